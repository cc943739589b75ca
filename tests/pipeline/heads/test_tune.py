"""Head `tune`: what leave-one-out chooses, and how it stands on a trained head."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from hsnet.errors import ConfigError
from hsnet.model import HSNet
from hsnet.readout import balanced, fit_readouts
from hsnet.similarity import NO_OBJECT
from pipeline.episodes.stream import Episode, EpisodeStream
from pipeline.heads import tune
from pipeline.heads.catalogue import made_again, on_trained, trained
from pipeline.heads.checkpoint import CheckpointInfo, save_checkpoint
from pipeline.heads.scene import Scene, grid_of, scenes
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.heads.tune import OFFSETS, PENALTIES, WEIGHTS, TuneSegmenter, carried, fit_supports
from pipeline.loading.batch import load_batch


def scene_in(source, shots=3, number=0, distinct=True):
    """An episode of the tiny setting in float64, where LBFGS comes near enough to compare."""
    drawn = EpisodeStream(source.index, 0, "test", shots, 0, repeat_supports=not distinct)[number]
    batch = load_batch(source, [drawn])
    exact = replace(batch, query=[q.double() for q in batch.query], support=[s.double() for s in batch.support])
    (scene,) = scenes(exact)
    return Scene(scene.query, scene.support, scene.shares.double(), scene.batch)


def alone(vectors, shares, penalty):
    """One fit, of nothing but what it is fitted to."""
    positive, negative = balanced(shares)
    weight = torch.tensor([penalty], dtype=vectors.dtype)
    direction, bias = fit_readouts(vectors, positive[None], negative[None], weight, 500)
    return lambda others: others @ direction[0] + bias[0]


def test_leave_one_out_by_the_letter(tiny_source, monkeypatch):
    monkeypatch.setattr(tune, "LEFT_OUT_STEPS", 500)
    chosen = set()
    for number in range(4):
        scene = scene_in(tiny_source, number=number)
        scores = {}
        for penalty in PENALTIES:
            for offset in OFFSETS:
                both = either = 0.0
                for left in range(3):
                    kept = [k for k in range(3) if k != left]
                    fit = alone(scene.support[kept].flatten(0, 1), scene.shares[kept].flatten(), penalty)
                    for said, share in zip(fit(scene.support[left]) > offset, scene.shares[left], strict=True):
                        both += float(said) * float(share)
                        either += max(float(said), float(share))
                scores[penalty, offset] = both / either
        found = fit_supports(scene.support, scene.shares)
        assert scores[found.penalty, found.offset] == pytest.approx(max(scores.values()), abs=1e-6)
        chosen.add((found.penalty, found.offset))
    assert len(chosen) > 1, "not the same for every episode"


def test_the_answer_is_the_fit_of_all_supports_carried_and_cut(tiny_source):
    scene = scene_in(tiny_source)
    fit = fit_supports(scene.support, scene.shares)
    margin = alone(scene.support.flatten(0, 1), scene.shares.flatten(), fit.penalty)(scene.query)
    wanted = carried(margin, scene.query) - fit.offset
    torch.testing.assert_close(TuneSegmenter().margin(scene), wanted, rtol=0, atol=1e-3)
    one = scene.of(slice(1))
    assert fit_supports(one.support, one.shares).left_out is None
    assert fit_supports(one.support, one.shares).penalty == tune.ONE_SHOT_PENALTY


def test_a_support_that_comes_twice_counts_once(tiny_source):
    scene = scene_in(tiny_source, shots=2)
    twice = scene.of([0, 1, 0])
    torch.testing.assert_close(TuneSegmenter().margin(twice), TuneSegmenter().margin(scene))
    same = scene.of([1, 1])
    torch.testing.assert_close(TuneSegmenter().margin(same), TuneSegmenter().margin(scene.of([1])))


def test_without_an_object_everything_is_background(tiny_source):
    scene = scene_in(tiny_source)
    nothing = Scene(scene.query, scene.support, torch.zeros_like(scene.shares), scene.batch)
    assert TuneSegmenter().margin(nothing).tolist() == [NO_OBJECT] * len(scene.query)


@pytest.fixture
def head():
    torch.manual_seed(0)
    return LearnedSegmenter(HSNet((4, 2, 2), (4, 8, 16)).eval())


def batch_in(source, shots):
    drawn = EpisodeStream(source.index, 0, "test", shots, 0, repeat_supports=False)[0]
    return load_batch(source, [drawn])


def test_the_margin_of_a_trained_head_is_added(tiny_source, head, monkeypatch):
    batch = batch_in(tiny_source, 1)
    base = head.answer(batch).logits[0, 0]
    mine = TuneSegmenter().answer(batch).logits[0, 0, 1]
    both = TuneSegmenter(head=head).answer(batch).logits[0, 0, 1]
    resized = F.interpolate(mine[None, None], base.shape[1:], mode="bilinear", align_corners=True)[0, 0]
    torch.testing.assert_close(both, base[1] - base[0] + tune.ONE_SHOT_WEIGHT * resized)
    monkeypatch.setattr(tune, "WEIGHTS", (0.0,))
    three = batch_in(tiny_source, 3)
    logits = head.answer(three).logits[:, 0]
    torch.testing.assert_close(
        TuneSegmenter(head=head).answer(three, (3,), 1).joint[3][0, 1], (logits[:, 1] - logits[:, 0]).mean(0)
    )


def test_its_weight_is_the_best_on_supports_left_out(tiny_source, head):
    batch = batch_in(tiny_source, 3)
    (scene,) = scenes(batch)
    fit = fit_supports(scene.support, scene.shares)
    drawn = EpisodeStream(tiny_source.index, 0, "test", 3, 0, repeat_supports=False)[0]
    grid = grid_of(batch)
    said = []
    for left in range(3):
        others = tuple(s for k, s in enumerate(drawn.supports) if k != left)
        logits = head.answer(load_batch(tiny_source, [Episode(drawn.supports[left], others, drawn.class_id)])).logits
        margin = (logits[:, 0, 1] - logits[:, 0, 0]).mean(0)
        said.append(F.interpolate(margin[None, None], grid, mode="bilinear", align_corners=True).flatten())
    said = torch.stack(said)
    torch.testing.assert_close(
        F.interpolate(tune.left_out_margins(head, batch)[:, None], grid, mode="bilinear", align_corners=True).flatten(
            1
        ),
        said,
        rtol=0,
        atol=1e-5,
    )
    scores = []
    for weight in WEIGHTS:
        mask = (said + weight * (fit.left_out.view_as(said) - fit.offset) > 0).float()
        both = (mask * scene.shares).sum()
        scores.append(float(both / (mask.sum() + scene.shares.sum() - both)))
    assert tune.Standing.on(head, scene, fit).weight == WEIGHTS[scores.index(max(scores))]


def test_standing_on_a_checkpoint(tmp_path, tiny_config, tiny_source):
    config = tiny_config(fold=1)
    info = CheckpointInfo(
        recipe=config.recipe, learner=config.learner_arguments, step=1, origin="a test", config=config
    )
    save_checkpoint(tmp_path / "h.safetensors", HSNet(**config.learner_arguments).state_dict(), info)
    method = on_trained("tune", trained(tmp_path / "h.safetensors", tiny_source))
    assert (method.facts["name"], method.facts["on"], method.held_out) == ("tune", "hsnet", 1)
    batch = batch_in(tiny_source, 2)
    again = made_again(method.facts, tiny_source, checkpoint=method.path)
    assert again.facts == method.facts
    found = [one.make().answer(batch, (2,)).joint[2] for one in (method, again)]
    assert torch.equal(*found)
    with pytest.raises(ConfigError, match="'contrast' does not stand on a checkpoint; tune does"):
        on_trained("contrast", method)
