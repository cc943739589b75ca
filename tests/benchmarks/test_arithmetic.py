"""Counted multiply-adds against counting them one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks import arithmetic
from benchmarks.inputs import disc
from hsnet.backbone import backbone_spec
from hsnet.model import HSNet


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 4)])
def test_pairs_that_meet_no_zero(kernel, stride):
    inside = torch.rand(7, 6, generator=torch.Generator().manual_seed(0)) > 0.5
    query = (5, 4)
    one = torch.ones(1, 1, kernel, kernel)
    # Convolving ones with ones counts the products that meet no padding; zeros outside the object count for nothing.
    over_support = F.conv2d(inside[None, None].float(), one, stride=stride, padding=kernel // 2).sum() * 5 * 4
    over_query = F.conv2d(torch.ones(1, 1, *query), one, padding=kernel // 2).sum() * inside[::stride, ::stride].sum()
    assert arithmetic._pairs(inside, query, kernel, stride) == int(over_support + over_query)


@pytest.mark.parametrize("backbone", ["resnet50", "vgg16"])
def test_a_full_mask_leaves_the_whole_model(backbone):
    """Against a count of what torch is asked to do, padding included; it is a little more than what is left."""
    size = 64
    spec = backbone_spec(backbone)
    counted = arithmetic.count(backbone, size, torch.ones(1, size, size))
    shapes = [spec.level_shape(level, (size, size)) for level in range(spec.levels)]
    wanted = sum((rows * columns) ** 2 * layers * width for layers, rows, columns, width in shapes)
    assert counted.correlation == wanted
    padded = 0

    def add(module, inputs, output):
        nonlocal padded
        padded += output.numel() * module.weight[0].numel()

    def add_both(module, inputs, output):
        add(module.query, inputs, output)
        add(module.support, inputs, output)

    learner = HSNet(tuple(reversed(spec.layers)))
    for module in learner.modules():
        if hasattr(module, "query"):
            module.register_forward_hook(add_both)
        elif isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(add)
    with torch.no_grad():
        learner([torch.zeros(1, layers, r, c, r, c) for layers, r, c, _ in reversed(shapes)])
    assert 0.5 * padded < counted.first + counted.rest < padded


def test_smaller_objects_need_less_and_training_more():
    small, large = (arithmetic.count("resnet50", 96, disc(0, 96, share)[None]) for share in (0.05, 0.4))
    assert small.correlation < large.correlation / 5
    assert small.first < large.first
    assert small.rest == large.rest
    assert small.evaluation < small.training < 3 * small.evaluation


def test_peaks_are_found_by_name():
    assert arithmetic.peak_tflops("NVIDIA H200") == 989
    assert arithmetic.peak_tflops("NVIDIA L40S") == 362
    assert arithmetic.peak_tflops("Imaginary 9000") is None
