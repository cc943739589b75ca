"""Pictures of a dozen episodes: which ones, predicted again from the store, and drawn.

A prediction is made exactly as the evaluation made it and its counts are compared with those of the row, so a picture
shows what was scored. Masks are those of network size, drawn on the photo in its own shape.
"""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hsnet.errors import ConfigError, DataError, HSNetError, StoreError
from pipeline.common.philox import Draws
from pipeline.report.inputs import RowSet, as_dict
from pipeline.scores.rows import Cell, Results, cell

if TYPE_CHECKING:
    from pipeline.datasets import Dataset
    from pipeline.heads.segmenters import Segmenter
    from pipeline.loading.source import StoreSource

log = logging.getLogger(__name__)

CELL = 224
"""Longer side of a picture, pixels."""
PLAIN = (226, 226, 222)
"""What masks are drawn on where there is no photo."""
MOST_SUPPORTS = 10


@dataclass(frozen=True)
class Places:
    """Where to look for what is needed to predict again; None is what the rows say."""

    store: str | Path | None = None
    checkpoint: Path | None = None
    data_root: Path | None = None
    splits: Path | None = None
    data_options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Picture:
    """One picture of a row of the gallery."""

    source: str
    """A data: address."""
    caption: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True)
class Shown:
    """One episode."""

    class_name: str
    query: str
    supports: tuple[str, ...]
    number: int
    """Of the episode within its seed."""
    seed: int
    iou: float
    """Percent, from the row."""
    share: float
    """Of the object in the squashed photo, percent."""
    pictures: tuple[Picture, ...]
    equal: bool
    """Whether the prediction made again has exactly the counts of the row."""


@dataclass(frozen=True)
class Gallery:
    """Episodes under headings."""

    label: str
    fold: int
    shots: int
    parts: tuple[tuple[str, str, tuple[Shown, ...]], ...]
    """(heading, how they were chosen, episodes)."""
    notes: tuple[str, ...]

    @property
    def episodes(self) -> tuple[Shown, ...]:
        return tuple(shown for _, _, part in self.parts for shown in part)


def choose(own: Cell, wanted: int, seed: int = 0) -> list[tuple[str, str, list[int]]]:
    """Which episodes to show: best, worst, random and by object size, a quarter of `wanted` each, at least one.

    No episode is shown twice, best and worst show each class and query at most once, and queries without a visible
    object are left to the random ones.
    """
    each = max(1, wanted // 4)
    iou = ious(own)
    visible = [place for place in range(len(own)) if own.object_pixels[place] > 0]
    taken: set[int] = set()
    parts = []
    ranked = sorted(visible, key=lambda place: (-iou[place], place))
    for heading, order in (("Best", ranked), ("Worst", ranked[::-1])):
        chosen = _different(own, order, each, taken)
        parts.append((heading, f"The {heading.lower()} episodes, each class at most once.", chosen))
    left = [place for place in range(len(own)) if place not in taken]
    draws, chosen = Draws("gallery", seed), []
    while left and len(chosen) < each:
        chosen.append(left.pop(draws.below(len(left))))
    taken |= set(chosen)
    parts.append(("Random", f"Drawn among all {len(own):,} episodes, seed {seed}: nothing was picked by eye.", chosen))
    chosen = _by_size(own, iou, each, [place for place in visible if place not in taken])
    how = "Episodes in order of their object's size, cut into groups of one length: the median IoU of each."
    parts.append(("By object size", how, chosen))
    return [part for part in parts if part[2]]


def ious(own: Cell) -> NDArray[np.float64]:
    """(n,) IoU of each episode's object, percent."""
    values: NDArray[np.float64] = 100 * own.counts[:, 0, 1] / np.maximum(own.counts[:, 1, 1], 1)
    return values


def _different(own: Cell, order: Sequence[int], wanted: int, taken: set[int]) -> list[int]:
    chosen: list[int] = []
    classes: set[int] = set()
    queries: set[str] = set()
    few = len(set(own.classes.tolist())) < wanted
    for place in order:
        class_id, query = int(own.classes[place]), own.queries[place]
        if len(chosen) == wanted:
            break
        if place in taken or query in queries or (class_id in classes and not few):
            continue
        chosen.append(place)
        classes.add(class_id)
        queries.add(query)
    taken |= set(chosen)
    return chosen


def _by_size(own: Cell, iou: NDArray[np.float64], wanted: int, places: Sequence[int]) -> list[int]:
    """One episode of each group of sizes, small objects first."""
    ordered = sorted(places, key=lambda place: (own.object_pixels[place], place))
    chosen = []
    for group in np.array_split(np.asarray(ordered, np.int64), min(wanted, len(ordered)) or 1):
        if len(group):
            inside = sorted(group.tolist(), key=lambda place: (iou[place], place))
            chosen.append(inside[len(inside) // 2])
    return chosen


def make_gallery(
    rows: RowSet,
    *,
    wanted: int = 12,
    shots: int | None = None,
    places: Places | None = None,
    seed: int = 0,
    device: str = "cpu",
    on_event: Callable[[int, int], None] | None = None,
) -> Gallery:
    """Choose episodes of a set's first fold, predict them again and draw them.

    Args:
        wanted: episodes, in four parts of the same number.
        shots: supports per query; None is the smallest number there is.

    Raises:
        HSNetError: store or checkpoint are not there or are not those of the rows; the message says which.
    """
    places = places or Places()
    file = rows.first
    fold, fusion, policy = file.fold, file.protocol.fusion, file.protocol.policy
    shots = rows.shots[0] if shots is None else shots
    if shots not in rows.shots:
        raise ConfigError(f"The rows have no {shots}-shot episodes: {', '.join(map(str, rows.shots))} there are.")
    own = cell(rows.files, fold, shots, fusion, policy)
    if own is None:
        raise DataError(f"{file.path} has no {shots}-shot rows of fold {fold}.")
    from pipeline.common.runner import one_torch_thread

    again = _Again(file, places, device)
    chosen = choose(own, wanted, seed)
    total, done = sum(len(part) for _, _, part in chosen), 0
    parts = []
    for heading, text, part in chosen:
        shown = []
        for place in part:
            with one_torch_thread():  # as in an evaluation, so that sums come out alike
                shown.append(again.show(own, place))
            done += 1
            if on_event:
                on_event(done, total)
        parts.append((heading, text, tuple(shown)))
    gallery = Gallery(rows.label, fold, shots, tuple(parts), ())
    return Gallery(rows.label, fold, shots, gallery.parts, tuple(again.notes(gallery)))


class _Again:
    """Makes predictions of one file's episodes again."""

    def __init__(self, file: Results, places: Places, device: str) -> None:
        self.file, self.device = file, device
        said = as_dict(file.facts.get("paths"))
        self.source = open_store(file, places.store or said.get("store"))
        self.numbers = {name: number for number, name in enumerate(self.source.index.images)}
        checkpoint = places.checkpoint or _path(said.get("checkpoint"))
        self.segmenter = open_segmenter(file, self.source, checkpoint, device)
        self.photos, self.no_photos = _photos(file, places, said)
        self.missing: list[str] = []

    def show(self, own: Cell, place: int) -> Shown:
        import torch

        from hsnet.metrics import count
        from pipeline.loading.batch import load_batch

        episode = self._episode(own, place)
        batch = load_batch(self.source, [episode]).to(self.device)
        with torch.inference_mode():
            mask = self._mask(batch, len(episode.supports), batch.target.shape[1])
        ignore = batch.ignore if self.file.protocol.ignore else None
        side = batch.target.shape[1]
        if self.file.protocol.resolution == "network":
            equal = bool((count(mask, batch.target, ignore)[0].cpu().numpy() == own.counts[place]).all())
        else:
            equal = True  # those counts are of another size than the picture's; the masks come from the same logits
        pictures = self._pictures(
            own.queries[place],
            own.supports[place],
            own.names[int(own.classes[place])],
            episode,
            batch.support_mask.cpu().numpy(),
            batch.target[0].cpu().numpy(),
            mask[0].cpu().numpy(),
            None if ignore is None else ignore[0].cpu().numpy(),
        )
        return Shown(
            own.names[int(own.classes[place])],
            own.queries[place],
            own.supports[place],
            int(own.numbers[place]),
            int(own.seeds[place]),
            float(ious(own)[place]),
            100 * float(own.object_pixels[place]) / side**2,
            pictures,
            equal,
        )

    def _episode(self, own: Cell, place: int) -> Any:
        from pipeline.episodes.stream import Episode

        names = (own.queries[place], *own.supports[place])
        lost = [name for name in names if name not in self.numbers]
        if lost:
            raise DataError(f"The store has no image '{lost[0]}', which an episode shows: it is not that of the rows.")
        query, *supports = (self.numbers[name] for name in names)
        return Episode(query, tuple(supports), int(own.classes[place]))

    def _mask(self, batch: Any, shots: int, side: int) -> Any:
        from hsnet.fusion import foreground, fuse
        from hsnet.model import resize_logits

        rules = self.file.protocol
        joint = (shots,) if rules.fusion == "joint" and shots > 1 else ()
        answers = self.segmenter.answer(batch, joint)
        if joint:
            return foreground(resize_logits(answers.joint[shots], (side, side)), rules.tau, rules.strict)
        fusion = "vote" if rules.fusion == "joint" else rules.fusion
        return fuse(answers.logits, (side, side), fusion, rules.tau, rules.strict, rules.normalise)

    def _pictures(
        self,
        query: str,
        supports: Sequence[str],
        class_name: str,
        episode: Any,
        support_masks: NDArray[np.bool_],
        target: NDArray[np.bool_],
        predicted: NDArray[np.bool_],
        ignore: NDArray[np.bool_] | None,
    ) -> tuple[Picture, ...]:
        from pipeline.common import render

        photo = self._photo(episode.query)
        drawn = [
            _masked(self._photo(number), mask, render.BLUE)
            for number, mask in zip(episode.supports, support_masks, strict=True)
        ]
        truth, answer = (resized(mask, photo.size) for mask in (target, predicted))
        hidden = None if ignore is None else resized(ignore, photo.size)
        support = _mosaic(drawn) if len(drawn) > 1 else drawn[0]
        counts = (int((target & predicted).sum()), int((~target & predicted).sum()), int((target & ~predicted).sum()))
        several = f"{len(drawn)} supports" if len(drawn) > 1 else "support"
        return (
            _picture(support, several, f"{several} of class {class_name}, object outlined: {', '.join(supports)}"),
            _picture(photo, "query", f"query photo {query}"),
            _picture(
                render.overlay(photo, truth, render.TRUTH), "truth", f"true mask of class {class_name} in {query}"
            ),
            _picture(render.overlay(photo, answer, render.PREDICTION), "prediction", f"predicted mask of {class_name}"),
            _picture(
                render.error_map(photo, answer, truth, hidden),
                "errors",
                f"error map: {counts[0]:,} pixels true positive, {counts[1]:,} false positive, {counts[2]:,} false "
                f"negative",
            ),
        )

    def _photo(self, number: int) -> Image.Image:
        """The photo at the size of a picture, or a plain surface of its shape."""
        height, width = self.source.store.size(number)
        scale = CELL / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        if self.photos is not None:
            try:
                return self.photos(self.source, number).convert("RGB").resize(size, Image.Resampling.LANCZOS)
            except HSNetError as error:
                self.missing.append(str(error))
        return Image.new("RGB", size, PLAIN)

    def notes(self, gallery: Gallery) -> list[str]:
        episodes = gallery.episodes
        unequal = sum(not shown.equal for shown in episodes)
        notes = [f"All {len(episodes)} predictions were made again and have exactly the counts of their rows."]
        if self.file.protocol.resolution != "network":
            notes = ["Masks are shown at network size; the IoU is that of the row, at original size."]
        elif unequal:
            notes = [
                f"{unequal} of {len(episodes)} predictions made again differ from the counts of their rows (marked): "
                f"another machine or version computes the last digits differently."
            ]
        if self.no_photos:
            notes.append(f"No photos, masks only: {self.no_photos}")
        elif self.missing:
            notes.append(f"{len(self.missing)} photos could not be shown: {self.missing[0]}")
        for note in notes[1:]:
            log.warning("Gallery: %s", note)
        return notes


def open_store(file: Results, path: str | Path | None) -> StoreSource:
    """The store of the rows. Raises StoreError if it is not there or is another one."""
    from pipeline.loading.source import StoreSource
    from pipeline.store.feature_store import FeatureStore

    if not path:
        raise StoreError("The rows do not say where their store is: give --store.")
    digest = str(file.facts["data"])
    try:
        store = FeatureStore.open(path, index_digest=digest)
    except HSNetError:
        # The rows may be of some of its classes only (domain shift): then their data's digest is their own.
        store = FeatureStore.open(path)
    if store.identity != file.store:
        raise StoreError(
            f"{path} is not the store of {file.path}:\n  rows   {file.store}\n  store  {store.identity}\n"
            f"Give that one with --store."
        )
    return StoreSource(store)


def open_segmenter(file: Results, source: StoreSource, checkpoint: Path | None, device: str) -> Segmenter:
    """What answered the episodes of the rows. Raises CheckpointError or DataError if it cannot be had again."""
    from pipeline.heads.catalogue import made_again

    return made_again(as_dict(file.facts.get("method")), source, checkpoint=checkpoint, device=device).make()


def _photos(
    file: Results, places: Places, said: Mapping[str, Any]
) -> tuple[Callable[[StoreSource, int], Image.Image] | None, str]:
    """A function (source, image number) -> photo, or None with the reason why there are no photos."""
    from pipeline.datasets import DATASETS, open_dataset, reader_of

    name = reader_of(str(file.facts["dataset"]))
    root = places.data_root or _path(said.get("data_root"))
    if name not in DATASETS:
        return None, f"'{name}' is no reader of data sets."
    if root is None and name != "shapes":
        return None, "the rows do not say where the data set is; give --data-root."
    try:
        dataset = open_dataset(name, root, places.splits, **dict(places.data_options))
    except HSNetError as error:
        return None, str(error).splitlines()[0]
    return _Photos(dataset), ""


class _Photos:
    """Photos by the store's numbers; one whose mask is not the store's is refused."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.dataset.index.images)}

    def __call__(self, source: StoreSource, number: int) -> Image.Image:
        from pipeline.datasets.images import resize_label

        name = source.index.images[number]
        if name not in self.numbers:
            raise DataError(f"The data set has no image '{name}'.")
        there = self.numbers[name]
        if self.dataset.index.digest != source.index.digest:
            # Other lists of the same photos, or other photos: the masks tell.
            side = source.recipe.image_size
            mine = resize_label(self.dataset.label(there), (side, side)) != 0
            if (mine != (source.store.labels([number])[0] != 0)).any():
                raise DataError(f"The data set's '{name}' is not the image of the store: their masks differ.")
        return self.dataset.image(there)


def resized(mask: NDArray[np.bool_], size: tuple[int, int]) -> NDArray[np.bool_]:
    """A mask at the (width, height) of a picture: smooth, cut at one half. To look at, not to count."""
    small = Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).resize(size, Image.Resampling.BILINEAR)
    found: NDArray[np.bool_] = np.asarray(small) >= 128
    return found


def _masked(photo: Image.Image, mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Image.Image:
    from pipeline.common import render

    return render.overlay(photo, resized(mask, photo.size), colour)


def _mosaic(pictures: Sequence[Image.Image]) -> Image.Image:
    """Several supports as one picture of the usual size."""
    shown = pictures[:MOST_SUPPORTS]
    columns = 2 if len(shown) <= 4 else 3
    side = CELL // columns
    lines = -(-len(shown) // columns)
    paper = Image.new("RGB", (columns * side, lines * side), PLAIN)
    for place, picture in enumerate(shown):
        small = picture.copy()
        small.thumbnail((side - 2, side - 2), Image.Resampling.LANCZOS)
        x, y = place % columns * side, place // columns * side
        paper.paste(small, (x + (side - small.width) // 2, y + (side - small.height) // 2))
    return paper


def _picture(image: Image.Image, caption: str, alt: str) -> Picture:
    """WebP where Pillow has it, else JPEG."""
    from PIL import features

    stream = io.BytesIO()
    webp = features.check("webp")
    if webp:
        image.save(stream, "WEBP", quality=82, method=6)
    else:
        image.save(stream, "JPEG", quality=85)
    data = base64.b64encode(stream.getvalue()).decode("ascii")
    return Picture(f"data:image/{'webp' if webp else 'jpeg'};base64,{data}", caption, alt, image.width, image.height)


def _path(text: object) -> Path | None:
    return Path(text) if isinstance(text, str) and text else None
