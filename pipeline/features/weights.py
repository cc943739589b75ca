"""Backbone weights: name or file -> tensors with a sha256. The only place that touches a download.

A file from elsewhere is never unpickled freely: safetensors, or `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import pickle
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from hsnet.errors import ConfigError, WeightsError
from hsnet.torchvision_ops import ensure_importable
from pipeline.features.weight_names import check_names, head_names, is_timm, random_weights, require_known

log = logging.getLogger(__name__)

PACKAGED = {
    "squeezenet1_1": (
        Path(__file__).with_name("data") / "squeezenet1_1_imagenet_f16.safetensors",
        "sha256:5d84a3f753047a1dba601204fbf9631da9ac838b054d463e1ab64d34be2c343c",
    ),
}
"""Weights inside this package, and their sha256. Origin and licence: THIRD_PARTY.md."""

PUBLISHED = "IMAGENET1K_V1"
"""torchvision's weights that the published HSNet was trained on; its V2 weights are another network's."""


@dataclass(frozen=True)
class Weights:
    """Tensors of one backbone, without its classification head."""

    backbone: str
    state_dict: dict[str, Tensor]
    """float32, by torchvision's or timm's names."""
    sha256: str
    """"sha256:" and 64 hex digits over names, shapes and values (`hash_tensors`): the identity in a store."""
    origin: str
    """Origin in words."""
    source: str = ""
    """Origin as told to a store: without folders of this machine; "" if unknown."""
    licence: str = ""
    """Licence of the weights; "" if unknown."""


def load_weights(backbone: str, source: str | Path | None = None, expected_sha256: str | None = None) -> Weights:
    """Find, check and hash the weights of a backbone.

    Args:
        backbone: a key of `hsnet.backbone.BACKBONES`, or "timm:" and a name of timm's.
        source: None for published weights (inside this package for squeezenet1_1, else torchvision's or timm's
            download); "random" or "random:SEED" for a fresh network; otherwise a .safetensors or torch (.pth, .pt)
            file with torchvision's or timm's names. A file called "random" can be given as a Path.
        expected_sha256: refuse weights with another `sha256`; at least its first 8 hex digits.

    Raises:
        ConfigError: no such backbone, a malformed seed or sha256.
        WeightsError: file missing or unreadable, download failed, weights of another network, NaN or infinity,
            or another sha256 than expected.
    """
    require_known(backbone)
    wanted = _hex_digits(expected_sha256) if expected_sha256 is not None else ""
    tensors, origin, told = _read(backbone, source)
    weights = replace(
        weights_of(backbone, tensors, origin), source=told.get("source", ""), licence=told.get("licence", "")
    )
    if source is None and backbone in PACKAGED and weights.sha256 != PACKAGED[backbone][1]:
        raise _other_bytes(weights, PACKAGED[backbone][1], "Install hsnet-pipeline again")
    if not weights.sha256.removeprefix("sha256:").startswith(wanted):
        raise _other_bytes(weights, f"sha256:{wanted}", "Give the right file, or leave out the sha256")
    return weights


def weights_of(backbone: str, tensors: Mapping[str, object], origin: str) -> Weights:
    """Check and hash tensors that are already in memory; the head and what changes no feature are left out.

    Raises:
        WeightsError: of another network, not tensors, NaN or infinity.
    """
    used = _check(backbone, tensors, origin)
    return Weights(backbone, used, hash_tensors(used), origin)


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over tensors sorted by name: name, dtype, shape, little-endian bytes. Not the hash of a file.

    The same weights hash equal from .pth and .safetensors, with or without the classification head.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        array = tensors[name].detach().cpu().contiguous().numpy()
        digest.update(f"{name}\n{array.dtype}\n{array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes())
    return f"sha256:{digest.hexdigest()}"


def _read(backbone: str, source: str | Path | None) -> tuple[Mapping[str, object], str, dict[str, str]]:
    """Tensors, where they came from, and what a store may tell of that."""
    if source is None:
        if backbone in PACKAGED:
            path = PACKAGED[backbone][0]
            return read_file(path), f"packaged {path.name}", {}
        if is_timm(backbone):
            from pipeline.features.timm_registry import download

            published, entry = download(backbone)
            return published, f"timm {entry.source}", {"source": entry.source, "licence": entry.licence}
        return *_download(backbone), {}
    if isinstance(source, str) and (source == "random" or source.startswith("random:")):
        tensors, origin = _random(backbone, source)
        return tensors, origin, {"source": origin}
    path = Path(source)
    return read_file(path), str(path), {"source": f"file {path.name}"} | told_by(path)


def told_by(path: Path) -> dict[str, str]:
    """What a safetensors file says of its weights' source and licence (`hsnet weights convert` writes it)."""
    if path.suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        said = file.metadata() or {}
    return {name: said[name][:500] for name in ("source", "licence") if said.get(name)}


def _random(backbone: str, source: str) -> tuple[Mapping[str, object], str]:
    digits = source.partition(":")[2] or "0"
    if not digits.isdecimal():
        raise ConfigError(f"'{source}': the seed of random weights is a whole number, as in random:0.")
    log.warning(
        "Random weights for %s (seed %s): the features mean nothing. For tests and timings only.", backbone, digits
    )
    return random_weights(backbone, int(digits)), f"random, seed {int(digits)}"


def read_file(path: Path) -> Mapping[str, object]:
    """Named values of a safetensors or torch file. Raises WeightsError if it is neither, or missing."""
    if not path.is_file():
        raise WeightsError(
            f"Weights file {path} does not exist. Give an existing .safetensors or .pth file, or leave it out for "
            f"ImageNet weights."
        )
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():  # of pickles that are refused anyway
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        # torch's own text advises to switch the safety off.
        raise WeightsError(
            f"{path} is not a plain file of tensors. It was not executed. Save only the network's state_dict(), best "
            f"as .safetensors."
        ) from None
    except Exception as error:  # torch's reader raises anything at all on damaged bytes
        raise WeightsError(
            f"{path} cannot be read as weights: {_first_line(error)}. Copy or download it again."
        ) from None
    if not isinstance(content, Mapping):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a network's state_dict (name -> tensor).")
    return content


def _download(backbone: str) -> tuple[Mapping[str, object], str]:
    ensure_importable()
    from torchvision.models import get_model_weights

    entry = get_model_weights(backbone)[PUBLISHED]
    try:
        # check_hash compares the bytes with the digits in the file's name.
        # torch announces the download on standard output, where results go.
        with contextlib.redirect_stdout(sys.stderr):
            tensors = entry.get_state_dict(progress=True, check_hash=True, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise WeightsError(
            f"The ImageNet weights of {backbone} could not be fetched from {entry.url}: {_first_line(error)}. "
            f"Without network, place that file in {folder} or pass it with --weights FILE; squeezenet1_1 needs no "
            f"download; --weights random serves tests. If {folder / Path(entry.url).name} exists, it may be cut "
            f"short: delete it."
        ) from None
    return tensors, f"torchvision {entry}"


def _check(backbone: str, tensors: Mapping[str, object], origin: str) -> dict[str, Tensor]:
    head = head_names(backbone)
    given: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise WeightsError(
                f"{origin}: entry '{name}' is a {type(value).__name__}, not a tensor. Save only the network's "
                f"state_dict(), not the training state around it."
            )
        # num_batches_tracked counts training steps and changes no feature.
        if not name.startswith(head) and not name.endswith("num_batches_tracked"):
            given[name] = value
    try:
        check_names(backbone, given)
    except WeightsError as error:
        raise WeightsError(f"{origin}: {error}") from None
    used = {name: value.to(torch.float32) for name, value in given.items()}
    broken = [name for name, value in used.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise WeightsError(f"{origin}: NaN or infinity in {', '.join(broken[:4])}. The file is corrupt.")
    return used


def _hex_digits(expected: str) -> str:
    digits = expected.removeprefix("sha256:").lower()
    if not re.fullmatch(r"[0-9a-f]{8,64}", digits):
        raise ConfigError(f"'{expected}' is not a sha256: give 8 to 64 hex digits.")
    return digits


def _other_bytes(weights: Weights, wanted: str, remedy: str) -> WeightsError:
    return WeightsError(
        f"The weights of {weights.backbone} ({weights.origin}) have another sha256:\n"
        f"  found   {weights.sha256}\n  wanted  {wanted}\n"
        f"It is taken over the tensors, not over the file. {remedy}. Nothing was changed."
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
