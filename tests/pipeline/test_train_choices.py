"""Choices of training: averages, schedules, clipping, both directions, pixels of held-out classes."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_runs import STABLE, assert_same_run, losses, resume_file, weights

from hsnet.errors import ConfigError, ShapeError
from hsnet.fused import FusedHSNet
from hsnet.loss import episode_losses
from hsnet.model import HSNet, resize_logits
from pipeline.datasets.shapes import Shapes
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.heads.config import TRAINING, RunConfig
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.heads.training import rate_at
from pipeline.loading.batch import load_batch
from pipeline.loading.source import OnlineSource
from pipeline.train import (
    fit,
    training_stream,
)


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
