"""The paper's numbers, to stand beside ours where data, backbone and fold are the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.report.inputs import as_dict
from pipeline.scores.rows import Results

SOURCE = "Min, Kang and Cho: Hypercorrelation Squeeze for Few-Shot Segmentation, ICCV 2021, Tables 1 to 3"
PROTOCOLS = {"pascal": "hsnet", "coco": "hsnet", "fss": "hsnet-fss"}
"""Data set -> the protocol of `pipeline.episodes.protocols` that the paper's numbers follow."""

TITLES = {"pascal": "PASCAL-5i", "coco": "COCO-20i", "fss": "FSS-1000"}


@dataclass(frozen=True)
class Published:
    """One line of the paper's tables, percent."""

    folds: tuple[float, ...]
    """mIoU of folds 0 to 3; empty for FSS-1000, which has none."""
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
    backbone = as_dict(results.facts.get("recipe")).get("backbone")
    return None if data is None else NUMBERS.get((data, str(backbone), shots))


def _plain(names: Mapping[int, str]) -> dict[int, str]:
    """Names without case, spaces and hyphens."""
    return {c: "".join(letter for letter in name.casefold() if letter.isalnum()) for c, name in names.items()}
