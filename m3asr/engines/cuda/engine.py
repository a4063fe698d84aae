"""(features, lengths) -> (log_probs, hidden, lengths) on one GPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m3asr.engines.cuda.buckets import bucket_batch, bucket_frames
from m3asr.engines.cuda.forward import Forward
from m3asr.engines.cuda.packing import Packed, lengthen_tables, pack
from m3asr.errors import ModelError
from m3asr.model import Model

# Positional tables start with this many rows and double when a longer utterance comes.
FIRST_POSITIONS = 1024


def device_of(device: str | torch.device) -> torch.device:
    """The device with its index. Raises ModelError if it is a GPU and there is none."""
    device = torch.device(device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ModelError("the cuda engine needs an NVIDIA GPU and found none: use the onnx engine")
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device


class Captured:
    """What `run` makes of inputs in fixed places, as one CUDA graph.

    Write the inputs, call `replay`, and read `outputs`, which have fixed places too, before another graph of the
    engine runs. On a device without CUDA graphs `replay` calls `run`.
    """

    def __init__(self, run: Callable[[], tuple[Tensor, ...]], device: torch.device, pool):
        self.graph = None
        if device.type == "cuda":
            # Once outside the capture, where kernels are compiled and loaded.
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                run()
            torch.cuda.current_stream(device).wait_stream(side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool):
                self.outputs = run()
        else:
            self._run, self.outputs = run, None

    def replay(self) -> None:
        if self.graph is None:
            self.outputs = self._run()
        else:
            self.graph.replay()


class EncoderGraph(Captured):
    """The encoder for one batch shape.

    Its inputs are `features` float32 (B, T, F) and `lengths` int32 (B,), its outputs those of `Forward`, among them
    `log_probs` float32 (B, S, V), `hidden` float32 (B, S, D) and `out_lengths` int32 (B,). What stands past a length
    does not matter.
    """

    def __init__(self, forward: Forward, batch: int, frames: int, bins: int, chunk, device, pool):
        features = self.features = torch.zeros(batch, frames, bins, device=device)
        lengths = self.lengths = torch.full((batch,), frames, dtype=torch.int32, device=device)
        # Not of self, which would then live until the garbage collector comes.
        super().__init__(lambda: forward(features, lengths, chunk), device, pool)

    def fill(self, features: Tensor, lengths: Tensor) -> None:
        """Put in features float32 (b, t, F), b <= B, t <= T, and their lengths; rows that are left over have none."""
        self.features[: features.shape[0], : features.shape[1]].copy_(features, non_blocking=True)
        self.lengths.zero_()
        self.lengths[: lengths.shape[0]].copy_(lengths, non_blocking=True)

    @property
    def log_probs(self) -> Tensor:
        return self.outputs[0]

    @property
    def hidden(self) -> Tensor:
        return self.outputs[1]

    @property
    def out_lengths(self) -> Tensor:
        return self.outputs[2]


class CudaEngine:
    """The model by fused kernels under CUDA graphs.

    model: a `Model`, a `ModelFolder`, a path to one, or `Packed` weights, whose precision stands. precision: "fp32",
    "bf16", "fp16" or "fp8" (the experts' weights, their inputs fp16, the rest bf16); the router is always float32.
    warm: (batch, frames) pairs to capture now instead of when they first come. graphs: how many batch shapes are kept;
    the least used goes first. For one thread at a time: a graph's inputs and outputs have fixed places.
    Raises ModelError for a model that the kernels do not cover, and where there is no GPU.
    """

    name = "cuda"
    # Frames of a batch that keep the card busy: 64 utterances of ten seconds.
    batch_frames = 1 << 16

    def __init__(self, model, precision="fp16", device="cuda", warm=(), *, graphs=32, pdl=None):
        self._device = device_of(device)
        if isinstance(model, str | Path):
            from m3asr.folder import ModelFolder

            model = ModelFolder.read(model)
        if isinstance(model, Packed):
            packed = model
        else:
            state = (
                model.state_dict()
                if isinstance(model, Model)
                else {name: torch.from_numpy(value) for name, value in model.weights().items()}
            )
            packed = pack(model.config, state, precision, self._device)
        self.config, self.precision = packed.config, packed.precision
        if self._device.type == "cuda":
            properties = torch.cuda.get_device_properties(self._device)
            self.device = f"{properties.name}, {self.precision}"
            pdl = properties.major >= 9 if pdl is None else pdl
        else:
            self.device = f"Triton's interpreter on the CPU, {self.precision}"
            pdl = False
        self.forward = Forward(self.config, packed.weights, self.precision, pdl)
        self._positions = 0
        self._decoder = self._load_decoder(packed.decoder)
        self._graphs: OrderedDict[tuple, Captured] = OrderedDict()
        self._most_graphs = graphs
        self._pool = None
        for batch, frames in warm:
            self.graph_for(batch, frames)

    def bucket(self, batch: int, frames: int) -> tuple[int, int, int]:
        """The batch, the features and the subsampled frames of the shape that holds `batch` utterances of at most
        `frames` features: all that give no more subsampled frames than the bucket has.
        """
        encoder, size = self.config.encoder, bucket_frames(self.subsampled(frames))
        return bucket_batch(batch), size * encoder.subsampling_rate + encoder.min_frames - 1, size

    def graph_for(self, batch: int, frames: int, chunk_size: int = 0, left_chunks: int = -1) -> EncoderGraph:
        """The captured encoder whose bucket holds `batch` utterances of at most `frames` features."""
        batch, frames, size = self.bucket(batch, frames)
        bins, chunk = self.config.encoder.input_dim, self.chunk(size, chunk_size, left_chunks)
        return self.captured(
            (batch, frames, chunk), batch, size,
            lambda pool: EncoderGraph(self.forward, batch, frames, bins, chunk, self._device, pool),
        )  # fmt: skip

    @torch.inference_mode()
    def captured(self, key: tuple, batch: int, size: int, make: Callable[..., Captured]) -> Captured:
        """The graph that is kept under that key, or `make(pool)`, which runs `forward` for (batch, size) frames."""
        if key in self._graphs:
            self._graphs.move_to_end(key)
            return self._graphs[key]
        self._hold_positions(size)
        self._hold_log_probs(batch * size)
        while len(self._graphs) >= self._most_graphs:
            self._graphs.popitem(last=False)
        if not self._graphs and self._device.type == "cuda":
            # A pool ends with the last graph in it, and nothing can be captured into it again.
            self._pool = torch.cuda.graph_pool_handle()
        self._graphs[key] = make(self._pool)
        return self._graphs[key]

    @torch.inference_mode()
    def __call__(self, features, lengths, *, compat=False, chunk_size=0, left_chunks=-1):
        """features float32 (B, T, F), lengths int32 (B,) -> log_probs float32 (B, S, V), hidden float32 (B, S, D),
        lengths int32 (B,): numpy arrays for numpy arrays, tensors on the device for tensors.

        Frames past an utterance's length hold finite numbers of no meaning. Raises ModelError for bad input.
        """
        if compat:
            raise ModelError("the cuda engine has no compat mode (original lengths and padding): use the eager engine")
        as_numpy = isinstance(features, np.ndarray)
        features, lengths = self._checked(features, lengths)
        if not len(lengths):
            size, widths = self._output_frames(features), (self.config.vocab_size, self.config.encoder.attention_dim)
            outputs = *(torch.zeros(0, size, width) for width in widths), torch.zeros(0, dtype=torch.int32)
        else:
            outputs = self._run(features, lengths, chunk_size, left_chunks, (0, 1, 2))
        return tuple(output.cpu().numpy() for output in outputs) if as_numpy else outputs

    @torch.inference_mode()
    def best_path(self, features, lengths):
        """As `__call__`, for greedy search alone: numpy symbols int32 (B, S), their log-probabilities float32 (B, S),
        lengths int32 (B,). The log-probabilities of the other symbols stay on the device.
        """
        if not len(lengths):
            return np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32), np.zeros(0, np.int32)
        outputs = self._run(*self._checked(features, lengths), 0, -1, (3, 4, 2))
        return tuple(output.cpu().numpy() for output in outputs)

    def _checked(self, features, lengths) -> tuple[Tensor, Tensor]:
        encoder = self.config.encoder
        if isinstance(features, np.ndarray):
            from m3asr.engines import padded

            features, lengths = padded(features, lengths, encoder.input_dim, encoder.min_frames)
            return torch.from_numpy(features), torch.from_numpy(lengths)
        if features.dim() != 3 or features.shape[2] != encoder.input_dim or lengths.shape != features.shape[:1]:
            raise ModelError(
                f"features have shape {tuple(features.shape)} and lengths {tuple(lengths.shape)}: "
                f"the model reads (batch, frames, {encoder.input_dim}) and one length each"
            )
        return features, lengths

    def _output_frames(self, features: Tensor) -> int:
        return self.subsampled(max(features.shape[1], self.config.encoder.min_frames))

    def _run(self, features: Tensor, lengths: Tensor, chunk_size, left_chunks, wanted) -> tuple[Tensor, ...]:
        """Outputs of `Forward` by number, cut to the batch; copies, since the next run overwrites the graph's own."""
        (batch, frames, _), size = features.shape, self._output_frames(features)
        graph = self.graph_for(batch, frames, chunk_size, left_chunks)
        graph.fill(features, lengths)
        graph.replay()
        outputs = (graph.outputs[i][:batch] for i in wanted)
        return tuple((output[:, :size] if output.dim() > 1 else output).clone() for output in outputs)

    @torch.inference_mode()
    def decode(self, hidden, lengths, tokens, *, reversed_tokens=None):
        """The attention decoder, by the model's own PyTorch in float32 on the same device; see `engines.Engine`."""
        if self._decoder is None:
            raise ModelError("the model has no attention decoder: rescoring is not possible, use greedy or beam")
        given = (hidden, lengths, tokens, reversed_tokens)
        arrays = (None if a is None else torch.as_tensor(np.ascontiguousarray(a)).to(self._device) for a in given)
        return tuple(None if output is None else output.cpu().numpy() for output in self._decoder.decode(*arrays))

    @property
    def place(self) -> torch.device:
        """The device, for torch; `device` is for people."""
        return self._device

    def drop_graphs(self) -> None:
        """Forget all captured shapes; each is captured again when it next comes."""
        self._graphs.clear()

    def subsampled(self, frames: int) -> int:
        """Frames that come out for so many features, at least one."""
        encoder = self.config.encoder
        return max(1, (frames - encoder.min_frames) // encoder.subsampling_rate + 1)

    def chunk(self, size: int, chunk_size: int, left_chunks: int) -> tuple[int, int] | None:
        """(size, left) of the chunks that queries see, as `ops.chunk_mask` has them; None: everything."""
        encoder = self.config.encoder
        if not encoder.use_dynamic_chunk:
            chunk_size = encoder.static_chunk_size
        if chunk_size <= 0:
            return None
        # More chunks to the left than there are is all of them; the cap keeps the products in 32 bits.
        chunk_size = min(int(chunk_size), size)
        return chunk_size, size if left_chunks < 0 else min(int(left_chunks), size)

    def _hold_positions(self, size: int) -> None:
        if size <= self._positions:
            return
        self._positions = max(FIRST_POSITIONS, 1 << (size - 1).bit_length())
        for stack in (self.forward.weights.main, self.forward.weights.embed):
            if stack is not None:
                lengthen_tables(stack, self._positions, self.forward.dtype)
        # Graphs hold the addresses of the tables that were just replaced.
        self.drop_graphs()

    def _hold_log_probs(self, tokens: int) -> None:
        """One place for the log-probabilities of all graphs, which are copied out after each run."""
        size, shared = tokens * self.config.vocab_size, self.forward.shared
        if self._device.type == "cuda" and (shared is None or shared.numel() < size):
            self.drop_graphs()
            self.forward.shared = torch.empty(size, device=self._device)

    def _load_decoder(self, state: dict[str, Tensor]) -> Model | None:
        if self.config.decoder is None:
            return None
        with torch.device("meta"):
            model = Model(self.config)
        missing, _ = model.load_state_dict(state, strict=False, assign=True)
        if missing := [name for name in missing if name.startswith("decoder.")]:
            raise ModelError(f"the model's weights lack {missing[0]}, which its config.json asks for")
        return model.eval()
