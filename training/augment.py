"""What happens to speech between a mouth and a file, simulated on the device: room, noise, microphone, codec, level.

Waveforms are float32 (B, samples), +-1, rows zero-padded; lengths int64 (B,). Each step works on a random part of the
rows whose size is known to the host, so that nothing waits for the device. The speech here is synthetic and clean while
the people it must understand are neither, which is why there is much of it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

RATE = 16000
ROOM = RATE  # samples of a room's response


@dataclass(frozen=True)
class AugmentConfig:
    """The part of a batch that each step touches, and how strongly."""

    expand: float = 0.0  # weak sounds weaker still, or less weak
    reverberation: float = 0.45
    given_rooms: float = 0.5  # of the reverberated rows, if impulse responses are given
    echo: float = 0.3  # of the reverberated rows: a wall far away, or the next loudspeaker of a row of them
    noise: float = 0.45
    babble: float = 0.15
    snr: tuple[float, float] = (3.0, 30.0)  # dB
    channel: float = 0.65
    telephone: float = 0.12
    modulated_noise: float = 0.2
    clip: float = 0.05
    level: tuple[float, float] = (-32.0, -1.0)  # dBFS of the peak
    warp: float = 0.5  # rows whose mel filterbank is warped
    max_warp: float = 0.12
    tempo: float = 0.0  # features: the largest natural logarithm of a passing change of tempo
    smear: float = 0.0  # features: rows whose frames run into their neighbours, as in careless speech
    masking: float = 1.0  # features: how many times as long the masked stretches are


class Augment:
    def __init__(self, config: AugmentConfig, device: torch.device, seed: int, rooms: Tensor | None = None):
        self.config, self.rooms = config, rooms
        self.generator = torch.Generator(device).manual_seed(seed)
        self.host_random = random.Random(seed)
        self.device = device

    def uniform(self, *shape: int, low=0.0, high=1.0) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device) * (high - low) + low

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def some(self, rows: int, part: float) -> Tensor:
        """Indices of round(rows * part) random rows."""
        return torch.randperm(rows, generator=self.generator, device=self.device)[: round(rows * part)]

    def __call__(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        config, rows = self.config, waveform.shape[0]
        inside = torch.arange(waveform.shape[1], device=self.device) < lengths.unsqueeze(-1)  # (B, N)
        steps = (
            (config.expand, self.expand),
            (config.reverberation, self.reverberate),
            (config.noise, self.add_noise),
            (config.babble, self.add_babble),
            (config.channel, self.colour),
            (config.modulated_noise, self.modulate),
            (config.telephone, self.telephone),
        )
        speech = waveform
        for part, step in steps:
            index = self.some(rows, part)
            if len(index):
                changed = step(waveform[index], speech, lengths[index])
                waveform = waveform.index_copy(0, index, changed * inside[index])
        peak = waveform.abs().amax(dim=-1, keepdim=True).clamp(min=1e-4)
        level = 10 ** (self.uniform(rows, 1, low=config.level[0], high=config.level[1]) / 20)
        loud = torch.zeros(rows, 1, device=self.device)
        index = self.some(rows, config.clip)
        loud[index] = self.uniform(len(index), 1, low=3.0, high=12.0)
        over = 10 ** (loud / 20)  # how far the signal would go over the converter's limit
        waveform = (waveform / peak * over).clamp(-1.0, 1.0) * level
        hiss = 10 ** self.uniform(rows, 1, low=-1.0, high=1.0) / 32768  # no digital silence
        return (waveform + hiss * self.normal(*waveform.shape)) * inside

    # ----- steps: (rows to change, all rows, lengths of the rows to change) -> changed rows

    def expand(self, x: Tensor, _, lengths: Tensor) -> Tensor:
        """Weak sounds weaker, as of careless speakers, far microphones and noise gates, or less weak, as on the radio.

        What is d decibels below a row's loudest becomes d times 0.6 to 2.8: in half of the rows by the level of all
        (20 ms), in the others by that of each of four bands.
        """
        n, rows = fast_size(x.shape[1]), x.shape[0]
        frequency = torch.arange(n // 2 + 1, device=self.device) * (RATE / n)
        edges = torch.tensor([500.0, 1200.0, 2500.0], device=self.device).view(3, 1)
        below = 1 / (1 + (frequency / edges) ** 8)  # (3, n // 2 + 1)
        masks = torch.cat([below, torch.ones_like(below[:1])]) - torch.cat([torch.zeros_like(below[:1]), below])
        parts = torch.fft.irfft(torch.fft.rfft(x, n=n).unsqueeze(1) * masks, n=n)[..., : x.shape[1]]  # (B, 4, N)
        energy = torch.nn.functional.avg_pool1d(parts.square(), 320, 160, 160, ceil_mode=True)  # (B, 4, T)
        apart = (torch.arange(rows, device=self.device) < rows // 2).view(-1, 1, 1)
        energy = torch.where(apart, energy, energy.sum(dim=1, keepdim=True))
        level = (energy / energy.amax(dim=-1, keepdim=True).clamp(min=1e-12)).sqrt().clamp(min=10 ** (-45 / 20))
        stretch = self.uniform(rows, 1, 1, low=math.log(0.6), high=math.log(2.8)).exp()
        gain = torch.nn.functional.interpolate(
            level ** (stretch - 1), size=x.shape[1], mode="linear", align_corners=True
        )
        y = (parts * gain).sum(dim=1)
        return y * (power(x, lengths) / power(y, lengths)).sqrt()

    def reverberate(self, x: Tensor, _, lengths: Tensor) -> Tensor:
        """Convolution with a room: exponentially decaying noise (Polack's model) or a given response, and echoes."""
        size, rows = ROOM, x.shape[0]
        time = torch.arange(size, device=self.device) / RATE
        t60 = self.uniform(rows, 1, low=math.log(0.1), high=math.log(1.6)).exp()
        tail = self.normal(rows, size) * torch.exp(-6.9 * time / t60)
        tail = tail * (time >= self.uniform(rows, 1, low=0.0005, high=0.01))  # the first reflection comes later
        # High frequencies die sooner: the smoothed tail takes over as time goes by.
        dull = torch.nn.functional.avg_pool1d(tail.unsqueeze(1), 4, 1, 2, count_include_pad=False)[:, 0, :size]
        share = torch.exp(-time / (t60 * 0.3))
        tail = tail * share + 2.0 * dull * (1 - share)
        ratio = 10 ** (self.uniform(rows, 1, low=-5.0, high=14.0) / 10)  # direct to reverberant energy
        tail = tail * (1.0 / (ratio * tail.square().sum(dim=-1, keepdim=True).clamp(min=1e-9))).sqrt()
        tail[:, 0] = 1.0
        if self.rooms is not None:
            use = round(rows * self.config.given_rooms)
            pick = torch.randint(len(self.rooms), (use,), generator=self.generator, device=self.device)
            tail[:use] = self.rooms[pick]
        late = torch.rand(rows, 1, generator=self.generator, device=self.device) < self.config.echo
        gain = self.uniform(rows, 1, low=0.1, high=0.7) * late
        delay = (self.uniform(rows, 1, low=0.05, high=0.33) * RATE).long()
        for times in (1, 2):
            tail = tail.scatter_add(1, times * delay, gain**times)
        n = fast_size(x.shape[1] + size)
        y = torch.fft.irfft(torch.fft.rfft(x, n=n) * torch.fft.rfft(tail, n=n), n=n)[:, : x.shape[1]]
        return y * (power(x, lengths) / power(y, lengths)).sqrt()

    def add_noise(self, x: Tensor, _, lengths: Tensor) -> Tensor:
        """Noise of a random spectral slope (white ... brown), with a slow random swell."""
        n = fast_size(x.shape[1])
        spectrum = torch.fft.rfft(self.normal(x.shape[0], n))
        frequency = torch.arange(spectrum.shape[1], device=self.device) * (RATE / n)
        slope = self.uniform(x.shape[0], 1, low=-1.2, high=0.1)
        noise = torch.fft.irfft(spectrum * ((frequency + 60.0) / 1000.0) ** slope, n=n)[:, : x.shape[1]]
        knots = 2 + x.shape[1] // RATE * 2
        swell = 10 ** (self.normal(x.shape[0], 1, knots) * self.uniform(x.shape[0], 1, 1, high=0.35))
        swell = torch.nn.functional.interpolate(swell, size=x.shape[1], mode="linear", align_corners=True)[:, 0]
        return self.mix(x, noise * swell, lengths, *self.config.snr)

    def add_babble(self, x: Tensor, speech: Tensor, lengths: Tensor) -> Tensor:
        """Several other utterances of the batch at once, too many to follow."""
        noise = torch.zeros_like(x)
        for _ in range(5):
            pick = torch.randint(len(speech), (len(x),), generator=self.generator, device=self.device)
            shift = self.host_random.randrange(speech.shape[1])
            noise = noise + torch.roll(speech, shift, dims=1)[pick]
        return self.mix(x, noise, lengths, max(8.0, self.config.snr[0]), self.config.snr[1])

    def mix(self, x: Tensor, noise: Tensor, lengths: Tensor, low: float, high: float) -> Tensor:
        snr = 10 ** (self.uniform(x.shape[0], 1, low=low, high=high) / 10)
        return x + noise * (power(x, lengths) / (power(noise, lengths) * snr)).sqrt()

    def colour(self, x: Tensor, _, lengths: Tensor) -> Tensor:
        """Microphone and line: a smooth random response, a high-pass, sometimes a low-pass."""
        n, rows = fast_size(x.shape[1]), x.shape[0]
        frequency = torch.arange(n // 2 + 1, device=self.device) * (RATE / n)
        nodes = 12
        gains = self.normal(rows, nodes) * self.uniform(rows, 1, high=5.0)  # dB, over a logarithmic axis
        place = (torch.log2((frequency + 60.0) / 60.0) / math.log2(8060.0 / 60.0)).clamp(0, 1) * (nodes - 1)
        left = place.floor().long().clamp(max=nodes - 2)
        decibels = torch.lerp(gains[:, left], gains[:, left + 1], (place - left).expand(rows, -1))
        decibels = decibels + (place / (nodes - 1) - 0.5) * self.uniform(rows, 1, low=-10.0, high=10.0)  # tilt
        high_pass = self.uniform(rows, 1, low=10.0, high=220.0)
        low_pass = self.uniform(rows, 1, low=3200.0, high=16000.0)  # above 8 kHz it does nothing
        response = 10 ** (decibels / 20)
        response = response / (1 + (high_pass / (frequency + 1.0)) ** 4).sqrt()
        response = response / (1 + (frequency / low_pass) ** 16).sqrt()
        return torch.fft.irfft(torch.fft.rfft(x, n=n) * response, n=n)[:, : x.shape[1]]

    def modulate(self, x: Tensor, _, lengths: Tensor) -> Tensor:
        """Noise that follows the signal, as waveform coders make it (modulated noise reference unit, ITU-T P.810)."""
        q = self.uniform(x.shape[0], 1, low=12.0, high=40.0)  # dB
        return x * (1.0 + 10 ** (-q / 20) * self.normal(*x.shape))

    def telephone(self, x: Tensor, _, lengths: Tensor) -> Tensor:
        """300-3400 Hz, 8 kHz, mu-law of 8 bits (ITU-T G.711), and back."""
        n, rows = fast_size(x.shape[1], multiple=2), x.shape[0]
        frequency = torch.arange(n // 4 + 1, device=self.device) * (RATE / n)
        low, high = self.uniform(rows, 1, low=100.0, high=320.0), self.uniform(rows, 1, low=3300.0, high=3800.0)
        band = 1 / (1 + (low / (frequency + 1.0)) ** 6 + (frequency / high) ** 40).sqrt()
        narrow = torch.fft.irfft(torch.fft.rfft(x, n=n)[:, : n // 4 + 1] * band, n=n // 2) * 0.5  # 8 kHz
        peak = narrow.abs().amax(dim=-1, keepdim=True).clamp(min=1e-4)
        full = 10 ** (self.uniform(rows, 1, low=-20.0, high=0.0) / 20)
        scaled = (narrow / peak * full).clamp(-1.0, 1.0)
        code = torch.sign(scaled) * torch.log1p(255.0 * scaled.abs()) / math.log(256.0)
        code = torch.round(code * 127.5) / 127.5
        coded = torch.sign(code) * (256.0 ** code.abs() - 1.0) / 255.0 * (peak / full)
        return torch.fft.irfft(torch.fft.rfft(coded), n=n)[:, : x.shape[1]] * 2.0

    # ----- features

    def pick_filters(self, rows: int, bank: Tensor) -> Tensor:
        """One mel filterbank a row: bank (W, 256, bins), the middle one unwarped -> (B, 256, bins)."""
        middle = len(bank) // 2
        pick = torch.full((rows,), middle, device=self.device)
        index = self.some(rows, self.config.warp)
        pick[index] = torch.randint(len(bank), (len(index),), generator=self.generator, device=self.device)
        return bank[pick]

    def warp_time(self, features: Tensor, lengths: Tensor, views: int = 1, knot: int = 40) -> Tensor:
        """Speech that hurries and drags: each row is read at a speed that wanders, a new one every `knot` frames.

        First and last frame stay where they are, so lengths stay too; rows differ in how far their speed wanders, an
        utterance's views do not: their frames stay beside each other.
        """
        rows, frames, bins = features.shape
        if not self.config.tempo or frames < 2:
            return features
        spread = self.uniform(rows // views, 1, 1) * self.config.tempo
        speed = self.uniform(rows // views, 1, frames // knot + 2, low=-1.0, high=1.0) * spread
        speed = speed.repeat(views, 1, 1)
        speed = torch.nn.functional.interpolate(speed, size=frames, mode="linear", align_corners=True)[:, 0].exp()
        place = speed.cumsum(dim=1) - speed[:, :1]  # (B, T), 0 at the first frame
        last = (lengths - 1).clamp(min=1).unsqueeze(-1)
        place = place * (last / place.gather(1, last.long().clamp(max=frames - 1)))
        # Past its length a row is read straight on: there is only padding.
        place = torch.where(torch.arange(frames, device=self.device) <= last, place, torch.arange(frames).to(place))
        left = place.long().clamp(max=frames - 2)
        share = (place - left).clamp(0.0, 1.0).unsqueeze(-1)
        index = left.unsqueeze(-1).expand(-1, -1, bins)
        return torch.lerp(features.gather(1, index), features.gather(1, index + 1), share)

    def blur(self, features: Tensor, lengths: Tensor, reach: int = 6, largest: float = 2.5) -> Tensor:
        """Some rows' frames become Gaussian means of those up to `reach` around, deviation up to `largest` frames."""
        index = self.some(len(features), self.config.smear)
        if not len(index):
            return features
        offset = torch.arange(-reach, reach + 1, device=self.device)
        deviation = self.uniform(len(index), 1, low=0.3, high=largest)
        weight = torch.softmax(-0.5 * (offset / deviation).square(), dim=1)  # (rows, taps)
        rows, time = features[index], torch.arange(features.shape[1], device=self.device)
        last = (lengths[index] - 1).clamp(min=0).unsqueeze(-1)
        total = torch.zeros_like(rows)
        for tap, shift in enumerate(range(-reach, reach + 1)):
            place = torch.minimum((time + shift).clamp(min=0), last).unsqueeze(-1)  # what is past the end goes on
            total += weight[:, tap].view(-1, 1, 1) * rows.gather(1, place.expand_as(rows))
        return features.index_copy(0, index, total)

    def mask(self, features: Tensor, lengths: Tensor, max_bins=22, max_frames=30, part=0.08) -> Tensor:
        """SpecAugment (Park et al. 2019): two bands of bins and some stretches of frames become 0, the mean.

        A stretch is at most `max_frames` long and `part` of the utterance, both times the configuration's `masking`;
        there is about one a second, at most 12.
        """
        max_frames, part = max_frames * self.config.masking, part * self.config.masking
        rows, frames, bins = features.shape
        bin_, time = torch.arange(bins, device=self.device), torch.arange(frames, device=self.device)
        width = self.uniform(rows, 2, 1) * max_bins
        start = self.uniform(rows, 2, 1) * (bins - width)
        masked = ((bin_ >= start) & (bin_ < start + width)).any(dim=1).unsqueeze(1)  # (B, 1, F)
        stretches = min(12, 1 + frames // 100)
        width = self.uniform(rows, stretches, 1) * (part * lengths).clamp(max=max_frames).view(-1, 1, 1)
        start = self.uniform(rows, stretches, 1) * (lengths.view(-1, 1, 1) - width)
        silent = ((time >= start) & (time < start + width)).any(dim=1).unsqueeze(-1)  # (B, T, 1)
        return features.masked_fill(masked | silent, 0.0)


def power(x: Tensor, lengths: Tensor) -> Tensor:
    """Mean square over each row's own samples (rows are zero past them, or nearly) -> (B, 1)."""
    return (x.square().sum(dim=-1) / lengths).clamp(min=1e-10).unsqueeze(-1)


def fast_size(size: int, multiple: int = 1) -> int:
    """The next size that has only the factors 2, 3 and 5 and 4 * `multiple` among its divisors."""
    step = 4 * multiple
    n = -(-size // step)
    while True:
        rest = n
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return n * step
        n += 1


def read_rooms(folder: Path, device: torch.device) -> Tensor | None:
    """Impulse responses (16 kHz wav) -> (rooms, ROOM), the loudest sample first and 1."""
    import soundfile

    rooms = []
    for path in sorted(folder.glob("*.wav")):
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
        if rate != RATE:
            raise SystemExit(f"{path}: {rate} Hz, expected {RATE}")
        response = torch.from_numpy(samples[:, 0])
        response = response[response.abs().argmax() :][:ROOM]
        rooms.append(torch.nn.functional.pad(response / response[0], (0, ROOM - len(response))))
    return torch.stack(rooms).to(device) if rooms else None
