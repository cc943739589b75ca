"""Backbones: the taps of the published code, read without its traps, from a network that never changes."""

import copy

import pytest
import torch
from torch import nn

from hsnet.backbone import BACKBONES, FrozenBackbone, pack_levels, random_state_dict
from hsnet.correlation import build_pyramid
from hsnet.errors import ConfigError, ShapeError, WeightsError
from hsnet.model import HSNet, squeezed_grids
from hsnet.torchvision_ops import ensure_importable


def plain_taps(name, state, images):
    """The same taps by walking the network by hand, every value copied before anything can overwrite it."""
    ensure_importable()
    import torchvision.models

    network = torchvision.models.get_model(name, weights=None)
    network.load_state_dict(state)
    network.eval()
    taps = []
    with torch.no_grad():
        if name == "vgg16":
            x = images
            for i, layer in enumerate(network.features):
                x = layer(x)
                if i in (17, 19, 21, 24, 26, 28, 30):
                    taps.append(x.clone())
        elif name == "squeezenet1_1":
            x = images
            for layer in network.features:
                x = layer(x)
                if type(layer).__name__ == "Fire":
                    taps.append(x.clone())
        else:
            x = network.maxpool(network.relu(network.bn1(network.conv1(images))))
            for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
                for block in stage:
                    identity = x if block.downsample is None else block.downsample(x)
                    y = torch.relu(block.bn1(block.conv1(x)))
                    y = torch.relu(block.bn2(block.conv2(y)))
                    y = block.bn3(block.conv3(y)) + identity
                    if stage is not network.layer1:
                        taps.append(y.clone())
                    x = torch.relu(y)
    return taps


@pytest.mark.parametrize("name", BACKBONES)
def test_taps_are_read_before_any_relu_overwrites_them(name):
    torch.manual_seed(0)
    state = random_state_dict(name)
    images = torch.randn(2, 3, 64, 80)
    expected = plain_taps(name, state, images)
    actual = FrozenBackbone(name, state).taps(images)
    assert len(actual) == len(expected) == len(BACKBONES[name].taps)
    for tap, a, b in zip(BACKBONES[name].taps, actual, expected, strict=True):
        assert a.shape[1] == tap.channels
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


def test_published_taps_are_before_the_relu():
    """A post-ReLU tap has no negative value; all but VGG's pooled last one have many."""
    torch.manual_seed(0)
    images = torch.randn(1, 3, 64, 64)
    for name in ("vgg16", "resnet50"):
        taps = FrozenBackbone(name, random_state_dict(name)).taps(images)
        negative = [bool((tap < 0).any()) for tap in taps]
        assert negative == [True] * (len(taps) - 1) + [name != "vgg16"]


@pytest.mark.parametrize("name", BACKBONES)
def test_no_layer_runs_twice(name):
    backbone = FrozenBackbone(name, random_state_dict(name))
    calls = {}
    for path, module in backbone.network.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *_, path=path: calls.__setitem__(path, calls.get(path, 0) + 1))
    backbone(torch.randn(1, 3, 64, 64))
    assert set(calls.values()) == {1}


@pytest.mark.parametrize(
    ("name", "grids", "layers"),
    [
        ("vgg16", (50, 25, 12), (3, 3, 1)),
        ("resnet50", (50, 25, 13), (4, 6, 3)),
        ("resnet101", (50, 25, 13), (4, 23, 3)),
    ],
)
def test_levels_at_400_px_are_the_published_ones(name, grids, layers):
    spec = BACKBONES[name]
    shapes = [spec.level_shape(level, (400, 400)) for level in range(spec.levels)]
    assert [shape[1:3] for shape in shapes] == [(side, side) for side in grids]
    assert tuple(shape[0] for shape in shapes) == spec.layers == layers
    ends = squeezed_grids([shape[1:3] for shape in reversed(shapes)])
    assert ends == [(2, 2)] * 3
    floats = {"vgg16": 4.87e6, "resnet50": 10.0e6, "resnet101": 20.9e6}[name]
    assert sum(a * b * c * d for a, b, c, d in shapes) == pytest.approx(floats, rel=0.005)


def test_level_shapes_match_what_comes_out():
    backbone = FrozenBackbone("squeezenet1_1", random_state_dict("squeezenet1_1"))
    levels = backbone(torch.randn(2, 3, 72, 104))
    for level, out in enumerate(levels):
        assert tuple(out.shape[1:]) == backbone.spec.level_shape(level, (72, 104))
        assert out.is_contiguous()
    assert levels[2][:, :2, :, :, 384:].count_nonzero() == 0, "narrow layers are padded with zeros"


@pytest.mark.parametrize("name", ["vgg16", "resnet50", "squeezenet1_1"])
def test_level_shapes_are_those_of_the_network_at_every_size(name):
    backbone = FrozenBackbone(name, random_state_dict(name)).to("meta")
    with torch.device("meta"):
        for side in (*range(1, 45), 112, 127, 128, 129, 145, 399, 400, 401, 402, 473):
            try:
                expected = [tuple(out.shape[1:]) for out in backbone(torch.empty(1, 3, side, side + 9))]
            except RuntimeError:
                with pytest.raises(ShapeError, match=f"cannot read images of {side} x {side + 9} pixels"):
                    backbone.spec.level_shape(backbone.spec.levels - 1, (side, side + 9))
            else:
                levels = range(backbone.spec.levels)
                assert [backbone.spec.level_shape(level, (side, side + 9)) for level in levels] == expected, side


def test_packing_into_given_memory_gives_the_same():
    backbone = FrozenBackbone("squeezenet1_1", random_state_dict("squeezenet1_1"))
    first, second = (backbone.taps(torch.randn(2, 3, 65, 65)) for _ in range(2))
    packed = pack_levels(first, backbone.spec)
    again = pack_levels(second, backbone.spec, packed)
    assert all(one is other for one, other in zip(again, packed, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(again, pack_levels(second, backbone.spec), strict=True))


def test_training_steps_leave_the_backbone_alone():
    """Weights and BatchNorm statistics stay the same to the bit, also inside a model put in training mode."""
    backbone = FrozenBackbone("resnet50", random_state_dict("resnet50"))
    learner = HSNet((3, 6, 4))
    model = nn.ModuleDict({"backbone": backbone, "learner": learner}).train()
    before = copy.deepcopy(backbone.state_dict())
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(2):
        query, support = backbone(torch.randn(1, 3, 64, 64)), backbone(torch.randn(1, 3, 64, 64))
        loss = learner(build_pyramid(query, support, torch.ones(1, 64, 64))).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    after = backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_weights_of_another_network_are_named():
    with pytest.raises(WeightsError, match=r"not weights of resnet50: missing conv1.weight"):
        FrozenBackbone("resnet50", random_state_dict("vgg16"))
    wrong = random_state_dict("squeezenet1_1")
    wrong["features.0.weight"] = wrong["features.0.weight"][:1]
    with pytest.raises(WeightsError, match=r"features.0.weight is \(1, 3, 3, 3\), wanted \(64, 3, 3, 3\)"):
        FrozenBackbone("squeezenet1_1", wrong)


def test_bad_input_is_named():
    with pytest.raises(ConfigError, match=r"Unknown backbone 'resnet5'. Choose one of: vgg16, resnet50"):
        random_state_dict("resnet5")
    backbone = FrozenBackbone("squeezenet1_1", random_state_dict("squeezenet1_1"))
    with pytest.raises(ShapeError, match=r"\(B, 3, H, W\), got \(1, 1, 64, 64\)"):
        backbone(torch.zeros(1, 1, 64, 64))
    with pytest.raises(ShapeError, match="cannot read images of 4 x 4 pixels"):
        BACKBONES["squeezenet1_1"].level_shape(0, (4, 4))
    spec = BACKBONES["squeezenet1_1"]
    taps = backbone.taps(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ShapeError, match="share one grid"):
        pack_levels([*taps[:1], taps[1][:, :, 1:], *taps[2:]], spec)
