"""Kokoro-82M (Apache-2.0; StyleTTS 2, Li et al. 2023, with the vocoder iSTFTNet, Kaneko et al. 2022), many utterances
at once: what training/speak.py makes speech with.

Tokens may be padded; frames may not: instance norms run over all of a row's frames, so a batch is brought to one number
of frames by its rows' closing silence. Rates: 40 frames a second of text, 80 of pitch and loudness, 24,000 samples.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from m3asr.ops import frame_mask
from training.kernels.adain import adain_snake

RATE, FRAME = 24000, 600  # samples a second; samples a frame
SYMBOLS, HIDDEN, STYLE = 178, 512, 128
HARMONICS, VOICED = 9, 10.0  # sines of the source; Hz from which a frame has a pitch
FFT, HOP = 20, 5


class Bert(nn.Module):
    """ALBERT (Lan et al. 2020): twelve times the same layer."""

    def __init__(self, size=768, inner=2048, heads=12, repeats=12):
        super().__init__()
        self.heads, self.repeats = heads, repeats
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(SYMBOLS, 128),
                "position_embeddings": nn.Embedding(512, 128),
                "token_type_embeddings": nn.Embedding(2, 128),
                "LayerNorm": nn.LayerNorm(128, eps=1e-12),
            }
        )
        self.input = nn.Linear(128, size)
        self.query, self.key, self.value, self.dense = (nn.Linear(size, size) for _ in range(4))
        self.attention_norm, self.output_norm = nn.LayerNorm(size, eps=1e-12), nn.LayerNorm(size, eps=1e-12)
        self.ffn, self.ffn_output = nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, tokens: Tensor, inside: Tensor) -> Tensor:
        """tokens (B, L), inside bool (B, L) -> (B, L, 768)."""
        place = torch.arange(tokens.shape[1], device=tokens.device)
        e = self.embeddings
        x = e["word_embeddings"](tokens) + e["position_embeddings"](place) + e["token_type_embeddings"].weight[0]
        x = self.input(e["LayerNorm"](x))
        mask = inside[:, None, None, :]
        for _ in range(self.repeats):
            q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.query, self.key, self.value))
            heard = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
            x = self.attention_norm(x + self.dense(heard))
            x = self.output_norm(x + self.ffn_output(F.gelu(self.ffn(x), approximate="tanh")))
        return x


class Recurrent(nn.LSTM):
    """Both directions over rows of different lengths: (B, L, inputs) -> (B, L, 512), 0 past the lengths."""

    def __init__(self, inputs: int):
        super().__init__(inputs, HIDDEN // 2, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:  # lengths: on the host; None: all full
        if lengths is None:
            return super().forward(x)[0]
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        return nn.utils.rnn.pad_packed_sequence(super().forward(packed)[0], True, total_length=x.shape[1])[0]


class ChannelNorm(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:  # (B, C, L)
        return F.layer_norm(x.transpose(1, 2), self.gamma.shape, self.gamma, self.beta, 1e-5).transpose(1, 2)


class TextEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, HIDDEN)
        self.cnn = nn.ModuleList(
            nn.Sequential(nn.Conv1d(HIDDEN, HIDDEN, 5, padding=2), ChannelNorm(HIDDEN), nn.LeakyReLU(0.2))
            for _ in range(3)
        )
        self.lstm = Recurrent(HIDDEN)

    def forward(self, tokens: Tensor, inside: Tensor, lengths: Tensor) -> Tensor:
        keep = inside.unsqueeze(1)
        x = self.embedding(tokens).transpose(1, 2) * keep  # (B, C, L)
        for layer in self.cnn:
            x = layer(x) * keep
        return self.lstm(x.transpose(1, 2), lengths)  # (B, L, C)


class StyledNorm(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(STYLE, 2 * channels)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:  # (B, L, C)
        gamma, beta = self.fc(style).unsqueeze(1).chunk(2, dim=-1)
        return (1 + gamma) * F.layer_norm(x, x.shape[-1:], eps=1e-5) + beta


class DurationEncoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstms = nn.ModuleList(m for _ in range(3) for m in (Recurrent(HIDDEN + STYLE), StyledNorm(HIDDEN)))

    def forward(self, x: Tensor, style: Tensor, inside: Tensor, lengths: Tensor) -> Tensor:
        keep = inside.unsqueeze(-1)
        around = style.unsqueeze(1).expand(-1, x.shape[1], -1)
        x = torch.cat([x, around], dim=-1) * keep
        for recurrent, norm in zip(self.lstms[::2], self.lstms[1::2], strict=True):
            x = torch.cat([norm(recurrent(x, lengths), style), around], dim=-1) * keep
        return x  # (B, L, 640)


class AdaIN(nn.Module):
    """Instance norm over time whose gain and offset come from the style (Huang and Belongie 2017)."""

    def __init__(self, channels: int):
        super().__init__()
        self.fc = nn.Linear(STYLE, 2 * channels)

    def gain_offset(self, style: Tensor) -> tuple[Tensor, Tensor]:
        gamma, beta = self.fc(style).chunk(2, dim=-1)
        return 1 + gamma, beta  # (B, C) each

    def forward(self, x: Tensor, style: Tensor) -> Tensor:  # (B, C, T)
        gain, offset = self.gain_offset(style)
        return F.instance_norm(x) * gain.unsqueeze(-1) + offset.unsqueeze(-1)


class StyledBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, double=False):
        super().__init__()
        self.double = double
        self.conv1, self.conv2 = nn.Conv1d(inputs, outputs, 3, padding=1), nn.Conv1d(outputs, outputs, 3, padding=1)
        self.norm1, self.norm2 = AdaIN(inputs), AdaIN(outputs)
        if inputs != outputs:
            self.conv1x1 = nn.Conv1d(inputs, outputs, 1, bias=False)
        if double:
            self.pool = nn.ConvTranspose1d(inputs, inputs, 3, 2, padding=1, output_padding=1, groups=inputs)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        y = F.leaky_relu(self.norm1(x, style), 0.2)
        y = self.conv1(self.pool(y) if self.double else y)
        y = self.conv2(F.leaky_relu(self.norm2(y, style), 0.2))
        x = F.interpolate(x, scale_factor=2) if self.double else x
        return (y + (self.conv1x1(x) if hasattr(self, "conv1x1") else x)) * math.sqrt(0.5)


class Predictor(nn.Module):
    """Durations, pitch and loudness."""

    def __init__(self):
        super().__init__()
        self.text_encoder = DurationEncoder()
        self.lstm, self.shared = Recurrent(HIDDEN + STYLE), Recurrent(HIDDEN + STYLE)
        self.duration_proj = nn.Linear(HIDDEN, 50)
        for name in ("F0", "N"):
            blocks = StyledBlock(512, 512), StyledBlock(512, 256, double=True), StyledBlock(256, 256)
            setattr(self, name, nn.ModuleList(blocks))
        self.F0_proj, self.N_proj = nn.Conv1d(256, 1, 1), nn.Conv1d(256, 1, 1)

    def curves(self, x: Tensor, style: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, F, 640) -> pitch in Hz and loudness, (B, 2 F) each."""
        x = self.shared(x).transpose(1, 2)
        out = []
        for blocks, project in ((self.F0, self.F0_proj), (self.N, self.N_proj)):
            y = x
            for block in blocks:
                y = block(y, style)
            out.append(project(y).squeeze(1))
        return out[0], out[1]


class ResBlock(nn.Module):
    def __init__(self, channels: int, kernel: int, dilations=(1, 3, 5)):
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in dilations
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=kernel // 2) for _ in dilations)
        self.adain1, self.adain2 = (nn.ModuleList(AdaIN(channels) for _ in dilations) for _ in range(2))
        self.alpha1, self.alpha2 = (
            nn.ParameterList(nn.Parameter(torch.ones(1, channels, 1)) for _ in dilations) for _ in range(2)
        )

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        first, second = (self.convs1, self.adain1, self.alpha1), (self.convs2, self.adain2, self.alpha2)
        for i in range(len(self.convs1)):
            y = x
            for convs, norms, alphas in (first, second):
                y = convs[i](adain_snake(y, *norms[i].gain_offset(style), alphas[i].flatten()))
            x = x + y
        return x


class Source(nn.Module):
    """Sines at the pitch and its harmonics, noise where there is none (Wang et al. 2019)."""

    def __init__(self):
        super().__init__()
        self.l_linear = nn.Linear(HARMONICS, 1)

    def forward(self, pitch: Tensor) -> Tensor:
        """pitch (B, 2 F) in Hz -> (B, 600 F)."""
        scale = FRAME // 2
        harmonics = torch.arange(1, HARMONICS + 1, device=pitch.device).view(1, -1, 1)
        turns = (pitch.unsqueeze(1) * harmonics / RATE) % 1  # (B, 9, 2 F) a sample
        start = torch.rand(*turns.shape[:2], device=pitch.device)
        start[:, 0] = 0.0
        turns[:, :, 0] += start / scale  # a phase for each harmonic (the original's is lost in its interpolation)
        phase = torch.cumsum(turns.double(), dim=-1) * scale
        # Only whole turns may be dropped before the phase is drawn out over the samples.
        phase = F.interpolate(phase, scale_factor=scale, mode="linear") % 1
        sines = 0.1 * torch.sin(2 * math.pi * phase.float())
        voiced = (pitch > VOICED).repeat_interleave(scale, dim=1).unsqueeze(1).float()
        noise = torch.randn_like(sines) * (voiced * 0.003 + (1 - voiced) * (0.1 / 3))
        return torch.tanh(self.l_linear((sines * voiced + noise).transpose(1, 2))).squeeze(-1)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.m_source = Source()
        self.ups = nn.ModuleList(
            [nn.ConvTranspose1d(512, 256, 20, 10, padding=5), nn.ConvTranspose1d(256, 128, 12, 6, padding=3)]
        )
        self.noise_convs = nn.ModuleList([nn.Conv1d(FFT + 2, 256, 12, 6, padding=3), nn.Conv1d(FFT + 2, 128, 1)])
        self.noise_res = nn.ModuleList([ResBlock(256, 7), ResBlock(128, 11)])
        self.resblocks = nn.ModuleList(ResBlock(size, kernel) for size in (256, 128) for kernel in (3, 7, 11))
        self.conv_post = nn.Conv1d(128, FFT + 2, 7, padding=3)

    def forward(self, x: Tensor, style: Tensor, pitch: Tensor) -> Tensor:
        window = torch.hann_window(FFT, device=x.device)
        spectrum = torch.stft(self.m_source(pitch), FFT, HOP, window=window, return_complex=True)
        source = torch.cat([spectrum.abs(), spectrum.angle()], dim=1).to(x.dtype)
        for i in range(2):
            heard = self.noise_res[i](self.noise_convs[i](source), style)
            x = self.ups[i](F.leaky_relu(x, 0.1))
            x = (F.pad(x, (1, 0), mode="reflect") if i else x) + heard
            x = sum(block(x, style) for block in self.resblocks[3 * i : 3 * i + 3]) / 3
        x = self.conv_post(F.leaky_relu(x, 0.01)).float()
        magnitude, phase = torch.exp(x[:, : FFT // 2 + 1]), torch.sin(x[:, FFT // 2 + 1 :])
        return torch.istft(torch.polar(magnitude, phase), FFT, HOP, window=window)  # (B, samples)


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.encode = StyledBlock(HIDDEN + 2, 1024)
        self.decode = nn.ModuleList(StyledBlock(1024 + 66, 512 if i == 3 else 1024, i == 3) for i in range(4))
        self.F0_conv, self.N_conv = nn.Conv1d(1, 1, 3, 2, padding=1), nn.Conv1d(1, 1, 3, 2, padding=1)
        self.asr_res = nn.Sequential(nn.Conv1d(HIDDEN, 64, 1))
        self.generator = Generator()

    def forward(self, text: Tensor, pitch: Tensor, loudness: Tensor, style: Tensor) -> Tensor:
        dtype = self.asr_res[0].weight.dtype
        text, style = text.to(dtype), style.to(dtype)
        curves = [conv(x.unsqueeze(1).to(dtype)) for conv, x in ((self.F0_conv, pitch), (self.N_conv, loudness))]
        x = self.encode(torch.cat([text, *curves], dim=1), style)
        for block in self.decode:
            x = block(torch.cat([x, self.asr_res(text), *curves], dim=1), style)
        return self.generator(x, style, pitch)


class Kokoro(nn.Module):
    def __init__(self):
        super().__init__()
        self.bert, self.bert_encoder = Bert(), nn.Linear(768, HIDDEN)
        self.text_encoder, self.predictor, self.decoder = TextEncoder(), Predictor(), Decoder()

    @classmethod
    def read(cls, folder: Path, device: torch.device, half: bool) -> Kokoro:
        """What kokoro_weights.py wrote. `half`: the decoder in float16 (what comes before it is small)."""
        model = cls()
        state = {}
        for path in sorted(folder.glob("weights-*.npz")):
            with np.load(path) as file:
                state |= {name: torch.from_numpy(file[name].astype(np.float32)) for name in file.files}
        model.load_state_dict(state)
        model.requires_grad_(False).eval().to(device)
        if half:
            model.decoder.half()
            model.decoder.generator.m_source.float()  # phases and sines need more
        return model

    def read_text(self, tokens: Tensor, lengths: Tensor, style: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """tokens int64 (B, L), lengths (B,) on the host, style (B, 256) -> what to say, for the predictor (B, L, 640)
        and the decoder (B, L, 512), and frames (B, L) as predicted, not rounded."""
        inside = frame_mask(lengths.to(tokens.device), tokens.shape[1])
        x = self.bert_encoder(self.bert(tokens, inside))
        x = self.predictor.text_encoder(x, style[:, STYLE:], inside, lengths)
        frames = torch.sigmoid(self.predictor.duration_proj(self.predictor.lstm(x, lengths))).sum(dim=-1)
        return x, self.text_encoder(tokens, inside, lengths), frames * inside


def spread(x: Tensor, frames: Tensor, total: int) -> Tensor:
    """Each token for as many frames as it lasts: (B, L, C), int64 (B, L) of sum `total` -> (B, total, C)."""
    time = torch.arange(total, device=x.device).expand(len(x), -1).contiguous()
    token = torch.searchsorted(frames.cumsum(dim=1), time, right=True)
    return x.gather(1, token.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
