"""The published way in benchmarks/ must be the model of hsnet/, or the ratios compare two different things."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks import published_way
from benchmarks.inputs import disc, normalised, picture
from hsnet.backbone import FrozenBackbone, backbone_spec, random_state_dict
from hsnet.correlation import build_pyramid
from hsnet.fusion import vote
from hsnet.loss import episode_losses
from hsnet.model import HSNet, predict_mask, resize_logits

SIZE = 96


def build(backbone: str, dtype: torch.dtype = torch.float32):
    torch.manual_seed(1)
    state = random_state_dict(backbone)
    learner = HSNet(tuple(reversed(backbone_spec(backbone).layers))).to(dtype)
    return published_way.PublishedHSNet(backbone, state, learner).to(dtype), learner, state


def inputs(count: int):
    photos = normalised(torch.stack([picture(number, SIZE) for number in range(count)]))
    return photos, torch.stack([disc(number, SIZE) for number in range(count)])


@pytest.mark.parametrize("backbone", ["resnet50", "vgg16"])
def test_learner_gives_the_same_logits_and_gradients_in_float64(backbone):
    published, learner, _ = build(backbone, torch.float64)
    spec = backbone_spec(backbone)
    shapes = [spec.level_shape(level, (SIZE, SIZE)) for level in reversed(range(spec.levels))]
    theirs = [torch.rand(2, *shape[:3], *shape[1:3], dtype=torch.float64) for shape in shapes]
    ours = [level.permute(0, 1, 4, 5, 2, 3).contiguous() for level in theirs]
    target = disc(0, SIZE).expand(2, -1, -1)

    logits = learner(ours)
    episode_losses(logits, target).mean().backward()
    wanted = published.learner(theirs)
    size = (SIZE, SIZE)
    published_way.loss(F.interpolate(wanted, size, mode="bilinear", align_corners=True), target).backward()

    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-12)
    gradients = {name: parameter.grad for name, parameter in published.learner.named_parameters()}
    assert len(gradients) == len(list(learner.parameters()))
    for name, parameter in learner.named_parameters():
        torch.testing.assert_close(parameter.grad.view_as(gradients[name]), gradients[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backbone", ["resnet50", "vgg16"])
def test_photos_give_the_same_features_correlations_logits_and_loss(backbone):
    published, learner, state = build(backbone)
    photos, masks = inputs(4)
    query, support, mask, target = photos[:2], photos[2:], masks[2:], masks[:2]
    network = FrozenBackbone(backbone, state)
    with torch.no_grad():
        for mine, theirs in zip(network.taps(query), published.features(query), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4 * float(mine.abs().max()))
        theirs = published.correlations(
            published.features(query), published_way.masked(published.features(support), mask.float())
        )
        ours = build_pyramid(network(query), network(support), mask)
        for mine, level in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, level.permute(0, 1, 4, 5, 2, 3), rtol=0, atol=2e-5)
        logits = learner(ours)
        torch.testing.assert_close(logits, published.coarse_logits(query, support, mask.float()), rtol=0, atol=2e-6)
        loss = published_way.loss(published(query, support, mask.float()), target)
        torch.testing.assert_close(episode_losses(logits, target).mean(), loss, rtol=0, atol=1e-6)


def test_several_shots_are_voted_on_as_in_the_model():
    published, learner, state = build("resnet50")
    photos, masks = inputs(3)
    network = FrozenBackbone("resnet50", state)
    # A bias that puts the shots' logits around zero, so that they do not all agree.
    with torch.no_grad():
        pyramid = build_pyramid(network(photos[:1].expand(2, -1, -1, -1)), network(photos[1:]), masks[1:])
        gap = learner(pyramid)
        shift = (gap[:, 1] - gap[:, 0]).median()
        learner.decode_fine[2].bias[1] -= shift
        published.learner.load_state_dict(published_way.translated(learner))
        hard = predict_mask(resize_logits(learner(pyramid), (SIZE, SIZE)))
    assert len({int(one.sum()) for one in hard}) > 1
    got = published.predict(photos[:1], photos[None, 1:], masks[None, 1:].float())
    assert (got != vote(hard[:, None])).float().mean() < 1e-3
    assert (hard[0] != hard[1]).any()  # one vote of two is enough: a tie at the threshold


def test_no_photo_is_read_again_after_a_relu_in_place():
    """Taps are copies: computing on cannot change them."""
    published, _, _ = build("resnet50")
    taps = published.features(inputs(1)[0])
    assert any((tap < 0).any() for tap in taps[:-1])
    assert published.backbone.relu.inplace
