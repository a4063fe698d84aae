"""What the card can do, measured, and what the model needs: the floor under every time."""

from __future__ import annotations

import statistics

import torch

from m3asr.config import ModelConfig


def timed(run, *, before=None, repeats: int = 30, warmup: int = 5) -> float:
    """Median milliseconds of `run` on the GPU. `before`, not timed, is called ahead of each."""
    times = []
    for i in range(warmup + repeats):
        if before is not None:
            before(i)
        # Keeps the card busy while the host enqueues, so that launch time stays out of the number.
        torch.cuda._sleep(1_000_000)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= warmup:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second of a device-to-device copy, read plus written."""
    source = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (timed(lambda: target.copy_(source), repeats=10) * 1e-3)


def gemm_peak(dtype: torch.dtype) -> float:
    """FLOP per second of a large matrix product on random data."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    return 2 * n**3 / (timed(lambda: a @ b, repeats=10) * 1e-3)


def flops(config: ModelConfig, batch: int, frames: int) -> float:
    """Multiply-adds times two of one forward with the CTC head; norms, softmax and activations left out."""
    total, head_frames = 0.0, 0
    for stack in (config.encoder, config.encoder.embed):
        if stack is None:
            continue
        d, t = stack.attention_dim, frames
        bins, channels = stack.input_dim // stack.conv_subsample_in_ch, stack.conv_subsample_in_ch
        for kernel, stride in stack.subsampling:
            t, bins = (t - kernel) // stride + 1, (bins - kernel) // stride + 1
            total += 2 * t * bins * d * channels * kernel**2
            channels = d
        total += 2 * t * d * bins * d
        hidden = stack.moe.hidden_units if stack.moe else stack.linear_units
        block = 8 * t * d * d + 4 * t * t * d + 4 * t * d * hidden + 6 * t * d * d + 2 * t * d * stack.cnn_module_kernel
        if stack.macaron_style:
            block += 4 * t * d * stack.linear_units
        if stack.moe:
            block += 2 * t * (d + stack.embed.attention_dim) * stack.moe.num_experts
        total += stack.num_blocks * block
        head_frames = head_frames or t
    return batch * (total + 2 * head_frames * config.encoder.attention_dim * config.vocab_size)


def weight_bytes(config: ModelConfig, state: dict, precision: str, experts_hit: list[int]) -> float:
    """Bytes that one forward must read: every live weight once, of the experts those that have a token."""
    size = 4 if precision == "fp32" else 2
    expert_size = 1 if precision == "fp8" else size
    total = 0
    for name, value in state.items():
        if name.startswith(("decoder.", "encoder.embed.out_linear")) or "linear_pos" in name:
            continue  # not run, or turned into tables
        if ".experts." in name:
            block = int(name.split("blocks.")[1].split(".")[0])
            total += value.numel() * expert_size * experts_hit[block] / value.shape[0]
        else:
            total += value.numel() * (4 if "router" in name else size)
    return total
