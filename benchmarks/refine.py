"""Ways to bring a coarse answer to the photo's resolution: boundary scores, IoU and time, as a Markdown table.

    python -m benchmarks.refine --data NAME=KIND:ROOT[:SPLITS] ... --backbone NAME:SIZE[:WEIGHTS] ... [--sheet OUT.png]

KIND is a reader (pascal, fss, folder). Jobs are those of `benchmarks.photo_jobs`: five annotated photos, head
`tune`, masks at the photos' own size. The first classes drawn (`--tuned-on`) are left out: parameters were chosen on
them.

Boundary IoU is that of Cheng et al. 2021 (pixels within 1 % of the photo's diagonal of each mask's own edge), boundary
F the harmonic mean of the shares of both contours that lie within that distance of the other.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from benchmarks.photo_jobs import Answered, answers, draw_jobs, new_reader, open_named
from pipeline.common.render import TRUTH, Panel, masked_panel, sheet
from pipeline.predict import refine as ours

NEAR = 0.01
"""Share of the diagonal within which an edge counts as found."""

Mask = NDArray[np.bool_]
Way = Callable[[NDArray[np.float32], Image.Image], NDArray[np.float32]]


def bilinear(margin: NDArray[np.float32], photo: Image.Image, aligned: bool = False) -> NDArray[np.float32]:
    """Resized, the grid's positions as cells; with `aligned` corners as the published code resizes logits."""
    size = (photo.height, photo.width)
    return F.interpolate(torch.from_numpy(margin)[None, None], size, mode="bilinear", align_corners=aligned)[
        0, 0
    ].numpy()


def guided(margin: NDArray[np.float32], photo: Image.Image) -> NDArray[np.float32]:
    """The guided filter alone, on the resized map: windows of one cell."""
    guide = ours._colours(photo)
    window = max(1, round(0.5 * max(photo.height / margin.shape[0], photo.width / margin.shape[1])))
    slope, offset = ours.linear_model(guide, torch.from_numpy(bilinear(margin, photo)), window, 1e-4)
    return ((slope * guide).sum(0) + offset).numpy()


def bilateral(margin: NDArray[np.float32], photo: Image.Image) -> NDArray[np.float32]:
    """Joint bilateral upsampling in one step, as published."""
    return ours._bilateral_step(torch.from_numpy(margin), ours._colours(photo), ours.COLOUR).numpy()


def doubled(margin: NDArray[np.float32], photo: Image.Image) -> NDArray[np.float32]:
    """Joint bilateral upsampling by doublings to the photo's own size, whatever it is."""
    return ours.upsample(torch.from_numpy(margin), ours._colours(photo)).numpy()


WAYS: Mapping[str, Way] = {
    "bilinear, aligned corners": lambda margin, photo: bilinear(margin, photo, aligned=True),
    "bilinear": bilinear,
    "guided filter": guided,
    "joint bilateral, one step": bilateral,
    "joint bilateral, doublings": doubled,
    "`refine`": ours.refine,
    "`refine`, 128 px": lambda margin, photo: ours.refine(margin, photo, working_side=128),
}


def boundary_iou(said: Mask, true: Mask) -> float:
    """Boundary IoU, 0 to 1; 1 if neither has an edge."""
    distance = reach(true)
    one, other = inner_edge(said, distance), inner_edge(true, distance)
    either = np.count_nonzero(one | other)
    return np.count_nonzero(one & other) / either if either else 1.0


def boundary_f(said: Mask, true: Mask) -> float:
    """F-score of the contours, 0 to 1; 0 if only one mask has a contour."""
    distance = reach(true)
    one, other = inner_edge(said, 1), inner_edge(true, 1)
    if not one.any() or not other.any():
        return float(one.any() == other.any())
    precision = float((ndimage.distance_transform_edt(~other)[one] <= distance).mean())
    recall = float((ndimage.distance_transform_edt(~one)[other] <= distance).mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def reach(mask: Mask) -> int:
    """Pixels that count as near in a photo of this size."""
    return max(1, round(NEAR * float(np.hypot(*mask.shape))))


def inner_edge(mask: Mask, distance: float) -> Mask:
    """Pixels of the mask within a distance of what is not; the photo's frame counts as an edge, as in the source."""
    inside: Mask = mask & (ndimage.distance_transform_edt(np.pad(mask, 1))[1:-1, 1:-1] <= distance)
    return inside


def iou(said: Mask, true: Mask) -> float:
    either = np.count_nonzero(said | true)
    return np.count_nonzero(said & true) / either if either else 1.0


@dataclass
class Scores:
    """Of one way on some photos."""

    iou: list[float] = field(default_factory=list)
    boundary_iou: list[float] = field(default_factory=list)
    boundary_f: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def add(self, way: Way, one: Answered) -> None:
        started = time.process_time()
        said = way(one.margin, one.photo) > 0
        self.seconds.append(time.process_time() - started)
        self.iou.append(iou(said, one.truth))
        self.boundary_iou.append(boundary_iou(said, one.truth))
        self.boundary_f.append(boundary_f(said, one.truth))

    def cells(self) -> str:
        parts = (self.iou, self.boundary_iou, self.boundary_f)
        return " | ".join(f"{100 * np.mean(part):.1f}" for part in parts)


def compare(answered: Iterable[Answered], ways: Mapping[str, Way] = WAYS) -> dict[str, Scores]:
    """Every way on every photo."""
    found = {name: Scores() for name in ways}
    for one in answered:
        for name, way in ways.items():
            found[name].add(way, one)
    return found


def table(columns: Mapping[str, Mapping[str, Scores]]) -> str:
    """Markdown: a row per way; per data set and backbone the mean IoU, boundary IoU and boundary F, percent."""
    lines = ["| Way | " + " | ".join(f"{name}: IoU | boundary IoU | boundary F" for name in columns) + " |"]
    lines.append("|---" * (1 + 3 * len(columns)) + "|")
    for way in next(iter(columns.values())):
        lines.append(f"| {way} | " + " | ".join(scores[way].cells() for scores in columns.values()) + " |")
    return "\n".join(lines)


def picture(answered: Sequence[Answered]) -> Image.Image:
    """Rows of photo, truth, resized and refined."""
    rows = []
    for one in answered:
        ways: dict[str, Way] = {"resized": bilinear, "refined": ours.refine}
        panels = [Panel(one.photo, one.job.class_name), masked_panel(one.photo, one.truth, "truth", colour=TRUTH)]
        for name, way in ways.items():
            said = way(one.margin, one.photo) > 0
            panels.append(masked_panel(one.photo, said, f"{name}: {100 * boundary_iou(said, one.truth):.0f}"))
        rows.append(panels)
    return sheet(rows, title="Boundary IoU of resized and refined masks, percent")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, help="NAME=KIND:ROOT[:SPLITS]; may be repeated")
    parser.add_argument("--backbone", action="append", required=True, help="NAME:SIZE[:WEIGHTS]; may be repeated")
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--tuned-on", type=int, default=3, help="the first so many of the classes are left out")
    parser.add_argument("--queries", type=int, default=20)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--sheet", type=Path, help="a picture of two queries of each class")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    columns, shown = {}, []
    for text in options.backbone:
        name, reader = new_reader(text)
        for data in options.data:
            called, dataset = open_named(data)
            jobs = draw_jobs(called, dataset, options.classes, options.shots, options.queries)[options.tuned_on :]
            found = [one for job in jobs for one in answers(job, dataset, reader)]
            columns[f"{called}, {name}"] = compare(found)
            shown += found[:: max(1, options.queries // 2)]
    print(table(columns))
    if options.sheet:
        picture(shown).save(options.sheet)


if __name__ == "__main__":
    main()
