"""The learner's switches in a user's words, resolved against the features that a head will read.

Every table of the paper that changes the learner is one of these choices: 4D kernels (Table 5), layers (Fig. 5),
levels (Fig. 6), depth (Fig. 8), support mask (Table 1, last row); and so is the head `hsnet+bg`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hsnet.errors import ConfigError
from hsnet.kernels import KERNELS
from hsnet.model import (
    CHANNELS,
    GROUPS,
    KERNEL,
    MOST_CONVOLUTIONS,
    SQUEEZE_KERNELS,
    SQUEEZE_STRIDES,
    HSNet,
    squeeze_channels,
    squeeze_plan,
)
from pipeline.features.recipe import Recipe

Numbers = str | int | Sequence[int]
"""What a list may be given as: "3,5,8-11", one number, or numbers."""

LEARNER_CHOICES: dict[str, type] = {
    "head": str,
    "kernel": str,
    "layers": str,
    "levels": str,
    "depth": int,
    "channels": str,
    "groups": int,
    "support_mask": bool,
}
"""Name -> type of every choice of `learner_arguments`, as options and sweep files give them."""

LEARNED_HEADS = ("hsnet", "hsnet+bg")


def learner_arguments(
    recipe: Recipe,
    *,
    head: str | None = None,
    kernel: str | None = None,
    layers: Numbers | None = None,
    levels: Numbers | None = None,
    depth: int | None = None,
    channels: Numbers | None = None,
    groups: int | None = None,
    support_mask: bool | None = None,
) -> dict[str, Any]:
    """Arguments of `hsnet.model.HSNet` for choices about the learner, for `RunConfig.learner`.

    Args:
        recipe: the features that it will read.
        head: "hsnet", or "hsnet+bg", which also sees the support's background.
        kernel: of the 4D convolutions, a key of `hsnet.kernels.KERNELS`.
        layers: "all", "shallow" or "deep" (the first or last layer of every level, as in the paper's Fig. 5), or
            numbers counted from 1 at the shallowest layer: "3,5,8-11".
        levels: "all", "finest", "deepest", or numbers counted from 1 at the finest level: "2,3".
        depth: convolutions of a squeeze block, 1 to 4. Strides follow from the grids (`squeeze_plan`), channels are
            `squeeze_channels` where `channels` does not say.
        channels: outputs of a squeeze block's convolutions: "16,64,128". As many as the depth.
        groups: of the normalisations; must divide all channels.
        support_mask: False correlates with the whole support photo, not with its object alone.

    None is the published choice.

    Returns:
        What differs from `recipe.learner_arguments()` and from the defaults of `HSNet`: nothing for published choices.

    Raises:
        ConfigError: a choice that cannot be meant, layers or levels that the features do not hold, a depth whose
            strides do not bring the levels together.
    """
    base = recipe.learner_arguments()
    found: dict[str, Any] = {}
    if _one_of("kernel", kernel or KERNEL, KERNELS) != KERNEL:
        found["kernel"] = kernel
    if _one_of("head", head or LEARNED_HEADS[0], LEARNED_HEADS) == "hsnet+bg":
        found["background"] = True
    if support_mask is False:
        found["support_mask"] = False
    if groups not in (None, GROUPS):
        found["groups"] = groups

    picked = pick(recipe, layers, levels)
    used = [number for number, of_level in enumerate(picked) if of_level]
    if [len(of_level) for of_level in picked] != base["layers"]:
        found["layers"] = [len(picked[number]) for number in used]
        found["picked"] = picked

    widths = None if channels is None else tuple(_numbers("channels", channels))
    if depth is None:
        depth = len(CHANNELS) if widths is None else len(widths)
    grids = [shape[1:3] for shape in reversed(recipe.level_shapes())]
    kernels, strides = (
        [list(base.get(name, published)[number]) for number in used if depth == len(CHANNELS)]
        for name, published in (("kernels", SQUEEZE_KERNELS), ("strides", SQUEEZE_STRIDES))
    )
    if depth != len(CHANNELS):
        kernels, strides = ([list(of_level) for of_level in part] for part in _plan([grids[n] for n in used], depth))
    if widths is None:
        widths = squeeze_channels(depth)
    if len(widths) != depth:
        raise ConfigError(f"{len(widths)} channels, {_text(widths)}, cannot be those of a depth of {depth}.")
    if widths != CHANNELS:
        found["channels"] = list(widths)
    for name, planned, published in (("kernels", kernels, SQUEEZE_KERNELS), ("strides", strides, SQUEEZE_STRIDES)):
        if planned != [list(of_level) for of_level in base.get(name, published)]:
            found[name] = planned
    with torch.device("meta"):
        HSNet(**{**base, **found})  # groups that divide the channels, and whatever else it asks for
    return found


def pick(recipe: Recipe, layers: Numbers | None = None, levels: Numbers | None = None) -> list[list[int]]:
    """Which layers of which level are used, see `learner_arguments`.

    Returns:
        For every level of the features, deepest first, layers counted from 0 at the level's shallowest.

    Raises:
        ConfigError: the features do not hold them, or nothing is left.
    """
    counts = recipe.layout.layers  # finest first
    ends = [sum(counts[: level + 1]) for level in range(len(counts))]
    if layers in (None, "all"):
        chosen = set(range(1, ends[-1] + 1))
    elif layers in ("shallow", "deep"):
        of_level = [(end - count + 1, end) for count, end in zip(counts, ends, strict=True)]
        chosen = {first if layers == "shallow" else last for first, last in of_level}
    else:
        held = f"the features have {ends[-1]} layers ({_text(counts)} per level, finest level first)"
        chosen = _chosen("layers", layers, ends[-1], held, ("all", "shallow", "deep"))
    words = {None: range(1, len(counts) + 1), "all": range(1, len(counts) + 1), "finest": [1], "deepest": [len(counts)]}
    if isinstance(levels, str | None) and levels in words:
        kept = set(words[levels])
    else:
        held = f"the features have {len(counts)} {'level' if len(counts) == 1 else 'levels'}"
        kept = _chosen("levels", levels, len(counts), held, ("all", "finest", "deepest"))
    picked = [
        [layer for layer in range(count) if end - count + layer + 1 in chosen] if level in kept else []
        for level, (count, end) in enumerate(zip(counts, ends, strict=True), 1)
    ]
    if not any(picked):
        raise ConfigError(
            f"layers '{_text(layers or 'all')}' and levels '{_text(levels or 'all')}' have no layer in common: nothing "
            "is left to learn."
        )
    return picked[::-1]


def _plan(grids: Sequence[tuple[int, int]], depth: int) -> tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]]:
    try:
        return squeeze_plan(grids, depth)
    except ConfigError as error:
        if not 1 <= depth <= MOST_CONVOLUTIONS:
            raise
        fitting = [str(other) for other in range(1, MOST_CONVOLUTIONS + 1) if other != depth and _fits(grids, other)]
        raise ConfigError(f"{error} Depths that fit these levels: {', '.join(fitting) or 'none'}.") from None


def _fits(grids: Sequence[tuple[int, int]], depth: int) -> bool:
    try:
        squeeze_plan(grids, depth)
    except ConfigError:
        return False
    return True


def _one_of(name: str, value: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    if value not in known:
        raise ConfigError(f"Unknown {name} '{value}'. Choose one of: {', '.join(known)}.")
    return value


def _chosen(name: str, value: Numbers | None, count: int, held: str, words: Sequence[str]) -> set[int]:
    numbers = set(_numbers(name, value, words))
    if missing := sorted(number for number in numbers if not 1 <= number <= count):
        raise ConfigError(f"{name} '{_text(value)}' asks for {_text(missing)}, but {held}. Count from 1.")
    return numbers


def _numbers(name: str, value: Numbers | None, words: Sequence[str] = ()) -> list[int]:
    """Whole numbers of "3,5,8-11", a number or numbers."""
    parts = value.split(",") if isinstance(value, str) else [value] if isinstance(value, int) else value or []
    numbers: list[int] = []
    for part in parts:
        match = re.fullmatch(r"\s*(\d{1,6})(?:\s*-\s*(\d{1,6}))?\s*", str(part))
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            numbers = []
            break
        numbers += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not numbers:
        known = f"{', '.join(words)} or " if words else ""
        raise ConfigError(f"{name} must be {known}numbers such as 3,5,8-11, got '{_text(value)}'.")
    return numbers


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
