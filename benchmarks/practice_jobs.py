"""Five annotated photos of a class, the rest predicted: the jobs that `benchmarks.refine` and `benchmarks.trust` score.

A job is drawn from a data set with masks; head `tune` is fitted to its supports once, and every query gets its margin
on the backbone's grid. Photos with ignored pixels are no queries: where they lie, at the objects' edges, nothing is
known.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hsnet.similarity import object_shares, positions
from pipeline.common.philox import Draws
from pipeline.datasets import Dataset, open_dataset
from pipeline.datasets.images import resize_label
from pipeline.features.backbones import new_recipe, open_backbone
from pipeline.features.forward import PhotoNetwork
from pipeline.features.weights import load_weights
from pipeline.heads.scene import Scene, grid_of
from pipeline.heads.segmenters import Segmenter
from pipeline.heads.tune import carried, distinct, fit_supports
from pipeline.loading.batch import EpisodeBatch


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
    trained: NDArray[np.float32] | None
    """(K, h', w'): margins of a trained head by each support, if one was given."""
    photo: Image.Image
    truth: NDArray[np.bool_]
    """(H, W), of the photo's size."""


def open_named(text: str) -> tuple[str, Dataset]:
    """ "NAME=KIND:ROOT" or "NAME=KIND:ROOT:SPLITS" -> the name and the data set."""
    name, _, place = text.partition("=")
    kind, root, *splits = place.split(":")
    return name, open_dataset(kind, Path(root), Path(splits[0]) if splits else None)


def network(backbone: str, image_size: int, weights: str | None) -> PhotoNetwork:
    """A backbone of the project's by name, size and file of weights (None: the published ones)."""
    found = load_weights(backbone, weights)
    return PhotoNetwork(open_backbone(new_recipe(backbone, found, image_size, "float32"), found), image_size)


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


def answers(job: Job, dataset: Dataset, through: PhotoNetwork, head: Segmenter | None = None) -> Iterator[Answered]:
    """Every query of a job, answered by head `tune` on all supports and on each alone, and by a trained head."""
    size = (through.image_size, through.image_size)
    masks = np.stack([resize_label(dataset.label(image) == job.class_id + 1, size) for image in job.supports])
    with torch.inference_mode():
        levels = through([dataset.image(image) for image in job.supports])
        support = positions(levels)
    shares = object_shares(torch.from_numpy(masks), (levels[-1].shape[2], levels[-1].shape[3]))
    shots = len(job.supports)
    batch = EpisodeBatch(levels, levels, torch.from_numpy(masks), torch.from_numpy(masks[:1]), None, shots)
    scene = Scene(support[0], support, shares, batch)
    together = _fitted(scene)
    alone = [_fitted(scene.of([k])) if shares[k].any() else None for k in range(shots)]
    for image in job.queries:
        photo, truth = dataset.image(image), dataset.label(image) == job.class_id + 1
        with torch.inference_mode():
            seen_levels = through([photo])
            vectors = positions(seen_levels)[0]
            seen = replace(scene, query=vectors)
            grid = grid_of(batch)
            margin = _margin(seen, together).unflatten(0, grid)
            ones = [
                (vectors.new_full((len(vectors),), -1.0) if one is None else _margin(seen, one)).unflatten(0, grid)
                for one in alone
            ]
            trained = None
            if head is not None:
                logits = head.answer(replace(batch, query=seen_levels)).logits[:, 0]
                trained = (logits[:, 1] - logits[:, 0]).numpy()
        yield Answered(job, image, margin.numpy(), torch.stack(ones).numpy(), trained, photo, truth)


Cut = tuple[Tensor, Tensor, float]


def _fitted(scene: Scene) -> Cut:
    """Direction, bias and threshold of head `tune`, as `TuneSegmenter.margin` has them."""
    scene = distinct(scene)
    fit = fit_supports(scene)
    direction, bias = fit.solve(scene.support.flatten(0, 1), scene.shares.flatten())
    return direction, bias, fit.offset


def _margin(scene: Scene, cut: Cut) -> Tensor:
    direction, bias, offset = cut
    return carried(scene.query @ direction + bias, scene) - offset
