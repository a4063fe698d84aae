"""What a live stream carries from chunk to chunk, in numpy, so that every engine streams the same way.

An engine's step is a pure function of arrays (see `Model.stream`). Here the states of several streams become its
inputs, and its outputs the states after the chunk. Streams of different ages share a batch: their caches are aligned
at the end and padded in front.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from m3asr.config import EncoderConfig
from m3asr.engines import padded
from m3asr.errors import ModelError


@dataclass(frozen=True)
class StreamState:
    """One stream between two chunks.

    offset: encoder frames so far. caches: for the main stack, then for the embedding network, attention float32
    (blocks, H, t, 2K+1) of the last t frames, and conv float32 (blocks, D, kernel-1).
    """

    offset: int
    caches: tuple[np.ndarray, ...]


def stream_start(config: EncoderConfig) -> StreamState:
    """The state before the first chunk. Raises ModelError for a model that chunks with caches cannot reproduce."""
    if not config.can_stream:
        raise ModelError(
            "this model cannot be run chunk by chunk with caches: its convolutions look ahead or it was not trained "
            "on chunks; stream it with overlapping windows instead"
        )
    caches = []
    for stack in (config, config.embed):
        if stack is not None:
            heads, width = stack.attention_heads, stack.attention_dim
            caches.append(np.zeros((stack.num_blocks, heads, 0, 2 * (width // heads) + 1), np.float32))
            caches.append(np.zeros((stack.num_blocks, width, stack.cnn_module_kernel - 1), np.float32))
    return StreamState(0, tuple(caches))


def step_inputs(
    features: np.ndarray, lengths: np.ndarray, states: Sequence[StreamState], config: EncoderConfig
) -> dict[str, np.ndarray]:
    """The inputs of `Model.stream` by name. Raises ModelError for features that do not fit (see `padded`)."""
    features, lengths = padded(features, lengths, config.input_dim, config.min_frames)
    if len(states) != len(lengths) or not len(lengths):
        raise ModelError(f"{len(lengths)} chunks came with the states of {len(states)} streams; expected one each")
    inputs = {"feats": features, "lengths": lengths}
    inputs["offsets"] = np.array([state.offset for state in states], np.int64)
    inputs["cached"] = np.array([state.caches[0].shape[2] for state in states], np.int64)
    names = cache_names(config)
    for name, tensors in zip(names, zip(*(state.caches for state in states), strict=True), strict=True):
        inputs[name] = _stacked(tensors) if name.startswith("attention") else np.stack(tensors, axis=1)
    return inputs


def cache_names(config: EncoderConfig) -> list[str]:
    """Names of the caches, in the order of `Model.stream`; the new ones are called the same with "new_" before it."""
    return ["attention", "conv"] + (["attention_embed", "conv_embed"] if config.embed is not None else [])


def next_states(
    states: Sequence[StreamState], lengths: np.ndarray, caches: Sequence[np.ndarray], keep: int
) -> list[StreamState]:
    """lengths (B,): encoder frames of the chunk; caches: as `Model.stream` returns them; keep: frames that the
    attention cache holds at most, below 0 for all.
    """
    after = []
    for b, (state, length) in enumerate(zip(states, np.asarray(lengths).tolist(), strict=True)):
        tensors = []
        for i, new in enumerate(caches):
            if i % 2:
                tensors.append(new[:, b].copy())  # a copy, so that no state holds on to the whole batch
            else:
                joined = np.concatenate((state.caches[i], new[:, b, :, :length]), axis=2)
                tensors.append(joined if keep < 0 else joined[:, :, max(joined.shape[2] - keep, 0) :].copy())
        after.append(StreamState(state.offset + length, tuple(tensors)))
    return after


def _stacked(tensors: Sequence[np.ndarray]) -> np.ndarray:
    """(blocks, H, t_i, W) each -> (blocks, B, H, t, W), t the longest, each at the end of its row."""
    blocks, heads, _, width = tensors[0].shape
    longest = max(tensor.shape[2] for tensor in tensors)
    stacked = np.zeros((blocks, len(tensors), heads, longest, width), np.float32)
    for b, tensor in enumerate(tensors):
        stacked[:, b, :, longest - tensor.shape[2] :] = tensor
    return stacked
