"""ONNX Runtime on the CPU: the default engine. Imports no torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import onnxruntime as ort

from m3asr.engines import no_utterances, padded
from m3asr.engines.streaming import StreamState, next_states, step_inputs, stream_start
from m3asr.errors import ModelError
from m3asr.folder import ModelFolder

_EXTERNAL = re.compile(r"(.+?)(?:\[(\d+)\])?")
GRAPH_FORMAT = 1


class OnnxEngine:
    """Runs the graphs in `engines/onnx` with the weights of `model.safetensors`."""

    name = "onnx"
    device = "cpu"

    def __init__(self, folder: ModelFolder, *, threads: int = 0):
        self.config = folder.config
        self._threads = threads
        self._path = folder.path / "engines" / "onnx"
        self._folder = folder
        self._rebuild = f"run `m3asr build {folder.path} --engine onnx` where torch is installed"
        self._check()
        weights = folder.weights()
        self._encoder = self._session("encoder.onnx", weights)
        self._stream: ort.InferenceSession | None = None  # made for the first stream: it holds weights of its own
        self._decoders = [
            self._session(name, weights)
            for name in ("decoder.onnx", "reverse_decoder.onnx")
            if name in self._weight_names
        ]

    def _check(self) -> None:
        try:
            manifest = json.loads((self._path / "manifest.json").read_text(encoding="utf-8"))
            version, digest = manifest["format_version"], manifest["config_sha256"]
            self._weight_names: dict[str, list[str]] = manifest["weights"]
        except FileNotFoundError:
            raise ModelError(f"{self._folder.path} has no onnx engine: {self._rebuild}") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise ModelError(f"{self._path / 'manifest.json'} is damaged: {self._rebuild}") from None
        if version != GRAPH_FORMAT:
            raise ModelError(f"{self._path} has format {version}, this m3asr runs {GRAPH_FORMAT}: {self._rebuild}")
        if digest != self._folder.config_digest():
            raise ModelError(f"{self._path} was built for another config.json: {self._rebuild}")

    def _session(self, name: str, weights: dict[str, np.ndarray], graph: bytes | None = None) -> ort.InferenceSession:
        """A session whose external initializers are the folder's weights; "NAME[3]" is expert 3's part of NAME.

        graph: a variant to run instead of the file.
        """
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads:
            options.intra_op_num_threads = self._threads
        path = self._path / name
        try:
            graph = path.read_bytes() if graph is None else graph
            names, arrays = self._weight_names[name], []
            for initializer in names:
                tensor, part = _EXTERNAL.fullmatch(initializer).groups()
                array = weights[tensor] if part is None else weights[tensor][int(part)]
                arrays.append(ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)))
            options.add_external_initializers(names, arrays)
            return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except OSError as error:
            raise ModelError(f"{path} cannot be read ({error.strerror}): build the onnx engine again") from None
        except KeyError as error:
            raise ModelError(
                f"{path} needs {error}, which the model does not hold: build the onnx engine again"
            ) from None
        except Exception as error:  # ONNX Runtime raises its own types for damaged graphs
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ModelError(f"{path} is damaged ({first[:200]}): build the onnx engine again") from None

    def __call__(self, features, lengths, *, compat=False, chunk_size=0, left_chunks=-1):
        encoder = self.config.encoder
        features, lengths = padded(features, lengths, encoder.input_dim, encoder.min_frames)
        if not len(lengths):
            return no_utterances(self.config)
        return tuple(_run(self._encoder, _encoder_inputs(features, lengths, compat, chunk_size, left_chunks)))

    @property
    def graph_path(self) -> Path:
        return self._path / "encoder.onnx"

    def run_graph(self, graph: bytes, features, lengths, *, compat=False, chunk_size=0, left_chunks=-1):
        """Runs a serialised variant of the encoder's graph, with further outputs, on this model's weights.

        features (B, T, F) and lengths (B,) as `padded` gives them -> arrays by name of the output.
        """
        session = self._session("encoder.onnx", self._folder.weights(), graph)
        names = [value.name for value in session.get_outputs()]
        outputs = _run(session, _encoder_inputs(features, lengths, compat, chunk_size, left_chunks))
        return dict(zip(names, outputs, strict=True))

    def decode(self, hidden, lengths, tokens, *, reversed_tokens=None):
        if not self._decoders:
            raise ModelError("the model has no attention decoder: rescoring is not possible, use greedy or beam")
        inputs = {"hidden": np.asarray(hidden, np.float32), "lengths": np.asarray(lengths, np.int32)}
        forward = _run(self._decoders[0], {**inputs, "tokens": np.asarray(tokens, np.int64)})[0]
        if reversed_tokens is None or len(self._decoders) == 1:
            return forward, None
        return forward, _run(self._decoders[1], {**inputs, "tokens": np.asarray(reversed_tokens, np.int64)})[0]

    def stream_start(self) -> StreamState:
        start = stream_start(self.config.encoder)
        if "stream.onnx" not in self._weight_names:
            raise ModelError(f"{self._path} has no graph for streams, as older versions built it: {self._rebuild}")
        if self._stream is None:
            self._stream = self._session("stream.onnx", self._folder.weights())
        return start

    def stream_step(self, features, lengths, states, keep=-1):
        inputs = step_inputs(features, lengths, states, self.config.encoder)
        log_probs, hidden, out_lengths, *caches = _run(self._stream, inputs)
        return log_probs, hidden, out_lengths, next_states(states, out_lengths, caches, keep)


def _encoder_inputs(features, lengths, compat, chunk_size, left_chunks) -> dict[str, np.ndarray]:
    inputs = {"feats": features, "lengths": lengths, "compat": np.array(bool(compat))}
    inputs["chunk_size"] = np.array(chunk_size, np.int64)
    inputs["left_chunks"] = np.array(left_chunks, np.int64)
    return inputs


def _run(session: ort.InferenceSession, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    return session.run(None, {value.name: inputs[value.name] for value in session.get_inputs()})
