"""The recipe of stored features: everything that changes one of their values, and nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from hsnet.backbone import IMAGENET_MEAN, IMAGENET_STD, TapLayout, backbone_spec
from hsnet.errors import ConfigError, ImageSizeError
from hsnet.model import squeeze_plan, squeezed_grids
from pipeline.common.fields import from_json, require_types
from pipeline.features.network import AUTOCAST, Network

CODED = "coded"
"""Precision of features in a byte budget: see `pipeline.features.budgeted`."""

DTYPES = {"float32": np.float32, "float16": np.float16, "int8": np.int8}
"""Precision -> type of a stored value. int8 keeps directions only: see `pipeline.features.precision`."""

TIMM = "timm:"
"""Begins the names of networks that timm gives: see `pipeline.features.timm_backbone`."""
RESIZE = "Pillow bilinear to a square; labels nearest, source = floor(target * in / out)"
LARGEST_IMAGE = 4096
UNKNOWN = "sha256:" + "0" * 64
"""Stands for a digest in a recipe of which only the size is asked."""
STORE_FORMAT = 1
"""Version of the store's layout. A reader refuses a higher one."""


def normalisation_text(mean: tuple[float, ...], std: tuple[float, ...]) -> str:
    """What a recipe says about the normalisation of photos."""
    return f"rgb/255, minus {mean}, over {std}"


NORMALISATION = normalisation_text(IMAGENET_MEAN, IMAGENET_STD)


@dataclass(frozen=True, kw_only=True)
class Coding:
    """What the budgeted codec was asked for, what it was fitted on and what came out.

    Raises:
        ConfigError: a field cannot be meant.
    """

    bytes_per_image: int
    """The budget of an image's features."""
    images: int
    """Training-split images of the sample it was fitted on."""
    positions: int
    """Feature vectors of a layer in the sample, at most."""
    seed: int
    """Seed of the sample."""
    fit: str
    """"sha256:..." over the arrays of the fit."""
    level_bytes: tuple[int, ...]
    """Bytes of a position, all layers of the level together; finest level first."""

    def __post_init__(self) -> None:
        whole = (self.bytes_per_image, self.images, self.positions, self.seed, *self.level_bytes)
        if not all(type(value) is int and 0 <= value < 1 << 40 for value in whole) or 0 in self.level_bytes:
            raise ConfigError(f"The recipe's coding holds numbers that cannot be meant: {self}.")
        if not (isinstance(self.fit, str) and re.fullmatch(r"sha256:[0-9a-f]{64}", self.fit)):
            raise ConfigError(f"The recipe's coding must name its fit by 'sha256:' and 64 digits, got {self.fit!r}.")

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values; `from_dict` reads them back."""
        return {**asdict(self), "level_bytes": list(self.level_bytes)}

    @classmethod
    def from_dict(cls, values: object) -> Coding:
        """Read what `to_dict` gave. Raises ConfigError for anything else."""
        return from_json(cls, values, "The recipe's coding")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Two equal recipes give equal features of the same photo on the same kind of device.

    Number of workers, paths and batch sizes change no feature, so they are not in it.

    >>> a = Recipe.of("squeezenet1_1", "sha256:" + "0" * 64, image_size=64)
    >>> a == Recipe.from_json(a.to_json())
    True
    >>> a.differences(Recipe.of("squeezenet1_1", "sha256:" + "0" * 64, image_size=96))
    {'image_size': (64, 96)}

    Raises:
        ConfigError: a field cannot be meant, e.g. an unknown precision.
    """

    backbone: str
    """A key of `hsnet.backbone.BACKBONES`, or "timm:" and a name of timm's."""
    weights: str
    """"sha256:..." over the tensors used, not a file name: names are reused, bytes are not."""
    image_size: int = 400
    """Side of the square network input, pixels."""
    precision: str = "int8"
    """float32 (exact), float16, int8, or coded (in a byte budget)."""
    taps: tuple[str, ...]
    """Layers read, shallow to deep."""
    normalisation: str = NORMALISATION
    resize: str = RESIZE
    format: int = STORE_FORMAT
    coding: Coding | None = None
    """How features are coded; None if they are not."""
    network: Network | None = None
    """What the table of built-in networks would say of another network; None for those in it."""
    autocast: str = ""
    """"bfloat16" or "float16": a built-in network's products are computed so; "" is float32. Others: `network`."""

    def __post_init__(self) -> None:
        require_types(self, "A recipe")
        if not re.fullmatch(r"sha256:[0-9a-f]{64}", self.weights):
            raise ConfigError(f"Recipe field 'weights' must be 'sha256:' and 64 hex digits, got {self.weights!r}.")
        if self.precision not in (*DTYPES, CODED):
            raise ConfigError(f"Unknown precision '{self.precision}'. Choose one of: {', '.join(DTYPES)}.")
        if (self.precision == CODED) != isinstance(self.coding, Coding):
            raise ConfigError(f"Recipe field 'coding' does not fit precision '{self.precision}': {self.coding!r}.")
        if not 1 <= self.image_size <= LARGEST_IMAGE:
            raise ConfigError(f"Image size must be 1 to {LARGEST_IMAGE} pixels, got {self.image_size}.")
        if self.backbone.startswith(TIMM) != isinstance(self.network, Network):
            raise ConfigError(f"Recipe field 'network' does not fit backbone '{self.backbone}': {self.network!r}.")
        if self.autocast not in AUTOCAST or (self.autocast and self.network is not None):
            raise ConfigError(f"Recipe field 'autocast' does not fit backbone '{self.backbone}': {self.autocast!r}.")
        if self.network is not None:
            count = sum(len(level.channels) for level in self.network.levels)
            if count != len(self.taps):
                raise ConfigError(f"The recipe's network has {count} layers, its taps are {len(self.taps)}.")
            text = normalisation_text(self.network.mean, self.network.std)
            if self.normalisation != text:
                raise ConfigError(f"Recipe field 'normalisation' must be {text!r}, got {self.normalisation!r}.")

    @classmethod
    def of(cls, backbone: str, weights: str, image_size: int = 400, precision: str = "int8") -> Recipe:
        """The recipe of a built-in network by this version of the program; taps come from the backbone table.

        For any network: `pipeline.features.backbones.new_recipe`.
        """
        taps = tuple(tap.node for tap in backbone_spec(backbone).taps)
        return cls(backbone=backbone, weights=weights, image_size=image_size, precision=precision, taps=taps)

    @property
    def dtype(self) -> np.dtype:
        """Type of a stored feature value."""
        return np.dtype(np.uint8 if self.coding else DTYPES[self.precision])

    def stored_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """Shape of every level of one image as it is stored: `level_shapes`, or (1, rows, columns, bytes) if coded.

        Raises:
            ConfigError, ShapeError: as `level_shapes`.
        """
        shapes = self.level_shapes()
        if self.coding is None:
            return shapes
        if len(self.coding.level_bytes) != len(shapes):
            raise ConfigError(f"The recipe's coding has {len(self.coding.level_bytes)} levels, not {len(shapes)}.")
        for (layers, _, _, channels), nbytes in zip(shapes, self.coding.level_bytes, strict=True):
            if not layers <= nbytes <= layers * channels:
                raise ConfigError(f"The recipe's coding has {nbytes} bytes for {layers} layers of {channels} channels.")
        return tuple((1, *shape[1:3], nbytes) for shape, nbytes in zip(shapes, self.coding.level_bytes, strict=True))

    def level_shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(layers, rows, columns, channels) of every level of one image, finest grid first.

        Raises:
            ConfigError: unknown backbone, or the taps are not those this version reads from it.
            ShapeError: the backbone cannot read so small an image.
        """
        if self.network is not None:
            return tuple((len(level.channels), *level.grid, max(level.channels)) for level in self.network.levels)
        spec = backbone_spec(self.backbone)
        taps = tuple(tap.node for tap in spec.taps)
        if self.taps != taps:
            raise ConfigError(f"This version reads {taps} from {self.backbone}, the recipe names {self.taps}.")
        size = (self.image_size, self.image_size)
        return tuple(spec.level_shape(level, size) for level in range(spec.levels))

    @property
    def layout(self) -> TapLayout:
        """Taps and levels of the network. Raises ConfigError: unknown backbone."""
        if self.network is None:
            return backbone_spec(self.backbone)
        return TapLayout(self.backbone, self.network.named(self.taps))

    def learner_arguments(self) -> dict[str, Any]:
        """The arguments of `hsnet.model.HSNet` that follow from these features.

        Built-in networks have the published kernels and strides; for others `squeeze_plan` chooses them.

        Raises:
            ConfigError: no learner could mix these levels.
        """
        arguments: dict[str, Any] = {"layers": list(reversed(self.layout.layers))}
        if self.network is not None:
            kernels, strides = squeeze_plan([level.grid for level in reversed(self.network.levels)])
            arguments |= {"kernels": [list(sides) for sides in kernels], "strides": [list(steps) for steps in strides]}
        return arguments

    def require_trainable(self) -> None:
        """Refuse an image size whose levels end at different support grids: no learner could mix them.

        Raises:
            ConfigError: a network of timm's whose levels no learner could mix.
            ImageSizeError: names the grids of a built-in network, and the nearest sizes that work.
        """
        if self.network is not None:
            self.learner_arguments()
            return
        if _ends_agree(self.backbone, self.image_size):
            return
        ends = squeezed_grids([shape[1:3] for shape in reversed(self.level_shapes())])
        sides = (range(self.image_size - 1, 31, -1), range(self.image_size + 1, LARGEST_IMAGE + 1))
        near = [next((size for size in side if _ends_agree(self.backbone, size)), None) for side in sides]
        raise ImageSizeError(
            f"{self.backbone} at {self.image_size} px gives levels whose support grids end at "
            f"{', '.join(f'{rows}x{columns}' for rows, columns in ends)} (deepest first): they cannot be mixed. "
            f"Nearest image sizes that work: {' and '.join(str(size) for size in near if size)}. Nothing was written.",
            [size for size in near if size],
        )

    def differences(self, other: Recipe) -> dict[str, tuple[object, object]]:
        """Field -> (value here, value in `other`), for the fields that differ."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        for name in _OPTIONAL:
            mine, theirs = pairs[name]
            if mine and theirs:
                del pairs[name]
                compared = [f.name for f in fields(mine) if f.compare]
                pairs |= {f"{name} {part}": (getattr(mine, part), getattr(theirs, part)) for part in compared}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values; `from_dict` reads them back."""
        parts = {name: getattr(self, name) for name in _OPTIONAL}  # recipes without are written as they always were
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*_OPTIONAL, "autocast")}
        optional = {name: part.to_dict() for name, part in parts.items() if part}
        return {**values, "taps": list(self.taps), **optional, **({"autocast": self.autocast} if self.autocast else {})}

    def identity(self) -> dict[str, object]:
        """`to_dict` less what is only told: where weights came from, and their licence."""
        network = self.network and replace(self.network, source="", licence="")
        return replace(self, network=network).to_dict()

    def to_json(self) -> str:
        """The recipe as one line of JSON."""
        return json.dumps(self.to_dict())

    @classmethod
    def from_dict(cls, values: object) -> Recipe:
        """Read what `to_dict` gave. Raises ConfigError for anything else."""
        return from_json(cls, values, "A recipe", may_lack=(*_OPTIONAL, "autocast"))

    @classmethod
    def from_json(cls, text: str) -> Recipe:
        """Read what `to_json` gave. Raises ConfigError for anything else."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"The recipe is not JSON: {error}.") from None
        return cls.from_dict(values)


_OPTIONAL = ("coding", "network")
"""Fields that are written only where they are not None."""


def _ends_agree(backbone: str, image_size: int) -> bool:
    spec = backbone_spec(backbone)
    shapes = [spec.level_shape(level, (image_size, image_size)) for level in reversed(range(spec.levels))]
    return len(set(squeezed_grids([shape[1:3] for shape in shapes]))) == 1


def difference_lines(
    differences: Mapping[str, tuple[object, object]], first: str = "stored", second: str = "wanted"
) -> str:
    """One indented line per differing field with both values, for error messages.

    >>> print(difference_lines({"backbone": ("resnet101", "resnet50")}))
      backbone      stored 'resnet101', wanted 'resnet50'
    """
    return "\n".join(f"  {name:<13} {first} {a!r}, {second} {b!r}" for name, (a, b) in differences.items())
