"""What timm knows of a network, and its weights. The only place that imports timm, and only when it is needed."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hsnet.errors import ConfigError, WeightsError
from pipeline.features.recipe import TIMM

INSTALL = "pip install 'hsnet-pipeline[timm]'"


@dataclass(frozen=True)
class RegistryEntry:
    """What timm's registry knows of a name without building anything."""

    name: str
    """Without "timm:"."""
    source: str
    """Where its published weights are; "" if there are none."""
    licence: str
    """Licence of the published weights; "" if timm does not say."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int
    """Image size of its training, pixels."""
    classifier: tuple[str, ...]
    """Parts that no tap needs, by name."""


def available() -> bool:
    """Whether timm can be imported."""
    from importlib.util import find_spec

    return find_spec("timm") is not None


def entry(backbone: str) -> RegistryEntry:
    """The registry's entry of "timm:NAME".

    Raises:
        ConfigError: timm is not installed, or has no such network; offers the nearest names.
    """
    timm, name = _timm(), backbone.removeprefix(TIMM)
    architecture, _, tag = name.partition(".")
    if not re.fullmatch(r"\w+", architecture) or not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), 4, 0.6)
        offer = f" Nearest: {', '.join(TIMM + found for found in near)}." if near else ""
        raise ConfigError(
            f"timm {timm.__version__} has no network '{name}'.{offer} All names: "
            f'python -c "import timm; print(*timm.list_models())"'
        )
    tags = [found.partition(".")[2] for found in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        there = f"there are: {', '.join(tags)}" if tags else "there are none"
        raise ConfigError(f"timm has no weights '{tag}' of {architecture}; {there}.")
    config = timm.get_pretrained_cfg(name)
    values = {} if config is None else config.to_dict()
    source = values.get("hf_hub_id") or values.get("url") or ""
    classifier = values.get("classifier") or ()
    return RegistryEntry(
        name=name,
        source=str(source) if timm.is_model_pretrained(name) else "",
        licence=str(values.get("license") or ""),
        mean=tuple(map(float, values.get("mean") or (0.485, 0.456, 0.406))),
        std=tuple(map(float, values.get("std") or (0.229, 0.224, 0.225))),
        input_size=int((values.get("input_size") or (3, 224, 224))[-1]),
        classifier=(classifier,) if isinstance(classifier, str) else tuple(classifier),
    )


def wanted_names(backbone: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights, without the classifier."""
    return {
        name: tuple(value.shape)
        for name, value in build(backbone, meta=True).state_dict().items()
        if not name.endswith("num_batches_tracked")
    }


def check_names(backbone: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise WeightsError unless tensors have the names and shapes of the network's; lists the first few differences."""
    wanted = wanted_names(backbone)
    given = {name: tuple(value.shape) for name, value in tensors.items()}
    for name in wanted:
        one, other = given.get(name, ()), wanted[name]
        if name.endswith("pos_embed") and len(one) == len(other) == 3 and one[2] == other[2] and one != other:
            raise WeightsError(
                f"These weights have {one[1]} positions, {backbone} has {other[1]}: another image size's. "
                f"Resample {name} to the network's own grid first (timm.layers.resample_abs_pos_embed), or choose the "
                "network of that size. (At extraction the network resamples its own grid to any image size.)"
            )
    problems = [f"missing {name}" for name in wanted if name not in given]
    problems += [f"unknown {name}" for name in given if name not in wanted]
    problems += [f"{n} is {given[n]}, wanted {wanted[n]}" for n in wanted if n in given and given[n] != wanted[n]]
    if problems:
        raise WeightsError(
            f"These are not weights of {backbone}: {'; '.join(problems[:4])}"
            f"{f'; and {len(problems) - 4} more' if len(problems) > 4 else ''}. Give the weights of {backbone} by "
            "timm's names (`hsnet weights convert` brings other files to them), or choose the network they belong to."
        )


def random_state_dict(backbone: str, seed: int) -> dict[str, Tensor]:
    """Weights of a freshly initialised network."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(build(backbone).state_dict())


def download(backbone: str) -> tuple[dict[str, Tensor], RegistryEntry]:
    """timm's published weights, from its cache or the network; files are checked by hash as timm's hub does.

    Raises:
        WeightsError: none are published, or they cannot be fetched; says how to go on without network.
    """
    about, timm = entry(backbone), _timm()
    if not about.source:
        raise WeightsError(
            f"timm publishes no weights of {backbone}. Give a file with --weights FILE, or --weights random for tests."
        )
    timm.models.set_pretrained_check_hash(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = timm.create_model(about.name, pretrained=True, num_classes=0)
    except Exception as error:  # httpx, huggingface_hub and torch.hub raise their own kinds, and OSError
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise WeightsError(
            f"The weights of {backbone} could not be fetched from {about.source}: {reason}. Without network, get them "
            f"elsewhere and give the file: --weights FILE (safetensors or torch; `hsnet weights convert` reads ONNX); "
            f"or copy the cache of a machine that has them (HF_HOME). squeezenet1_1 needs no download; "
            f"--weights random serves tests."
        ) from None
    return dict(model.state_dict()), about


def stages(network: nn.Module) -> list[dict[str, Any]]:
    """Stages as timm lists them: module, channels and reduction."""
    info = getattr(network, "feature_info", None)
    if info is None:
        raise ConfigError(f"{type(network).__name__} gives no feature maps: timm lists no stages of it.")
    return [dict(item) for item in (info if isinstance(info, list) else info.info)]


def build(backbone: str, meta: bool = False) -> nn.Module:
    """A network without classifier, in eval mode, at its own image size; on the meta device without any numbers."""
    name, timm = entry(backbone).name, _timm()
    with torch.device("meta" if meta else "cpu"):
        network = timm.create_model(name, pretrained=False, num_classes=0)
    for module in network.modules():
        if getattr(module, "inplace", False):
            module.inplace = False  # it would overwrite what a tap has read
    return network.eval()


def _timm() -> Any:
    from hsnet.torchvision_ops import ensure_importable

    try:
        ensure_importable()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations among timm's own modules
            import timm
    except ImportError:
        raise ConfigError(
            f"Backbones that begin with '{TIMM}' need timm, which is not installed: {INSTALL}. Stores of their "
            "features train and evaluate without it."
        ) from None
    return timm
