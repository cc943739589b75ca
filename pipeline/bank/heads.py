"""Heads fitted once to annotated photos of one class, to answer any number of new photos.

The same heads as in an evaluation (`pipeline.heads`), with the fit kept: there every episode has supports of its own.

Dimension key: T tiles of a photo, P positions of a tile, D channels, h w map of a whole photo.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hsnet.errors import ConfigError, DataError
from hsnet.fused import FusedHSNet
from hsnet.fusion import fuse
from hsnet.model import HSNet, resize_logits
from hsnet.similarity import NO_OBJECT, clear_positions, nearest
from pipeline.bank.reading import Features
from pipeline.datasets.images import resize_label
from pipeline.heads.tune import (
    ONE_SHOT_WEIGHT,
    WEIGHTS,
    Fit,
    carried,
    fit_supports,
    soft_iou,
)

CONTRAST, TUNE, HSNET, STANDING = "contrast", "tune", "hsnet", "tune on hsnet"
HEADS = (CONTRAST, TUNE, HSNET, STANDING)

WHOLE_PHOTOS = "A trained head answers whole photos: leave --tile or --checkpoint out."

MOST_POSITIONS = 2048
"""Positions of each side of one photo that a fit takes; of more, so many are drawn."""

CONTRAST_SCALE = 20.0
"""What a margin of `contrast` is multiplied with, so that its sigmoid is a probability; of the others it is 1."""

TOP = 0.05
"""Share of a photo's positions whose mean margin says whether the class is there at all."""

Floats = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Example:
    """A photo of which it is known where the class is."""

    features: Features
    mask: NDArray[np.bool_] | None
    """(H, W), true on the object; None: the class is not in the photo."""
    ignore: NDArray[np.bool_] | None = None
    """(H, W), true where nothing is known."""

    @cached_property
    def positions(self) -> tuple[Tensor, Tensor]:
        """Vectors (n, D) and shares (n,) of the positions of which something is known."""
        vectors = self.features.vectors().flatten(0, 1)
        mask = np.zeros(self.features.size, bool) if self.mask is None else self.mask
        shares = self.features.shares(mask).flatten()
        if self.ignore is None:
            return vectors, shares
        known = self.features.shares(self.ignore).flatten() < 0.5
        return vectors[known], shares[known]


@dataclass(frozen=True)
class Coarse:
    """A head's answer to one photo, at its own size: small, and all that is needed to make a mask of any size."""

    maps: Floats
    """Of a head with margins (h, w), object above 0, as logits. Of a voting head (K, 2, h, w), logits per support."""
    presence: float
    """Mean margin of the highest `TOP` of the positions: the higher, the surer that the class is there."""


class Fitted(Protocol):
    """A head that knows its class."""

    @property
    def name(self) -> str:
        """One of `HEADS`."""
        ...

    def answer(self, query: Features) -> Coarse:
        """Look at a photo."""
        ...

    def soft(self, coarse: Coarse, size: tuple[int, int]) -> Floats:
        """(H, W) in [0, 1] at any size: how much a pixel is object; a probability, or the share of the largest vote."""
        ...

    def mask(self, coarse: Coarse, size: tuple[int, int], tau: float = 0.5) -> NDArray[np.bool_]:
        """(H, W): object where `soft` is at `tau` or above."""
        ...

    def margin_of(self, coarse: Coarse) -> Floats | None:
        """(h, w) of an answer, logits that may be brought to the photo's edges; None of a head that votes."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same on a device."""
        ...


def presence_of(margin: Tensor) -> float:
    """Of a map of margins of any shape, see `Coarse`."""
    flat = margin.flatten()
    return float(flat.topk(max(1, round(TOP * len(flat)))).values.mean())


class _Margins:
    """What heads with one margin have in common: probabilities of logits, resized as logits are."""

    def margin_of(self, coarse: Coarse) -> Floats | None:
        return coarse.maps

    def soft(self, coarse: Coarse, size: tuple[int, int]) -> Floats:
        margin = torch.from_numpy(coarse.maps)[None, None]
        resized = F.interpolate(margin, size, mode="bilinear", align_corners=True)[0, 0]
        soft: Floats = resized.sigmoid().numpy()
        return soft

    def mask(self, coarse: Coarse, size: tuple[int, int], tau: float = 0.5) -> NDArray[np.bool_]:
        mask: NDArray[np.bool_] = self.soft(coarse, size) >= tau
        return mask


def _coarse(margin: Tensor) -> Coarse:
    return Coarse(margin.float().cpu().numpy(), presence_of(margin))


@dataclass(frozen=True, eq=False)
class ContrastFit(_Margins):
    """Nearest positions of the object against nearest of the background: see `pipeline.heads.contrast`."""

    inside: Tensor
    """(n, D)."""
    outside: Tensor
    name: str = CONTRAST

    @classmethod
    def of(cls, examples: Sequence[Example]) -> ContrastFit:
        inside, outside = [], []
        for number, example in enumerate(examples):
            vectors, shares = example.positions
            on, off = (side[0] for side in clear_positions(shares[None]))
            inside.append(_drawn(vectors[on], number))
            outside.append(_drawn(vectors[off], number))
        return cls(torch.cat(inside), torch.cat(outside))

    def answer(self, query: Features) -> Coarse:
        vectors = query.vectors()
        if not len(self.inside):
            margin = vectors.new_full(vectors.shape[:2], NO_OBJECT)
        else:
            margin = torch.stack([nearest(one, self.inside) - nearest(one, self.outside) for one in vectors])
        return _coarse(CONTRAST_SCALE * query.as_map(margin))

    def to(self, device: torch.device | str) -> ContrastFit:
        return replace(self, inside=self.inside.to(device), outside=self.outside.to(device))


@dataclass(frozen=True, eq=False)
class TuneFit(_Margins):
    """A logistic regression on the examples' positions: see `pipeline.heads.tune`."""

    fit: Fit
    direction: Tensor
    bias: Tensor
    name: str = TUNE

    @classmethod
    def of(cls, examples: Sequence[Example]) -> TuneFit:
        vectors, shares = zip(*(thinned(*one.positions, number) for number, one in enumerate(examples)), strict=True)
        fit = fit_supports(vectors, shares)
        direction, bias = fit.solve(torch.cat(vectors), torch.cat(shares))
        return cls(fit, direction, bias)

    def margin(self, query: Features) -> Tensor:
        """(h, w)."""
        answers = [carried(one @ self.direction + self.bias, one) - self.fit.offset for one in query.vectors()]
        return query.as_map(torch.stack(answers))

    def answer(self, query: Features) -> Coarse:
        return _coarse(self.margin(query))

    def to(self, device: torch.device | str) -> TuneFit:
        return replace(self, direction=self.direction.to(device), bias=self.bias.to(device))


@dataclass(frozen=True, eq=False)
class TrainedFit:
    """A trained head and its supports: every support answers, and the answers are combined as asked."""

    learner: FusedHSNet
    supports: tuple[tuple[list[Tensor], Tensor], ...]
    """Levels (1, L, U, V, C) and mask (1, S, S) of each."""
    fusion: str = "vote"
    name: str = HSNET

    @classmethod
    def of(cls, examples: Sequence[Example], trained: Trained) -> TrainedFit:
        shown = [one for one in examples if one.mask is not None]
        if any(len(one.features.tiles) > 1 for one in shown):
            raise ConfigError(WHOLE_PHOTOS)
        side = trained.image_size
        masks = [
            torch.from_numpy(np.ascontiguousarray(resize_label(one.mask.astype(np.uint8), (side, side))))[None]
            for one in shown
            if one.mask is not None
        ]
        supports = tuple((one.features.levels, mask) for one, mask in zip(shown, masks, strict=True))
        return cls(trained.learner, supports, trained.fusion)

    @torch.inference_mode()
    def answer(self, query: Features) -> Coarse:
        if len(query.tiles) > 1:
            raise ConfigError(WHOLE_PHOTOS)
        # One support after the other: memory stays that of one shot, whatever the number of supports.
        device = query.levels[0].device
        contexts = [self.learner.encode(query.levels, levels, mask.to(device)) for levels, mask in self.supports]
        if self.fusion == "joint":
            logits = self.learner.joint(torch.stack(contexts))
        else:
            logits = torch.cat([self.learner.decode(context) for context in contexts])
        return Coarse(logits.float().cpu().numpy(), presence_of((logits[:, 1] - logits[:, 0]).mean(0)))

    def margin(self, query: Features) -> Tensor:
        """(h, w) at the head's own size: mean of all supports."""
        logits = torch.from_numpy(self.answer(query).maps)
        return (logits[:, 1] - logits[:, 0]).mean(0)

    def soft(self, coarse: Coarse, size: tuple[int, int]) -> Floats:
        logits = torch.from_numpy(coarse.maps)[:, None]
        if self.fusion == "vote":
            votes = torch.stack([fuse(one[None], size)[0] for one in logits]).sum(0)
            soft = votes / max(1, int(votes.max()))
        elif self.fusion == "probabilities":
            soft = torch.stack([resize_logits(one, size).softmax(1)[0, 1] for one in logits]).mean(0)
        else:
            soft = resize_logits(logits.mean(0), size).softmax(1)[0, 1]
        found: Floats = soft.float().numpy()
        return found

    def mask(self, coarse: Coarse, size: tuple[int, int], tau: float = 0.5) -> NDArray[np.bool_]:
        """(H, W), as `hsnet.fusion.fuse` cuts it: the published vote to the pixel."""
        logits = torch.from_numpy(coarse.maps)[:, None]
        fusion = "logits" if self.fusion == "joint" else self.fusion
        mask: NDArray[np.bool_] = fuse(logits, size, fusion, tau)[0].numpy().astype(bool)
        return mask

    def margin_of(self, coarse: Coarse) -> Floats | None:
        """None: its masks stay those that the head was published and evaluated with."""
        return None

    def votes(self, coarse: Coarse) -> NDArray[np.bool_] | None:
        """(K, h, w): what each support marks; None of a joint answer, and of one support."""
        if self.fusion == "joint" or len(coarse.maps) < 2:
            return None
        marked: NDArray[np.bool_] = coarse.maps[:, 1] > coarse.maps[:, 0]
        return marked

    def to(self, device: torch.device | str) -> TrainedFit:
        learner = FusedHSNet(self.learner.model.to(device), self.learner.arithmetic)
        supports = tuple(([level.to(device) for level in levels], mask.to(device)) for levels, mask in self.supports)
        return replace(self, learner=learner, supports=supports)


@dataclass(frozen=True, eq=False)
class StandingFit(_Margins):
    """A read-out beside a trained head, with the weight that is best on examples left out."""

    trained: TrainedFit
    readout: TuneFit
    weight: float
    name: str = STANDING

    @classmethod
    def of(cls, examples: Sequence[Example], trained: Trained) -> StandingFit:
        shown = [one for one in examples if one.mask is not None]
        base, readout = TrainedFit.of(shown, trained), TuneFit.of(examples)
        if len(shown) < 2:
            return cls(base, readout, ONE_SHOT_WEIGHT)
        heads, mine, shares = [], [], []
        for left, one in enumerate(shown):
            others = [other for other in examples if other is not one]
            fewer = replace(base, supports=(*base.supports[:left], *base.supports[left + 1 :]))
            heads.append(_at(fewer.margin(one.features), one.features.grid).flatten())
            mine.append(TuneFit.of(others).margin(one.features).flatten().cpu())
            shares.append(one.features.shares(_shown(one)).flatten().cpu())
        margin, own, share = torch.cat(heads), torch.cat(mine), torch.cat(shares)
        tried = torch.stack([margin + weight * own for weight in WEIGHTS])
        return cls(base, readout, WEIGHTS[int(soft_iou(tried > 0, share, 1).argmax())])

    def answer(self, query: Features) -> Coarse:
        margin = self.trained.margin(query)
        size = (margin.shape[0], margin.shape[1])
        return _coarse(margin + self.weight * _at(self.readout.margin(query), size).cpu())

    def to(self, device: torch.device | str) -> StandingFit:
        return replace(self, trained=self.trained.to(device), readout=self.readout.to(device))


@dataclass(frozen=True, eq=False)
class Trained:
    """A checkpoint's learner, as the fits take it."""

    learner: FusedHSNet
    image_size: int
    fusion: str = "vote"

    @classmethod
    def of(cls, learner: HSNet, image_size: int, fusion: str = "vote") -> Trained:
        return cls(FusedHSNet(learner.eval()), image_size, fusion)


Fitter = Callable[[Sequence[Example], Trained | None], Fitted]


def _need(trained: Trained | None) -> Trained:
    if trained is None:
        raise ConfigError("This head stands on a trained one: give its run or checkpoint with --checkpoint.")
    return trained


_FITTERS: Mapping[str, Fitter] = {
    CONTRAST: lambda examples, trained: ContrastFit.of(examples),
    TUNE: lambda examples, trained: TuneFit.of(examples),
    HSNET: lambda examples, trained: TrainedFit.of(examples, _need(trained)),
    STANDING: lambda examples, trained: StandingFit.of(examples, _need(trained)),
}


def fit(name: str, examples: Sequence[Example], trained: Trained | None = None) -> Fitted:
    """Fit a head to photos of one class.

    Args:
        name: one of `HEADS`.
        examples: photos with the class and, for heads that look at the background, without; all of one reading.
        trained: for the heads that need one.

    Raises:
        ConfigError: no such head, or one that needs `trained`.
        DataError: no example shows the class, or none shows anything else.
    """
    if name not in _FITTERS:
        raise ConfigError(f"No head '{name}'. There are {', '.join(HEADS)}.")
    if not any(one.mask is not None and one.mask.any() for one in examples):
        raise DataError("No annotated photo shows the class: at least one with a mask is needed.")
    if name != HSNET and not any((one.positions[1] < 1).any() for one in examples):
        raise DataError(
            f"Every annotated photo shows its object everywhere: head '{name}' needs to see some background, too. Add "
            "a photo that shows some, or one without the object."
        )
    with torch.no_grad():
        return _FITTERS[name](examples, trained)


def thinned(vectors: Tensor, shares: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """At most `MOST_POSITIONS` of the positions with some object, and as many of those without: drawn evenly."""
    some = shares > 0
    if max(int(some.sum()), int((~some).sum())) <= MOST_POSITIONS:
        return vectors, shares
    picked = torch.cat([_drawn(side.nonzero()[:, 0], seed) for side in (some, ~some)])
    return vectors[picked], shares[picked]


def _drawn(rows: Tensor, seed: int) -> Tensor:
    if len(rows) <= MOST_POSITIONS:
        return rows
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[order[:MOST_POSITIONS].to(rows.device)]


def _at(margin: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(margin[None, None], size, mode="bilinear", align_corners=True)[0, 0]


def _shown(example: Example) -> NDArray[np.bool_]:
    assert example.mask is not None
    return example.mask
