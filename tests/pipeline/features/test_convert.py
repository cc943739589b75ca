"""Weights from elsewhere: torch, safetensors and ONNX files brought to the names that a network needs."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hsnet.errors import ConfigError, WeightsError
from pipeline.features.convert import convert_weights
from pipeline.features.onnx import read_onnx
from pipeline.features.weights import load_weights

NAME = "timm:test_vit"


@pytest.fixture(scope="module")
def weights():
    return load_weights(NAME, "random:2")


def number(value: int) -> bytes:
    out = b""
    while True:
        value, byte = value >> 7, value & 127
        out += bytes([byte | (128 if value else 0)])
        if not value:
            return out


def part(field: int, content: bytes | str | int) -> bytes:
    if isinstance(content, int):
        return number(field << 3) + number(content)
    data = content.encode() if isinstance(content, str) else content
    return number(field << 3 | 2) + number(len(data)) + data


def initialiser(name: str, tensor: torch.Tensor, packed: bool = True, listed: bool = False) -> bytes:
    """A TensorProto, as exporters write it."""
    kind = {torch.float32: 1, torch.float16: 10, torch.float64: 11, torch.bfloat16: 16, torch.int64: 7}[tensor.dtype]
    shape = part(1, b"".join(map(number, tensor.shape))) if packed else b"".join(part(1, n) for n in tensor.shape)
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else tensor.numpy().tobytes()
    values = part(4, raw) if listed else part(9, raw)
    return shape + part(2, kind) + part(8, name) + values


def node(kind: str, inputs, outputs) -> bytes:
    return b"".join(part(1, n) for n in inputs) + b"".join(part(2, n) for n in outputs) + part(4, kind)


def model(tensors, nodes=()) -> bytes:
    graph = b"".join(part(1, one) for one in nodes) + b"".join(part(5, one) for one in tensors)
    # A version, a float of fixed width and the graph: readers skip what they do not know.
    return part(1, 8) + number(99 << 3 | 5) + struct.pack("<f", 1.0) + part(7, graph)


def exported(state, **how) -> bytes:
    """As torch exports a transformer: matrices of linear layers transposed, with names of the exporter's."""
    tensors, nodes = [], []
    for place, (name, value) in enumerate(state.items()):
        if name.endswith("weight") and value.ndim == 2:
            own = f"onnx::MatMul_{place}"
            tensors.append(initialiser(own, value.t().contiguous(), **how))
            nodes += [
                node("MatMul", ["x", own], [f"y{place}"]),
                node("Add", [name.replace("weight", "bias"), f"y{place}"], [f"z{place}"]),
            ]
        else:
            tensors.append(initialiser(name, value, **how))
    tensors.append(initialiser("onnx::Reshape_7", torch.tensor([1, -1])))
    return model(tensors, nodes)


@pytest.mark.parametrize("how", [{}, {"packed": False}, {"listed": True}])
def test_an_onnx_file_gives_the_same_weights(weights, tmp_path, how):
    (tmp_path / "m.onnx").write_bytes(exported(weights.state_dict, **how))
    done = convert_weights(tmp_path / "m.onnx", tmp_path / "w.safetensors", NAME, origin="an export", licence="MIT")
    assert done.sha256 == weights.sha256
    assert done.left_out == ()
    loaded = load_weights(NAME, tmp_path / "w.safetensors")
    assert loaded.sha256 == weights.sha256
    assert (loaded.source, loaded.licence) == ("an export", "MIT")


def test_half_precision_is_read_and_written(weights, tmp_path):
    halves = {name: value.half() for name, value in weights.state_dict.items()}
    (tmp_path / "m.onnx").write_bytes(exported(halves))
    save_file(halves, tmp_path / "h.safetensors")
    first = convert_weights(tmp_path / "m.onnx", tmp_path / "a.safetensors", NAME)
    save_file(weights.state_dict, tmp_path / "f.safetensors")
    second = convert_weights(tmp_path / "f.safetensors", tmp_path / "b.safetensors", NAME, half=True)
    assert first.sha256 == second.sha256 == load_weights(NAME, tmp_path / "h.safetensors").sha256 != weights.sha256
    assert {tensor.dtype for tensor in load_file(tmp_path / "b.safetensors").values()} == {torch.float16}
    brain = {name: value.bfloat16() for name, value in weights.state_dict.items()}
    (tmp_path / "b.onnx").write_bytes(exported(brain))
    assert torch.equal(read_onnx(tmp_path / "b.onnx")["pos_embed"], brain["pos_embed"])


@pytest.mark.parametrize("start", ["", "module.", "model.backbone.", "teacher.encoder."])
def test_training_files_are_searched_and_beginnings_of_names_dropped(weights, tmp_path, start):
    inside = {start + name: value for name, value in weights.state_dict.items()}
    rest = {f"{start}head.weight": torch.zeros(3, 64), "mask_token": torch.zeros(1, 64)}
    torch.save({"state_dict": inside | rest, "epoch": 3}, tmp_path / "run.pth")
    done = convert_weights(tmp_path / "run.pth", tmp_path / "w.safetensors", NAME)
    assert done.sha256 == weights.sha256
    assert done.left_out == tuple(sorted(rest))
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert file.metadata() == {"source": "run.pth"}


def test_built_in_networks_are_converted_too(tmp_path):
    from hsnet.backbone import random_state_dict

    torch.save({f"module.{n}": v for n, v in random_state_dict("squeezenet1_1", 4).items()}, tmp_path / "w.pth")
    done = convert_weights(tmp_path / "w.pth", tmp_path / "w.safetensors", "squeezenet1_1")
    assert done.sha256 == load_weights("squeezenet1_1", "random:4").sha256
    assert done.left_out == ("module.classifier.1.bias", "module.classifier.1.weight")


def external(name: str) -> bytes:
    return part(1, 4) + part(2, 1) + part(8, name) + part(13, part(1, "location") + part(2, "m.data")) + part(14, 1)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "holds no graph"),
        (b"not onnx at all", "cannot be read as ONNX"),
        (model([external("pos_embed")]), r"'pos_embed' are in another file \(external data\).*save_as_external_data"),
        (model([part(1, 4) + part(2, 1) + part(8, "a") + part(9, b"abc")]), "cannot be read as ONNX"),
        (model([part(1, 4) + part(2, 1) + part(8, "a") + part(9, bytes(8))]), r"'a' of shape \[4\] has 2 numbers"),
        (model([part(1, 4) + part(2, 17) + part(8, "a") + part(9, bytes(4))]), "values of type 17"),
        (model([part(1, 1) + part(2, 7) + part(8, "a") + part(7, number(4))]), "one by one"),
        (model([initialiser("onnx::MatMul_1", torch.zeros(2, 2))]), "no tensor with a name of the network's"),
        (
            model(
                [initialiser("onnx::Conv_12", torch.zeros(2, 2, 1, 1))], [node("Conv", ["x", "onnx::Conv_12"], ["y"])]
            ),
            "Conv weight 'onnx::Conv_12'.*normalisation was folded",
        ),
        (model([initialiser("pos_embed", torch.zeros(2))]), "not weights of timm:test_vit"),
    ],
)
def test_onnx_of_unknown_layout_is_refused(content, text, tmp_path):
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(WeightsError, match=text):
        convert_weights(tmp_path / "m.onnx", tmp_path / "w.safetensors", NAME)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_a_file_cut_anywhere_is_an_error_and_no_crash(weights, tmp_path):
    whole = exported(weights.state_dict)
    for end in np.linspace(1, len(whole) - 1, 40).astype(int):
        (tmp_path / "m.onnx").write_bytes(whole[:end])
        with pytest.raises(WeightsError):
            convert_weights(tmp_path / "m.onnx", tmp_path / "w.safetensors", NAME)


def test_what_is_there_is_kept(weights, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"mine")
    torch.save(weights.state_dict, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="exists and was left as it is"):
        convert_weights(tmp_path / "w.pth", tmp_path / "w.safetensors", NAME)
    with pytest.raises(ConfigError, match=r"converted weights are safetensors"):
        convert_weights(tmp_path / "w.pth", tmp_path / "w.bin", NAME)
    with pytest.raises(WeightsError, match="not weights of timm:test_vit2"):
        convert_weights(tmp_path / "w.pth", tmp_path / "o.safetensors", "timm:test_vit2")
    with pytest.raises(WeightsError, match="does not exist"):
        convert_weights(tmp_path / "none.onnx", tmp_path / "o.safetensors", NAME)
    assert (tmp_path / "w.safetensors").read_bytes() == b"mine"
