import numpy as np
import pytest
import torch

from m3asr.config import LEVEL, FbankConfig
from m3asr.engines import torch_fbank as reference
from m3asr.features import fbank
from m3asr.kernels.fbank import log_mel, windowed_frames
from m3asr.kernels.pieces import Tile


@pytest.mark.parametrize("bins, share, cmvn", [(40, 0.0, False), (80, 0.35, True), (23, 0.2, False)])
def test_log_mel(device, bins, share, cmvn):
    """Rows of any length, silence among them: what PyTorch's steps give; without compression what Kaldi's give."""
    config = FbankConfig(num_mel_bins=bins, level_compression=share)
    sound = torch.randn(3, 2345, device=device) * torch.tensor([[0.1], [1e-3], [0.0]], device=device)
    sound[1] += 0.9 * torch.sin(torch.arange(2345, device=device) * 0.1)
    mean, istd = torch.randn(2, bins, device=device)
    filters, tile = reference.mel_filters(config).to(device), Tile(4, 1)
    frames = windowed_frames(sound, reference.window(config).to(device), shift=160, fft=512, tile=tile)
    assert frames.shape == (3, 13, 512) and not frames[..., 400:].any()
    found = log_mel(
        torch.fft.rfft(frames), filters, floor=reference.FLOOR, share=share, level=LEVEL,
        cmvn=(mean, istd) if cmvn else None, tile=Tile(16, 1, k=64),
    )  # fmt: skip
    expected = reference.compressed_fbank(sound.double() * 32768, filters.double(), config)
    expected = (expected - mean) * istd if cmvn else expected
    assert float((found - expected).abs().max()) < 1e-3
    if not share:
        theirs = np.stack([fbank(row, config) for row in sound.cpu().numpy()])
        np.testing.assert_allclose(found.cpu(), theirs, atol=1e-3)
