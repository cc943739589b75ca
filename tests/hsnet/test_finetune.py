"""Learner and backbone as one network: gradients down to the first layer, against a plain reading and differences."""

import copy

import pytest
import torch
import torch.nn.functional as F

from hsnet.backbone import FinetunedBackbone, FrozenBackbone, pack_levels, random_state_dict
from hsnet.correlation import interpolate_mask
from hsnet.finetune import FinetunedHSNet, FusedFinetunedHSNet
from hsnet.loss import episode_losses
from hsnet.model import HSNet

SIDES = {"squeezenet1_1": 64, "resnet50": 64, "vgg16": 96}


def network(name="squeezenet1_1", **switches):
    backbone = FinetunedBackbone(name, random_state_dict(name))
    torch.manual_seed(0)
    return FinetunedHSNet(backbone, layers=list(reversed(backbone.spec.layers)), channels=(8, 8, 16), **switches)


def episodes(side, count=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    query, support = torch.randn(2, count, 3, side, side, generator=generator, dtype=dtype)
    mask, target = torch.zeros(2, count, side, side, dtype=torch.bool)
    # Corners too: the first convolution's stride leaves out every second position of a 3x3 grid.
    mask[0, :40, :50] = mask[1, 20:, 4:] = target[0, 5:30, 20:60] = target[1, 30:50, 30:50] = True
    return query, support, mask, target


def plain(model, query, support, mask):
    """Eq. 1 and 2 written out for every pair of positions, then the learner: no code of `hsnet.fused`."""
    levels = []
    for photos in (query, support):
        outputs = model.backbone.network(photos)
        levels.append(pack_levels([outputs[tap.node] for tap in model.backbone.spec.taps], model.backbone.spec))
    pyramid = []
    for scenes, objects in zip(*map(reversed, levels), strict=True):
        soft = interpolate_mask(mask, (objects.shape[2], objects.shape[3])).to(objects.dtype)
        objects = objects * soft[:, None, :, :, None]
        unit = [
            side / (side.square().sum(-1, keepdim=True).clamp_min(1e-300).sqrt() + 1e-5) for side in (scenes, objects)
        ]
        pyramid.append(F.relu(torch.einsum("blhwc,bluvc->bluvhw", *unit)))
    return model(pyramid)


def gradients(model, logits, target):
    losses = episode_losses(logits, target, None)
    return torch.autograd.grad(losses.sum(), list(model.parameters()))


@pytest.mark.parametrize(
    ("name", "both"),
    [("squeezenet1_1", False), ("squeezenet1_1", True), pytest.param("resnet50", False, marks=pytest.mark.slow)],
)
def test_logits_and_gradients_are_those_of_the_plain_reading(name, both):
    """In float64, every parameter of backbone and head; both directions make each photo's features once."""
    model = network(name).double()
    query, support, mask, target = episodes(SIDES[name])
    if both:
        query, support = torch.cat([query, support]), torch.cat([support, query])
        mask, target = torch.cat([mask, target]), torch.cat([target, mask])
    fused = FusedFinetunedHSNet(model, both_directions=both)
    ours, theirs = fused([query], [support], mask), plain(model, query, support, mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)
    names = [name for name, _ in model.named_parameters()]
    for name, a, b in zip(names, gradients(model, ours, target), gradients(model, theirs, target), strict=True):
        assert b.abs().max() > 0, f"no gradient reaches {name}"
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(b.abs().max()), msg=name)


def test_gradients_of_the_backbone_are_differences():
    """Central differences along random directions, one per tensor of the first and a late layer, in float64."""
    model = network().double()
    query, support, mask, target = episodes(64)
    fused = FusedFinetunedHSNet(model)

    def loss():
        return episode_losses(fused([query], [support], mask), target, None).sum()

    loss().backward()
    parameters = dict(model.backbone.network.named_parameters())
    for name in ("features.0.weight", "features.0.bias", "features.10.expand3x3.weight"):
        parameter = parameters[name]
        start, direction = parameter.detach().clone(), torch.randn_like(parameter)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.copy_(start + sign * 1e-7 * direction)
                values.append(loss())
        with torch.no_grad():
            parameter.copy_(start)
        slope = float((parameter.grad * direction).sum())
        assert float(values[0] - values[1]) / 2e-7 == pytest.approx(slope, rel=1e-4), name


@pytest.mark.parametrize("switches", [{"background": True}, {"kernel": "separable"}, {"support_mask": False}])
def test_every_switch_of_the_learner_lets_the_gradient_through(switches):
    model = network(**switches)
    query, support, mask, target = episodes(64, dtype=torch.float32)
    fused = FusedFinetunedHSNet(model)
    found = gradients(model, fused([query], [support], mask), target)
    assert all(gradient.isfinite().all() and gradient.abs().max() > 0 for gradient in found)
    levels = model.backbone(query), model.backbone(support)
    torch.testing.assert_close(fused([query], [support], mask), model.answer(*levels, mask), rtol=0, atol=1e-4)


def test_statistics_stay_and_features_are_those_of_the_frozen_network():
    """In train() too, and in a copy, which torchvision's traced networks come out of in training mode."""
    model = network("resnet50").train()
    copied = copy.deepcopy(model).eval()
    frozen = FrozenBackbone("resnet50", model.backbone.weights())
    photos = torch.randn(2, 3, 64, 64)
    before = {name: value.clone() for name, value in model.named_buffers()}
    for one, two, three in zip(frozen(photos), model.backbone(photos), copied.backbone(photos), strict=True):
        assert not one.requires_grad
        assert two.requires_grad
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())


def test_the_head_begins_as_it_would_without_its_backbone():
    model = network()
    torch.manual_seed(0)
    alone = HSNet(layers=[4, 2, 2], channels=(8, 8, 16)).state_dict()
    assert alone.keys() == model.head_state().keys()
    assert all(torch.equal(value, alone[name]) for name, value in model.head_state().items())
