"""What a codec costs: correlations of one source of features against another's, and the mIoU of a head on both.

Dimension key: P positions of an image, L layers of a level, C channels or coordinates.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from hsnet.errors import ConfigError, StoreMismatch
from pipeline.common.philox import Draws
from pipeline.common.runner import Runner
from pipeline.episodes.protocols import resolve
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.evaluate.stage import evaluate
from pipeline.features.budgeted import unit_vectors
from pipeline.features.precision import encode
from pipeline.features.recipe import difference_lines
from pipeline.heads.catalogue import trained
from pipeline.loading.source import FeatureSource, StoreSource
from pipeline.scores.bootstrap import Interval, interval, resample
from pipeline.scores.rows import episode_counts

PAIRS = 32
POSITIONS = 256
"""Positions of an image and layer that are correlated, at most: 65,536 correlations for each pair."""


@dataclass(frozen=True)
class LayerError:
    """Absolute differences of one layer's correlations."""

    level: int
    """0 is the finest."""
    layer: int
    mean: float
    p99: float
    largest: float
    spread: float
    """Standard deviation of the correlations themselves, in the source compared against."""
    shift: float
    """Mean of the differences with their sign."""


@dataclass(frozen=True)
class ScoreChange:
    """mIoU of one head on both sources, on the same episodes, percent."""

    fold: int
    shots: int
    episodes: int
    miou: Interval
    miou_against: Interval
    difference: Interval
    """The first minus the second, points."""


@dataclass(frozen=True)
class CodecComparison:
    """The cost of a store's codec."""

    layers: tuple[LayerError, ...]
    pairs: int
    bytes_per_image: float | None
    """Size of the features, label maps not counted."""
    bytes_per_image_against: float | None
    encode_per_s: float | None
    """Images a second that this process encodes; None if there is nothing exact to encode."""
    decode_per_s: float
    """Images a second from stored bytes in memory to coordinates in float32."""
    score: ScoreChange | None


def compare(
    source: FeatureSource,
    against: FeatureSource,
    *,
    pairs: int = PAIRS,
    seed: int = 0,
    score: ScoreChange | None = None,
) -> CodecComparison:
    """Correlate pairs of images by both sources.

    Args:
        source, against: features of the same data set, network and image size.
        pairs: how many pairs of different images, drawn by the seed from those that both have.
        score: of `compare_scores`, to go into the result.

    Raises:
        StoreMismatch: the sources hold features of different photos or networks.
        ConfigError: fewer than two images.
    """
    require_comparable(source, against)
    drawn = _draw_pairs(source, against, pairs, seed)
    grids = [rows * columns for _, rows, columns, _ in source.recipe.level_shapes()]
    layers = [shape[0] for shape in source.recipe.level_shapes()]
    first: list[list[list[Tensor]]] = [[[] for _ in range(count)] for count in layers]
    second: list[list[list[Tensor]]] = [[[] for _ in range(count)] for count in layers]
    for number, pair in enumerate(drawn):
        ours, theirs = ([_unit(each, each.features([image])) for image in pair] for each in (source, against))
        for level, count in enumerate(layers):
            places = [_positions(grids[level], (seed, number, level, side)) for side in range(2)]
            for layer in range(count):
                first[level][layer].append(_correlate(ours, level, layer, places))
                second[level][layer].append(_correlate(theirs, level, layer, places))
    encode_per_s, decode_per_s = _rates(source, against, sorted({image for pair in drawn for image in pair})[:16])
    return CodecComparison(
        layers=tuple(
            _error(level, layer, torch.cat(first[level][layer]), torch.cat(second[level][layer]))
            for level, count in enumerate(layers)
            for layer in range(count)
        ),
        pairs=len(drawn),
        bytes_per_image=feature_bytes(source),
        bytes_per_image_against=feature_bytes(against),
        encode_per_s=encode_per_s,
        decode_per_s=decode_per_s,
        score=score,
    )


def compare_scores(
    checkpoint: Path,
    make_source: Callable[[], FeatureSource],
    make_against: Callable[[], FeatureSource],
    *,
    fold: int | None = None,
    shots: int = 1,
    episodes: int = 1000,
    seed: int = 0,
    runner: Runner | None = None,
    device: str = "cpu",
    on_event: Callable[[int, int], None] | None = None,
) -> ScoreChange:
    """Evaluate a head on both sources, on the same episodes.

    Args:
        checkpoint: a head that fits both.
        fold: whose classes are tested; None is the one that the head held out.
        on_event: called with (episodes done, episodes in all), both evaluations together.

    Raises:
        StoreMismatch, CheckpointMismatch, ConfigError: as `compare` and `evaluate`.
    """
    pair = [make_source(), make_against()]
    require_comparable(*pair)
    # An image that one of them lacks is in no episode of either.
    skipped = {image for source in pair for image in source.skipped}
    rules = resolve("default", shots=(shots,), episodes=episodes, seeds=(seed,))
    tables: list[pa.Table] = []
    for number, (source, make) in enumerate(zip(pair, (make_source, make_against), strict=True)):
        method = trained(checkpoint, source, device)
        fold = (method.held_out or 0) if fold is None else fold
        plan = EvaluationPlan(
            method=method,
            source=source,
            make_source=make,
            fold=fold,
            protocol=rules,
            skipped=skipped,
            device=device,
        )

        def report(now: int, _: int, before: int = number * episodes) -> None:
            if on_event:
                on_event(before + now, 2 * episodes)

        tables.append(evaluate(plan, runner=runner, on_event=report).rows)
    assert fold is not None
    class_ids = pair[0].index.split(fold, "test").class_ids
    counts = np.stack([episode_counts(table, rules.policy) for table in tables])
    values, samples = resample(counts, tables[0]["class_id"].to_numpy(), class_ids).miou()
    return ScoreChange(
        fold=fold,
        shots=shots,
        episodes=episodes,
        miou=interval(values[0], samples[:, 0]),
        miou_against=interval(values[1], samples[:, 1]),
        difference=interval(values[0] - values[1], samples[:, 0] - samples[:, 1]),
    )


def require_comparable(source: FeatureSource, against: FeatureSource) -> None:
    """Refuse sources that differ in more than their codec. Raises StoreMismatch."""
    differing = {
        name: pair
        for name, pair in source.recipe.differences(against.recipe).items()
        if name != "precision" and not name.startswith("coding")
    }
    if source.index.digest != against.index.digest:
        differing["data set"] = (source.index.digest, against.index.digest)
    if differing:
        raise StoreMismatch(
            f"These features differ in more than their codec:\n{difference_lines(differing, 'first', 'second')}\n"
            f"Compare features of the same photos and network. Nothing was computed.",
            differing,
        )


def feature_bytes(source: FeatureSource) -> float | None:
    """Bytes of an image's stored features; None if they are not stored."""
    if not isinstance(source, StoreSource):
        return None
    return float(sum(math.prod(shape) for shape in source.recipe.stored_shapes()) * source.recipe.dtype.itemsize)


def _unit(source: FeatureSource, levels: Sequence[Tensor]) -> list[Tensor]:
    """Levels (n, L, H, W, C) float32 whose inner products are the source's correlations before they are cut at 0."""
    if source.codec is not None:
        return source.codec.decode(levels)
    return [unit_vectors(level).view(level.shape) for level in levels]


def _draw_pairs(source: FeatureSource, against: FeatureSource, pairs: int, seed: int) -> list[tuple[int, int]]:
    gone = set(source.skipped) | set(against.skipped)
    there = [image for image in range(len(source.index.images)) if image not in gone]
    if len(there) < 2:
        raise ConfigError(f"Correlations need two images; the sources share {len(there)}.")
    drawn = []
    for number in range(pairs):
        draws = Draws(source.index.digest, "compare", seed, number)
        first, second = draws.below(len(there)), draws.below(len(there) - 1)
        drawn.append((there[first], there[second + (second >= first)]))
    return drawn


def _positions(count: int, key: Sequence[object]) -> Tensor:
    if count <= POSITIONS:
        return torch.arange(count)
    order = np.argsort(Draws("compare", *key).array(count), kind="stable")
    return torch.from_numpy(np.sort(order[:POSITIONS]))


def _correlate(pair: Sequence[Sequence[Tensor]], level: int, layer: int, places: Sequence[Tensor]) -> Tensor:
    query, support = (image[level][0, layer].flatten(0, 1)[at] for image, at in zip(pair, places, strict=True))
    return (query @ support.t()).clamp_(min=0).flatten()


def _error(level: int, layer: int, first: Tensor, second: Tensor) -> LayerError:
    shift = first - second
    error = shift.abs()
    p99 = error.kthvalue(max(1, math.ceil(0.99 * len(error)))).values
    return LayerError(
        level, layer, float(error.mean()), float(p99), float(error.max()), float(second.std()), float(shift.mean())
    )


def _rates(source: FeatureSource, against: FeatureSource, images: Sequence[int]) -> tuple[float | None, float]:
    """(images encoded, images decoded) a second, one by one as extraction does, without disk or backbone."""
    stored = [source.features([image]) for image in images]
    decode_s = _seconds(lambda levels: _unit(source, levels), stored)
    encode_s = None
    if against.codec is None:
        exact = [[level.float() for level in against.features([image])] for image in images]
        codec, precision = source.codec, source.recipe.precision
        encode_s = _seconds((lambda x: codec.encode(x)) if codec else (lambda x: encode(x, precision)), exact)
    return None if encode_s is None else 1 / encode_s, 1 / decode_s


def _seconds(work: Callable[[list[Tensor]], object], items: Sequence[list[Tensor]]) -> float:
    """Median seconds per item, the first one left out where there are more."""
    taken = []
    for item in items:
        started = time.perf_counter()
        work(item)
        taken.append(time.perf_counter() - started)
    return float(np.median(taken[1:] or taken))
