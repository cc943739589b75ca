"""Training: a run is its configuration, whatever interrupts or divides it."""

import json
import math
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch

from hsnet.backbone import FrozenBackbone
from hsnet.errors import CheckpointError, ConfigError, HSNetError, StoreError
from pipeline.common.process_group import Distributed
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.datasets.shapes import Shapes
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.heads.config import skipped_digest
from pipeline.loading.source import OnlineSource
from pipeline.train import (
    StepDone,
    Validated,
    batch_numbers,
    fit,
    selection_stream,
    steps_per_epoch,
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


def test_prefetch_changes_nothing(whole_run, tiny_config, tiny_source, tmp_path):
    fit(tiny_config(steps=6), tiny_source, tmp_path / "run", prefetch_depth=0)
    assert_same_run(whole_run[0], tmp_path / "run", atol=0)


def gloo_rank(rank, world_size, file, config, recipe, shapes, state_dict, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    source = OnlineSource(shapes, FrozenBackbone("squeezenet1_1", state_dict), recipe)
    fit(config, source, path, ranks=Distributed(), micro_batch=2)
    torch.distributed.destroy_process_group()


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
    spawn = multiprocessing.get_context("spawn")
    arguments = (2, tmp_path / "group", config, tiny_recipe, tiny_shapes, squeezenet.state_dict, tmp_path / "two")
    processes = [spawn.Process(target=gloo_rank, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0], f"not {-signal.SIGKILL}: a rank waits forever"
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
            return [level * float("nan") for level in levels] if self.reads > 4 else levels

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
