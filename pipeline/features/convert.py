"""Bring weights from elsewhere to the names that a network needs, as one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from hsnet.errors import ConfigError, WeightsError
from pipeline.common.files import whole
from pipeline.features.weight_names import wanted_names
from pipeline.features.weights import read_file, weights_of

_AROUND = ("state_dict", "model", "module", "teacher", "student", "model_ema", "ema", "backbone", "encoder", "net")
"""Entries of training files that hold the weights, and beginnings of names that only say whose they are."""


@dataclass(frozen=True)
class Converted:
    """What `convert_weights` wrote."""

    path: Path
    backbone: str
    tensors: int
    left_out: tuple[str, ...]
    """Names that the network does not have: heads, mask tokens, the rest of a larger model."""
    sha256: str
    """Digest of the tensors, as a recipe has it."""
    bytes: int


def convert_weights(
    source: Path, target: Path, backbone: str, half: bool = False, origin: str = "", licence: str = ""
) -> Converted:
    """Read a torch, safetensors or ONNX file and write the weights of a backbone as safetensors.

    Names may have a beginning that all of the network's share ("module.", "backbone.", "body."); tensors that the
    network does not have are left out.

    Args:
        target: must not exist.
        backbone: whose weights they are; its names and shapes are what is written.
        half: write float16, half the bytes; the digest is that of the rounded numbers.
        origin, licence: told to stores made with the file; "" if unknown.

    Raises:
        ConfigError: unknown backbone, or `target` exists.
        WeightsError: the file cannot be read, or holds other weights; names what is missing.
    """
    if target.exists():
        raise ConfigError(f"{target} exists and was left as it is. Choose another name.")
    if target.suffix != ".safetensors":
        raise ConfigError(f"{target}: converted weights are safetensors; give a name that ends so.")
    wanted = wanted_names(backbone)
    if source.suffix == ".onnx" and source.is_file():
        from pipeline.features.onnx import read_onnx

        given: Mapping[str, object] = read_onnx(source)
    else:
        given = _inside(read_file(source))
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    start = _beginning(tensors, wanted)
    found = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
    used = {name: value for name, value in found.items() if name in wanted}
    if half:
        used = {name: value.to(torch.float16) for name, value in used.items()}
    weights = weights_of(backbone, used, str(source))
    content = {name: value.contiguous() for name, value in used.items()}
    told = {"source": origin or source.name, **({"licence": licence} if licence else {})}
    data = save(content, told)
    _write(target, data)
    left_out = sorted({*given} - {start + name for name in used})
    return Converted(target, backbone, len(used), tuple(left_out), weights.sha256, len(data))


def _write(target: Path, data: bytes) -> None:
    try:
        with whole(target) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise WeightsError(f"{target} cannot be written: {error.strerror}. Nothing was changed.") from error


def _inside(content: Mapping[str, object]) -> Mapping[str, object]:
    """The weights in a training file: the first entry of a usual name that holds named tensors."""
    while True:
        inner = next((content[name] for name in _AROUND if isinstance(content.get(name), Mapping)), None)
        if not isinstance(inner, Mapping):
            return content
        content = inner


def _beginning(tensors: Mapping[str, Tensor], wanted: Mapping[str, tuple[int, ...]]) -> str:
    """What stands before the network's names in a file; "" if nothing does, or the file is of another network."""
    first = next(iter(wanted))
    starts = {name.removesuffix(first) for name in tensors if name == first or name.endswith(f".{first}")}
    return max(starts, key=lambda start: (sum(start + name in tensors for name in wanted), -len(start)), default="")
