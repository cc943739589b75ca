"""The paper's numbers, to stand beside ours. Nothing heavy is imported: `hsnet --help` names the tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.scores.rows import Results

SOURCE = "Min, Kang and Cho: Hypercorrelation Squeeze for Few-Shot Segmentation, ICCV 2021, Tables 1 to 3"
PROTOCOLS = {"pascal": "hsnet", "coco": "hsnet", "fss": "hsnet-fss"}
"""Data set -> the protocol of `pipeline.episodes.protocols` that the paper's numbers follow."""

TITLES = {"pascal": "PASCAL-5i", "coco": "COCO-20i", "fss": "FSS-1000"}


@dataclass(frozen=True)
class Published:
    """One line of the paper's tables, percent."""

    folds: tuple[float, ...]
    """mIoU of folds 0 to 3; empty for FSS-1000, which has none, and where only the mean is known here."""
    mean: float
    fb_iou: float | None


NUMBERS: dict[tuple[str, str, int], Published] = {
    ("pascal", "vgg16", 1): Published((59.6, 65.7, 59.6, 54.0), 59.7, 73.4),
    ("pascal", "vgg16", 5): Published((64.9, 69.0, 64.1, 58.6), 64.1, 76.6),
    ("pascal", "resnet50", 1): Published((64.3, 70.7, 60.3, 60.5), 64.0, 76.7),
    ("pascal", "resnet50", 5): Published((70.3, 73.2, 67.4, 67.1), 69.5, 80.6),
    ("pascal", "resnet101", 1): Published((67.3, 72.3, 62.0, 63.1), 66.2, 77.6),
    ("pascal", "resnet101", 5): Published((71.8, 74.4, 67.0, 68.3), 70.4, 80.6),
    ("coco", "resnet50", 1): Published((36.3, 43.1, 38.7, 38.7), 39.2, 68.2),
    ("coco", "resnet50", 5): Published((43.3, 51.3, 48.2, 45.0), 46.9, 70.7),
    ("coco", "resnet101", 1): Published((37.2, 44.1, 42.4, 41.3), 41.2, 69.1),
    ("coco", "resnet101", 5): Published((45.9, 53.0, 51.8, 47.1), 49.5, 72.4),
    ("fss", "vgg16", 1): Published((), 82.3, None),
    ("fss", "vgg16", 5): Published((), 85.8, None),
    ("fss", "resnet50", 1): Published((), 85.5, None),
    ("fss", "resnet50", 5): Published((), 87.8, None),
    ("fss", "resnet101", 1): Published((), 86.5, None),
    ("fss", "resnet101", 5): Published((), 88.5, None),
}
"""(data set, backbone, shots) -> the paper's line for HSNet."""


@dataclass(frozen=True)
class Line:
    """One line of a table or a figure of the paper. What is not known here is not there."""

    label: str
    data: str
    backbone: str
    scores: Mapping[int, Published]
    """Number of shots -> percent."""
    choices: Mapping[str, Any] = field(default_factory=dict)
    """Choices of `pipeline.heads.learner` that are not the published ones."""
    more: Mapping[str, str] = field(default_factory=dict)
    """Other columns, as they are written."""


@dataclass(frozen=True)
class PaperTable:
    """A table or figure of the paper that can be made again."""

    title: str
    lines: tuple[Line, ...]
    shots: tuple[int, ...] = (1, 5)
    more: tuple[str, ...] = ()
    """Other columns than scores."""
    trained_on: str = ""
    """Data that its heads were trained on, where they are tested on other data."""
    notes: tuple[str, ...] = ()


def _of(data: str, backbone: str) -> dict[int, Published]:
    return {shots: line for (name, net, shots), line in NUMBERS.items() if (name, net) == (data, backbone)}


def _lines(data: str, *backbones: str) -> tuple[Line, ...]:
    return tuple(Line("HSNet", data, backbone, _of(data, backbone)) for backbone in backbones)


def _mean(one: float, five: float) -> dict[int, Published]:
    """Scores of which only the means over folds are known here, 1-shot and 5-shot."""
    return {1: Published((), one, None), 5: Published((), five, None)}


_ABLATION = _of("pascal", "resnet101")
"""The paper's ablations have its ResNet-101 on PASCAL-5i as their full model."""

PAPER: dict[str, PaperTable] = {
    "table1": PaperTable(
        "Table 1: PASCAL-5i",
        (
            *_lines("pascal", "vgg16", "resnet50", "resnet101"),
            Line("HSNet without support mask", "pascal", "resnet101", {}, {"support_mask": False}),
        ),
        notes=("The line without support mask is in the paper; its numbers are not known here.",),
    ),
    "table2": PaperTable("Table 2: COCO-20i", _lines("coco", "resnet50", "resnet101")),
    "table3": PaperTable("Table 3: FSS-1000", _lines("fss", "vgg16", "resnet50", "resnet101")),
    "table4": PaperTable(
        "Table 4: trained on COCO-20i, tested on PASCAL-5i",
        (
            Line("HSNet", "pascal", "resnet50", {}),
            Line("HSNet", "pascal", "resnet101", _mean(64.1, 70.3)),
        ),
        trained_on="coco",
        notes=("Scores per fold, FB-IoU and the line of ResNet-50 are in the paper; they are not known here.",),
    ),
    "table5": PaperTable(
        "Table 5: 4D kernels",
        (
            Line(
                "original 4D kernel",
                "pascal",
                "resnet101",
                {},
                {"kernel": "original"},
                {"parameters": "11.3 M", "ms": "512.17", "memory, GB": "4.12", "GFLOPs": "702.35"},
            ),
            Line("separable 4D kernel", "pascal", "resnet101", {}, {"kernel": "separable"}, {"parameters": "4.4 M"}),
            Line(
                "centre-pivot 4D kernel",
                "pascal",
                "resnet101",
                _ABLATION,
                more={"parameters": "2.6 M", "ms": "25.51", "memory, GB": "1.39", "GFLOPs": "20.56"},
            ),
        ),
        more=("parameters", "ms", "memory, GB", "GFLOPs"),
        notes=(
            "Scores of the other two kernels, and time, memory and FLOPs of the separable one, are in the paper; they "
            "are not known here.",
            "Rows hold no memory and no FLOPs, and their seconds are of all numbers of shots in one pass.",
        ),
    ),
    "fig5": PaperTable(
        "Figure 5: layers correlated",
        (
            Line("all layers", "pascal", "resnet101", _ABLATION),
            Line("deepest layer of each level", "pascal", "resnet101", _mean(61.7, 67.5), {"layers": "deep"}),
            Line("shallowest layer of each level", "pascal", "resnet101", _mean(59.1, 65.7), {"layers": "shallow"}),
        ),
    ),
    "fig6": PaperTable(
        "Figure 6: levels of the pyramid",
        (
            Line("all three levels", "pascal", "resnet101", _ABLATION),
            Line("two deepest levels", "pascal", "resnet101", {}, {"levels": "2,3"}),
            Line("deepest level", "pascal", "resnet101", _mean(55.5, 61.6), {"levels": "3"}),
        ),
        notes=("The figure has the two deepest levels; their numbers are not known here.",),
    ),
    "fig8": PaperTable(
        "Figure 8: 4D convolutions of a squeeze block",
        tuple(
            Line(
                f"{depth}",
                "pascal",
                "resnet101",
                _ABLATION if depth == 3 else {},
                {} if depth == 3 else {"depth": depth},
            )
            for depth in (1, 2, 3, 4)
        ),
        notes=("The figure has a curve over depths; only the published depth's numbers are known here.",),
    ),
    "tableA1": PaperTable(
        "Table A1: ten shots",
        (
            Line("HSNet", "pascal", "resnet50", {10: Published((), 70.6, None)}),
            Line("HSNet", "coco", "resnet50", {10: Published((), 48.7, None)}),
        ),
        shots=(10,),
        notes=(
            "That the backbone is ResNet-50 follows from Table 2: with ResNet-101, COCO-20i has 49.5 at five shots "
            "already.",
        ),
    ),
}
"""Name -> what `hsnet report --like` prints and `experiments/` has a sweep file for."""

BATCH = {"pascal": 20, "coco": 40, "fss": 20}
"""Episodes per step of the published training."""

STEPS = {"pascal": 200_000, "fss": 200_000}
"""Optimiser steps of the published training, about: its author names 350 epochs or more. COCO's are not known here."""


def papers_data(results: Results) -> str | None:
    """The data set's name if the rows are of the paper's own classes, else None.

    A reader's name is not enough: any photos can be laid out like PASCAL's or FSS-1000's.
    """
    from pipeline.datasets.coco import COCO_CLASSES
    from pipeline.datasets.pascal import VOC_CLASSES

    name, fold = str(results.facts["dataset"]), results.fold
    if results.facts["role"] != "test":
        return None
    if name == "pascal":
        wanted = dict(enumerate(VOC_CLASSES[5 * fold : 5 * fold + 5], 5 * fold))
    elif name == "coco":
        wanted = dict(list(enumerate(COCO_CLASSES))[fold::4])
    elif name == "fss":
        # 240 test classes, numbered from 760: 520 to train and 240 to validate come before.
        return name if sorted(results.classes) == list(range(760, 1000)) else None
    else:
        return None
    return name if _plain(results.classes) == _plain(wanted) else None


def published(results: Results, shots: int) -> Published | None:
    """The paper's line for these rows' data, backbone and number of shots; None if it has none."""
    data = papers_data(results)
    recipe = results.facts.get("recipe")
    backbone = recipe.get("backbone") if isinstance(recipe, dict) else None
    return None if data is None else NUMBERS.get((data, str(backbone), shots))


def _plain(names: Mapping[int, str]) -> dict[int, str]:
    """Names without case, spaces and hyphens."""
    return {c: "".join(letter for letter in name.casefold() if letter.isalnum()) for c, name in names.items()}
