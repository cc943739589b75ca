"""Five annotated photos of a class, the rest predicted: the jobs that `benchmarks.refine` and `benchmarks.trust` score.

A job is drawn from a data set with masks; head `tune` is fitted to its supports once, and every query gets its margin
on the backbone's grid. Photos with ignored pixels are no queries: where they lie, at the objects' edges, nothing is
known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.bank.heads import Example, TuneFit
from pipeline.bank.reading import Reader, Reading
from pipeline.common.philox import Draws
from pipeline.datasets import Dataset, open_dataset
from pipeline.features.backbones import new_recipe
from pipeline.features.weights import load_weights


@dataclass(frozen=True)
class Job:
    """A class, its annotated photos and those to be predicted, as numbers of the data set's images."""

    data: str
    class_id: int
    class_name: str
    supports: tuple[int, ...]
    queries: tuple[int, ...]


@dataclass(frozen=True)
class Answered:
    """One query of a job with what the head says to it."""

    job: Job
    query: int
    margin: NDArray[np.float32]
    """(h, w) on the backbone's grid, object above 0."""
    ones: NDArray[np.float32]
    """(K, h, w): the same by each support alone."""
    photo: Image.Image
    truth: NDArray[np.bool_]
    """(H, W), of the photo's size."""


def open_named(text: str) -> tuple[str, Dataset]:
    """ "NAME=KIND:ROOT" or "NAME=KIND:ROOT:SPLITS" -> the name and the data set."""
    name, _, place = text.partition("=")
    kind, root, *splits = place.split(":")
    return name, open_dataset(kind, Path(root), Path(splits[0]) if splits else None)


def new_reader(text: str, tile: int | None = None) -> tuple[str, Reader]:
    """ "timm:NAME:224:FILE", without FILE for the published weights -> the name and what reads photos."""
    parts = text.split(":")
    place = next(number for number, part in enumerate(parts) if part.isdecimal())
    backbone, size, file = ":".join(parts[:place]), int(parts[place]), ":".join(parts[place + 1 :]) or None
    weights = load_weights(backbone, file)
    reading = Reading(new_recipe(backbone, weights, size, "float32"), tile)
    return reading.text, Reader(reading, weights)


def draw_jobs(
    name: str, dataset: Dataset, classes: int, shots: int, queries: int, seed: int = 0, least_share: float = 0.005
) -> list[Job]:
    """Jobs of so many classes, in a drawn order; classes with fewer than `shots` + 5 photos are left out.

    Args:
        queries: at most so many queries each.
        least_share: smallest share of the photo that a class covers in a query.
    """
    index = dataset.index
    photos: dict[int, set[int]] = {}
    for fold in index.folds:
        for role in ("trn", "val", "test"):
            for image, class_id in index.split(fold, role).entries:
                photos.setdefault(class_id, set()).add(image)
    able = sorted(class_id for class_id, images in photos.items() if len(images) >= shots + 5)
    draws = Draws("practice", name, seed)
    jobs = []
    for class_id in shuffled(able, draws)[:classes]:
        order = shuffled(sorted(photos[class_id]), Draws("practice", name, seed, class_id))
        rest = (
            image for image in order[shots:] if _whole(dataset.label(image), class_id, index.ignore_label, least_share)
        )
        chosen = tuple(image for image, _ in zip(rest, range(queries), strict=False))
        jobs.append(Job(name, class_id, index.classes[class_id], tuple(order[:shots]), chosen))
    return jobs


def shuffled(values: Sequence[int], draws: Draws) -> list[int]:
    left, order = list(values), []
    while left:
        order.append(left.pop(draws.below(len(left))))
    return order


def _whole(label: NDArray[np.generic], class_id: int, ignore: int, least_share: float) -> bool:
    return not (label == ignore).any() and float((label == class_id + 1).mean()) >= least_share


def answers(job: Job, dataset: Dataset, reader: Reader) -> Iterator[Answered]:
    """Every query of a job, answered by head `tune` on all supports and on each alone."""
    supports = [
        Example(reader.read(dataset.image(image)), dataset.label(image) == job.class_id + 1) for image in job.supports
    ]
    together, alone = TuneFit.of(supports), [TuneFit.of([one]) for one in supports]
    for image in job.queries:
        photo, truth = dataset.image(image), dataset.label(image) == job.class_id + 1
        features = reader.read(photo)
        ones = np.stack([one.answer(features).maps for one in alone])
        yield Answered(job, image, together.answer(features).maps, ones, photo, truth)
