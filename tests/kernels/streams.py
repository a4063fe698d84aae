"""The residual stream of 24 bits in torch, for the kernels that read and write it."""

import torch

from m3asr.kernels.stream import Stream


def stream_of(x, dtype, columns=64) -> Stream:
    """x float32 (N, D) with parts of so many columns."""
    if dtype == torch.bfloat16:
        bits = x.float().contiguous().view(torch.int32) + 0x80
        raw, low = ((bits + 0x8000) >> 16).short().view(dtype), (bits >> 8).to(torch.int8)
    else:
        raw = (x / 16).to(dtype)
        rest = ((x.float() / 16 - raw.float()) * 2048).half().contiguous().view(torch.int16)
        low = ((rest + 0x80) >> 8).to(torch.int8)
    parts = x.float().unflatten(1, (-1, columns))
    mean = parts.mean(-1)
    squares = ((parts - mean[..., None]) ** 2).sum(-1)
    return Stream(raw, low, torch.stack((mean.t(), squares.t()), -1).contiguous())


def floats(stream: Stream) -> torch.Tensor:
    """Float32 (N, D)."""
    if stream.raw.dtype == torch.bfloat16:
        return ((stream.raw.view(torch.int16).int() << 16) + (stream.low.int() << 8)).view(torch.float32)
    rest = (stream.low.short() << 8).view(torch.float16).float()
    return (stream.raw.float() + rest / 2048) * 16
