"""Packed training: every head of a pack is the run that it would be alone, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hsnet.errors import ConfigError, HSNetError
from hsnet.fused import FusedHSNet
from pipeline.common.lock import sole_writer
from pipeline.heads.checkpoint import load_checkpoint, read_tensors
from pipeline.packed import fit_packed
from pipeline.train import FitSummary, StepDone, fit

KINDS = (
    {},
    {"learning_rate": 3e-3, "average": 0.9, "optimiser": "adamw", "weight_decay": 0.01},
    {"seed": 1},
    {"learner": {"channels": [4, 8, 16], "kernel": "original"}},
    {"learner": {"channels": [4, 8, 16], "background": True}},
    {"learner": {"channels": [4, 8, 8]}, "clip": 0.1},
    {"batch_size": 2, "both_directions": True},
    {"fold": 1},
    {"novel_pixels": "ignore"},
)
"""One of each: other weights' treatment, episodes, kernels, sight, shapes, batches, classes."""


@pytest.fixture(scope="module")
def configs(tiny_config):
    return [tiny_config(**kind) for kind in KINDS]


@pytest.fixture(scope="module")
def alone(configs, tiny_source, tmp_path_factory):
    """Every head by itself."""
    out = tmp_path_factory.mktemp("alone")
    for number, config in enumerate(configs):
        fit(config, tiny_source, out / str(number))
    return out


def losses(run_dir: Path) -> list[tuple[int, float, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train" in line]
    return [(line["step"], line["train"]["loss"], line["train"]["gradient"]) for line in steps]


def assert_same_run(mine: Path, theirs: Path) -> None:
    assert losses(mine) == losses(theirs)
    assert (mine / "config.json").read_text() == (theirs / "config.json").read_text()
    assert load_checkpoint(mine).digest == load_checkpoint(theirs).digest
    (state, facts), (other, other_facts) = (read_tensors(path / "resume.safetensors") for path in (mine, theirs))
    assert facts == other_facts
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name


def places(out: Path, count: int) -> list[Path]:
    return [out / str(number) for number in range(count)]


def test_a_pack_equals_its_heads_alone(configs, tiny_source, alone, tmp_path):
    seen = []
    summaries = fit_packed(
        configs,
        tiny_source,
        places(tmp_path, len(configs)),
        on_event=lambda number, event: seen.append((number, event)),
    )
    for number, summary in enumerate(summaries):
        assert isinstance(summary, FitSummary), summary
        assert (summary.steps, summary.finished, summary.resumed_at) == (4, True, 0)
        assert_same_run(tmp_path / str(number), alone / str(number))
        steps = [event for head, event in seen if head == number and isinstance(event, StepDone)]
        assert [event.step for event in steps] == [1, 2, 3, 4]
        assert all(0 <= event.waited <= event.seconds for event in steps)


def test_micro_batches_of_a_pack(tiny_config, tiny_source, tmp_path):
    """Batches of different numbers of parts run out at different times."""
    configs = [tiny_config(steps=2), tiny_config(steps=2, batch_size=3), tiny_config(steps=1, learning_rate=0.01)]
    for number, config in enumerate(configs):
        fit(config, tiny_source, tmp_path / "alone" / str(number), micro_batch=1)
    fit_packed(configs, tiny_source, places(tmp_path, 3), micro_batch=1, prefetch_depth=0)
    for number in range(3):
        assert_same_run(tmp_path / str(number), tmp_path / "alone" / str(number))


def test_packed_goes_on_alone_and_alone_goes_on_packed(configs, tiny_source, alone, tmp_path):
    """Heads that stand at different steps: those behind catch up."""
    chosen, out = configs[:3], places(tmp_path, 3)
    asked = iter(range(100))
    fit(chosen[1], tiny_source, out[1], stop=lambda: next(asked) >= 3)
    rounds = iter(range(100))
    stopped = fit_packed(chosen, tiny_source, out, stop=lambda: next(rounds) >= 1)
    assert [(one.resumed_at, one.steps, one.finished) for one in stopped] == [
        (0, 1, False),
        (3, 3, False),
        (0, 1, False),
    ]
    assert fit(chosen[0], tiny_source, out[0]).resumed_at == 1
    done = fit_packed(chosen, tiny_source, out)
    assert [(one.resumed_at, one.finished) for one in done] == [(4, True), (3, True), (1, True)]
    for number in range(3):
        assert_same_run(out[number], alone / str(number))


class Counting:
    """What was read of a source, and how often something was correlated."""

    def __init__(self, source):
        self.source, self.images = source, []

    def __getattr__(self, name):
        return getattr(self.source, name)

    def features(self, images):
        self.images += images
        return self.source.features(images)


def test_reading_and_correlating_are_shared(tiny_config, tiny_source, tmp_path, monkeypatch):
    rates = [tiny_config(steps=3, select_on="none", learning_rate=rate) for rate in (1e-3, 2e-3, 3e-3)]
    calls = []
    before = FusedHSNet._read
    monkeypatch.setattr(FusedHSNet, "_read", lambda self, *given: calls.append(self) or before(self, *given))
    one = Counting(tiny_source)
    fit(rates[0], one, tmp_path / "one")
    assert len(calls) == 3
    three = Counting(tiny_source)
    fit_packed(rates, three, places(tmp_path / "same", 3))
    assert three.images == one.images, "three heads read what one does"
    assert len(calls) == 3 + 3, "and correlate what one does"
    calls.clear()
    seeds = [tiny_config(steps=3, select_on="none", seed=seed) for seed in (0, 1, 2)]
    union = Counting(tiny_source)
    fit_packed(seeds, union, places(tmp_path / "seeds", 3))
    assert len(calls) == 9, "other episodes, other correlations"
    each = 0
    for number, config in enumerate(seeds):
        counted = Counting(tiny_source)
        fit(config, counted, tmp_path / "apart" / str(number))
        each += len(counted.images)
    assert len(union.images) < each


def test_a_head_that_fails_leaves_the_others(configs, tiny_config, tiny_source, alone, tmp_path):
    chosen = [configs[0], configs[1], configs[2], tiny_config(fold=9)]
    out = places(tmp_path, 4)

    def burst(number, event):
        if number == 1 and event.step == 2:
            raise MemoryError("no room for step 3")

    fit(chosen[2], tiny_source, out[2], stop=lambda: True)
    with sole_writer(out[2]):
        done = fit_packed(chosen, tiny_source, out, on_event=burst)
    assert done[0].finished
    assert_same_run(out[0], alone / "0")
    assert isinstance(done[1], MemoryError)
    assert "is being written by process" in str(done[2])
    assert isinstance(done[3], HSNetError)
    assert "fold 9" in str(done[3])
    assert not out[3].exists()
    again = fit_packed(chosen[:3], tiny_source, out[:3])
    assert [one.finished for one in again] == [True] * 3
    for number in range(3):
        assert_same_run(out[number], alone / str(number))


def test_what_a_pack_refuses(configs, tiny_source, tmp_path):
    with pytest.raises(ConfigError, match="2 heads need as many run directories, got 1"):
        fit_packed(configs[:2], tiny_source, [tmp_path / "a"])
    with pytest.raises(ConfigError, match="cannot be trained in one run directory"):
        fit_packed(configs[:2], tiny_source, [tmp_path / "a", tmp_path / "b" / ".." / "b" / ".." / "a"])
    assert not any(tmp_path.iterdir())
