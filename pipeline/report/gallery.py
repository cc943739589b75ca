"""A dozen episodes predicted again from the store and drawn, so that a picture shows what was scored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from hsnet.errors import ConfigError, DataError, HSNetError
from pipeline.report.choice import choose
from pipeline.report.inputs import ResultSet
from pipeline.report.origins import Origins, open_photos
from pipeline.scores.rows import ScoredEpisodes, scored_episodes

if TYPE_CHECKING:  # imported where pictures are made: they bring torch
    from pipeline.loading.source import StoreSource
    from pipeline.report.again import Prediction
    from pipeline.report.drawing import Picture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ShownEpisode:
    """One episode."""

    class_name: str
    query: str
    supports: tuple[str, ...]
    number: int
    """Number of the episode within its seed."""
    seed: int
    iou: float
    """Percent, from the row."""
    share: float
    """Share of the object in the squashed photo, percent."""
    pictures: tuple[Picture, ...]
    equal: bool
    """Whether the prediction made again has exactly the counts of the row."""


@dataclass(frozen=True)
class Gallery:
    """Episodes under headings."""

    label: str
    fold: int
    shots: int
    parts: tuple[tuple[str, str, tuple[ShownEpisode, ...]], ...]
    """(heading, how they were chosen, episodes)."""
    notes: tuple[str, ...]

    @property
    def episodes(self) -> tuple[ShownEpisode, ...]:
        """All of them, in the order of the page."""
        return tuple(shown for _, _, part in self.parts for shown in part)


def make_gallery(
    results: ResultSet,
    *,
    wanted: int = 12,
    shots: int | None = None,
    origins: Origins | None = None,
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
    file = results.first
    shots = results.shots[0] if shots is None else shots
    if shots not in results.shots:
        raise ConfigError(f"The rows have no {shots}-shot episodes: {', '.join(map(str, results.shots))} there are.")
    episodes = scored_episodes(results.files, file.fold, shots, file.protocol.fusion, file.protocol.policy)
    if episodes is None:
        raise DataError(f"{file.path} has no {shots}-shot rows of fold {file.fold}.")
    from pipeline.report.again import Repeater

    origins = origins or Origins()
    repeater = Repeater(file, origins, device)
    grounds = _Grounds(repeater.source, *open_photos(file, origins))
    chosen = choose(episodes, wanted, seed)
    total, done = sum(len(part) for _, _, part in chosen), 0
    parts = []
    for heading, how, part in chosen:
        shown = []
        for number in part:
            shown.append(_show(episodes, number, repeater.predict(episodes, number), grounds))
            done += 1
            if on_event:
                on_event(done, total)
        parts.append((heading, how, tuple(shown)))
    equal = [episode.equal for _, _, part in parts for episode in part]
    notes = [*_prediction_notes(file.protocol.resolution, equal), *grounds.notes()]
    for note in notes[1:]:
        log.warning("Gallery: %s", note)
    return Gallery(results.label, file.fold, shots, tuple(parts), tuple(notes))


class _Grounds:
    """What masks are drawn on: photos at the size of a picture, plain surfaces of their shape where there are none."""

    def __init__(
        self, source: StoreSource, photos: Callable[[StoreSource, int], Image.Image] | None, reason: str
    ) -> None:
        self.source, self.photos, self.reason = source, photos, reason
        self.missing: list[str] = []

    def __call__(self, number: int) -> Image.Image:
        from pipeline.report.drawing import PLAIN, picture_size

        size = picture_size(*self.source.store.size(number))
        if self.photos is not None:
            try:
                return self.photos(self.source, number).convert("RGB").resize(size, Image.Resampling.LANCZOS)
            except HSNetError as error:
                self.missing.append(str(error))
        return Image.new("RGB", size, PLAIN)

    def notes(self) -> list[str]:
        if self.photos is None:
            return [f"No photos, masks only: {self.reason}"]
        return [f"{len(self.missing)} photos could not be shown: {self.missing[0]}"] if self.missing else []


def _show(
    episodes: ScoredEpisodes, number: int, prediction: Prediction, ground: Callable[[int], Image.Image]
) -> ShownEpisode:
    from pipeline.report.drawing import draw

    class_name = episodes.names[int(episodes.classes[number])]
    query, supports = episodes.queries[number], episodes.supports[number]
    pictures = draw(
        prediction,
        ground(prediction.episode.query),
        [ground(support) for support in prediction.episode.supports],
        class_name=class_name,
        names=(query, *supports),
    )
    return ShownEpisode(
        class_name,
        query,
        supports,
        int(episodes.numbers[number]),
        int(episodes.seeds[number]),
        float(episodes.iou[number]),
        100 * float(episodes.object_pixels[number]) / prediction.truth.size,
        pictures,
        prediction.equal,
    )


def _prediction_notes(resolution: str, equal: Sequence[bool]) -> list[str]:
    if resolution != "network":
        return ["Masks are shown at network size; the IoU is that of the row, at original size."]
    if not all(equal):
        return [
            f"{equal.count(False)} of {len(equal)} predictions made again differ from the counts of their rows "
            f"(marked): another machine or version computes the last digits differently."
        ]
    return [f"All {len(equal)} predictions were made again and have exactly the counts of their rows."]
