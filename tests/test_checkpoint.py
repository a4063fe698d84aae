"""Reading training folders: what is understood, what is refused, and that a refusal says why."""

from __future__ import annotations

import json
import math
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from golden import GOLDEN, GOLDEN_NAMES
from random_model import random_model

from m3asr.checkpoint import read_checkpoint
from m3asr.convert import write_model_folder
from m3asr.engines.eager import load_model
from m3asr.errors import ModelError
from m3asr.folder import ModelFolder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A copy of a golden 3M-ASR training folder that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "3m-moe-80", tmp_path / "3m"))


@pytest.fixture
def wenet(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / "wenet-u2pp-80", tmp_path / "wenet"))


def edit_state(path: Path, edit) -> None:
    state = torch.load(path, weights_only=True)
    state = edit(state) or state
    torch.save(state, path)


def edit_yaml(folder: Path, edit) -> None:
    values = yaml.safe_load((folder / "train.yaml").read_text())
    edit(values)
    (folder / "train.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_model_folder_holds_the_checkpoint(name, golden_folders):
    found = read_checkpoint(GOLDEN / name)
    folder = ModelFolder.read(golden_folders[name])
    assert folder.config == found.config and found.notes == []
    model = load_model(folder)
    for key, value in model.state_dict().items():
        assert torch.equal(value, found.state[key]), key
    assert (folder.cmvn is None) == (found.config.family == "wenet")
    assert folder.path.joinpath("README.md").read_text().startswith("# ")


def test_shapes_win_over_the_yaml_and_it_is_said(folder):
    def edit(values):
        encoder = values["model_conf"]["encoder_conf"]
        encoder["attention_heads"] = 4
        encoder["moe_conf"]["num_experts"] = 2
        encoder["embed_conf"]["linear_units"] = 7

    edit_yaml(folder, edit)
    found = read_checkpoint(folder)
    assert found.config.encoder.attention_heads == 2 and found.config.encoder.moe.num_experts == 4
    notes = "\n".join(found.notes)
    assert "attention_heads says 4" in notes and "2 on each of 2 training ranks" in notes
    assert "linear_units says 7" in notes


def test_training_only_tensors_are_left_out(folder):
    def edit(state):
        for i in range(2):
            state[f"encoder.blocks.{i}.concat_linear.weight"] = torch.zeros(32, 64)
        state["encoder.after_norm_6.weight"] = torch.zeros(32)
        state["encoder.after_norm_12.bias"] = torch.zeros(32)
        state["decoder_1.embed.0.weight"] = torch.zeros(40, 32)
        state["decoder_2.after_norm.weight"] = torch.zeros(32)
        state["decoder.decoders.0.concat_linear1.bias"] = torch.zeros(32)

    edit_state(folder / "model.pt", edit)
    assert read_checkpoint(folder).state.keys() == read_checkpoint(GOLDEN / "3m-moe-80").state.keys()


@pytest.mark.parametrize("projection", ["out", "linear"])
def test_names_of_the_conv2d6_projection(tmp_path, projection):
    """3M-ASR and WeNet call it differently; ours is a third."""
    model = random_model("conv2d6")
    old, new = "subsampling.out.0.", f"subsampling.{projection}."
    torch.save({key.replace(old, new): value for key, value in model.state_dict().items()}, tmp_path / "model.pt")
    encoder = {"input_layer": "conv2d6", "num_blocks": 2, "moe_conf": {}, "embed_conf": {"input_layer": "conv2d6"}}
    values = {
        "nnet_proto": "conformer_aed_moe_catEmbed",
        "model_conf": {"encoder_conf": encoder, "decoder_conf": {"attention_heads": 2}},
        "dataset_conf": {"fbank_conf": {"num_mel_bins": 40}},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "units.txt").write_text("".join(f"s{i} {i}\n" for i in range(20)))
    found = read_checkpoint(tmp_path, use_cmvn=False)
    assert found.config.cmvn == "none" and found.config.encoder == model.config.encoder
    assert all(torch.equal(found.state[key], value) for key, value in model.state_dict().items())


def test_files_with_other_names(folder, tmp_path):
    for name in ("model.pt", "train.yaml", "units.txt", "global_cmvn"):
        (folder / name).rename(folder / f"my-{name}")
    for option, config in (("--config", None), ("--units", folder / "my-train.yaml")):
        with pytest.raises(ModelError, match=option):
            read_checkpoint(folder, config=config)
    found = read_checkpoint(
        folder,
        config=folder / "my-train.yaml",
        checkpoint=folder / "my-model.pt",
        units=folder / "my-units.txt",
        cmvn=folder / "my-global_cmvn",
    )
    assert found.source == [folder / "my-model.pt"]


def test_average_takes_the_last_ones(folder):
    state = torch.load(folder / "model.pt", weights_only=True)
    (folder / "model.pt").unlink()
    # Numbers, not names, decide the order: 2.10 is after 2.9.
    for epoch, step, scale in ((1, 1, 100.0), (2, 9, 1.0), (2, 10, 3.0)):
        scaled = {key: value * scale if value.is_floating_point() else value for key, value in state.items()}
        torch.save(scaled, folder / f"model.epoch-{epoch}.step-{step}")
    found = read_checkpoint(folder, average=2)
    key = "encoder.blocks.0.self_attn.linear_q.weight"
    torch.testing.assert_close(found.state[key], state[key] * 2)
    assert [path.name for path in found.source] == ["model.epoch-2.step-9", "model.epoch-2.step-10"]
    with pytest.raises(ModelError, match="has 3 numbered checkpoints, --average asks for 4"):
        read_checkpoint(folder, average=4)
    assert read_checkpoint(folder).source[0].name == "model.epoch-2.step-10"


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/m3asr-was-run",)


def test_a_pickle_that_runs_code_is_not_run(folder):
    marker = Path("/tmp/m3asr-was-run")
    marker.unlink(missing_ok=True)
    (folder / "model.pt").write_bytes(pickle.dumps({"encoder.blocks.0.x": Malicious()}))
    with pytest.raises(ModelError, match="could run code"):
        read_checkpoint(folder)
    torch.save({"encoder.blocks.0.x": Malicious()}, folder / "model.pt")
    with pytest.raises(ModelError, match="could run code"):
        read_checkpoint(folder)
    assert not marker.exists()


@pytest.mark.parametrize("size", [0, 1, 100, 5000, 800_000])
def test_a_truncated_checkpoint(folder, size):
    data = (folder / "model.pt").read_bytes()
    (folder / "model.pt").write_bytes(data[:size])
    with pytest.raises(ModelError, match="model.pt"):
        read_checkpoint(folder)


def _drop(state):
    del state["encoder.blocks.1.feed_forward.router_weights"], state["decoder.after_norm.bias"]


def _extra(state):
    state["encoder.blocks.0.adapter.weight"] = torch.zeros(2)


def _both(state):
    _drop(state), _extra(state)


def _shape(state):
    state["encoder.blocks.1.norm_ff.weight"] = torch.zeros(7)


def _nan(state):
    state["encoder.blocks.1.norm_ff.weight"][3] = float("nan")


def _of(change):
    def edit(state):
        state["encoder.blocks.1.norm_ff.weight"] = change(state["encoder.blocks.1.norm_ff.weight"])

    return edit


def _hole(state):
    return {key: value for key, value in state.items() if not key.startswith("encoder.blocks.0.")}


def _wrapped(state):
    return {"model": state, "step": 7}


@pytest.mark.parametrize(
    "edit,said",
    [
        (_drop, ["missing", "blocks.1.feed_forward.router_weights", "decoder.after_norm.bias"]),
        (_extra, ["unexpected", "encoder.blocks.0.adapter.weight"]),
        (_both, ["missing", "unexpected", "adapter", "router_weights"]),
        (_shape, ["other shapes", "norm_ff.weight (7,) instead of (32,)"]),
        (_nan, ["NaN", "norm_ff.weight"]),
        (_hole, ["some are missing"]),
        (_wrapped, ["not a bare state_dict", "model"]),
        (lambda state: {7: torch.zeros(1)}, ["not a bare state_dict: 7"]),
        (_of(torch.Tensor.to_sparse), ["no tensor of plain numbers", "norm_ff.weight"]),
        (_of(lambda tensor: tensor.to("meta")), ["no tensor of plain numbers", "norm_ff.weight"]),
        (_of(lambda tensor: tensor.to(torch.complex64)), ["no tensor of plain numbers", "norm_ff.weight"]),
        (lambda state: {"weight": torch.zeros(1)}, ["neither a 3M-ASR checkpoint"]),
    ],
)
def test_wrong_tensors_are_listed(folder, edit, said):
    edit_state(folder / "model.pt", edit)
    with pytest.raises(ModelError) as caught:
        read_checkpoint(folder)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    "setting,value",
    [
        ("normalize_before", False),
        ("concat_after", True),
        ("input_layer", "linear"),
        ("pos_enc_layer_type", "abs_pos"),
        ("use_cnn_module", False),
        ("activation_type", "mish"),
        ("selfattention_layer_type", "rope_abs_selfattn"),
        ("n_kv_head", 1),
        ("mlp_type", "moe"),
        ("layer_norm_type", "rms_norm"),
        ("brand_new_setting", 3),
    ],
)
def test_unsupported_settings_are_refused_by_name(wenet, setting, value):
    edit_yaml(wenet, lambda values: values["encoder_conf"].__setitem__(setting, value))
    with pytest.raises(ModelError, match=setting):
        read_checkpoint(wenet)


def test_a_sample_rate_at_which_nothing_is_read_is_refused(folder, wenet):
    for training in (folder, wenet):
        edit_yaml(training, lambda values: values["dataset_conf"]["resample_conf"].update(resample_rate=8000))
        with pytest.raises(ModelError, match="resample_rate 8000 is not supported"):
            read_checkpoint(training)


@pytest.mark.parametrize(
    "setting,value",
    [("norm_eps", "small"), ("norm_eps", math.nan), ("static_chunk_size", [1]), ("static_chunk_size", math.inf)]
    + [("attention_heads", 5)],
)
def test_settings_of_another_type(wenet, setting, value):
    edit_yaml(wenet, lambda values: values["encoder_conf"].__setitem__(setting, value))
    edit_yaml(wenet, lambda values: values["decoder_conf"].__setitem__("attention_heads", 5))
    with pytest.raises(ModelError, match="train.yaml"):
        read_checkpoint(wenet)


@pytest.mark.parametrize(
    "section,setting,value",
    [
        ((), "input_dim", 10**30),
        ((), "input_dim", 10**12),
        ((), "input_dim", 0),
        ((), "input_dim", 5),
        (("dataset_conf", "fbank_conf"), "num_mel_bins", 10**12),
        (("dataset_conf", "fbank_conf"), "num_mel_bins", 40),
        (("dataset_conf", "fbank_conf"), "frame_length", 10**12),
        (("dataset_conf", "fbank_conf"), "frame_shift", 0),
        (("dataset_conf", "fbank_conf"), "window_type", "round"),
        (("encoder_conf",), "static_chunk_size", 10**30),
        (("encoder_conf",), "causal", "false"),
        (("encoder_conf",), "norm_eps", -1),
        (("decoder_conf",), "attention_heads", 0),
        (("decoder_conf",), "attention_heads", -1),
        (("model_conf",), "reverse_weight", 10**12),
    ],
)
def test_settings_outside_any_range(wenet, section, setting, value):
    """Refused by name, before anything of that size is made."""

    def edit(values):
        for name in section:
            values = values.setdefault(name, {})
        values[setting] = value

    edit_yaml(wenet, edit)
    with pytest.raises(ModelError, match=setting):
        read_checkpoint(wenet)


@pytest.mark.parametrize("width", [[], "80", 80.5, True])
def test_an_input_width_that_is_none(wenet, width):
    edit_yaml(wenet, lambda values: values.update(input_dim=width))
    with pytest.raises(ModelError, match="train.yaml: .*input_dim is .*expected a whole number"):
        read_checkpoint(wenet)


@pytest.mark.parametrize(
    "special", [{"<eos>": None}, {"<sos>": 40}, {"<eos>": -1}, {"<sos>": "two"}, {"<sos>": True}, [2]]
)
def test_special_tokens_that_are_no_units(wenet, special):
    edit_yaml(wenet, lambda values: values["tokenizer_conf"].update(special_tokens=special))
    with pytest.raises(ModelError, match="special_tokens with ids from 0 to 39"):
        read_checkpoint(wenet)


def test_wenet_sos_is_its_special_token(wenet):
    assert read_checkpoint(wenet).config.sos == 2
    edit_yaml(wenet, lambda values: values["tokenizer_conf"].pop("special_tokens"))
    assert read_checkpoint(wenet).config.sos == 39


def test_wenet_without_normalisation(wenet):
    with pytest.raises(ModelError, match="--no-cmvn: this checkpoint normalises its input itself"):
        read_checkpoint(wenet, use_cmvn=False)

    def edit(state):
        del state["encoder.global_cmvn.mean"], state["encoder.global_cmvn.istd"]

    edit_state(wenet / "final.pt", edit)
    assert read_checkpoint(wenet).config.cmvn == "inside"  # from the file that train.yaml names
    assert read_checkpoint(wenet, use_cmvn=False).config.cmvn == "none"


def test_wenet_buffers_of_older_and_newer_versions(wenet):
    def edit(state):
        state.pop("encoder.embed.pos_enc.pe", None)
        state["decoder.left_decoder.embed.1.pe"] = torch.zeros(1, 5000, 32)
        state["encoder.encoders.0.concat_linear.weight"] = torch.zeros(32, 64)

    edit_state(wenet / "final.pt", edit)
    assert read_checkpoint(wenet).state.keys() == read_checkpoint(GOLDEN / "wenet-u2pp-80").state.keys()


def test_a_vocabulary_of_another_size(folder):
    lines = (folder / "units.txt").read_text().splitlines()[:-1]
    (folder / "units.txt").write_text("\n".join(lines) + "\n")
    with pytest.raises(ModelError, match="39 units, the model puts out 40"):
        read_checkpoint(folder)


def test_cmvn_of_another_width(folder):
    shutil.copy(GOLDEN / "3m-moe-40" / "global_cmvn", folder / "global_cmvn")
    with pytest.raises(ModelError, match="40 bins, the model reads 80"):
        read_checkpoint(folder)


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [", "\x00\x01"])
def test_bad_yaml(folder, text):
    (folder / "train.yaml").write_text(text)
    with pytest.raises(ModelError, match="train.yaml"):
        read_checkpoint(folder)


def test_nothing_is_half_written(folder, tmp_path, monkeypatch):
    target = tmp_path / "out" / "model"
    found = read_checkpoint(folder)
    monkeypatch.setattr("m3asr.convert.build_onnx", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_model_folder(found, target)
    assert not target.parent.exists()  # it was made for what did not come
    target.parent.mkdir()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("m3asr.convert.write_model_files", full)
        with pytest.raises(ModelError, match="model cannot be written: No space left on device"):
            write_model_folder(found, target, onnx=False)
    assert list(target.parent.iterdir()) == []
    write_model_folder(found, target, onnx=False)
    with pytest.raises(ModelError, match="--force"):
        write_model_folder(found, target, onnx=False)
    write_model_folder(found, target, onnx=False, overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    with pytest.raises(ModelError, match="another name"):
        write_model_folder(found, tmp_path / "notes", onnx=False, overwrite=True)


def test_damaged_model_folders(folder, tmp_path):
    target = tmp_path / "model"
    write_model_folder(read_checkpoint(folder), target, onnx=False)
    weights = target / "model.safetensors"
    data = weights.read_bytes()
    for size in (0, 7, 100, len(data) - 5):
        weights.write_bytes(data[:size])
        with pytest.raises(ModelError, match="damaged or truncated"):
            ModelFolder.read(target).weights()
    weights.write_bytes(data)
    config = (target / "config.json").read_text()
    for text, said in (
        (config.replace('"format_version": 1', '"format_version": 99'), "version 99"),
        (config.replace('"family"', '"tribe"'), "tribe"),
        ("{", "not valid JSON"),
        ("[]", "list"),
        (json.dumps({**json.loads(config), "encoder": 3}), "encoder holds a int"),
        (json.dumps({**json.loads(config), "encoder": None}), "encoder holds a NoneType"),
        (config.replace('"attention_heads": 2', '"attention_heads": "2"'), "attention_heads is '2', expected a whole"),
        (config.replace('"attention_dim": 32', f'"attention_dim": {10**30}'), "attention_dim is 1000.*expected 1 to"),
        (config.replace('"attention_heads": 2', '"attention_heads": 3'), "attention_heads is 3, expected a divisor"),
        (config.replace('"num_blocks": 2', '"num_blocks": 1000000'), "num_blocks is 1000000, expected 1 to 1000"),
        (config.replace('"conv2d"', '"conv3d"'), "input_layer is 'conv3d', expected one of conv2d"),
    ):
        (target / "config.json").write_text(text)
        with pytest.raises(ModelError, match=said):
            ModelFolder.read(target)
    (target / "config.json").write_text(config)
    (target / "cmvn.json").write_text("{}")
    with pytest.raises(ModelError):
        ModelFolder.read(target)
    with pytest.raises(ModelError, match="not a model folder"):
        ModelFolder.read(tmp_path / "nowhere")


def test_weights_may_be_stored_in_half_precision(folder, tmp_path):
    from safetensors.numpy import load_file, save_file

    target = tmp_path / "model"
    write_model_folder(read_checkpoint(folder), target, onnx=False)
    tensors = load_file(target / "model.safetensors")
    half = {name: value.astype(np.float16) if value.dtype == np.float32 else value for name, value in tensors.items()}
    save_file(half, target / "model.safetensors")
    weights = ModelFolder.read(target).weights()
    assert {value.dtype for value in weights.values()} == {np.dtype(np.float32)}
    assert load_model(ModelFolder.read(target)) is not None
