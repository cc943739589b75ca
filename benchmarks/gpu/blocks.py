"""Where a step's time goes: parts `profile` (kernels, gaps, blocks) and `conv` (the layout of the learner's layers)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.measuring import Bench, Row
from benchmarks.gpu.ways import BFLOAT16, FLOAT32, Mode, OurWay, Scene, Variant, Work
from hsnet.backbone import backbone_spec
from hsnet.conv4d import CenterPivotConv4d, support_matrix
from hsnet.fused import FusedHSNet
from hsnet.model import CHANNELS, SQUEEZE_KERNELS, SQUEEZE_STRIDES

MOST_KERNELS = 12
"""Rows of a profile."""


def profile(bench: Bench) -> Iterator[dict[str, Any]]:
    """One training step: its blocks, its kernels, and how long the device waits between them."""
    options, batch = bench.options, max(bench.options.train_batch)
    scene = Scene.make(bench.backbone, options.size, options.object_share, bench.device)
    work = Work("", "train", batch)
    for name, mode in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
        rows = _blocks(bench, scene, work, mode)
        yield bench.measurement(f"blocks-{name}", f"blocks of a step of {batch}, {name}", rows)
        rows = _kernels(bench, OurWay(scene, work, Variant("", mode)))
        yield bench.measurement(f"profile-{name}", f"profile of a step of {batch}, {name}", rows)


def _blocks(bench: Bench, scene: Scene, work: Work, mode: Mode) -> dict[str, Row]:
    """Correlation and every block of the dense path by itself, forward and backward, on inputs of the real shapes."""
    model = scene.learner()
    fused = FusedHSNet(model, "bfloat16" if mode.bfloat16 else "float32", sparse=False)
    way = OurWay(scene, work, Variant("", mode))
    features, masks = way.features, scene.masks[way.supports.flatten()]
    query, support = ([level[rows] for level in features] for rows in (way.queries, way.supports.flatten()))
    cast = torch.bfloat16 if mode.bfloat16 else torch.float32

    def both(block: nn.Module, x: Tensor, needs_gradient: bool) -> Callable[[], None]:
        x = x.detach().requires_grad_(needs_gradient)

        def run() -> None:
            with mode.on():
                with torch.autocast(bench.device.type, torch.bfloat16, enabled=mode.bfloat16):
                    out = block(x)
                out.float().sum().backward()

        return run

    with torch.no_grad(), mode.on():
        pyramid = list(fused.correlate(query, support, masks).levels)
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=mode.bfloat16):
            squeezed = [block(level).to(cast) for block, level in zip(model.squeeze, pyramid, strict=True)]
    finest = squeezed[-1]
    context = torch.zeros(len(finest), finest.shape[1], *finest.shape[-2:], device=bench.device, dtype=cast)

    def correlate() -> None:
        with torch.no_grad(), mode.on():
            list(fused.correlate(query, support, masks).levels)

    runs: dict[str, Callable[[], object]] = {"correlation, all levels, forward": correlate}
    for block, level in zip(model.squeeze, pyramid, strict=True):
        assert isinstance(level, torch.Tensor)  # dense
        runs[f"squeeze {level.shape[4]}x{level.shape[5]}"] = both(block, level, False)
    for block, level in zip(model.mix, squeezed[1:], strict=True):
        runs[f"mix {level.shape[4]}x{level.shape[5]}"] = both(block, level, True)
    runs["decoder"] = both(_Decoder(model.decode), context, True)
    return bench.rows(runs, repeats=min(10, bench.options.repeats))


class _Decoder(nn.Module):
    def __init__(self, decode: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.decode = decode

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(x)


def _kernels(bench: Bench, way: OurWay) -> dict[str, Row]:
    """The largest kernels (on a CPU: operations) of one step, the convolutions called, and the device's idle time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    for _ in range(2):
        way.run()
    bench.wait()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if bench.cuda else [])
    with profiler(activities=kinds) as found:
        way.run()
        bench.wait()
    times: dict[str, tuple[float, int]] = defaultdict(lambda: (0.0, 0))
    spans: list[tuple[float, float]] = []
    for event in found.events():
        if bench.cuda:
            if event.device_type.name != "CUDA" or getattr(event, "is_user_annotation", False):
                continue
            spans.append((event.time_range.start, event.time_range.end))
            spent = event.time_range.end - event.time_range.start
        else:
            spent = event.self_cpu_time_total
        before, calls = times[event.name]
        times[event.name] = (before + spent, calls + 1)
    rows: dict[str, Row] = {}
    if spans:
        whole = max(end for _, end in spans) - min(start for start, _ in spans)
        rows["from the first kernel to the last"] = {"value": whole / 1e3, "unit": "ms"}
        rows["the device computes"] = {"value": covered(spans) / 1e3, "unit": "ms"}
        rows["gaps between kernels"] = {"value": (whole - covered(spans)) / 1e3, "unit": "ms"}
        rows["kernels"] = {"value": len(spans), "unit": "launches"}
    convolutions = {}
    for average in found.key_averages():
        if average.key.startswith("aten::") and "conv" in average.key:
            convolutions[average.key.removeprefix("aten::")] = average.count
    said = ", ".join(f"{name} {count}" for name, count in sorted(convolutions.items())) or "none"
    rows["convolutions called"] = {"value": sum(convolutions.values()), "unit": "calls", "note": said}
    for name, (spent, calls) in sorted(times.items(), key=lambda item: -item[1][0])[:MOST_KERNELS]:
        rows[name[:100]] = {"value": spent / 1e3, "unit": "ms", "note": f"{calls} calls"}
    return rows


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of (start, end).

    >>> covered([(0, 2), (1, 3), (5, 6)])
    4.0
    """
    total, reached = 0.0, None
    for start, end in sorted(spans):
        first = start if reached is None else max(start, reached)
        total += max(0, end - first)
        reached = end if reached is None else max(reached, end)
    return total


# ---------------------------------------------------------------------------------------------------- layouts


class RowsConv4d(nn.Module):
    """A centre-pivot convolution as a channels-last 2D convolution and one matrix product: no 3D convolution.

    Args:
        layer: its weights are shared.

    Input (B, U, V, C, H, W), whose last three dimensions are channels-last in memory; output (B, U', V', C', H, W).
    """

    def __init__(self, layer: CenterPivotConv4d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer, stride, side = self.layer, self.layer.support_stride, self.layer.kernel_size
        batch, rows, columns, channels, height, width = x.shape
        pivots = x[:, ::stride, ::stride]
        grid = pivots.shape[1:3]
        planes = pivots.flatten(0, 2).contiguous(memory_format=torch.channels_last)
        query, support = layer.query, layer.support
        over_query = F.conv2d(planes, query.weight[:, :, 0], query.bias, padding=side // 2)
        assert support.bias is not None
        places, kernel = batch * height * width, support.weight[..., 0]
        if rows * columns <= side**2:  # most of a window would be padding: one matrix for the whole grid
            matrix = support_matrix(kernel, (rows, columns), stride)  # (C', U' V', C, U V)
            flat = x.flatten(1, 2).permute(0, 3, 4, 2, 1).reshape(places, channels * rows * columns)
            products = flat @ matrix.flatten(2).flatten(0, 1).t()  # (places, C' U' V')
        else:
            flat = x.permute(0, 4, 5, 3, 1, 2).reshape(places, channels, rows, columns)
            products = kernel.flatten(1) @ F.unfold(flat, side, padding=side // 2, stride=stride)
        over_support = products.view(places, -1, grid[0] * grid[1]) + support.bias[:, None]
        over_support = over_support.view(batch, height, width, -1, *grid).permute(0, 4, 5, 3, 1, 2)
        return over_query.view(batch, *grid, -1, height, width) + over_support


def layers(backbone: str, size: int) -> list[tuple[str, CenterPivotConv4d, tuple[int, ...]]]:
    """Six layers of the learner, those that move most: name, layer, and its input (C, U, V, H, W)."""
    spec = backbone_spec(backbone)
    found = []
    for level, kernels, strides in zip(reversed(range(spec.levels)), SQUEEZE_KERNELS, SQUEEZE_STRIDES, strict=True):
        layers, rows, columns, _ = spec.level_shape(level, (size, size))
        grid = (rows, columns)
        wide = [layers, *CHANNELS]
        for number, (kernel, stride) in enumerate(zip(kernels, strides, strict=True)):
            layer = CenterPivotConv4d(wide[number], wide[number + 1], kernel, stride)
            found.append((f"squeeze {rows}x{columns}, layer {number + 1}", layer, (wide[number], *grid, rows, columns)))
            grid = (-(-grid[0] // stride), -(-grid[1] // stride))
        width = CHANNELS[-1]
        if level < spec.levels - 1:
            mix = CenterPivotConv4d(width, width, 3, 1)
            found.append((f"mix {rows}x{columns}", mix, (width, *grid, rows, columns)))
    finest = [one for one in found if one[2][-2:] == found[-1][2][-2:]]
    middle = [one for one in found if one not in finest]
    return [*finest, middle[-4], middle[-1]]


def conv(bench: Bench) -> Iterator[dict[str, Any]]:
    """Each of six layers as 3D convolutions and as rows, forward and backward, in float32, TF32 and bfloat16."""
    batch = max(bench.options.train_batch)
    for name, layer, shape in layers(bench.backbone, bench.options.size):
        layer.to(bench.device)
        first = name.endswith("layer 1")  # correlations need no gradient
        runs: dict[str, Callable[[], object]] = {}
        for said, mode in (("float32", Mode()), ("TF32", Mode(tf32=True)), ("bfloat16", BFLOAT16)):
            dtype = torch.bfloat16 if mode.bfloat16 else torch.float32
            volume = torch.randn(batch, *shape, device=bench.device, dtype=dtype, requires_grad=not first)
            rows = _rows_of(volume.detach()).requires_grad_(not first)
            runs[f"3D convolutions, {said}"] = _both(layer, volume, mode, bench.device)
            runs[f"rows, {said}"] = _both(RowsConv4d(layer), rows, mode, bench.device)
        title = f"{name}: {tuple(shape)} to {layer.query.out_channels} channels, batch {batch}, forward and backward"
        rows_found = bench.rows(runs, repeats=min(10, bench.options.repeats))
        key = "conv-" + name.replace(", layer ", "-").replace(" ", "-")
        yield bench.measurement(key, title, rows_found, batch=batch, shape=list(shape))


def _rows_of(volume: Tensor) -> Tensor:
    """(B, C, U, V, H, W) as (B, U, V, C, H, W) with channels last in memory."""
    return volume.permute(0, 2, 3, 4, 5, 1).contiguous().permute(0, 1, 2, 5, 3, 4)


def _both(layer: nn.Module, x: Tensor, mode: Mode, device: torch.device) -> Callable[[], None]:
    def run() -> None:
        with mode.on():
            with torch.autocast(device.type, torch.bfloat16, enabled=mode.bfloat16):
                out = layer(x)
            out.sum().backward()

    return run


def largest(values: Sequence[Tensor]) -> float:
    """The largest absolute value of several tensors."""
    return max((float(value.abs().max()) for value in values if value.numel()), default=0.0)
