"""Heads fitted once answer as they do in episodes, whole photos and tiles, object and background."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from hsnet.backbone import BACKBONES
from hsnet.errors import ConfigError, DataError
from hsnet.model import HSNet
from pipeline.bank.heads import CONTRAST, CONTRAST_SCALE, HSNET, STANDING, TUNE, Example, Trained, fit, thinned
from pipeline.bank.tiles import Tile
from pipeline.datasets.images import resize_label
from pipeline.heads.contrast import ContrastSegmenter
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.heads.tune import TuneSegmenter
from pipeline.loading.batch import EpisodeBatch

SIZE = 64


@pytest.fixture(scope="module")
def examples(reader, drawn):
    return [Example(reader.read(photo), mask) for photo, mask in drawn["class 0"][:4]]


@pytest.fixture(scope="module")
def learner():
    torch.manual_seed(1)
    head = HSNet(list(reversed(BACKBONES["squeezenet1_1"].layers))).eval()
    with torch.no_grad():
        head.decode_fine[-1].weight.mul_(10)
    return head


def episode(examples, query):
    """The same as an episode, with masks at network size as evaluation has them."""
    masks = [torch.from_numpy(resize_label(one.mask.astype(np.uint8), (SIZE, SIZE)).copy()) > 0 for one in examples]
    support = [torch.cat(levels) for levels in zip(*(one.features.levels for one in examples), strict=True)]
    return EpisodeBatch(query.levels, support, torch.stack(masks), masks[0][None], None, len(examples))


def at_network_size(examples):
    """Examples whose masks are at network size already, so that an episode sees the same shares."""
    found = []
    for one in examples:
        mask = resize_label(one.mask.astype(np.uint8), (SIZE, SIZE)) > 0
        found.append(Example(one.features, mask))
    return found


@pytest.mark.parametrize(
    ("name", "segmenter", "scale"), [(CONTRAST, ContrastSegmenter(), CONTRAST_SCALE), (TUNE, TuneSegmenter(), 1.0)]
)
def test_answers_are_those_of_an_episode(reader, examples, drawn, name, segmenter, scale):
    query = reader.read(drawn["class 0"][5][0])
    some = at_network_size(_whole(examples))
    fitted = fit(name, some[:3])
    said = fitted.answer(query).maps
    wanted = segmenter.answer(episode(some[:3], query), joint=(3,), alone=1).joint[3][0, 1]
    torch.testing.assert_close(torch.from_numpy(said), scale * wanted, rtol=0, atol=2e-3)
    assert (said > 0).any()
    assert (said < 0).any()


def _whole(examples):
    """Features that say their photo has network size, so that masks of that size fit."""
    size = (SIZE, SIZE)
    return [Example(replace(one.features, size=size, tiles=(Tile(0, 0, *size),)), one.mask) for one in examples]


def test_a_trained_head_beside_a_read_out_is_that_of_an_episode(reader, examples, drawn, learner):
    query = reader.read(drawn["class 0"][5][0])
    some = at_network_size(_whole(examples))[:3]
    trained = Trained.of(learner, SIZE)
    fitted = fit(STANDING, some, trained)
    head = LearnedSegmenter(learner)
    logits = head.answer(episode(some, query)).logits[:, 0]
    base = (logits[:, 1] - logits[:, 0]).mean(0)
    torch.testing.assert_close(fit(HSNET, some, trained).margin(query), base, rtol=0, atol=1e-4)
    own = torch.from_numpy(fit(TUNE, some).answer(query).maps)[None, None]
    own = torch.nn.functional.interpolate(own, base.shape, mode="bilinear", align_corners=True)[0, 0]
    torch.testing.assert_close(
        torch.from_numpy(fitted.answer(query).maps), base + fitted.weight * own, rtol=0, atol=2e-3
    )


def test_a_photo_without_the_object_teaches_background(reader, examples, drawn):
    """What the other class shows is answered less often once it was given as a photo without the class."""
    other = [reader.read(photo) for photo, _ in drawn["class 1"][:4]]
    alone, told = fit(TUNE, examples[:2]), fit(TUNE, [*examples[:2], Example(other[0], None)])
    assert told.answer(other[1]).presence < alone.answer(other[1]).presence
    assert fit(CONTRAST, [*examples[:2], Example(other[0], None)]).answer(other[0]).maps.max() < 0


def test_ignored_positions_teach_nothing(reader, examples):
    one = examples[0]
    half = np.zeros(one.mask.shape, bool)
    half[:, : half.shape[1] // 2] = True
    vectors, shares = Example(one.features, one.mask, half).positions
    kept = one.features.shares(half).flatten() < 0.5
    assert 0 < len(vectors) == len(shares) < len(kept)
    assert torch.equal(vectors, one.positions[0][kept])


def test_tiles_find_what_a_whole_photo_finds(tiled, drawn):
    """Tiles of a photo are answered one by one and become one map, finer than the photo's own grid."""
    photo, mask = drawn["class 0"][0]
    features = tiled.read(photo)
    assert len(features.tiles) == 6
    fitted = fit(TUNE, [Example(features, mask)])
    coarse = fitted.answer(features)
    assert coarse.maps.shape[0] > features.grid[0]
    said = fitted.mask(coarse, mask.shape)
    assert (said & mask).sum() / (said | mask).sum() > 0.5


def test_a_fit_to_many_positions_draws_some(monkeypatch):
    monkeypatch.setattr("pipeline.bank.heads.MOST_POSITIONS", 10)
    vectors, shares = torch.arange(200.0)[:, None], torch.cat([torch.ones(30), torch.zeros(170)])
    some, kept = thinned(vectors, shares, 1)
    assert (len(some), int(kept.sum())) == (20, 10)
    assert torch.equal(some, thinned(vectors, shares, 1)[0])
    assert (some[kept > 0] < 30).all()
    assert len(thinned(vectors[:20], shares[:20], 1)[0]) == 10
    assert len(thinned(vectors[:10], shares[:10], 1)[0]) == 10


def test_what_cannot_be_fitted_is_said(reader, examples, tiled, drawn, learner):
    everything = Example(examples[0].features, np.ones_like(examples[0].mask))
    with pytest.raises(DataError, match="shows its object everywhere"):
        fit(TUNE, [everything])
    with pytest.raises(DataError, match="No annotated photo shows the class"):
        fit(TUNE, [Example(examples[0].features, None)])
    with pytest.raises(ConfigError, match="stands on a trained one"):
        fit(HSNET, examples)
    with pytest.raises(ConfigError, match="No head 'hsnett'"):
        fit("hsnett", examples)
    cut = [Example(tiled.read(photo), mask) for photo, mask in drawn["class 0"][:1]]
    with pytest.raises(ConfigError, match="whole photos"):
        fit(HSNET, cut, Trained.of(learner, SIZE))
    whole = fit(HSNET, examples[:1], Trained.of(learner, SIZE))
    with pytest.raises(ConfigError, match="whole photos"):
        whole.answer(cut[0].features)


def test_shares_keep_an_object_of_one_pixel(reader):
    photo = Image.new("RGB", (400, 300))
    mask = np.zeros((300, 400), bool)
    mask[150, 201] = True
    shares = reader.read(photo).shares(mask)
    assert shares.sum() > 0
    assert not (resize_label(mask.astype(np.uint8), (SIZE, SIZE)) > 0).any(), "at network size it is lost"
