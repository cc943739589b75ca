"""A bank looked at before a folder is run: what to expect of each class, and what would make it better."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hsnet.errors import ConfigError, DataError
from pipeline.bank.check import COVERAGE, NEW_PHOTOS, ClassCheck, candidates, check_class
from pipeline.bank.folder import Bank, BankPhoto
from pipeline.bank.heads import HSNET, STANDING, TUNE, Trained
from pipeline.bank.reading import Reader, Reading
from pipeline.bank.tiles import FEW_PIXELS, object_pixels, suggest_tile
from pipeline.features.backbones import new_recipe
from pipeline.features.weights import load_weights
from pipeline.heads.checkpoint import Checkpoint

WIDE = 0.3
"""An interval wider than this says that more photos are needed to know."""

GAINS = 0.01
"""More photos would help if one photo less costs so much IoU."""


@dataclass(frozen=True)
class Report:
    """What `check_bank` found."""

    checks: Mapping[str, tuple[ClassCheck, ...]]
    """Reading in words -> a check of every class."""
    advice: tuple[str, ...]
    """Sentences, the most important first."""


def check_bank(
    bank: Bank,
    weights: str | None = None,
    *,
    classes: Sequence[str] = (),
    head: str = "auto",
    checkpoint: Checkpoint | None = None,
    sizes: Sequence[int] = (),
    tiles: Sequence[int] = (),
    on_event: Callable[[int, int | None, str], None] | None = None,
) -> Report:
    """Leave every annotated photo out in turn, for each class, head, image size and tile.

    Args:
        weights: file of the bank's network's weights; None for the published ones.
        classes: some of the bank's; empty for all.
        head: "auto" for all that can be, or one of `pipeline.bank.heads.HEADS`.
        checkpoint: a trained head of the bank's reading.
        sizes, tiles: to try beside the bank's own.
        on_event: called with (steps done, None, what is done).

    Raises:
        DataError: no photo in the bank, or no such class.
        ConfigError: a head that needs a checkpoint without one; other weights than the bank's.
        CheckpointMismatch: the checkpoint is of another network or size.
    """
    names = tuple(classes) or bank.classes
    if not names:
        raise DataError(f"{bank.root} holds no annotated photo yet: `hsnet bank add` adds some.")
    loaded = load_weights(bank.reading.recipe.backbone, weights, bank.reading.recipe.weights)
    trained = None
    if checkpoint is not None:
        checkpoint.require(bank.reading.recipe, "the bank")
        trained = Trained.of(checkpoint.learner(), bank.reading.recipe.image_size)
    elif head in (HSNET, STANDING):
        raise ConfigError(f"Head '{head}' needs a trained one: give its run or checkpoint with --checkpoint.")
    own = bank.reading
    others = [Reading(new_recipe(loaded.backbone, loaded, size, "float32"), own.tile) for size in sizes]
    others += [Reading(own.recipe, tile) for tile in tiles]
    steps = 0

    def step(text: str) -> None:
        nonlocal steps
        steps += 1
        if on_event:
            on_event(steps, None, text)

    found: dict[str, tuple[ClassCheck, ...]] = {}
    for reading in dict.fromkeys([own, *others]):
        reader = Reader(reading, loaded)
        fits = trained if reading == own else None
        checks = []
        for name in names:
            photos, examples = bank.examples(name, reader)
            heads = candidates(fits, reading.tile is not None) if head == "auto" else _asked(head, fits)
            called = [photo.item.name for photo in photos]
            ask = reading == own
            checks.append(check_class(name, called, examples, heads, fits, influence=ask, on_event=step))
        found[reading.text] = tuple(checks)
    return Report(found, tuple(_advice(bank, names, found)))


def _asked(head: str, trained: Trained | None) -> tuple[str, ...]:
    if head == HSNET and trained is None:
        return ()
    return (STANDING,) if head == TUNE and trained is not None else (head,)


def _advice(bank: Bank, names: Sequence[str], found: Mapping[str, Sequence[ClassCheck]]) -> list[str]:
    """What each class's photos say."""
    lines = []
    for place, name in enumerate(names):
        tried = {reading: checks[place] for reading, checks in found.items()}
        lines += _on_class(name, bank.of_class(name)[0], bank.reading, tried)
    return lines


def _on_class(name: str, photos: Sequence[BankPhoto], own: Reading, tried: Mapping[str, ClassCheck]) -> list[str]:
    check = tried[own.text]
    if check.best is None:
        return [f"{name}: one annotated photo, of which nothing can be left out. Add a second one to know more."]
    best = check.best
    lines = [
        f"{name}: expect an IoU of {100 * best.pooled:.0f} with head {best.head}; that of {NEW_PHOTOS} new photos "
        f"like these lies in {100 * best.low:.0f} to {100 * best.high:.0f} with a chance of {100 * COVERAGE:.0f} %."
    ]
    if best.high - best.low > WIDE:
        lines.append(f"  {len(check.photos)} photos differ too much to say it closer: annotate a few more.")
    elif best.fewer is not None and best.pooled - best.fewer > GAINS:
        less = 100 * (best.pooled - best.fewer)
        lines.append(f"  With one annotated photo less it is {less:.0f} points lower: more photos would help.")
    if check.hurts:
        lines.append(f"  The others do better without {', '.join(check.hurts)}: look at its mask, or remove it.")
    worst = min(zip(best.ious, check.photos, strict=True))
    if len(best.ious) > 2 and worst[0] < best.pooled / 2:
        lines.append(f"  {worst[1]} is not found by the others (IoU {100 * worst[0]:.0f}): photos like it will not be.")
    masks = [mask for photo in photos if (mask := photo.mask(name)) is not None]
    pixels = [object_pixels(mask, own.recipe.image_size) for mask in masks]
    if own.tile is None and np.median(pixels) < FEW_PIXELS:
        lines.append(f"  To the network its objects have {int(np.median(pixels))} pixels, too few to know them by.")
    tile = suggest_tile(masks, own.recipe.image_size) if own.tile is None else None
    if tile is not None:
        lines.append(f"  Its objects are small: try `hsnet bank check --tile {tile}`.")
    others = [(one.best.pooled, reading) for reading, one in tried.items() if reading != own.text and one.best]
    if others and max(others)[0] > best.pooled:
        gain = max(others)
        lines.append(f"  Read as {gain[1]} it is {100 * gain[0]:.0f}: predict with that.")
    return lines
