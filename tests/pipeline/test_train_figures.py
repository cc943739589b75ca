"""Losses and gradients of steps are read together, before anything is kept: the same run, however seldom."""

from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import STABLE, assert_same_run, losses, resume_file, weights

from hsnet.errors import HSNetError
from hsnet.fused import FusedHSNet
from pipeline.common.process_group import Alone
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.loading.batch import load_batch
from pipeline.train import (
    StepDone,
    Trainer,
    fit,
    opened_trainer,
    training_stream,
)


def test_a_gradient_that_is_no_number_stops_before_anything_of_it_is_kept(tiny_config, tiny_source, tmp_path):
    class Broken:
        def __init__(self):
            self.reads = 0

        def __getattr__(self, name):
            return getattr(tiny_source, name)

        def features(self, images):
            self.reads += 1
            levels = tiny_source.features(images)
            return [level * float("nan") for level in levels] if self.reads > 2 else levels

    config = tiny_config(validate_every=1, validate_episodes=1)
    with pytest.raises(HSNetError, match="step 2 is not a number"):
        fit(config, Broken(), tmp_path / "run", prefetch_depth=0)
    saved = load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert saved.info.step == 1
    assert all(bool(torch.isfinite(value).all()) for value in saved.state.values())


class Counting(Alone):
    """Alone, with a count of what a group would send."""

    def __init__(self, world_size=1):
        self.world_size, self.sums = world_size, 0

    def sum(self, tensor):
        self.sums += 1
        return tensor


@pytest.mark.parametrize("every", [2, 5, 100])
def test_losses_that_are_read_seldom_are_those_of_every_step(
    stable_run, tiny_config, tiny_source, tmp_path, every, monkeypatch
):
    """The same losses, weights and validations to the bit; events in order; one message for several steps.

    Validations are at steps 2, 4 and 6, before which everything is read.
    """
    monkeypatch.setattr("pipeline.train.SAVE_SECONDS", 0.0)  # a save whenever there may be one
    events, ranks, config = [], Counting(), tiny_config(steps=6, **STABLE)
    fit(config, tiny_source, tmp_path / "run", ranks=ranks, read_every=every, on_event=events.append)
    assert_same_run(stable_run[0], tmp_path / "run", atol=0)
    mine, theirs = resume_file(tmp_path / "run"), resume_file(stable_run[0])
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    names = [(type(event).__name__, event.step) for event in events]
    step, validated = "StepDone", "Validated"
    assert names == [(step, 1), (step, 2), (validated, 2), (step, 3), (step, 4), (validated, 4), *names[6:]]
    assert names[6:] == [(step, 5), (step, 6), (validated, 6)]
    assert [event.loss for event in events if isinstance(event, StepDone)] == losses(stable_run[0])
    assert [e.gradient for e in events if isinstance(e, StepDone)] == [e.gradient for e in stable_run[1]]
    reads = {2: 3, 5: 4, 100: 3}[every]  # those of validations; every five, step 5 as well
    assert ranks.sums == reads + 3 + 3, "validations; at the start waiting, the position and the wish to stop"


def test_a_stop_reads_what_was_not_read_and_the_run_goes_on_to_the_bit(stable_run, tiny_config, tiny_source, tmp_path):
    config, path = replace(tiny_config(steps=6, **STABLE), validate_every=6), tmp_path / "run"
    for stop_at, read_every in ((1, 5), (2, 100)):
        asked, events = iter(range(100)), []
        summary = fit(
            config, tiny_source, path, read_every=read_every, on_event=events.append,
            stop=lambda asked=asked, n=stop_at: next(asked) >= n,
        )  # fmt: skip
        assert len(events) == stop_at, "told before it is saved"
    assert (summary.resumed_at, summary.steps) == (1, 3)
    assert fit(config, tiny_source, path, read_every=4).resumed_at == 3
    np.testing.assert_array_equal(losses(path), losses(stable_run[0]))
    assert all(torch.equal(value, weights(stable_run[0])[name]) for name, value in weights(path).items())


@pytest.mark.parametrize("way", ["end", "validation", "stop"])
def test_weights_that_are_no_numbers_are_never_saved(tiny_config, tiny_source, tmp_path, way, monkeypatch):
    """The loss of step 3 is none, and nobody looks at it until something is to be kept."""
    config = tiny_config(steps=5, validate_every=4 if way == "validation" else 100, validate_episodes=1)
    path, taken = tmp_path / "run", Trainer.learn
    fit(replace(config, steps=1), tiny_source, path)
    saved = {file.name: file.read_bytes() for file in path.glob("*.safetensors")}

    def learn(self, step, *arguments, **named):
        return taken(self, step, *arguments, **named) * (float("nan") if step == 2 else 1)

    monkeypatch.setattr(Trainer, "learn", learn)
    events, asked = [], iter(range(100))
    stop = (lambda: next(asked) == 3) if way == "stop" else lambda: False
    with pytest.raises(HSNetError, match=r"step 3 is not a number. The last save is unharmed"):
        fit(config, tiny_source, path, read_every=100, stop=stop, on_event=events.append)
    assert [event.step for event in events] == [2], "those before it are told"
    assert {file.name: file.read_bytes() for file in path.glob("*.safetensors")} == saved


def test_a_step_on_a_device_looks_at_no_number(tiny_config, tiny_source, tmp_path, monkeypatch):
    """Tensors of the device "meta" have none: whoever asks for one gets an error, as `read` does."""
    monkeypatch.setattr(FusedHSNet, "_autocast", lambda self, device: nullcontext())
    config = tiny_config(steps=4, select_on="none", **{**STABLE, "clip": 0.5})
    stream = training_stream(config, tiny_source)
    given = {"ranks": Alone(), "device": "meta", "micro_batch": 4, "on_event": None, "read_every": 20}
    monkeypatch.setattr("pipeline.train.keep", lambda source, *_: source)
    with opened_trainer(config, tiny_source, tmp_path / "run", **given) as trainer:
        batch = trainer.placed(load_batch(tiny_source, [stream[0], stream[1]]))
        for step in range(3):
            total = trainer.begin()
            total += trainer.learn(step, batch)
            trainer.finish(step, total, lambda: 0.0, 0.0)
            assert not trainer.book()
        assert len(trainer.unread) == 3
        assert all(parameter.is_meta for parameter in trainer.model.parameters())
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            trainer.read()
