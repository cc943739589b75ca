import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pipeline.features.budgeted import LayerCode, fit_layers, unit_vectors
from pipeline.features.level_search import LevelSearch

WIDTH = 255


def thresholds_of(rows: list[list[float]]) -> NDArray[np.float32]:
    table = np.full((len(rows), WIDTH), np.inf, np.float32)
    for row, values in zip(table, rows, strict=True):
        row[: len(values)] = np.sort(np.array(values, np.float32))
    return table


def searched(thresholds: NDArray[np.float32], values: NDArray[np.float32]) -> NDArray[np.integer]:
    return torch.searchsorted(torch.from_numpy(thresholds), torch.from_numpy(values)).numpy()


def probes(thresholds: NDArray[np.float32], generator: np.random.Generator, count: int = 500) -> NDArray[np.float32]:
    """Values all over a row's range and beyond, every threshold itself, and the numbers next to it."""
    known = np.where(np.isfinite(thresholds), thresholds, 0)
    spread = np.abs(known).max(1, keepdims=True)
    wild = generator.standard_normal((len(thresholds), count)).astype(np.float32) * spread
    up, down = (np.nextafter(known, np.float32(to)) for to in (np.inf, -np.inf))
    ends = np.tile(np.array([-1e6, 0.0, -0.0, 1e6], np.float32), (len(thresholds), 1))
    return np.ascontiguousarray(np.concatenate([known, up, down, wild, ends], axis=1), np.float32)


def test_it_counts_as_a_search_does():
    generator = np.random.default_rng(0)
    rows = [list(generator.standard_normal(count) * 10.0**power) for count in (0, 1, 2, 15, 255) for power in (-6, 0)]
    thresholds = thresholds_of(rows)
    values = probes(thresholds, generator)
    found = LevelSearch(thresholds, np.ones(len(rows), np.int32))(values)
    assert found.dtype == np.uint8
    assert np.array_equal(found, searched(thresholds, values))


@pytest.mark.parametrize(
    "row",
    [
        [0.5] * 255,
        [1.0, 1.0, 1.0, 2.0],
        [0.0, np.nextafter(np.float32(0), np.float32(1))],
        [-1.0, *np.linspace(0, 1e-6, 200), 1.0],
        [1e-38 * number for number in range(20)],
    ],
    ids=["one place", "ties", "neighbours", "crowded", "subnormal"],
)
def test_levels_that_stand_close_are_told_apart(row):
    thresholds = thresholds_of([row, [0.25]])
    values = probes(thresholds, np.random.default_rng(1))
    found = LevelSearch(thresholds, np.ones(2, np.int32))(values)
    assert np.array_equal(found, searched(thresholds, values))


def test_weights_and_blocks():
    """More values than a block holds, more positions than that, none at all."""
    generator = np.random.default_rng(2)
    thresholds = thresholds_of([list(generator.standard_normal(count)) for count in (3, 15, 7)])
    weights = np.array([64, 16, 1])
    search = LevelSearch(thresholds, weights)
    for positions in (0, 1, 40_000, 70_000):
        values = generator.standard_normal((3, positions)).astype(np.float32)
        assert np.array_equal(search(values), searched(thresholds, values) * weights[:, None])


def plain_encode(layer: LayerCode, vectors: torch.Tensor) -> torch.Tensor:
    """`LayerCode.encode` as it was when the first coded stores were written: their bytes must not change."""
    turned = (layer.basis.t() @ vectors.t()).contiguous()
    parts, first = [], 0
    for count, width in layer.groups:
        rows = slice(first, first + count * width)
        digits = torch.searchsorted(layer.thresholds[rows].contiguous(), turned[rows], out_int32=True)
        digits *= layer.strides[rows, None]
        parts.append(digits.view(count, width, -1).sum(1, dtype=torch.int32))
        first += count * width
    return torch.cat(parts).t().to(torch.uint8)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
def test_codes_are_those_of_older_stores(share):
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(64, 64, generator=generator) * torch.arange(1, 65.0) ** -1
    sample = unit_vectors(torch.randn(3000, 64, generator=generator) @ mix + 0.5)
    (layer,) = fit_layers([[sample]], [100], int(100 * 64 * share)).levels[0]
    vectors = torch.cat([unit_vectors(torch.randn(4000, 64, generator=generator) @ mix), sample, layer.basis.t()])
    assert torch.equal(layer.encode(vectors), plain_encode(layer, vectors))
