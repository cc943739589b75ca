"""The learner with each of its 4D kernels: size, multiply-adds, time and memory, beside the paper's Table 5.

    python -m benchmarks.kernels --backbone resnet101

The learner alone, on random correlations of one episode: nothing is left out, so that the kernels are compared and not
what the fast path saves with one of them. The paper's figures are of ResNet-101 at 400 px on a GPU. Its multiply-adds
of the original kernel are those of all support positions, most of which the strides throw away: the last line.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks import timing
from hsnet.backbone import backbone_spec
from hsnet.kernels import KERNELS
from hsnet.model import HSNet


@dataclass(frozen=True)
class Figures:
    """What one kernel costs."""

    parameters: float
    """Millions."""
    multiply_adds: float
    """Of a forward pass of one episode, thousands of millions."""
    milliseconds: float
    """On a GPU; on a CPU those of the process, all threads together: another job beside it changes them less."""
    gigabytes: float
    """Peak while it runs, above the correlations and the weights."""


PAPER = {
    "center-pivot": Figures(2.6, 20.56, 25.51, 1.39),
    "original": Figures(11.3, 702.35, 512.17, 4.12),
    "separable": Figures(4.4, 28.40, 28.48, 1.50),
}
"""Min et al. 2021, Table 5: ResNet-101, one episode, a GPU. Its memory is that of the whole process."""


def pyramid(backbone: str, size: int, device: str) -> list[Tensor]:
    """Correlations of one episode, (1, L, U, V, H, W), deepest level first."""
    spec = backbone_spec(backbone)
    shapes = [spec.level_shape(level, (size, size)) for level in reversed(range(spec.levels))]
    return [torch.rand(1, layers, *grid, *grid, device=device) for layers, *grid, _ in shapes]


def multiply_adds(kernel: str, backbone: str, size: int, every_position: bool = False) -> int:
    """Of one forward pass, those with padding counted: every weight once for every position of its output.

    Args:
        every_position: 4D convolutions are computed at all support positions, and strided after.
    """
    with torch.device("meta"):
        levels = pyramid(backbone, size, "meta")
        model = HSNet([level.shape[1] for level in levels], kernel=kernel)
    total, side = 0, 0
    for level, squeeze, mix in zip(levels, model.squeeze, [None, *model.mix], strict=True):
        side, places = level.shape[2], level.shape[4] * level.shape[5]
        for layer in [*squeeze.children(), *(mix.children() if mix is not None else ())]:
            stride = getattr(layer, "support_stride", None)
            if stride is not None:
                left = -(-side // stride)
                total += _weights(layer) * (side if every_position else left) ** 2 * places
                side = left
    places = levels[-1].shape[4] * levels[-1].shape[5]
    return total + _weights(model.decode_coarse) * places + _weights(model.decode_fine) * 4 * places


def _weights(module: nn.Module) -> int:
    """Numbers of a module that are multiplied with: not its biases."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim > 1)


@torch.no_grad()
def measure(kernel: str, backbone: str, size: int, device: str, repeats: int) -> Figures:
    """Build a learner, count it, time it and look at its peak memory."""
    torch.manual_seed(0)
    levels = pyramid(backbone, size, device)
    model = HSNet([level.shape[1] for level in levels], kernel=kernel).eval().to(device)
    on_gpu = device.startswith("cuda")
    model(levels)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        timing.forget_peak()
        before = timing.memory()[0]
    times = timing.alternate(
        {kernel: lambda: model(levels)}, repeats, synchronise=torch.cuda.synchronize if on_gpu else lambda: None
    )
    peak = torch.cuda.max_memory_allocated() if on_gpu else timing.memory()[1]
    return Figures(
        sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        multiply_adds(kernel, backbone, size) / 1e9,
        1e3 * timing.summary(times[kernel].wall if on_gpu else times[kernel].cpu)["median"],
        (peak - before) / 1e9,
    )


def table(measured: dict[str, Figures]) -> str:
    """Ours beside the paper's, as Markdown.

    >>> print(table({"center-pivot": Figures(2.587, 18.1, 700.0, 0.2)}))
    | 4D kernel | parameters, M | multiply-adds, G | ms | GB |
    |---|---|---|---|---|
    | center-pivot | 2.59 (2.6) | 18.1 (20.56) | 700 (25.51) | 0.20 (1.39) |
    """
    lines = ["| 4D kernel | parameters, M | multiply-adds, G | ms | GB |", "|---|---|---|---|---|"]
    for name, ours in measured.items():
        paper = PAPER[name]
        lines.append(
            f"| {name} | {ours.parameters:.2f} ({paper.parameters}) | {ours.multiply_adds:.1f} "
            f"({paper.multiply_adds:.2f}) | {ours.milliseconds:.0f} ({paper.milliseconds}) | {ours.gigabytes:.2f} "
            f"({paper.gigabytes:.2f}) |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--size", type=int, default=400)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    chosen = parser.parse_args(arguments)
    name = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    print(f"{chosen.backbone}, {chosen.size} px, {chosen.device}, {name}; the paper's in brackets\n")
    which = (chosen.backbone, chosen.size)
    print(table({kernel: measure(kernel, *which, chosen.device, chosen.repeats) for kernel in KERNELS}))
    everywhere = multiply_adds("original", *which, every_position=True) / 1e9
    print(f"\noriginal, at every support position: {everywhere:.1f} G multiply-adds")


if __name__ == "__main__":
    main()
