"""Training: a run is its configuration, whatever interrupts or divides it."""

import json
import math
import multiprocessing
import os
import signal
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch

from hsnet.backbone import FrozenBackbone
from hsnet.errors import CheckpointError, ConfigError, DeviceMemoryError, HSNetError, ShapeError, StoreError
from hsnet.fused import FusedHSNet
from hsnet.loss import episode_losses
from hsnet.metrics import mean_iou, sum_by_class
from hsnet.model import HSNet, resize_logits
from pipeline.common.machine import environment
from pipeline.common.process_group import Alone, Distributed
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.stream import batch_numbers, steps_per_epoch
from pipeline.heads.checkpoint import load_checkpoint, read_tensors
from pipeline.heads.config import TRAINING, RunConfig, skipped_digest
from pipeline.heads.contrast import ContrastSegmenter
from pipeline.heads.run_dir import RunDir
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.heads.training import rate_at
from pipeline.loading.batch import load_batch
from pipeline.loading.source import OnlineSource
from pipeline.train import (
    Baseline,
    StepDone,
    Trainer,
    Validated,
    fit,
    opened_trainer,
    selection_stream,
    training_stream,
)


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["train"]["loss"] for line in lines if "train" in line]


def weights(run_dir):
    return load_checkpoint(run_dir / "last.safetensors").state


def assert_same_run(a, b, atol):
    np.testing.assert_allclose(losses(a), losses(b), rtol=0, atol=atol)
    for name, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[name], rtol=0, atol=10 * atol, msg=name)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, tiny_config, tiny_source):
    """Six steps without interruption: what the others are compared with."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    events = []
    summary = fit(tiny_config(steps=6), tiny_source, path, on_event=events.append)
    return path, summary, events


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


def gloo_rank(rank, world_size, file, config, recipe, shapes, state_dict, path, stops=(100,), read_every=None):
    """One process of a group, which begins the run once for each of `stops`: the number of events to stop after."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    source = OnlineSource(shapes, FrozenBackbone("squeezenet1_1", state_dict), recipe)
    save = RunDir.save
    # A slow disk: whoever goes on at once must not find what was there before.
    RunDir.save = lambda *given: (time.sleep(0.5), save(*given))
    for stop_after in stops:
        events = []
        stop = lambda events=events, n=stop_after: len(events) >= n  # noqa: E731
        ranks = Distributed()
        fit(config, source, path, ranks=ranks, micro_batch=2, read_every=read_every, stop=stop, on_event=events.append)
    torch.distributed.destroy_process_group()


def run_group(*arguments):
    """`gloo_rank` in two processes."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=gloo_rank, args=(rank, 2, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0], f"not {-signal.SIGKILL}: a rank waits forever"


@pytest.mark.slow
def test_two_ranks_are_the_same_run(tiny_config, tiny_source, tiny_recipe, tiny_shapes, squeezenet, tmp_path):
    """Batch 5 of an epoch of 72 episodes ends in a batch of 2; here also in one of 1, so that a rank is left idle.

    Two gloo processes, three steps across the end of the epoch: losses as in one process up to rounding.
    """
    config = tiny_config(steps=3, batch_size=71, validate_every=3, select_on="none")
    epoch = training_stream(config, tiny_source).epoch_length
    assert steps_per_epoch(71, epoch) == 2, "the second step is a batch of one episode"
    assert len(batch_numbers(1, 71, epoch)) == epoch - 71 == 1
    fit(config, tiny_source, tmp_path / "one")
    run_group(tmp_path / "group", config, tiny_recipe, tiny_shapes, squeezenet.state_dict, tmp_path / "two")
    # Features of other batch sizes and another order of summing differ by 1e-6 before Adam divides.
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=2e-4)


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


def test_pixels_of_held_out_classes_are_left_out_of_the_loss(tiny_config, tiny_source, tmp_path):
    """The loss of a step, by hand: cross-entropy over the other pixels. Shapes photos show several classes."""
    novel = tiny_source.index.split(0, "test").class_ids
    config = tiny_config(novel_pixels="ignore", steps=1, select_on="none", average=0.0)
    stream = training_stream(config, tiny_source)
    numbers = next(
        first for first in range(0, 400, 4)
        if load_batch(tiny_source, [stream[n] for n in range(first, first + 4)], novel).novel.any()
    )  # fmt: skip
    episodes = [stream[number] for number in range(numbers, numbers + 4)]
    batch = load_batch(tiny_source, episodes, novel)
    labels = tiny_source.labels([episode.query for episode in episodes])
    assert torch.equal(batch.novel, torch.isin(labels, torch.tensor(novel) + 1))
    assert load_batch(tiny_source, episodes).novel is None
    torch.manual_seed(0)
    model = HSNet(**config.learner_arguments)
    logits = FusedHSNet(model)(batch.query, batch.support, batch.support_mask)
    whole = torch.nn.functional.cross_entropy(resize_logits(logits, (64, 64)), batch.target.long(), reduction="none")
    by_hand = torch.stack([loss[~out].mean() for loss, out in zip(whole, batch.novel, strict=True)])
    torch.testing.assert_close(episode_losses(logits, batch.target, left_out=batch.novel), by_hand)
    assert not torch.allclose(episode_losses(logits, batch.target), by_hand)
    both = batch.both_directions()
    assert torch.equal(both.novel, torch.cat([batch.novel, batch.support_novel]))
    assert torch.equal(both.support_novel, torch.cat([batch.support_novel, batch.novel]))


def test_a_run_keeps_what_held_out_pixels_are(tiny_config, tiny_source, tmp_path):
    """Runs of before keep their digest; a run that was begun one way does not go on the other."""
    assert tiny_config().digest == tiny_config(novel_pixels="background").digest
    assert tiny_config(novel_pixels="ignore").digest != tiny_config().digest
    with pytest.raises(ConfigError, match="novel_pixels must be 'background' or 'ignore', got 'drop'"):
        tiny_config(novel_pixels="drop")
    losses = {}
    for kind in ("background", "ignore"):
        events = []
        fit(tiny_config(novel_pixels=kind, steps=2), tiny_source, tmp_path / kind, on_event=events.append)
        losses[kind] = [event.loss for event in events if hasattr(event, "loss")]
    assert losses["background"] != losses["ignore"]
    with pytest.raises(ConfigError, match=r"novel_pixels +stored 'ignore', wanted 'background'"):
        fit(tiny_config(steps=4), tiny_source, tmp_path / "ignore")
    values = tiny_config().to_dict()
    del values["novel_pixels"]  # as an earlier version wrote it
    assert RunConfig.from_dict(values).novel_pixels == "background"


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


@pytest.mark.slow
def test_dropping_novel_images_leaves_none_in_training(tiny_config, tiny_source):
    """12 images per class: with 3, some class would keep fewer than the two an episode needs."""
    shapes = Shapes(size=64, trn_per_class=12, val_per_class=2)
    source = OnlineSource(shapes, tiny_source.network.backbone, tiny_source.recipe)
    kept = training_stream(tiny_config(), source)
    dropped = training_stream(tiny_config(drop_novel_images=True), source)
    novel = set(source.index.split(0, "test").class_ids)
    clean = [entry for entry in kept.entries if novel.isdisjoint(source.classes_present(entry[0]))]
    assert 0 < len(clean) < kept.epoch_length
    assert list(dropped.entries) == clean


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


def test_a_gradient_that_is_no_number_stops_before_the_weights_are_spoilt(tiny_config, tiny_source, tmp_path):
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


STABLE = {
    "optimiser": "adamw",
    "weight_decay": 0.05,
    "schedule": "cosine",
    "warmup": 2,
    "clip": 0.5,
    "average": 0.9,
    "both_directions": True,
}


def resume_file(run_dir):
    return read_tensors(run_dir / "resume.safetensors")[0]


@pytest.fixture(scope="module")
def stable_run(tmp_path_factory, tiny_config, tiny_source):
    """Six steps with every training choice, without interruption."""
    path = tmp_path_factory.mktemp("runs") / "stable"
    events = []
    fit(tiny_config(steps=6, **STABLE), tiny_source, path, on_event=events.append)
    return path, [event for event in events if isinstance(event, StepDone)]


def test_every_training_choice_resumes_to_the_bit(stable_run, tiny_config, tiny_source, tmp_path):
    config, path = tiny_config(steps=6, **STABLE), tmp_path / "run"
    for stop_at in (1, 3):
        asked = iter(range(100))
        fit(config, tiny_source, path, stop=lambda asked=asked, n=stop_at: next(asked) >= n)
    assert fit(config, tiny_source, path).resumed_at == 4
    assert_same_run(stable_run[0], path, atol=0)
    mine, theirs = resume_file(path), resume_file(stable_run[0])
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert load_checkpoint(path).digest == load_checkpoint(stable_run[0]).digest


def test_the_average_is_what_is_validated_and_what_checkpoints_hold(
    stable_run, whole_run, tiny_config, tiny_source, tmp_path, monkeypatch
):
    judged = []

    class Listening(LearnedSegmenter):
        def __init__(self, model, arithmetic):
            super().__init__(model, arithmetic)
            judged.append({name: value.clone() for name, value in model.state_dict().items()})

    monkeypatch.setattr("pipeline.train.LearnedSegmenter", Listening)
    fit(tiny_config(steps=2, average=0.9, validate_every=2), tiny_source, tmp_path / "run")
    stored = resume_file(tmp_path / "run")
    average = {name.removeprefix("average."): v for name, v in stored.items() if name.startswith("average.")}
    best, last = load_checkpoint(tmp_path / "run"), load_checkpoint(tmp_path / "run" / "last.safetensors")
    assert best.path.name == "best.safetensors"
    for state in (*judged, best.state, last.state):
        assert state.keys() == average.keys()
        assert all(torch.equal(value, average[name]) for name, value in state.items())
    assert len(judged) == 1
    assert any(not torch.equal(value, stored[f"model.{name}"]) for name, value in average.items())
    # The weights themselves are those of a run without an average.
    fit(tiny_config(steps=2), tiny_source, tmp_path / "raw")
    assert all(torch.equal(value, stored[f"model.{name}"]) for name, value in weights(tmp_path / "raw").items())
    for file in ("last.safetensors", "best.safetensors"):
        assert load_checkpoint(stable_run[0] / file).info.averaged
        assert not load_checkpoint(whole_run[0] / file).info.averaged


def test_events_tell_the_learning_rate_and_the_gradient(stable_run, tiny_config):
    config = tiny_config(steps=6, **STABLE)
    assert [event.learning_rate for event in stable_run[1]] == [rate_at(config, step) for step in range(6)]
    assert all(event.gradient > 0 for event in stable_run[1])


@pytest.mark.parametrize("times", [0.5, 2.0])
def test_a_gradient_is_clipped_to_its_greatest_norm(tiny_config, tiny_source, tmp_path, times):
    """After one step Adam's first moment is a tenth of the gradient it was given."""
    free = tiny_config(steps=1, select_on="none")
    events = []
    fit(free, tiny_source, tmp_path / "free", on_event=events.append)
    limit = events[0].gradient * times
    fit(replace(free, clip=limit), tiny_source, tmp_path / "clipped", on_event=events.append)
    assert events[1].gradient == events[0].gradient, "told as it was before"

    def moments(run):
        return {name: value for name, value in resume_file(tmp_path / run).items() if name.startswith("exp_avg.")}

    whole, clipped = moments("free"), moments("clipped")
    for name, value in whole.items():
        torch.testing.assert_close(clipped[name], value * min(1.0, times), rtol=1e-4, atol=1e-9)


def test_both_directions_are_two_losses_with_query_and_support_exchanged(tiny_config, tiny_source):
    """In float64, gradients included. Boundary pixels go with the photo that becomes the query."""
    config = tiny_config(both_directions=True)
    stream = training_stream(config, tiny_source)
    batch = load_batch(tiny_source, [stream[number] for number in range(2)])
    generator = torch.Generator().manual_seed(0)
    edges = [torch.rand(batch.target.shape, generator=generator) < 0.2 for _ in range(2)]
    exact = {"query": [q.double() for q in batch.query], "support": [s.double() for s in batch.support]}
    batch = replace(batch, **exact, ignore=edges[0], support_ignore=edges[1])
    torch.manual_seed(0)
    model = HSNet(**config.learner_arguments).double()

    def loss(query, support, mask, target, ignore):
        return episode_losses(FusedHSNet(model)(query, support, mask), target, ignore, "ignore")

    def gradients(value):
        return torch.autograd.grad(value, list(model.parameters()))

    there = loss(batch.query, batch.support, batch.support_mask, batch.target, edges[0])
    back = loss(batch.support, batch.query, batch.target, batch.support_mask, edges[1])
    both = batch.both_directions()
    assert (both.size, both.shots) == (4, 1)
    joined = loss(both.query, both.support, both.support_mask, both.target, both.ignore)
    torch.testing.assert_close(joined, torch.cat([there, back]), rtol=0, atol=1e-9)
    for mine, theirs in zip(gradients(joined.sum()), gradients(there.sum() + back.sum()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_both_directions_read_half_the_episodes_and_an_epoch_is_the_same_list(tiny_config, tiny_source, tmp_path):
    """The loss of a step is the mean over both directions of half a batch of episodes."""
    read = []

    class Listening:
        def __getattr__(self, name):
            return getattr(tiny_source, name)

        def features(self, images):
            read.append(len(images))
            return tiny_source.features(images)

    config = tiny_config(steps=1, both_directions=True, select_on="none")
    fit(config, Listening(), tmp_path / "run")
    assert read == [4], "two queries and two supports for four losses"
    torch.manual_seed(config.seed)
    fused = FusedHSNet(HSNet(**config.learner_arguments))
    stream = training_stream(config, tiny_source)
    batch = load_batch(tiny_source, [stream[0], stream[1]])
    there = episode_losses(fused(batch.query, batch.support, batch.support_mask), batch.target)
    back = episode_losses(fused(batch.support, batch.query, batch.target), batch.support_mask)
    assert losses(tmp_path / "run") == [pytest.approx(float(torch.cat([there, back]).mean().detach()), rel=1e-5)]
    with pytest.raises(ShapeError, match="Only one-shot episodes"):
        replace(batch, shots=5).both_directions()


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_micro_batches_keep_the_batch_in_both_directions(stable_run, tiny_config, tiny_source, tmp_path, micro_batch):
    fit(tiny_config(steps=6, **STABLE), tiny_source, tmp_path / "run", micro_batch=micro_batch)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(stable_run[0]), rtol=0, atol=1e-4)


@pytest.mark.slow
def test_two_ranks_average_the_same_weights(
    stable_run, tiny_config, tiny_source, tiny_recipe, tiny_shapes, squeezenet, tmp_path
):
    """Two gloo processes that read two or three steps together, stopped and started again: as in one process, up to
    rounding. They validate after four steps and after the last."""
    config, two = replace(tiny_config(steps=6, **STABLE), validate_every=4), tmp_path / "two"
    run_group(tmp_path / "group", config, tiny_recipe, tiny_shapes, squeezenet.state_dict, two, (2, 100), 3)
    assert len(losses(two)) == 6
    np.testing.assert_allclose(losses(two), losses(stable_run[0]), rtol=0, atol=2e-4)
    for name, value in weights(stable_run[0]).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=0, atol=2e-3, msg=name)


def test_a_run_of_another_length_is_another_run_under_a_schedule(stable_run, tiny_config, tiny_source):
    before = (stable_run[0] / "config.json").read_bytes()
    said = r"steps +stored 6, wanted 8[\s\S]*cosine schedule ends with its last step"
    with pytest.raises(ConfigError, match=said):
        fit(tiny_config(steps=8, **STABLE), tiny_source, stable_run[0])
    assert (stable_run[0] / "config.json").read_bytes() == before


def test_a_run_of_an_earlier_version_goes_on(whole_run, tiny_config, tiny_source, tmp_path):
    """Its config.json lacks the training choices, its resume file an average."""
    path = tmp_path / "run"
    fit(tiny_config(steps=2), tiny_source, path)
    values = json.loads((path / "config.json").read_text())
    for name in set(TRAINING) - {"learning_rate"}:
        del values[name]
    (path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match=r"average +stored 0.0, wanted 0.9[\s\S]*begun with --recipe hsnet"):
        fit(tiny_config(steps=6, average=0.9), tiny_source, path)
    assert fit(tiny_config(steps=6), tiny_source, path).resumed_at == 2
    assert_same_run(whole_run[0], path, atol=0)


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
