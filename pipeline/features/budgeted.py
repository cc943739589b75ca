"""The budgeted codec: features in a byte budget, by directions that matter and levels that they are worth.

A feature vector is divided by its norm and turned into its layer's own directions, strongest first. Each direction
that is kept has a number of levels by its variance (`pipeline.features.allocation`), placed by Lloyd and Max's rule,
and a byte holds the levels of a few directions as digits of one number. Reading is a table lookup: a byte is worth a
few coordinates. An inner product is the same in any directions, so nothing is turned back, and nothing is normalised
again: coordinates are those of a unit vector less what the codec dropped.

Dimension key: B images, L layers of a level, H W grid, C channels, R directions kept, P positions.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hsnet.errors import StoreError
from pipeline.features.allocation import LEVELS, Run, allocate
from pipeline.features.level_search import LevelSearch
from pipeline.features.precision import check_levels

_ITERATIONS = 20
_FEW = 16


@dataclass(frozen=True)
class LayerCode:
    """How vectors of one layer become bytes. Bytes that hold as many directions as each other stand together.

    Raises:
        StoreError: the parts do not fit each other.
    """

    basis: Tensor
    """(C, R) float32, orthonormal columns."""
    counts: Tensor
    """(R,) int32: levels of each direction, 1 to 256."""
    places: Tensor
    """(R,) int32: the byte of a position that each direction is in, never descending."""
    levels: Tensor
    """(R, 256) float32: coordinates of a direction's levels, ascending; infinite beyond its count."""

    def __post_init__(self) -> None:
        rank = self.basis.shape[-1]
        fits = (
            self.basis.ndim == 2
            and 1 <= rank <= len(self.basis)
            and self.counts.shape == self.places.shape == (rank,)
            and self.levels.shape == (rank, LEVELS)
            and bool(((self.counts >= 1) & (self.counts <= LEVELS)).all())
            and bool(torch.isfinite(self.basis).all())
            and int(self.places[0]) == 0
            and bool(((self.places.diff() == 0) | (self.places.diff() == 1)).all())
            and bool((torch.isfinite(self.levels) == (torch.arange(LEVELS) < self.counts[:, None])).all())
        )
        if not fits or any(math.prod(run) > LEVELS for run in self.runs):
            raise StoreError("The fit of a coded store is damaged: its parts do not fit each other.")

    @property
    def rank(self) -> int:
        """Directions kept."""
        return self.basis.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of a position."""
        return int(self.places[-1]) + 1

    @cached_property
    def runs(self) -> list[Run]:
        """Levels of the directions of every byte."""
        return [tuple(run.tolist()) for run in self.counts.split(self.places.bincount().tolist())]

    @cached_property
    def groups(self) -> list[tuple[int, int]]:
        """(bytes, directions in each) of the bytes that are alike, in order."""
        return [(len(list(alike)), width) for width, alike in groupby(map(len, self.runs))]

    @cached_property
    def strides(self) -> Tensor:
        """(R,) int32: what a level of a direction counts in its byte."""
        strides = [math.prod(run[:i]) for run in self.runs for i in range(len(run))]
        return torch.tensor(strides, dtype=torch.int32)

    @cached_property
    def thresholds(self) -> Tensor:
        """(R, 255): between neighbouring levels."""
        middle = (self.levels[:, 1:] + self.levels[:, :-1]) / 2
        return torch.where(torch.isfinite(middle), middle, torch.inf).contiguous()

    @cached_property
    def tables(self) -> list[Tensor]:
        """Per group (bytes * 256, directions): coordinates of every value of a byte."""
        digits = torch.arange(LEVELS)[None] // self.strides[:, None] % self.counts[:, None]  # (R, 256)
        values = self.levels.gather(1, digits)
        tables, first = [], 0
        for count, width in self.groups:
            part = values[first : first + count * width].view(count, width, LEVELS)
            tables.append(part.transpose(1, 2).reshape(count * LEVELS, width).contiguous())
            first += count * width
        return tables

    def on(self, device: torch.device) -> LayerCode:
        """The same with its lookup tables on a device."""
        moved = LayerCode(self.basis, self.counts, self.places, self.levels)
        moved.__dict__["tables"] = [table.to(device) for table in self.tables]
        return moved

    @cached_property
    def search(self) -> LevelSearch:
        """What the level of a coordinate counts in its byte."""
        return LevelSearch(self.thresholds.numpy(), self.strides.numpy())

    def encode(self, vectors: Tensor) -> Tensor:
        """(P, C) float32 unit vectors -> (P, bytes) uint8."""
        turned = self.basis.to(vectors.device).t() @ vectors.t()  # (R, P)
        if turned.device.type == "cpu":
            digits = torch.from_numpy(self.search(turned.numpy()))
        else:
            thresholds, strides = self.thresholds.to(turned.device), self.strides.to(turned.device)[:, None]
            digits = (torch.searchsorted(thresholds, turned, out_int32=True) * strides).to(torch.uint8)
        codes = torch.empty(turned.shape[1], self.nbytes, dtype=torch.uint8, device=turned.device)
        place = first = 0
        for count, width in self.groups:
            part = digits[first : first + count * width].unflatten(0, (count, width))
            total = part[:, 0]
            for digit in range(1, width):
                total = total + part[:, digit]  # at most 255
            codes[:, place : place + count] = total.t()
            place, first = place + count, first + count * width
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """(..., bytes) uint8 -> (..., R) float32 coordinates, on the device of the codes."""
        parts, first = [], 0
        for (count, _), table in zip(self.groups, self.tables, strict=True):
            places = torch.arange(count, device=codes.device, dtype=torch.int32) * LEVELS
            numbers = codes[..., first : first + count].int() + places
            parts.append(F.embedding(numbers, table.to(codes.device)).flatten(-2))
            first += count
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class TransformCodec:
    """The fit of a store: how each layer of each level is coded. The layers of a position stand side by side."""

    levels: tuple[tuple[LayerCode, ...], ...]

    @property
    def level_bytes(self) -> tuple[int, ...]:
        """Bytes of a position, all layers of the level together."""
        return tuple(sum(layer.nbytes for layer in level) for level in self.levels)

    @cached_property
    def digest(self) -> str:
        """sha256 over all arrays of the fit."""
        digest = hashlib.sha256()
        for name, array in self.arrays().items():
            digest.update(f"{name} {array.shape} {array.dtype.str}\n".encode() + array.tobytes())
        return "sha256:" + digest.hexdigest()

    def encode(self, levels: Sequence[Tensor], images: Sequence[str] | None = None) -> list[NDArray[np.uint8]]:
        """(B, L, H, W, C) float32 features per level -> (B, 1, H, W, bytes) uint8 per level, on the host.

        Raises:
            StoreError: a value is NaN or infinite; names the image and the level.
        """
        for _ in check_levels(levels, images):
            pass
        return [
            torch.cat(
                [layer.encode(unit_vectors(values[:, row])) for row, layer in enumerate(layers)],
                dim=-1,
            )
            .unflatten(0, (len(values), 1, *values.shape[2:4]))
            .cpu()
            .numpy()
            for values, layers in zip(levels, self.levels, strict=True)
        ]

    def decode(self, codes: Sequence[Tensor]) -> list[Tensor]:
        """(B, 1, H, W, bytes) uint8 per level -> (B, L, H, W, R) float32, R of the level's widest layer.

        A narrower layer ends in zeros. Runs on the device of the codes.
        """
        result = []
        for level, layers in zip(codes, self.levels, strict=True):
            width = max(layer.rank for layer in layers)
            batch, _, rows, columns, _ = level.shape
            out = torch.zeros(batch, len(layers), rows, columns, width, device=level.device)
            first = 0
            for row, layer in enumerate(layers):
                out[:, row, ..., : layer.rank] = layer.decode(level[:, 0, ..., first : first + layer.nbytes])
                first += layer.nbytes
            result.append(out)
        return result

    def on(self, device: torch.device) -> TransformCodec:
        """The same with its lookup tables on a device, moved there once."""
        if device.type == "cpu":
            return self
        if device not in self._moved:
            self._moved[device] = TransformCodec(tuple(tuple(x.on(device) for x in level) for level in self.levels))
        return self._moved[device]

    @cached_property
    def _moved(self) -> dict[torch.device, TransformCodec]:
        return {}

    def arrays(self) -> dict[str, NDArray[np.generic]]:
        """The fit as named arrays, `from_arrays` reads them back."""
        return {
            f"level{k}.layer{row}.{name}": np.ascontiguousarray(getattr(layer, name).cpu().numpy())
            for k, level in enumerate(self.levels)
            for row, layer in enumerate(level)
            for name in _PARTS
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[np.generic]], layers: Sequence[int]) -> TransformCodec:
        """Read what `arrays` gave, for levels of so many layers. Raises StoreError for anything else."""
        try:
            levels = tuple(
                tuple(
                    LayerCode(
                        *(torch.from_numpy(np.array(arrays[f"level{k}.layer{row}.{name}"], dtype))
                          for name, dtype in _PARTS.items())
                    )
                    for row in range(count)
                )
                for k, count in enumerate(layers)
            )  # fmt: skip
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise StoreError(f"The fit of a coded store is damaged: {error!r}.") from None
        return cls(levels)


_PARTS = {"basis": np.float32, "counts": np.int32, "places": np.int32, "levels": np.float32}


def unit_vectors(values: Tensor) -> Tensor:
    """(..., C) -> (P, C) float32 of length 1; zero vectors stay."""
    flat = values.flatten(0, -2).float()
    norm = torch.linalg.vector_norm(flat, dim=-1, keepdim=True)
    return flat / norm.clamp(min=torch.finfo(torch.float32).tiny)


def fit_layers(samples: Sequence[Sequence[Tensor]], positions: Sequence[int], nbytes: int) -> TransformCodec:
    """Fit a codec.

    Args:
        samples: per level and layer (n, C) unit vectors.
        positions: of each level, per image.
        nbytes: of all features of an image.

    Raises:
        ConfigError: the budget is too small, or larger than int8 needs.
    """
    fitted = [[_directions(layer) for layer in level] for level in samples]
    # A correlation's error is, per direction, twice its second moment times what quantising left of its variance.
    runs = allocate(
        [moment * variance for level in fitted for _, moment, variance in level],
        [count for level, count in zip(fitted, positions, strict=True) for _ in level],
        nbytes,
    )
    left = iter(runs)
    return TransformCodec(
        tuple(
            tuple(_place(layer, basis, next(left)) for layer, (basis, _, _) in zip(level, parts, strict=True))
            for level, parts in zip(samples, fitted, strict=True)
        )
    )


def _directions(sample: Tensor) -> tuple[Tensor, NDArray[np.float64], NDArray[np.float64]]:
    """(C, C) directions, strongest first, and per direction the mean square and the variance."""
    values = sample.float()
    moments, basis = torch.linalg.eigh((values.t() @ values).double() / len(values))
    basis = basis.flip(1).float()
    # Either sign of an eigenvector is one; take that of its largest entry.
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    moment = moments.flip(0).clamp(min=0)
    variance = (moment - (values.double().mean(0) @ basis.double()) ** 2).clamp(min=0)
    # Costs must fall: the first direction's variance is small where it is the mean, and it needs its levels as well.
    return basis, moment.numpy(), np.maximum.accumulate(variance.numpy()[::-1])[::-1].copy()


def _place(sample: Tensor, basis: Tensor, runs: Sequence[Run]) -> LayerCode:
    """Put bytes that hold as many directions as each other together, and place the levels."""
    starts = np.cumsum([0, *(len(run) for run in runs)])
    order = sorted(range(len(runs)), key=lambda place: len(runs[place]))
    directions = [d for place in order for d in range(starts[place], starts[place + 1])]
    counts = torch.tensor([count for place in order for count in runs[place]], dtype=torch.int32)
    places = torch.tensor([new for new, place in enumerate(order) for _ in runs[place]], dtype=torch.int32)
    # A byte that is never 255 tells written data from absent data (the store's fill value).
    counts[0] -= int(math.prod(runs[order[0]]) == LEVELS)
    chosen = basis[:, directions].contiguous()
    return LayerCode(chosen, counts, places, place_levels((sample.float() @ chosen).t().contiguous(), counts))


def place_levels(values: Tensor, counts: Tensor) -> Tensor:
    """Lloyd's iteration for many variables at once, on sorted values: a level is the mean of what is nearest to it.

    Args:
        values: (R, n) float32.
        counts: (R,) levels of each.

    Returns:
        (R, 256) float32, ascending, infinite beyond the count.
    """
    levels = torch.full((len(values), LEVELS), torch.inf)
    few = counts <= _FEW  # most directions: the rest would have them carry 256 levels each
    for chosen in (few.nonzero()[:, 0], (~few).nonzero()[:, 0]):
        if len(chosen):
            most = int(counts[chosen].max())
            levels[chosen, :most] = _place_levels(values[chosen], counts[chosen], most)
    return levels


def _place_levels(values: Tensor, counts: Tensor, most: int) -> Tensor:
    """`place_levels`, as (R, most)."""
    ordered = values.sort(dim=1).values.double()
    n = ordered.shape[1]
    sums = F.pad(ordered.cumsum(1), (1, 0))
    number = torch.arange(most)[None]
    inside = number < counts[:, None]
    middle = ((number + 0.5) / counts[:, None] * n).long().clamp(max=n - 1)
    # Between even spacing and equal shares: the tails of a peaked variable need levels as well.
    low, high = ordered[:, :1], ordered[:, -1:]
    levels = (ordered.gather(1, middle) + low + (high - low) * (number + 0.5) / counts[:, None]) / 2
    levels = torch.where(inside, levels, torch.inf)
    for _ in range(_ITERATIONS):
        borders = (levels[:, 1:] + levels[:, :-1]) / 2
        ends = torch.searchsorted(ordered, torch.where(inside[:, 1:], borders, torch.inf).contiguous())
        starts, stops = F.pad(ends, (1, 0), value=0), F.pad(ends, (0, 1), value=n)
        members = stops - starts
        means = (sums.gather(1, stops) - sums.gather(1, starts)) / members.clamp(min=1)
        levels = torch.where(inside & (members > 0), means, levels)
    return levels.float().sort(dim=1).values
