"""What is fitted once to annotated photos of N classes, and what it says of a new photo.

From Python: `PhotoModel.of_photos` or `PhotoModel.of_bank`, then call it with photos.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline.bank.check import ClassCheck, Presence, candidates, check_class, without_check
from pipeline.bank.folder import Bank
from pipeline.bank.heads import HEADS, HSNET, Coarse, Example, Fitted, Floats, Trained, fit
from pipeline.bank.reading import Features, Reader, Reading, default_size
from pipeline.features.backbones import new_recipe
from pipeline.features.weights import Weights, load_weights
from pipeline.predict.refine import refine
from pipeline.predict.trust import sureness

AUTO = "auto"
"""The head that does best on annotated photos left out, for each class by itself."""

LEAST_SCORE = 0.2
"""Score below which a class is taken to be absent: with five annotated photos of both kinds, 95 to 98 % of the photos
that show it are kept (docs/practice.md)."""

MOST_CLASSES = 255
"""A mask of class numbers has 8 bits."""


@dataclass(frozen=True, eq=False)
class ClassHead:
    """A class and what finds it."""

    name: str
    fitted: Fitted
    presence: Presence | None = None
    """Decides whether the class is there at all; None: it is looked for in every photo."""
    expected: ClassCheck | None = None
    """What leaving annotated photos out said; None if it was not asked."""


@dataclass(frozen=True, eq=False)
class ClassAnswer:
    """One class in one photo."""

    mask: NDArray[np.bool_]
    """(H, W) at the photo's own size."""
    soft: Floats
    """(H, W) in [0, 1]: a probability, or for a head that votes the share of the photo's largest vote."""
    score: float | None
    """How sure that the class is in the photo, 0 to 1; None if nothing is known of photos without it."""

    @property
    def share(self) -> float:
        """Share of the photo that is object, 0 to 1."""
        return float(self.mask.mean())

    @property
    def sureness(self) -> float:
        """See `pipeline.predict.trust.sureness`."""
        return sureness(self.soft)


@dataclass(frozen=True, eq=False)
class Answering:
    """All of a model but its network: makes masks of what the heads answered, in any process."""

    classes: tuple[ClassHead, ...]
    tau: float = 0.5
    overlapping: bool = False
    """Whether a pixel may be of several classes; else it is of the one with the highest soft value."""
    refine: bool = True
    """Whether margins are brought to the photo's edges (`pipeline.predict.refine`); votes of a trained head never."""
    least_score: float = LEAST_SCORE
    """Of a class's score, 0 to 1; below it nothing of the class is marked."""

    def __post_init__(self) -> None:
        if len(self.classes) > MOST_CLASSES and not self.overlapping:
            raise ConfigError(
                f"A mask of class numbers has {MOST_CLASSES} classes at most, here are {len(self.classes)}. Name some, "
                f"or let them overlap: a mask for each."
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(one.name for one in self.classes)

    def answer(self, query: Features) -> dict[str, Coarse]:
        """What every class's head says of a photo."""
        with torch.inference_mode():
            return {one.name: one.fitted.answer(query) for one in self.classes}

    def masks(self, answers: Mapping[str, Coarse], photo: Image.Image) -> dict[str, ClassAnswer]:
        """Masks of a photo (RGB) at its own size, in the order of the classes."""
        size = (photo.height, photo.width)
        found: dict[str, ClassAnswer] = {}
        for one in self.classes:
            coarse = answers[one.name]
            score = None if one.presence is None else one.presence.score(coarse.presence)
            margin = one.fitted.margin_of(coarse) if self.refine else None
            if margin is None:
                mask, soft = one.fitted.mask(coarse, size, self.tau), one.fitted.soft(coarse, size)
            else:
                soft = torch.from_numpy(refine(margin, photo)).sigmoid().numpy()
                mask = soft >= self.tau
            if score is not None and score < self.least_score:
                mask = np.zeros(size, bool)
            found[one.name] = ClassAnswer(mask, soft, score)
        return found if self.overlapping or len(found) == 1 else _apart(found)

    def to(self, device: torch.device | str) -> Answering:
        """The same on a device."""
        return replace(self, classes=tuple(replace(one, fitted=one.fitted.to(device)) for one in self.classes))


def _apart(found: Mapping[str, ClassAnswer]) -> dict[str, ClassAnswer]:
    """Every pixel to the class with the highest soft value of those whose mask has it, the first of equal ones."""
    best: Floats | None = None
    owner: NDArray[np.uint8] | None = None
    for number, one in enumerate(found.values()):
        value = np.where(one.mask, one.soft, np.float32(-1))
        if best is None or owner is None:
            best, owner = value, np.zeros(value.shape, np.uint8)
            continue
        better = value > best
        best = np.where(better, value, best)
        owner[better] = number
    return {name: replace(one, mask=one.mask & (owner == n)) for n, (name, one) in enumerate(found.items())}


@dataclass(frozen=True, eq=False)
class PhotoModel:
    """A network with the heads that were fitted to annotated photos. Keeps no state between calls."""

    reader: Reader
    answering: Answering

    @classmethod
    def of_photos(
        cls,
        photos: Mapping[str, Sequence[tuple[Image.Image | NDArray[np.uint8], NDArray[np.bool_]]]],
        *,
        head: str = AUTO,
        backbone: str = "squeezenet1_1",
        weights: Weights | None = None,
        image_size: int | None = None,
        tile: int | None = None,
        trained: Trained | None = None,
        device: torch.device | str = "cpu",
        tau: float = 0.5,
        overlapping: bool = False,
        refined: bool = True,
    ) -> PhotoModel:
        """Fit to photos in memory.

        Args:
            photos: class -> (photo, mask) pairs: RGB of any size, Pillow's or (H, W, 3) uint8; (H, W) bool, true on
                the object. Nothing is known of a class on photos given for other classes.
            head: "auto", or one of `pipeline.bank.heads.HEADS`.
            backbone, weights: network, and its weights; None for the published ones.
            image_size: side of the network's square, pixels; None for `default_size`.
            tile: see `Reading`.
            trained: for heads that stand on a trained one; backbone, weights and image_size must be its own.
            tau, overlapping, refined: see `Answering`.

        Raises:
            DataError: no photo, a mask of another size than its photo, or one that marks nothing.
            ConfigError: as `fit_class`; unknown backbone or a size it cannot read.
        """
        weights = weights or load_weights(backbone)
        size = image_size or default_size(weights.backbone)
        reader = Reader(Reading(new_recipe(weights.backbone, weights, size, "float32"), tile), weights, device)
        classes = []
        for name, pairs in photos.items():
            examples = [
                example_of(reader, photo, mask, f"photo {n} of '{name}'") for n, (photo, mask) in enumerate(pairs)
            ]
            classes.append(fit_class(name, [str(n) for n in range(len(pairs))], examples, head, trained))
        return cls(reader, Answering(tuple(classes), tau, overlapping, refined))

    @classmethod
    def of_bank(
        cls,
        bank: Bank,
        reader: Reader,
        *,
        head: str = AUTO,
        classes: Sequence[str] = (),
        trained: Trained | None = None,
        tau: float = 0.5,
        overlapping: bool = False,
        refined: bool = True,
    ) -> PhotoModel:
        """Fit to the photos of a bank.

        Args:
            reader: of the bank's reading, or of another one (features are then made and kept beside the others).
            classes: some of the bank's; empty for all.

        Raises:
            DataError: the bank has no photo, or no such class.
            ConfigError: as `fit_class`.
        """
        names = tuple(classes) or bank.classes
        if not names:
            raise DataError(f"{bank.root} holds no annotated photo yet: `hsnet bank add` adds some.")
        fitted = []
        for name in names:
            photos, examples = bank.examples(name, reader)
            fitted.append(fit_class(name, [photo.item.name for photo in photos], examples, head, trained))
        return cls(reader, Answering(tuple(fitted), tau, overlapping, refined))

    @cached_property
    def _on_device(self) -> Answering:
        return self.answering.to(self.reader.network.device)

    def answer(self, features: Features) -> dict[str, Coarse]:
        """What every class's head says of a photo's features: small, see `Answering.masks`."""
        return self._on_device.answer(features)

    def __call__(self, photo: Image.Image | NDArray[np.uint8]) -> dict[str, ClassAnswer]:
        """Class -> its mask, soft map and score in a photo (RGB, Pillow's or (H, W, 3) uint8)."""
        image = as_photo(photo, "the photo")
        return self.answering.masks(self.answer(self.reader.read(image)), image)


def fit_class(
    name: str, photos: Sequence[str], examples: Sequence[Example], head: str = AUTO, trained: Trained | None = None
) -> ClassHead:
    """Choose a head for a class, if none is named, and fit it.

    Args:
        photos, examples: see `pipeline.bank.check.check_class`.
        head: `AUTO`, or one of `pipeline.bank.heads.HEADS`.

    Raises:
        ConfigError: no such head, or one that needs a trained one.
        DataError: no photo shows the class, or none shows anything else.
    """
    if head not in (AUTO, *HEADS):
        raise ConfigError(f"No head '{head}' for photos. There are {', '.join((AUTO, *HEADS))}. Nothing was computed.")
    tiled = any(len(one.features.tiles) > 1 for one in examples)
    shown = sum(one.mask is not None for one in examples)
    heads = candidates(trained, tiled) if head == AUTO else (head,)
    if head == AUTO and not any((one.positions[1] < 1).any() for one in examples) and trained is not None:
        heads = (HSNET,)  # of the object's surroundings nothing is seen, which the others need
    if len(heads) == 1 and not _asks_presence(examples):
        return ClassHead(name, fit(heads[0], examples, trained))
    if shown < 2:
        return ClassHead(name, fit(without_check(trained, tiled) if head == AUTO else head, examples, trained))
    check = check_class(name, photos, examples, heads, trained)
    assert check.best is not None
    return ClassHead(name, fit(check.best.head, examples, trained), Presence.of(check.best), check)


def _asks_presence(examples: Sequence[Example]) -> bool:
    return any(one.mask is None for one in examples)


def example_of(reader: Reader, photo: Image.Image | NDArray[np.uint8], mask: NDArray[np.bool_], what: str) -> Example:
    """A photo in memory with its mask as an example.

    Raises:
        DataError: sizes differ, or the mask marks nothing.
    """
    image = as_photo(photo, what)
    mask = np.asarray(mask)
    if mask.shape != (image.height, image.width):
        raise DataError(f"The mask of {what} is {mask.shape}, its photo (height, width) = {image.height, image.width}.")
    if not mask.any():
        raise DataError(f"The mask of {what} marks nothing.")
    return Example(reader.read(image), mask.astype(bool))


def as_photo(photo: Image.Image | NDArray[np.uint8], what: str) -> Image.Image:
    """A photo as Pillow's RGB. Raises DataError for an array of another shape or type."""
    if isinstance(photo, Image.Image):
        return photo.convert("RGB")
    if photo.ndim != 3 or photo.shape[2] != 3 or photo.dtype != np.uint8:
        raise DataError(f"{what} must be RGB, (H, W, 3) uint8, got {photo.shape} of {photo.dtype}.")
    return Image.fromarray(photo)
