"""Evaluation on Ray: the same rows for any number of workers, also when one dies in the middle."""

import functools
import os
import signal
from pathlib import Path

import pytest
import torch

from cluster.runner import RayRunner
from hsnet.model import HSNet
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.protocols import resolve
from pipeline.evaluate.nway import evaluate_ways
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.evaluate.stage import evaluate
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.heads.catalogue import Method
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.loading.source import StoreSource
from pipeline.store.feature_store import FeatureStore

SHAPES = Shapes(size=64, trn_per_class=2, val_per_class=4)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "s.zarr"
    extract(SHAPES, load_weights("squeezenet1_1"), path, image_size=64, precision="int8")
    return path


def make_source(path: Path) -> StoreSource:
    return StoreSource(FeatureStore.open(path))


def make_segmenter() -> LearnedSegmenter:
    torch.manual_seed(0)
    model = HSNet((4, 2, 2), (4, 8, 16)).eval()
    with torch.no_grad():  # answers both ways, so that counts have something to differ in
        model.decode_fine[-1].weight.mul_(10)
        model.decode_fine[-1].bias.zero_()
    return LearnedSegmenter(model)


class MortalSegmenter:
    """Kills its process at the first block that any worker starts."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark
        self.inner = make_segmenter()

    def answer(self, batch, joint=(), alone=None):
        try:
            self.mark.touch(exist_ok=False)
        except FileExistsError:
            return self.inner.answer(batch, joint)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("unreachable")


def plan_of(store: Path, segmenter=make_segmenter, **choices):
    return EvaluationPlan(
        method=Method(segmenter, {}),
        source=make_source(store),
        make_source=functools.partial(make_source, store),
        fold=0,
        protocol=resolve(**{"shots": (1, 3), "episodes": 110, **choices}),
    )


def run(store: Path, runner=None, segmenter=make_segmenter):
    return evaluate(plan_of(store, segmenter), runner=runner)


def counted(rows):
    """Rows without the only column that may differ."""
    return rows.drop_columns(["seconds"])


@pytest.fixture(scope="module")
def expected(store):
    result = run(store)
    assert 0 < result.scores[0].miou < 100
    return result


@pytest.mark.usefixtures("ray_runner")
@pytest.mark.parametrize("workers", [1, 2])
def test_rows_are_the_same_for_any_number_of_workers(store, expected, workers):
    result = run(store, RayRunner(workers))
    assert counted(result.rows).equals(counted(expected.rows), check_metadata=True)
    assert result.scores == expected.scores


def test_rows_and_the_fitted_background_of_several_ways(store, ray_runner):
    plan = plan_of(store, shots=(1,), episodes=30, ways=2, absent=0.2)
    here, there = evaluate_ways(plan), evaluate_ways(plan, runner=ray_runner)
    assert there.background == here.background
    assert counted(there.rows).equals(counted(here.rows), check_metadata=True)


def test_a_killed_worker_changes_no_row(store, expected, ray_runner, tmp_path):
    result = run(store, ray_runner, functools.partial(MortalSegmenter, tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert counted(result.rows).equals(counted(expected.rows))
