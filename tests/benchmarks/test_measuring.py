"""What the benchmarks measure with: order, files, counted multiply-adds, rounding. No test looks at a time."""

from __future__ import annotations

import doctest
import json

import pytest
import torch
import torch.nn.functional as F

from benchmarks import arithmetic, inputs, kernels, rounding, timing
from hsnet.backbone import backbone_spec
from hsnet.model import HSNet


@pytest.mark.parametrize("module", [arithmetic, inputs, kernels, timing], ids=lambda module: module.__name__)
def test_examples(module):
    results = doctest.testmod(module)
    assert results.attempted
    assert not results.failed


def test_ways_alternate_each_is_first_in_turn_and_the_device_is_waited_for():
    seen = []
    runs = {name: lambda name=name: seen.append(name) for name in "abc"}
    times = timing.alternate(runs, repeats=3, warmup=1, synchronise=lambda: seen.append("|"))
    assert [len(times[name].wall) for name in "abc"] == [3, 3, 3]
    rounds = "".join(seen).removeprefix("|").removesuffix("|").split("||")
    assert [rounds[start] for start in (3, 6, 9)] == ["a", "b", "c"]
    assert [sorted(rounds[start : start + 3]) for start in range(0, 12, 3)] == [["a", "b", "c"]] * 4


def test_a_budget_leaves_three_repeats(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(clock)))
    times = timing.alternate({"a": lambda: None}, repeats=50, budget=1)
    assert times["a"].wall == (1.0,) * timing.LEAST_REPEATS


def test_memory_forgets_a_peak():
    waste = bytearray(80_000_000)
    waste[::4096] = b"x" * len(waste[::4096])
    del waste
    assert timing.memory()[1] >= 80_000_000
    timing.forget_peak()
    now, most = timing.memory()
    assert 0 < now <= most * 1.01


def test_results_are_added_to_the_run_they_belong_to(tmp_path):
    path = tmp_path / "deep" / "results.json"
    measured = {"device": "cpu", "backbone": "vgg16", "work": "train1", "image_size": 400, "value": 1 / 3}
    for date, work in (("2030-01-02", "train1"), ("2030-01-02", "eval1"), ("2030-01-01", "train1")):
        timing.record({"date": date}, {**measured, "work": work}, path)
    stored = json.loads(path.read_text())
    assert [len(run["measurements"]) for run in stored["runs"]] == [2, 1]
    newest = timing.newest([path])["cpu", "vgg16", "train1", 400]
    assert (newest["run"], newest["value"]) == ({"date": "2030-01-02"}, 0.3333)
    path.write_text('{"schema": 99, "runs": []}')
    with pytest.raises(SystemExit, match="99"):
        timing.read(path)


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


def test_rounding_more_bits_less_error_more_bytes():
    generator = torch.Generator().manual_seed(0)
    photos = [[torch.randn(1, 2, 6, 6, 16, generator=generator).relu()] for _ in range(3)]
    found = {each.way: each for each in rounding.measure(photos)}
    assert len(found) == 2 + 2 + len(rounding.KEPT_BITS) * 2 - 1 + 2 * len(rounding.DIGITS)
    assert (found[rounding.PLAIN].bytes_per_value, found["float32"].mean) == (1, 0)
    for dtype in ("float32", "float16"):
        few, many = found[f"{dtype}, BitRound 4"], found[f"{dtype}, BitRound 8"]
        assert few.mean > 8 * many.mean
        assert few.bytes_per_value < many.bytes_per_value
    assert found["float32, Quantize 1"].mean > 10 * found["float32, Quantize 3"].mean


def test_kernels_are_counted_as_the_paper_counts_them():
    """Table 5: parameters to the digit printed, multiply-adds to 1 % of two; the published kernel has 12 % fewer."""
    for name, paper in kernels.PAPER.items():
        with torch.device("meta"):
            model = HSNet((3, 23, 4), kernel=name)
        assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == paper.parameters
    count = {name: kernels.multiply_adds(name, "resnet101", 400, name == "original") / 1e9 for name in kernels.PAPER}
    assert count["original"] == pytest.approx(kernels.PAPER["original"].multiply_adds, rel=0.01)
    assert count["separable"] == pytest.approx(kernels.PAPER["separable"].multiply_adds, rel=0.01)
    assert count["center-pivot"] == pytest.approx(18.14, abs=0.005)
    assert kernels.multiply_adds("original", "resnet101", 400) / 1e9 == pytest.approx(110.07, abs=0.005)


def test_the_table_of_kernels_measures_all_three(capsys):
    kernels.main(["--backbone", "squeezenet1_1", "--size", "48", "--device", "cpu", "--repeats", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[4:7]] == ["center-pivot", "original", "separable"]
    assert "at every support position" in lines[-1]
