"""What a recipe says of a network that is not in the built-in table: how its photos are made and what comes out.

With it a store of such a network opens, trains and evaluates where the program that ran the network is not installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from hsnet.backbone import Tap
from hsnet.errors import ConfigError
from pipeline.common.fields import from_json, require_types

AUTOCAST = ("", "bfloat16", "float16")
"""Arithmetic of the network beside float32, which is ""."""

_LARGEST_GRID, _LARGEST_WIDTH, _MOST_LEVELS = 4096, 1 << 16, 64


@dataclass(frozen=True)
class LevelLayout:
    """One level: its grid and the channels of its layers, shallow to deep."""

    rows: int
    columns: int
    channels: tuple[int, ...]

    def __post_init__(self) -> None:
        require_types(self, "A level of the recipe's network")

    @property
    def grid(self) -> tuple[int, int]:
        return self.rows, self.columns

    @classmethod
    def from_dict(cls, values: object) -> LevelLayout:
        """Read what `dataclasses.asdict` gave, by way of JSON. Raises ConfigError for anything else."""
        return from_json(cls, values, "A level of the recipe's network")


@dataclass(frozen=True, kw_only=True)
class Network:
    """Levels, normalisation and arithmetic of a network at the recipe's image size.

    Raises:
        ConfigError: a field cannot be meant.
    """

    levels: tuple[LevelLayout, ...]
    """Finest grid first; layers as in the recipe's taps."""
    mean: tuple[float, ...]
    """Mean of red, green and blue, 0 to 1: subtracted from photos."""
    std: tuple[float, ...]
    """Photos are divided by it."""
    patch: int = 1
    """The image size is a multiple of this many pixels."""
    autocast: str = ""
    """"bfloat16" or "float16": the network's products are computed so; "" is float32."""
    source: str = field(default="", compare=False)
    """Where the weights came from, in words; "" if unknown. Told, not compared."""
    licence: str = field(default="", compare=False)
    """Licence of the weights; "" if unknown. Told, not compared."""

    def __post_init__(self) -> None:
        require_types(self, "The recipe's network")
        sides = [side for level in self.levels for side in level.grid]
        widths = [width for level in self.levels for width in level.channels]
        fits = (
            1 <= len(self.levels) <= _MOST_LEVELS
            and all(level.channels for level in self.levels)
            and all(1 <= side <= _LARGEST_GRID for side in sides)
            and all(1 <= width <= _LARGEST_WIDTH for width in widths)
            and self.patch >= 1
        )
        if not fits:
            raise ConfigError(f"The recipe's network has levels or a patch that cannot be meant: {self!r}.")
        for name, least in (("mean", -math.inf), ("std", 0.0)):
            values = getattr(self, name)
            if len(values) != 3 or not all(type(v) is float and math.isfinite(v) and v > least for v in values):
                raise ConfigError(f"The recipe's network must have three numbers as {name}, got {values!r}.")
        if self.autocast not in AUTOCAST:
            raise ConfigError(f"Unknown autocast {self.autocast!r}. Choose one of: bfloat16, float16.")

    def named(self, taps: Sequence[str]) -> tuple[Tap, ...]:
        """The taps of these names, which are as many as there are layers."""
        widths = [(level, width) for level, layout in enumerate(self.levels) for width in layout.channels]
        return tuple(Tap(node, level, width) for node, (level, width) in zip(taps, widths, strict=True))

    def to_dict(self) -> dict[str, object]:
        """Plain JSON values; `from_dict` reads them back."""
        values = {**asdict(self), "mean": list(self.mean), "std": list(self.std)}
        return {**values, "levels": [{**asdict(level), "channels": list(level.channels)} for level in self.levels]}

    @classmethod
    def from_dict(cls, values: object) -> Network:
        """Read what `to_dict` gave. Raises ConfigError for anything else."""
        return from_json(cls, values, "The recipe's network", may_lack=())
