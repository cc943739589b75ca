"""Levels of any number and size: what the learner makes of them, and that the fast path is the plain one."""

from __future__ import annotations

import itertools

import pytest
import torch

from hsnet.backbone import BACKBONES
from hsnet.correlation import build_pyramid
from hsnet.errors import ConfigError, ShapeError
from hsnet.fused import FusedHSNet
from hsnet.model import CHANNELS, SQUEEZE_KERNELS, SQUEEZE_STRIDES, HSNet, squeeze_plan, squeezed_grids


@pytest.mark.parametrize("name", BACKBONES)
def test_built_in_pyramids_keep_the_published_kernels_and_strides(name):
    spec, checked = BACKBONES[name], 0
    for size in range(64, 640, 3):
        grids = [spec.level_shape(level, (size, size))[1:3] for level in reversed(range(spec.levels))]
        if len(set(squeezed_grids(grids))) == 1 and len(set(grids)) == 3:
            assert squeeze_plan(grids) == (SQUEEZE_KERNELS, SQUEEZE_STRIDES), (size, grids)
            checked += 1
    assert checked > 20


@pytest.mark.parametrize(
    ("grids", "strides", "end"),
    [
        ([(16, 16)], [(2, 2, 2)], (2, 2)),
        ([(32, 32)], [(4, 2, 2)], (2, 2)),
        ([(37, 37)], [(4, 4, 2)], (2, 2)),
        ([(64, 64)], [(4, 4, 2)], (2, 2)),
        ([(3, 3)], [(2, 2, 2)], (1, 1)),
        ([(16, 16), (16, 16)], [(2, 2, 2), (2, 2, 2)], (2, 2)),
        ([(28, 28), (28, 28), (28, 28)], [(4, 2, 2)] * 3, (2, 2)),
        ([(14, 14), (28, 28)], [(2, 2, 2), (4, 2, 2)], (2, 2)),
        ([(14, 14), (28, 28), (28, 28)], [(2, 2, 2), (4, 2, 2), (4, 2, 2)], (2, 2)),
        # SqueezeNet's grids at 400 px, which the published strides bring to 3x3, 4x4 and 4x4.
        ([(24, 24), (49, 49), (99, 99)], [(4, 2, 2), (4, 4, 2), (4, 4, 4)], (2, 2)),
        ([(9, 12), (18, 24)], [(2, 2, 2), (4, 2, 2)], (2, 2)),
    ],
)
def test_strides_bring_any_levels_together(grids, strides, end):
    kernels, found = squeeze_plan(grids)
    assert found == tuple(strides)
    assert squeezed_grids(grids, found) == [end] * len(grids)
    assert kernels == tuple(tuple(5 if stride == 4 else 3 for stride in steps) for steps in strides)


@pytest.mark.parametrize(
    ("depth", "grids", "strides", "end"),
    [
        (1, [(13, 13), (25, 25), (50, 50)], [(2,), (4,), (8,)], (7, 7)),
        (2, [(13, 13), (25, 25), (50, 50)], [(4, 2), (4, 4), (8, 4)], (2, 2)),
        (4, [(13, 13), (25, 25), (50, 50)], [(2, 2, 2, 1), (2, 2, 2, 2), (4, 2, 2, 2)], (2, 2)),
        (1, [(16, 16)], [(8,)], (2, 2)),
        (1, [(50, 50)], [(8,)], (7, 7)),
        (2, [(3, 3)], [(2, 2)], (1, 1)),
        (4, [(37, 37), (37, 37)], [(4, 2, 2, 2)] * 2, (2, 2)),
        (2, [(14, 14), (28, 28)], [(4, 2), (4, 4)], (2, 2)),
    ],
)
def test_blocks_of_other_depths_meet_too(depth, grids, strides, end):
    kernels, found = squeeze_plan(grids, depth)
    assert found == tuple(strides)
    assert squeezed_grids(grids, found) == [end] * len(grids)
    sides = {1: 3, 2: 3, 4: 5, 8: 9}
    assert kernels == tuple(tuple(sides[stride] for stride in steps) for steps in strides)


@pytest.mark.parametrize("depth", [0, 5])
def test_depths_that_no_block_has_are_refused(depth):
    with pytest.raises(ConfigError, match=f"1 to 4 convolutions, got a depth of {depth}"):
        squeeze_plan([(13, 13)], depth)


def test_a_depth_that_cannot_bring_levels_together_is_named():
    with pytest.raises(ConfigError, match=r"4x4, 8x8, 16x16, 32x32 .* at depth 1: choose"):
        squeeze_plan([(4, 4), (8, 8), (16, 16), (32, 32)], 1)


def test_equal_grids_have_equal_strides_and_the_order_is_kept():
    for grids in itertools.permutations([(12, 12), (24, 24), (12, 12)]):
        _, strides = squeeze_plan(grids)
        by_grid = dict(zip(grids, strides, strict=True))
        assert [by_grid[grid] for grid in grids] == list(strides)


def test_grids_that_cannot_meet_are_named():
    with pytest.raises(ConfigError, match="7x900, 900x7"):
        squeeze_plan([(7, 900), (900, 7)])
    assert len(CHANNELS) == 3
    with pytest.raises(ConfigError, match=r"1, 3 and 3.*squeeze_plan"):
        HSNet((4,))


LEVELS = {
    "one level": [(3, 6, 5)],
    "one level, one position": [(2, 1, 1)],
    "one layer of one level": [(1, 9, 9)],
    "two levels": [(2, 10, 10), (3, 5, 5)],
    "two equal grids": [(2, 6, 6), (1, 6, 6)],
    "three, two of them equal": [(1, 12, 12), (2, 6, 6), (2, 6, 6)],
    "four levels": [(1, 12, 11), (1, 9, 9), (2, 5, 5), (1, 3, 3)],
}


@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("sparse", [True, False])
def test_the_fast_path_equals_the_plain_one(name, sparse):
    """Values and gradients, float64."""
    torch.manual_seed(0)
    shapes = LEVELS[name]
    kernels, strides = squeeze_plan([shape[1:] for shape in reversed(shapes)])
    layers = tuple(shape[0] for shape in reversed(shapes))
    model = HSNet(layers, (8, 8, 16), kernels, strides, mix_convolutions=2).double()
    for parameter in model.parameters():  # norms begin at exactly 0 otherwise, where a ReLU has two slopes
        parameter.data += 0.05 * torch.randn_like(parameter)
    query = [torch.randn(2, *shape, 7, dtype=torch.float64) for shape in shapes]
    support = [torch.randn(4, *shape, 7, dtype=torch.float64) for shape in shapes]
    mask = torch.zeros(4, 24, 24, dtype=torch.float64)
    mask[0, 3:12, 5:20] = mask[1, :8, :8] = mask[2, 20:, 20:] = 1  # and one support without an object

    repeated = [level.repeat_interleave(2, 0) for level in query]
    plain = model(build_pyramid(repeated, support, mask.float()))
    wanted = torch.autograd.grad(plain.square().sum(), list(model.parameters()))
    fast = FusedHSNet(model, sparse=sparse)(query, support, mask)
    found = torch.autograd.grad(fast.square().sum(), list(model.parameters()))

    plain, fast = plain.detach(), fast.detach()
    assert plain.shape == (4, 2, 2 * shapes[0][1], 2 * shapes[0][2])
    assert (fast - plain).abs().max() <= 1e-9 * max(1, float(plain.abs().max()))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).abs().max() <= 1e-9 * max(1, float(other.abs().max()))


def test_a_level_more_than_the_learner_has_is_an_error():
    model = HSNet((1,), kernels=[(3, 3, 3)], strides=[(2, 2, 2)])
    pyramid = [torch.zeros(1, 1, 4, 4, 4, 4)] * 2
    with pytest.raises(ShapeError, match="1 levels, the pyramid 2"):
        model(pyramid)
