"""Backbones that timm builds: what is read of them by rule, their weights, and the forward pass.

Its description goes into the recipe (`pipeline.features.network`), so that whoever opens a store needs no timm.

The rule, where `--taps` does not say otherwise:

- a plain transformer (every block on one grid): the last third of its blocks as one level. Class and register tokens
  are dropped, the final norm is applied to each, as timm's `forward_intermediates(norm=True)` does, and the position
  embedding is resampled to the image size.
- any other network: of its last three strides, every block of the stage, as HSNet reads a ResNet; where blocks hand
  on tokens instead of maps, or there are none, the stages' outputs, as timm's feature interface gives them. Nobody
  but the network knows the order of tokens in the middle of a stage.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hsnet.backbone import Backbone, require_images
from hsnet.errors import ConfigError, ImageSizeError, ShapeError
from pipeline.features.network import LevelLayout, Network
from pipeline.features.recipe import LARGEST_IMAGE, Recipe
from pipeline.features.timm_registry import RegistryEntry, build, check_names, entry, stages

SHARE_OF_BLOCKS = 3
"""Share of a plain transformer's blocks that is read, one in so many: the last ones."""
STRIDES = 3
"""Strides of other networks that are read: the last ones."""
_TRIED_SIZES = 24


def describe(
    backbone: str, image_size: int, taps: str | None = None, autocast: str = ""
) -> tuple[tuple[str, ...], Network]:
    """Names of the layers that are read, and what comes out of them; nothing is computed.

    Args:
        taps: layers instead of the rule's: block numbers of a plain transformer, names of modules otherwise, commas
            between them. A slash begins another level; without one, a level is made of the layers of each grid.
        autocast: arithmetic of the forward pass, see `Network.autocast`.

    Raises:
        ConfigError: no such network, none that gives maps, or not at this image size (names the nearest two that
            work); layers that there are not.
    """
    about = entry(backbone)
    model = _Model(backbone, about)
    model.require_size(image_size)
    names, groups = model.chosen(taps, image_size)
    shapes = model.shapes(names, image_size)
    if groups is None:  # finest grid first, in the network's order within one
        order = sorted(range(len(names)), key=lambda tap: -math.prod(shapes[tap][1:]))
        names, shapes = tuple(names[tap] for tap in order), [shapes[tap] for tap in order]
        groups = []
        for tap, shape in enumerate(shapes):
            if tap and shape[1:] == shapes[tap - 1][1:]:
                groups[-1] += 1
            else:
                groups.append(1)
    levels, first = [], 0
    for count in groups:
        group = shapes[first : first + count]
        if len({shape[1:] for shape in group}) > 1:
            raise ConfigError(
                f"--taps puts layers of several grids into one level of {backbone}: "
                f"{', '.join(f'{name} {h}x{w}' for name, (_, h, w) in zip(names[first:], group, strict=False))}. "
                "All layers of a level share one grid: begin another level with a slash, or leave slashes out."
            )
        levels.append(LevelLayout(*group[0][1:], tuple(shape[0] for shape in group)))
        first += count
    sizes = [math.prod(level.grid) for level in levels]
    if sizes != sorted(sizes, reverse=True):
        raise ConfigError(f"--taps of {backbone}: levels go from the finest grid to the coarsest, got {taps}.")
    return names, Network(levels=tuple(levels), mean=about.mean, std=about.std, patch=model.patch, autocast=autocast)


class TimmBackbone(Backbone):
    """A network of timm's, read as a recipe says.

    Args:
        recipe: of a "timm:" backbone.
        state_dict: its weights by timm's names at the network's own image size, without classifier.

    Raises:
        ConfigError: timm is not installed, or another version's network has other layers.
        WeightsError: names or shapes are not those of the network.
    """

    def __init__(self, recipe: Recipe, state_dict: Mapping[str, Tensor]) -> None:
        super().__init__()
        if recipe.network is None:
            raise ConfigError(f"{recipe.backbone} is no network of timm's.")
        self.spec = recipe.layout
        self.mean, self.std = recipe.network.mean, recipe.network.std
        self.image_size = recipe.image_size
        self.autocast = {"": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[recipe.network.autocast]
        self._shapes = [(tap.channels, *recipe.network.levels[tap.level].grid) for tap in recipe.layout.taps]
        check_names(recipe.backbone, state_dict)
        model = build(recipe.backbone)
        model.load_state_dict(dict(state_dict), strict=False)  # but for num_batches_tracked
        self.reader = _Reader(model, recipe.taps)
        if not self.reader.plain:
            # Positions before channels, as the levels are kept.
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        _set_size(model, recipe.image_size)
        self.network = model
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def taps(self, images: Tensor) -> list[Tensor]:
        require_images(images)
        if tuple(images.shape[2:]) != (self.image_size, self.image_size):
            raise ShapeError(f"This network was built for {self.image_size} px, got {tuple(images.shape[2:])}.")
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            maps = self.reader.read(self.network, images)
        for tap, values, shape in zip(self.spec.taps, maps, self._shapes, strict=True):
            if tuple(values.shape[1:]) != shape:
                raise ShapeError(
                    f"{self.spec.name}: {tap.node} gives {tuple(values.shape[1:])} (channels, rows, columns), the "
                    f"recipe says {shape}. Another version of timm made it; use that one, or extract anew."
                )
        return [values.float() for values in maps]


class _Model:
    """A network without numbers, asked for the shapes of its layers."""

    def __init__(self, backbone: str, about: RegistryEntry) -> None:
        self.backbone, self.about = backbone, about
        self.network = build(backbone, meta=True)
        self.plain = _is_plain(self.network)
        side = getattr(getattr(self.network, "patch_embed", None), "patch_size", 1)
        self.patch = int(side[0] if isinstance(side, Sequence) else side) if self.plain else 1

    def require_size(self, image_size: int) -> None:
        """Refuse an image size that the network cannot read; names the nearest two that work."""
        if image_size % self.patch:
            low = image_size // self.patch * self.patch
            raise ImageSizeError(
                f"{self.backbone} reads patches of {self.patch} pixels, which do not divide an image size of "
                f"{image_size}. Nearest sizes: {f'{low} and ' if low else ''}{low + self.patch}. Nothing was written.",
                [size for size in (low, low + self.patch) if size],
            )
        reason = self._trouble(image_size)
        if reason is None:
            return
        own = self.about.input_size
        step = self.patch if self.plain else max(entry["reduction"] for entry in stages(self.network))
        if self._trouble(own) is not None:
            raise ConfigError(f"{self.backbone} gives no feature maps: {reason}.")
        aligned = image_size // step * step
        below = (size for size in range(aligned - (aligned == image_size) * step, 0, -step))
        above = (size for size in range(aligned + step, LARGEST_IMAGE + 1, step))
        near = [self._first(below, min(own, image_size)), self._first(above, max(own, image_size))]
        works = [size for size in near if size is not None and size != image_size] or [own]
        raise ImageSizeError(
            f"{self.backbone} cannot read images of {image_size} px ({reason}). Nearest sizes that work: "
            f"{' and '.join(map(str, works))}. Nothing was written.",
            works,
        )

    def _first(self, sizes: Iterator[int], own: int) -> int | None:
        for _, size in zip(range(_TRIED_SIZES), sizes, strict=False):
            if self._trouble(size) is None:
                return size
        return own if self._trouble(own) is None else None

    def _trouble(self, image_size: int) -> str | None:
        """Why the network cannot read an image size; None if it can."""
        try:
            self.chosen(None, image_size)
        except (RuntimeError, AssertionError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        return None

    def chosen(self, taps: str | None, image_size: int) -> tuple[tuple[str, ...], list[int] | None]:
        """Names of the layers to read, and how many are in each level where that was said."""
        if taps is None:
            return self._by_rule(image_size), None
        levels = [[name.strip() for name in level.split(",")] for level in taps.split("/")]
        if self.plain:
            levels = [[f"blocks.{name}" if name.isdecimal() else name for name in level] for level in levels]
        names = [name for level in levels for name in level]
        if len(set(names)) < len(names):
            raise ConfigError(f"--taps {taps} names a layer twice.")
        known = [i["module"] for i in stages(self.network)] if self.plain else dict(self.network.named_modules())
        for name in names:
            if name not in known or not name:
                near = difflib.get_close_matches(name, list(known), 3, 0.5)
                what = f"its blocks are 0 to {len(known) - 1}" if self.plain else f"nearest: {', '.join(near)}"
                raise ConfigError(f"--taps: {self.backbone} has no layer '{name}'; {what}.")
        if self.plain and names != sorted(names, key=list(known).index):
            raise ConfigError(f"--taps {taps}: give the blocks from shallow to deep.")
        return tuple(names), [len(level) for level in levels] if "/" in taps else None

    def shapes(self, names: Sequence[str], image_size: int) -> list[tuple[int, int, int]]:
        """(channels, rows, columns) of layers.

        Raises:
            ConfigError: a layer gives no map.
        """
        try:
            maps = self._read(names, image_size)
        except (RuntimeError, AssertionError, ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{self.backbone} gives no feature maps: {str(error).rstrip('.')}.") from None
        return [(values.shape[1], values.shape[2], values.shape[3]) for values in maps]

    def _read(self, names: Sequence[str], image_size: int) -> list[Tensor]:
        reader = _Reader(self.network, names)
        with torch.no_grad(), torch.device("meta"):
            _set_size(self.network, image_size)
            return reader.read(self.network, torch.empty(1, 3, image_size, image_size))

    def _by_rule(self, image_size: int) -> tuple[str, ...]:
        info = stages(self.network)
        if self.plain:
            names = [item["module"] for item in info[-max(1, len(info) // SHARE_OF_BLOCKS) :]]
            self._read(names, image_size)
            return tuple(names)
        strides = sorted({item["reduction"] for item in info})[-STRIDES:]
        last = [item["module"] for item in info if item["reduction"] in strides]
        blocks = [self._blocks(stage) for stage in last]
        outputs = self._outputs([*last, *(name for names in blocks for name in names)], image_size)
        found: list[str] = []
        for stage, names in zip(last, blocks, strict=True):
            shape = outputs.get(stage)
            same = [name for name in names if shape is not None and outputs.get(name) == shape]
            if not same:
                self._read(last, image_size)
                return tuple(last)
            found += same
        self._read(found, image_size)
        return tuple(found)

    def _blocks(self, stage: str) -> list[str]:
        """Names of the blocks of a stage, first to last."""
        module = self.network.get_submodule(stage)
        inner = getattr(module, "blocks", None)
        container, prefix = (inner, f"{stage}.blocks") if isinstance(inner, nn.Module) else (module, stage)
        if not isinstance(container, nn.Sequential | nn.ModuleList):
            return []
        return [f"{prefix}.{name}" for name, _ in container.named_children()]

    def _outputs(self, names: Sequence[str], image_size: int) -> dict[str, tuple[int, ...]]:
        """(channels, rows, columns) of the modules that give a map."""
        kept: dict[str, tuple[int, ...]] = {}

        def keep(name: str, output: object) -> None:
            shape = _map_shape(self.network, output)
            if shape is not None:
                kept[name] = shape

        with torch.no_grad(), torch.device("meta"), _hooked(self.network, names, keep):
            _set_size(self.network, image_size)
            self.network.forward_features(torch.empty(1, 3, image_size, image_size))  # type: ignore[operator]
        return kept


class _Reader:
    """Runs a network as far as its layers reach and hands them out as (B, C, H, W)."""

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        known = [item["module"] for item in stages(network)]
        self.names = tuple(names)
        self.plain = _is_plain(network)
        # Stage outputs (and a plain transformer's blocks) come through timm's own interface, in the right order.
        through_timm = all(name in known for name in names) and hasattr(network, "forward_intermediates")
        self.indices = [known.index(name) for name in names] if through_timm else None
        self.format = "NLC" if self.plain else "NCHW"

    def read(self, network: Any, images: Tensor) -> list[Tensor]:
        if self.indices is None:
            return self._hooked(network, images)
        read = partial(
            network.forward_intermediates,
            images,
            indices=sorted(self.indices),
            norm=self.plain,
            stop_early=True,
            intermediates_only=True,
        )
        try:
            maps = read(output_fmt=self.format)
        except AssertionError:
            if self.format == "NCHW":
                raise
            self.format = "NCHW"
            maps = read(output_fmt=self.format)
        if self.format == "NLC":  # a view, positions before channels: as the levels are kept
            maps = [_as_map(tokens) for tokens in maps]
        by_index = dict(zip(sorted(self.indices), maps, strict=True))
        return [by_index[index] for index in self.indices]

    def _hooked(self, network: Any, images: Tensor) -> list[Tensor]:
        kept: dict[str, Tensor] = {}
        versions: dict[str, int] = {}

        def keep(name: str, output: object) -> None:
            shape = _map_shape(network, output)
            if shape is None or not isinstance(output, Tensor):
                raise ValueError(f"layer '{name}' gives no map")
            # What follows may write into it, as an addition in place does.
            kept[name] = output if tuple(output.shape[1:]) == shape else output.permute(0, 3, 1, 2)
            versions[name] = _version(output)
            if len(kept) == len(self.names):
                raise _Enough

        with _hooked(network, self.names, keep), contextlib.suppress(_Enough):
            network.forward_features(images)
        missing = [name for name in self.names if name not in kept]
        if missing:
            raise ValueError(f"layer '{missing[0]}' is not run")
        written = [name for name in self.names if _version(kept[name]) != versions[name]]
        if written:
            raise ValueError(f"layer '{written[0]}' is overwritten by what follows it")
        return [kept[name] for name in self.names]


def _version(values: Tensor) -> int:
    """Grows with every change in place; tensors of inference mode do not count theirs."""
    return 0 if values.is_inference() else values._version


class _Enough(Exception):
    """The last layer that is wanted has been run."""


@contextlib.contextmanager
def _hooked(network: nn.Module, names: Sequence[str], keep: Callable[[str, object], None]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in names:
            hook = network.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: keep(name, output)
            )
            stack.callback(hook.remove)
        yield


def _map_shape(network: nn.Module, output: object) -> tuple[int, ...] | None:
    """(channels, rows, columns) of a module's output for a square image; None if it is no map."""
    if not isinstance(output, Tensor) or output.ndim != 4:
        return None
    first, second, third = output.shape[1:]
    last = first == second and (first != third or getattr(network, "output_fmt", None) == "NHWC")
    if not last and second != third:
        return None
    return (third, first, second) if last else (first, second, third)


def _as_map(tokens: Tensor) -> Tensor:
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens are no square grid")
    return tokens.unflatten(1, (side, side)).permute(0, 3, 1, 2)


def _is_plain(network: nn.Module) -> bool:
    """Whether all blocks of a network work on one grid."""
    info = stages(network)
    return (
        len(info) > 1 and len({item["reduction"] for item in info}) == 1 and hasattr(network, "forward_intermediates")
    )


def _set_size(network: Any, image_size: int) -> None:
    """Resample what depends on the image size, such as a position embedding."""
    if hasattr(network, "set_input_size"):
        network.set_input_size(img_size=(image_size, image_size))
