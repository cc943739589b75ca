"""Training: a run is its configuration, whatever interrupts or divides it."""

import json
import math
import os
import time

import numpy as np
import pytest
import torch
from tiny_runs import assert_same_run, losses, resume_file

from hsnet.errors import CheckpointError, ConfigError, DeviceMemoryError, StoreError
from hsnet.metrics import mean_iou, sum_by_class
from pipeline.common.machine import environment
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.episodes.stream import batch_numbers, steps_per_epoch
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.heads.config import skipped_digest
from pipeline.heads.contrast import ContrastSegmenter
from pipeline.loading.batch import load_batch
from pipeline.train import (
    Baseline,
    StepDone,
    Trainer,
    Validated,
    fit,
    selection_stream,
)


def test_a_run_leaves_checkpoints_metrics_and_its_configuration(whole_run, tiny_config):
    path, summary, events = whole_run
    assert summary.finished
    assert (summary.steps, summary.resumed_at) == (6, 0)
    steps = [event for event in events if isinstance(event, StepDone)]
    validations = [event for event in events if isinstance(event, Validated)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in validations] == [2, 4, 6]
    assert all(math.isfinite(event.loss) for event in steps)
    assert summary.best_miou == max(event.miou for event in validations)
    best = load_checkpoint(path)
    assert best.path.name == "best.safetensors"
    assert best.info.step == summary.best_step
    assert best.info.config == tiny_config(steps=6)
    assert best.info.scores["miou"] == summary.best_miou
    assert any(path.joinpath("tensorboard").iterdir())
    assert json.loads((path / "config.json").read_text())["batch_size"] == 4
    assert json.loads((path / "environment.json").read_text()) == environment()


def test_what_needs_no_training_is_told_beside_the_first_validation(whole_run, tiny_config, tiny_source, tmp_path):
    """The same run, and a score of head `contrast` as `evaluate` has it on those episodes."""
    events, config = [], tiny_config(steps=6)
    summary = fit(config, tiny_source, tmp_path / "run", baseline=True, on_event=events.append)
    assert_same_run(whole_run[0], tmp_path / "run", atol=0)
    (place,) = [number for number, event in enumerate(events) if isinstance(event, Baseline)]
    assert isinstance(events[place - 1], Validated)
    assert events[place].step == events[place - 1].step == 2
    stream = selection_stream(config, tiny_source)
    episodes = [stream[number] for number in range(config.validate_episodes)]
    batch = load_batch(tiny_source, episodes)
    counts = ContrastSegmenter().answer(batch).count(batch)
    totals = sum_by_class(counts, [episode.class_id for episode in episodes], stream.class_ids)
    assert events[place].miou == summary.baseline_miou == mean_iou(totals)
    assert whole_run[1].baseline_miou is None


def test_no_baseline_where_a_support_shows_nothing_but_its_object(tiny_config, tiny_source, tmp_path, caplog):
    """Head `contrast` has no answer there; training goes on without it."""
    caplog.set_level("INFO", logger="pipeline.train")

    class Full:
        def __getattr__(self, name):
            return getattr(tiny_source, name)

        def labels(self, images):
            shown = [max(tiny_source.classes_present(image), default=0) + 1 for image in images]
            return torch.tensor(shown)[:, None, None].expand(-1, 64, 64).contiguous().byte()

    summary = fit(tiny_config(steps=2), Full(), tmp_path / "run", baseline=True)
    assert summary.best_miou is not None
    assert summary.baseline_miou is None
    assert "is not told" in caplog.text


@pytest.mark.slow
def test_learning_happens(tiny_config, tiny_source, tmp_path):
    """Forty steps on a handful of episodes bring the loss well under that of a constant answer."""
    config = tiny_config(steps=40, batch_size=8, select_on="none", learning_rate=3e-3)
    summary = fit(config, tiny_source, tmp_path / "run")
    curve = losses(tmp_path / "run")
    assert summary.loss == pytest.approx(np.mean(curve[-20:])), "the last twenty steps, not all"
    assert np.mean(curve[-5:]) < 0.75 * np.mean(curve[:5])


def test_resumed_equals_uninterrupted(whole_run, tiny_config, tiny_source, tmp_path):
    """Stopped twice, at any step, then continued: the same losses and weights to the last bit."""
    path = tmp_path / "run"
    for stop_at in (1, 4):
        asked = iter(range(100))
        summary = fit(tiny_config(steps=6), tiny_source, path, stop=lambda asked=asked, n=stop_at: next(asked) >= n)
        assert not summary.finished
    assert (summary.resumed_at, summary.steps) == (1, 5)
    assert fit(tiny_config(steps=6), tiny_source, path).finished
    assert_same_run(whole_run[0], path, atol=0)
    assert load_checkpoint(path).info.scores == load_checkpoint(whole_run[0]).info.scores


def test_a_killed_run_goes_on_from_its_last_save(whole_run, tiny_config, tiny_source, tmp_path):
    """An error in the middle of a step stands for a kill: steps since the last save are computed again, once."""
    path = tmp_path / "run"

    class PowerCut(Exception):
        pass

    def cut(event):
        if event.step == 5:
            raise PowerCut

    with pytest.raises(PowerCut):
        fit(tiny_config(steps=6), tiny_source, path, on_event=cut)
    assert losses(path) == losses(whole_run[0])[:5]
    with open(path / "metrics.jsonl", "a") as stream:
        stream.write('{"step": 6, "tra')  # cut short by the crash
    summary = fit(tiny_config(steps=6), tiny_source, path)
    assert summary.resumed_at == 4
    assert_same_run(whole_run[0], path, atol=0)


def test_a_finished_run_can_be_continued_with_more_steps(whole_run, tiny_config, tiny_source, tmp_path):
    path = tmp_path / "run"
    fit(tiny_config(steps=2), tiny_source, path)
    assert fit(tiny_config(steps=6), tiny_source, path).resumed_at == 2
    assert_same_run(whole_run[0], path, atol=0)
    again = fit(tiny_config(steps=6), tiny_source, path)
    assert (again.resumed_at, again.steps, again.finished) == (6, 6, True)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_micro_batches_keep_the_global_batch(whole_run, tiny_config, tiny_source, tmp_path, micro_batch):
    """Gradient accumulation is the same mean over the batch; only rounding differs (1e-5 after Adam's division)."""
    fit(tiny_config(steps=6), tiny_source, tmp_path / "run", micro_batch=micro_batch)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole_run[0]), rtol=0, atol=1e-4)


def test_bfloat16_is_another_run_that_starts_alike(whole_run, tiny_config, tiny_source, tmp_path):
    fit(tiny_config(steps=1, arithmetic="bfloat16", select_on="none"), tiny_source, tmp_path / "run")
    near, exact = losses(tmp_path / "run")[0], losses(whole_run[0])[0]
    assert near != exact
    assert near == pytest.approx(exact, rel=0.02)
    with pytest.raises(ConfigError, match="arithmetic"):
        fit(tiny_config(steps=7, arithmetic="bfloat16"), tiny_source, whole_run[0])


def test_the_share_of_waiting_is_told(tiny_config, tiny_source, tmp_path):
    """By each step, in its metrics and in the summary, which leaves the first step out."""

    class Late:
        def __getattr__(self, name):
            return getattr(tiny_source, name)

        def features(self, images):
            time.sleep(0.2)
            return tiny_source.features(images)

    steps = []
    config = tiny_config(select_on="none")
    told = fit(config, Late(), tmp_path / "run", prefetch_depth=0, on_event=steps.append)
    assert all(0.2 <= step.waited <= step.seconds for step in steps)
    assert told.waited_share == sum(step.waited for step in steps[1:]) / sum(step.seconds for step in steps[1:])
    lines = [json.loads(line)["train"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["waited"] for line in lines] == [step.waited for step in steps]
    assert fit(tiny_config(steps=1, select_on="none"), tiny_source, tmp_path / "one").waited_share is None


def test_prefetch_changes_nothing(whole_run, tiny_config, tiny_source, tmp_path):
    fit(tiny_config(steps=6), tiny_source, tmp_path / "run", prefetch_depth=0)
    assert_same_run(whole_run[0], tmp_path / "run", atol=0)


def test_batches_follow_epochs_and_the_last_one_is_short():
    sizes = [len(batch_numbers(step, 20, 11394)) for step in range(steps_per_epoch(20, 11394))]
    assert (len(sizes), sizes[0], sizes[-1]) == (570, 20, 14), "PASCAL fold 0 as published"
    seen = [number for step in range(6) for number in batch_numbers(step, 4, 10)]
    assert seen == list(range(20))


def test_selection_never_sees_a_test_episode(tiny_config, tiny_source):
    config = tiny_config()
    index = tiny_source.index
    selection = selection_stream(config, tiny_source)
    novel = set(index.split(0, "test").class_ids)
    assert novel.isdisjoint(selection.class_ids)
    assert selection_stream(tiny_config(select_on="none"), tiny_source) is None
    assert set(selection_stream(tiny_config(select_on="test"), tiny_source).class_ids) == novel


def test_validation_may_change_when_a_run_goes_on(tiny_config, tiny_source, tmp_path, caplog):
    """The weights are those of a run that never changed; what is best is chosen anew where scores do not compare."""
    fit(tiny_config(steps=4), tiny_source, tmp_path / "whole")
    fit(tiny_config(steps=2), tiny_source, tmp_path / "run")
    assert fit(tiny_config(steps=2, validate_episodes=3), tiny_source, tmp_path / "run").best_step == 2
    assert "validations were" not in caplog.text, "it does not go on"
    fit(tiny_config(steps=3, validate_every=1), tiny_source, tmp_path / "run")
    assert "validations were" not in caplog.text, "the same episodes, more often"
    summary = fit(tiny_config(steps=4, validate_every=1, validate_episodes=3), tiny_source, tmp_path / "run")
    assert "validations were on 6 episodes and are on 3 from here: the best checkpoint (mIoU" in caplog.text
    assert (summary.best_step, load_checkpoint(tmp_path / "run" / "best.safetensors").info.step) == (4, 4)
    whole, changed = (resume_file(tmp_path / name) for name in ("whole", "run"))
    assert all(torch.equal(changed[name], value) for name, value in whole.items())


def test_another_configuration_in_the_run_directory_is_refused(whole_run, tiny_config, tiny_source):
    before = (whole_run[0] / "config.json").read_bytes()
    with pytest.raises(ConfigError, match=r"learning_rate +stored 0.001, wanted 0.01[\s\S]*Nothing was changed"):
        fit(tiny_config(steps=6, learning_rate=0.01), tiny_source, whole_run[0])
    assert (whole_run[0] / "config.json").read_bytes() == before


def test_a_foreign_directory_is_left_alone(tiny_config, tiny_source, tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        fit(tiny_config(), tiny_source, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_damaged_resume_file_is_named(tiny_config, tiny_source, tmp_path):
    fit(tiny_config(steps=2), tiny_source, tmp_path / "run")
    file = tmp_path / "run" / "resume.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"resume\.safetensors is not a checkpoint or is damaged"):
        fit(tiny_config(steps=4), tiny_source, tmp_path / "run")


def test_bad_settings_are_named(tiny_config, tiny_source, tmp_path):
    with pytest.raises(ConfigError, match="no fold 7; folds here: 0, 1, 2, 3"):
        fit(tiny_config(fold=7), tiny_source, tmp_path / "a")
    with pytest.raises(ConfigError, match="configured for other features"):
        fit(tiny_config(data="sha256:" + "0" * 64), tiny_source, tmp_path / "b")
    for bad in ({"batch_size": 0}, {"learning_rate": 0.0}, {"select_on": "trn"}, {"boundary": "drop"}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            tiny_config(**bad)
    assert list(tmp_path.iterdir()) == [], "nothing was left behind"


def test_a_class_with_one_image_is_an_error_and_not_an_endless_loop(tiny_config, tiny_source, tmp_path):
    index = DatasetIndex(
        name="folder",
        classes={0: "cat"},
        images=("a.jpg",),
        splits={0: {"trn": Split(((0, 0),)), "val": Split(), "test": Split(((0, 0),))}},
    )

    class OneImage:
        recipe, skipped = tiny_source.recipe, frozenset()

        def __init__(self):
            self.index = index

    with pytest.raises(ConfigError, match=r"needs 2 images of its class.*'cat' has 1"):
        fit(tiny_config(data=index.digest), OneImage(), tmp_path / "run")


def test_leaving_out_other_photos_is_another_run(tiny_config, tiny_source, tmp_path):
    """A store whose skipped photo was mended draws other episodes; going on with it would not be the same run."""

    class WithSkipped:
        skipped = (3,)

        def __getattr__(self, name):
            return getattr(tiny_source, name)

    with pytest.raises(ConfigError, match=r"skipped +configured '', given 'sha256:"):
        fit(tiny_config(), WithSkipped(), tmp_path / "run")
    config = tiny_config(skipped=skipped_digest([tiny_source.index.images[3]]), steps=1, select_on="none")
    assert fit(config, WithSkipped(), tmp_path / "run").finished
    assert set(config.differences(tiny_config())) == {"skipped", "select_on"}


def test_a_second_training_in_the_same_folder_is_refused(tiny_config, tiny_source, tmp_path):
    """Two would undo each other's saves. The first one is not disturbed."""
    refused = []

    def start_another(event):
        if not refused:
            with pytest.raises(StoreError, match=f"being written by process {os.getpid()}"):
                fit(tiny_config(), tiny_source, tmp_path / "run")
            refused.append(event)

    assert fit(tiny_config(), tiny_source, tmp_path / "run", on_event=start_another).finished
    assert len(losses(tmp_path / "run")) == 4
    assert not (tmp_path / "run" / "_owner.json").exists()


@pytest.mark.parametrize(("micro_batch", "resident", "less"), [
    (None, "auto", r"Use --micro-batch 2 \(it is 4; the steps are the same up to rounding\), or --resident off\."),
    (2, "off", r"Use --micro-batch 1 \(it is 2; the steps are the same up to rounding\)\."),
    (1, "off", r"Use a store of a smaller --image-size: a step computes one episode at a time already\."),
])  # fmt: skip
def test_a_lack_of_memory_names_the_option_and_loses_nothing(
    tiny_config, tiny_source, tmp_path, monkeypatch, micro_batch, resident, less
):
    config, path, taken = tiny_config(steps=4, validate_every=2, validate_episodes=1), tmp_path / "run", Trainer.learn

    def learn(self, step, *arguments, **named):
        if step == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")
        return taken(self, step, *arguments, **named)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "learn", learn)
        said = rf"Out of memory \(CUDA out of memory\. Tried .* 20 MiB\)\. {less} .*run is as it was saved last"
        with pytest.raises(DeviceMemoryError, match=said):
            fit(config, tiny_source, path, micro_batch=micro_batch, resident=resident)
    assert fit(config, tiny_source, path, micro_batch=1).resumed_at == 2
