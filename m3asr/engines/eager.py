"""The PyTorch model itself, in float32: the truth the other engines are compared with."""

from __future__ import annotations

import numpy as np
import torch

from m3asr.engines import no_utterances, padded
from m3asr.engines.streaming import StreamState, next_states, step_inputs, stream_start
from m3asr.errors import ModelError
from m3asr.folder import ModelFolder
from m3asr.model import Model


def load_model(folder: ModelFolder) -> Model:
    """The folder's model in evaluation mode. Raises ModelError if weights and configuration do not fit."""
    with torch.device("meta"):
        model = Model(folder.config)
    state = {name: torch.from_numpy(value) for name, value in folder.weights().items()}
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ModelError(
            f"{folder.path}: weights do not fit config.json: {' '.join(str(error).split())[:400]}"
        ) from None
    return model.eval()


class EagerEngine:
    """Runs `Model` as it is."""

    name = "eager"

    def __init__(self, folder: ModelFolder, *, threads: int = 0, device: str | None = None):
        """threads: torch has one number for the whole process, so any but 0 is set for everything else that runs torch
        in it too, and stays; 0 changes nothing. device: torch's name of one, None the CPU. Raises ModelError for a
        folder whose weights are damaged or do not fit.
        """
        if threads:
            torch.set_num_threads(threads)
        self.device = device or "cpu"
        self.config = folder.config
        self.model = load_model(folder).to(self.device)

    @torch.inference_mode()
    def __call__(self, features, lengths, *, compat=False, chunk_size=0, left_chunks=-1):
        encoder = self.config.encoder
        features, lengths = padded(features, lengths, encoder.input_dim, encoder.min_frames)
        if not len(lengths):
            return no_utterances(self.config)
        outputs = self.model(self._tensor(features), self._tensor(lengths), chunk_size, left_chunks, compat)
        return tuple(output.cpu().numpy() for output in outputs)

    @torch.inference_mode()
    def decode(self, hidden, lengths, tokens, *, reversed_tokens=None):
        if self.model.decoder is None:
            raise ModelError("the model has no attention decoder: rescoring is not possible, use greedy or beam")
        backwards = None if reversed_tokens is None else self._tensor(reversed_tokens)
        arrays = self._tensor(hidden), self._tensor(lengths), self._tensor(tokens), backwards
        return tuple(None if output is None else output.cpu().numpy() for output in self.model.decode(*arrays))

    def stream_start(self) -> StreamState:
        return stream_start(self.config.encoder)

    @torch.inference_mode()
    def stream_step(self, features, lengths, states, keep=-1):
        inputs = step_inputs(features, lengths, states, self.config.encoder)
        outputs = self.model.stream(*(self._tensor(array) for array in inputs.values()))
        log_probs, hidden, out_lengths, *caches = (output.cpu().numpy() for output in outputs)
        return log_probs, hidden, out_lengths, next_states(states, out_lengths, caches, keep)

    def _tensor(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
