"""A sweep on Ray: cases side by side, the same scores as one after the other."""

import functools
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cli
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.protocols import resolve
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.loading.source import StoreSource
from pipeline.store.feature_store import FeatureStore
from pipeline.sweep import make_cases, sweep

QUICK = {"steps": 2, "batch_size": 2, "validate_every": 1, "validate_episodes": 2}


def open_source(path: str) -> StoreSource:
    return StoreSource(FeatureStore.open(path))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "s.zarr"
    data = Shapes(size=64, trn_per_class=2, val_per_class=3)
    extract(data, load_weights("squeezenet1_1"), path, image_size=64, precision="int8")
    return path


def test_cases_side_by_side_equal_cases_one_after_the_other(store: Path, tmp_path: Path, ray_runner) -> None:
    cases = make_cases([str(store)], (0, 1), {"seed": (0, 1)}, QUICK)
    run = functools.partial(sweep, cases, open_source, protocol=resolve(episodes=10))
    together = run(out=tmp_path / "ray", runner=ray_runner)
    assert not together.failed
    assert [one.case for one in together.cases] == cases
    apart = run(out=tmp_path / "here")
    for mine, theirs in zip(together.configurations, apart.configurations, strict=True):
        assert mine.scores[0].miou == theirs.scores[0].miou


@pytest.mark.ray
def test_the_first_ctrl_c_ends_a_sweep_on_ray(store: Path, tmp_path: Path) -> None:
    """Workers cannot hear of a wish to stop: cases are cancelled, and the same command goes on."""
    out = tmp_path / "out"
    words = ("--folds", "0", "--fix", "batch_size=2", "--steps", "5000", "--workers", "1", "--out", str(out))
    process = subprocess.Popen(
        [sys.executable, "cli.py", "sweep", "--store", str(store), *words],
        cwd=Path(cli.__file__).parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not (out / "s-fold0" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert printed == ""
    assert "Traceback" not in said
    assert "Interrupted. The run goes on from its last save: give the same command again." in said
