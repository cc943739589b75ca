"""A sweep on Ray: cases side by side, the same scores as one after the other."""

import functools
import json
import os
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
from pipeline.heads.checkpoint import read_tensors
from pipeline.heads.run_dir import read_metrics
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


def fail_by_seed(case, event) -> None:
    """Training of seed 1 ends its process, that of seed 2 meets a bug."""
    if case.choices["seed"] == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if case.choices["seed"] == 2:
        raise ZeroDivisionError("a bug of seed 2")


def test_a_case_that_fails_on_ray_fails_alone(store: Path, tmp_path: Path, ray_runner, monkeypatch) -> None:
    monkeypatch.setattr("cluster.runner.ATTEMPTS", 1)
    cases = make_cases([str(store)], (0,), {"seed": (0, 1, 2)}, QUICK)
    result = sweep(cases, open_source, tmp_path, resolve(episodes=4), runner=ray_runner, on_step=fail_by_seed)
    assert [done.kind for done in result.cases] == [None, "dead process", "bug"]
    assert result.cases[0].rows is not None
    dead, bug = result.failed
    assert dead.log == tmp_path / "s-seed=1-fold0.log"
    assert "Ray lost the work" in dead.log.read_text()
    assert bug.error == "ZeroDivisionError: a bug of seed 2"
    assert "in fail_by_seed" in bug.log.read_text(), "the traceback"
    assert not (tmp_path / ".sweep").exists()


@pytest.mark.ray
def test_ctrl_c_saves_the_cases_that_train_on_ray(store: Path, tmp_path: Path) -> None:
    """They see the stop file: all but the current step is kept, and the same command goes on."""
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
    deadline = time.monotonic() + 180
    while not (out / "s-fold0" / "metrics.jsonl").exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "0 of 1 cases" in printed
    assert "Traceback" not in said
    assert "s-fold0: interrupted; the same command goes on" in said
    steps = [line["step"] for line in read_metrics(out / "s-fold0")]
    progress = json.loads(read_tensors(out / "s-fold0" / "resume.safetensors")[1]["progress"])
    assert progress["step"] == max(steps) > 0
    assert not (out / ".sweep").exists()
