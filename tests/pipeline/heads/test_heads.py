"""Heads without a learner: one interface on every kind of features, the same answer alone and in a batch."""

import math
from dataclasses import replace

import pytest
import torch

from hsnet.errors import ConfigError, DataError, ShapeError
from hsnet.similarity import object_shares, positions
from pipeline.episodes.protocols import FUSIONS
from pipeline.episodes.stream import Episode, EpisodeStream
from pipeline.heads.catalogue import HEADS, NOTHING, made
from pipeline.heads.contrast import ContrastSegmenter, margin
from pipeline.heads.scene import Scene, require_background
from pipeline.heads.tune import carried
from pipeline.loading.batch import EpisodeBatch, load_batch

WITHOUT_LEARNER = ("contrast", "tune")
KINDS = ("float32", "int8", "unit", "levels", "one level")


def features(kind, images, seed):
    """Levels (finest first) of random features in one of the forms a store may have."""
    torch.manual_seed(seed)
    shapes = {"one level": [(2, 4, 4, 6)], "levels": [(1, 7, 7, 3), (2, 4, 4, 6), (2, 3, 3, 5)]}
    levels = [torch.randn(images, *shape) for shape in shapes.get(kind, [(2, 5, 5, 3), (2, 4, 4, 6)])]
    if kind == "int8":
        return [(level * 40).clamp(-127, 127).to(torch.int8) for level in levels]
    if kind == "unit":
        return [0.9 * torch.nn.functional.normalize(level, dim=-1) for level in levels]
    return levels


def batch_of(kind, size=3, shots=3, seed=0):
    masks = torch.zeros(size * shots, 32, 32, dtype=torch.bool)
    for number in range(len(masks)):
        masks[number, 4 : 20 + number % 5, number % 4 : 18] = True
    target = torch.zeros(size, 32, 32, dtype=torch.bool)
    target[:, 8:20, 8:20] = True
    return EpisodeBatch(
        query=features(kind, size, seed),
        support=features(kind, size * shots, seed + 1),
        support_mask=masks,
        target=target,
        ignore=None,
        shots=shots,
        unit=kind == "unit",
    )


def part(batch, number):
    """One episode of a batch."""
    drawn = slice(number * batch.shots, (number + 1) * batch.shots)
    return replace(
        batch,
        query=[level[number : number + 1] for level in batch.query],
        support=[level[drawn] for level in batch.support],
        support_mask=batch.support_mask[drawn],
        target=batch.target[number : number + 1],
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", WITHOUT_LEARNER)
def test_answers_do_not_depend_on_the_batch(name, kind, tiny_source):
    batch, segmenter = batch_of(kind), made(name, tiny_source).make()
    joint = (2, 3) if HEADS[name].joint else ()
    whole = segmenter.answer(batch, joint)
    grid = batch.query[-1].shape[2:4]
    assert whole.logits.shape == (3, 3, 2, *grid)
    assert whole.logits.dtype == torch.float32
    assert whole.logits.isfinite().all()
    assert set(whole.joint) == set(joint)
    for number in range(3):
        alone = segmenter.answer(part(batch, number), joint)
        assert torch.equal(alone.logits[:, 0], whole.logits[:, number])
        assert all(torch.equal(alone.joint[k][0], whole.joint[k][number]) for k in joint)
    fewer = segmenter.answer(batch, joint, 1)
    assert torch.equal(fewer.logits, whole.logits[:1]), "only what was asked for"


@pytest.mark.parametrize("kind", KINDS)
def test_contrast_by_loops(kind):
    """Cosines layer by layer and position by position, on the deepest grid; several levels where all grids agree."""
    batch = batch_of("one level" if kind == "levels" else kind, size=1, shots=2)
    query, support = ([level[..., :4, :4, :] for level in side[-1:]] for side in (batch.query, batch.support))
    batch = replace(batch, query=query, support=support)
    answer = ContrastSegmenter().answer(batch).logits
    layers = query[0].shape[1]
    for shot in range(2):
        for p in range(16):
            near, far = [], []
            for s in range(16):
                total = 0.0
                for layer in range(layers):
                    a = query[0][0, layer, p // 4, p % 4].float()
                    b = support[0][shot, layer, s // 4, s % 4].float()
                    total += float(a @ b) / (1.0 if batch.unit else float(a.norm() * b.norm()))
                cell = batch.support_mask[shot, 8 * (s // 4) : 8 * (s // 4) + 8, 8 * (s % 4) : 8 * (s % 4) + 8]
                share = float(cell.float().mean())
                if share > 0.5:
                    near.append(total / layers)
                elif share == 0:
                    far.append(total / layers)
            assert float(answer[shot, 0, 1, p // 4, p % 4]) == pytest.approx(
                mean_of_five(near) - mean_of_five(far), abs=1e-5
            )
    assert answer[:, :, 0].count_nonzero() == 0


def test_several_supports_of_contrast_are_one_with_all_positions():
    """Two supports of 4x4 beside each other are one of 4x8."""
    batch = batch_of("one level", size=1, shots=2)
    first, second = batch.support[0]
    beside = replace(
        batch,
        support=[torch.cat([first, second], 2)[None]],
        support_mask=torch.cat([*batch.support_mask], 1)[None],
        shots=1,
    )
    scene, wide = (scene_of(*pair) for pair in ((batch, (4, 4)), (beside, (4, 8))))
    torch.testing.assert_close(margin(scene), margin(wide))
    together = ContrastSegmenter().answer(batch, (2,)).joint[2]
    torch.testing.assert_close(together[0, 1].flatten(), margin(wide))


def scene_of(batch, grid):
    return Scene(positions(batch.query)[0], positions(batch.support), object_shares(batch.support_mask, grid), batch)


def mean_of_five(values):
    highest = sorted(values)[-5:]
    return sum(highest) / len(highest)


def test_a_margin_is_carried_by_loops():
    """Twice, every position takes what all positions say, by how much it looks like them."""
    scene = scene_of(batch_of("one level", size=1, shots=1), (4, 4))
    said = own = margin(scene).tolist()
    for _ in range(2):
        heard = []
        for p in range(16):
            weights = [math.exp(float(scene.query[p] @ scene.query[q]) / 0.05) for q in range(16)]
            heard.append(sum(w * m for w, m in zip(weights, said, strict=True)) / sum(weights))
        said = heard
    assert carried(torch.tensor(own), scene.query).tolist() == pytest.approx(said, abs=1e-5)


def test_supports_without_object_and_without_background():
    batch = batch_of("one level", size=1, shots=1)
    nothing = replace(batch, support_mask=torch.zeros_like(batch.support_mask))
    assert (ContrastSegmenter().answer(nothing).logits[:, :, 1] < 0).all(), "background everywhere"
    with pytest.raises(ShapeError, match="no background"):
        ContrastSegmenter().answer(replace(batch, support_mask=torch.ones_like(batch.support_mask)))


class Labelled:
    """A source whose second image shows nothing but class 0."""

    def __init__(self, source):
        self.source, self.index, self.recipe = source, source.index, source.recipe

    def labels(self, images):
        labels = self.source.labels(images).clone()
        labels[[image == 1 for image in images]] = 1
        return labels


def test_a_support_without_background_is_refused_by_name(tiny_source):
    source = Labelled(tiny_source)
    require_background(source, [(0, 0), (2, 0), (1, 1)], "contrast")  # an object that is not there needs none
    with pytest.raises(DataError, match=f"1 supports show their object everywhere .*{tiny_source.index.images[1]}"):
        require_background(source, [(0, 0), (1, 0)], "contrast")


def test_the_catalogue(tiny_source):
    for name, head in HEADS.items():
        assert head.summary, name
        assert head.fusion in (None, *FUSIONS), name
        assert head.joint or head.fusion != "joint", name
        if head.needs == NOTHING:
            methods = [made(name, tiny_source, fold=fold) for fold in (0, 1)]
            assert methods[0].facts == methods[1].facts, "no fold is known to it"
            assert methods[0].names_seen() == ()
    with pytest.raises(ConfigError, match=r"No head 'contast': choose of hsnet, .*; did you mean 'contrast'"):
        made("contast", tiny_source)
    with pytest.raises(ConfigError, match="Head 'hsnet' must be trained: give its run or checkpoint with --checkpoint"):
        made("hsnet", tiny_source)


@pytest.mark.parametrize("name", [name for name, head in HEADS.items() if head.segmenter and not head.joint])
def test_joint_is_refused_by_heads_that_have_none(name, tiny_source):
    stream = EpisodeStream(tiny_source.index, 0, "test", 2, 0)
    batch = load_batch(tiny_source, [stream[0]])
    with pytest.raises(ConfigError, match=f"Head '{name}' answers each support by itself"):
        made(name, tiny_source).make().answer(batch, (2,))


def test_the_support_itself_is_found(tiny_source):
    """Query and support the same photo: every position finds itself, and the mask comes back as well as 3x3 can say."""
    stream = EpisodeStream(tiny_source.index, 0, "test", 1, 0)
    same = [Episode(stream[n].query, (stream[n].query,), stream[n].class_id) for n in range(8)]
    batch = load_batch(tiny_source, same)
    everything = float(batch.target.float().mean())  # IoU of calling all of it object
    for name in WITHOUT_LEARNER:
        counts = made(name, tiny_source).make().answer(batch).count(batch).sum(0)
        assert float(counts[0, 1] / counts[1, 1]) > 1.4 * everything, name
