"""Tensors of an ONNX file by their names, read as data: nothing is run, and no ONNX library is needed.

An ONNX file is a protobuf message: fields of a number, a kind and a value, one inside the other. Three messages are
looked at: the graph's nodes, its initialisers, and the tensors these are. An exporter gives a weight that it has
transposed a name of its own; its real name is told by the bias that is added next.

Source: onnx.proto of ONNX 1.x (field numbers), protobuf's encoding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsnet.errors import WeightsError

_TYPES = {1: "<f4", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8"}
_BFLOAT16 = 16
_LARGEST_NUMBER = 70  # bits of a number, as protobuf allows
_MADE_BY_EXPORTER = re.compile(r"onnx::\w+_\d+|_v_\d+|\d+|val_\d+")


@dataclass
class _Node:
    """One operation of the graph."""

    kind: str = ""
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


def read_onnx(path: Path) -> dict[str, Tensor]:
    """Initialisers of an ONNX model by the names of the network's parameters.

    A matrix whose product gets the bias "X.bias" is "X.weight", transposed, if the exporter has named it itself. Other
    tensors with names of the exporter's are left out: constants of the graph.

    Raises:
        WeightsError: not ONNX, damaged, tensors in other files, values of another type, or weights that nothing names
            (a convolution whose normalisation was folded in).
    """
    try:
        data = memoryview(path.read_bytes())
        model = _last(_fields(data), 7)
        if model is None:
            raise ValueError("it holds no graph")
        nodes, tensors = [], {}
        for number, value in _fields(model):
            if number == 1:
                nodes.append(_node(_message(value)))
            elif number == 5:
                name, tensor = _tensor(_message(value))
                tensors[name] = tensor
    except (ValueError, IndexError, OverflowError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} cannot be read as ONNX: {error or type(error).__name__}.") from None
    return _named(tensors, nodes, path)


def _named(tensors: dict[str, Tensor], nodes: Sequence[_Node], path: Path) -> dict[str, Tensor]:
    for node in nodes:  # one tensor under several names
        if node.kind == "Identity" and node.inputs[0] in tensors:
            tensors[node.outputs[0]] = tensors[node.inputs[0]]
    readers = {name: node for node in nodes for name in node.inputs}
    named = {name: tensor for name, tensor in tensors.items() if not _MADE_BY_EXPORTER.fullmatch(name)}
    for node in nodes:
        matrix = next((name for name in node.inputs if name in tensors and name not in named), None)
        if node.kind == "MatMul" and matrix == node.inputs[1]:
            added = readers.get(node.outputs[0])
            biases = [] if added is None or added.kind != "Add" else [n for n in added.inputs if n.endswith(".bias")]
            if biases and tensors[matrix].ndim == 2:
                named[biases[0].removesuffix("bias") + "weight"] = tensors[matrix].t().contiguous()
        elif node.kind in ("Conv", "ConvTranspose", "Gemm") and matrix is not None:
            raise WeightsError(
                f"{path}: the {node.kind} weight '{matrix}' has no name of the network's: a normalisation was folded "
                "into it at export, and the network has both. Export without constant folding, or give a torch file. "
                "Nothing was written."
            )
    if not named:
        raise WeightsError(f"{path} holds no tensor with a name of the network's. Nothing was written.")
    return named


def _node(message: memoryview) -> _Node:
    node = _Node()
    for number, value in _fields(message):
        if number == 1:
            node.inputs.append(_text(value))
        elif number == 2:
            node.outputs.append(_text(value))
        elif number == 4:
            node.kind = _text(value)
    return node


def _tensor(message: memoryview) -> tuple[str, Tensor]:
    shape: list[int] = []
    name, kind, raw = "", 0, None
    listed: dict[int, list[memoryview]] = {}
    for number, value in _fields(message):
        if number == 1:
            shape += [value] if isinstance(value, int) else list(_numbers(value))
        elif number == 2 and isinstance(value, int):
            kind = value
        elif number == 8:
            name = _text(value)
        elif number == 9:
            raw = _message(value)
        elif number in (4, 10):
            listed.setdefault(number, []).append(_message(value))
        elif number in (5, 7):
            raise ValueError(f"tensor '{name}' lists its numbers one by one, which this reader does not know")
        elif number == 13 or (number == 14 and value == 1):
            raise ValueError(
                f"the numbers of tensor '{name}' are in another file (external data): save the model as one file, "
                "such as by onnx.save(model, path, save_as_external_data=False)"
            )
    if raw is None and listed:
        raw = memoryview(b"".join(part for parts in listed.values() for part in parts))
    if kind not in (*_TYPES, _BFLOAT16):
        raise ValueError(f"tensor '{name}' holds values of type {kind}, which this reader does not know")
    array: NDArray[np.generic] = np.frombuffer(raw or b"", "<u2" if kind == _BFLOAT16 else _TYPES[kind])
    if array.size != int(np.prod(shape, dtype=object)):
        raise ValueError(f"tensor '{name}' of shape {shape} has {array.size} numbers")
    tensor = torch.from_numpy(array.copy()).reshape(shape)
    return name, tensor.view(torch.bfloat16) if kind == _BFLOAT16 else tensor


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of the fields of a message; values of fixed width are bytes."""
    place = 0
    while place < len(data):
        key, place = _number(data, place)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, place = _number(data, place)
            yield number, value
            continue
        if kind == 2:
            size, place = _number(data, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"a field of kind {kind} at byte {place}")
        if place + size > len(data):
            raise ValueError("it is cut short")
        yield number, data[place : place + size]
        place += size


def _number(data: memoryview, place: int) -> tuple[int, int]:
    """A number in protobuf's variable width, and where it ends."""
    value = 0
    for shift in range(0, _LARGEST_NUMBER, 7):
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
    raise ValueError("a number has no end")


def _numbers(data: memoryview) -> Iterator[int]:
    place = 0
    while place < len(data):
        value, place = _number(data, place)
        yield value


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message should be")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode()


def _last(fields: Iterator[tuple[int, int | memoryview]], wanted: int) -> memoryview | None:
    found = None
    for number, value in fields:
        if number == wanted:
            found = _message(value)
    return found
