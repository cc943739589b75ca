"""The whole main job on the generated data set, through the very commands that a user would type.

    extract -> evaluate (untrained, cosine) -> train -> evaluate -> predict -> pictures

It ends in figures before and after training on episodes of classes that were held out, and one sheet of pictures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.common import render
from pipeline.datasets.shapes import Shapes

Run = Callable[[Sequence[str]], Any]
"""Runs `hsnet ARGS`, showing the command and its output as a user would see them; returns its JSON result."""

BACKBONE = "squeezenet1_1"
IMAGE_SIZE = 96
"""Pixels. Small, so that everything takes minutes on two cores; 400 is the published size."""
BATCH_SIZE = 10
STEPS = 200
FOLD = 0
EPISODES = 200
SHOWN_CLASSES, QUERIES_PER_CLASS = 2, 3
PHOTO_SIZE = 240
DATA_OPTIONS: tuple[str, ...] = ()
"""More options of the data set; tests make it smaller."""


@dataclass(frozen=True)
class DemoSummary:
    """Figures in percent, on `episodes` episodes of classes never trained on; and where to look."""

    untrained_miou: float
    cosine_miou: float
    trained_miou: float
    trained_miou_5_shot: float
    episodes: int
    sheet: Path
    masks: Path
    seconds: float


def demo(
    out: Path,
    run: Run,
    workers: int = 2,
    backbone: str = BACKBONE,
    weights: str | None = None,
    image_size: int | None = None,
) -> DemoSummary:
    """Do the main job in `out`. Running it again goes on with what is there.

    Args:
        out: folder for store, run, photos and pictures; about 300 MB.
        run: how a command is run.
        workers: Ray workers for extraction, training and evaluation; 0 needs no Ray.
        backbone, weights, image_size: as the options of `hsnet extract`; a size of None is IMAGE_SIZE.
    """
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    store, run_dir, rows = str(out / "shapes.zarr"), str(out / "run"), str(out / "episodes.parquet")
    # On the CPU also where there is a GPU: it is small enough, and two workers would need two GPUs.
    spread = ("--workers", str(workers), "--device", "cpu")
    held_out = ("--store", store, "--fold", str(FOLD), "--episodes", str(EPISODES))

    given = ("--weights", weights) if weights else ()
    network = ("--backbone", backbone, "--image-size", str(image_size or IMAGE_SIZE), *given)
    run(["extract", "shapes", *DATA_OPTIONS, *network, "--store", store, *spread])
    untrained = run(["evaluate", "--baseline", "untrained", *held_out])
    cosine = run(["evaluate", "--baseline", "cosine", *held_out])
    run([
        "train", "--store", store, "--fold", str(FOLD), "--run-dir", run_dir, "--steps", str(STEPS),
        "--batch-size", str(BATCH_SIZE), "--validate-every", "50", "--validate-episodes", "100", *spread,
    ])  # fmt: skip
    trained = run(["evaluate", "--checkpoint", run_dir, *held_out, "--shots", "1,5", "--out", rows, *spread])

    data = Shapes(size=PHOTO_SIZE)
    sheet_rows = []
    for class_id in data.index.split(FOLD, "test").class_ids[:SHOWN_CLASSES]:
        sheet_rows += _predict_class(data, class_id, out, run_dir, run, given)
    sheet = out / "pictures.png"
    title = "Classes never trained on: one support, three new pictures"
    render.sheet(sheet_rows, cell=180, title=title, legend=render.ERROR_LEGEND).save(sheet)
    return DemoSummary(
        untrained_miou=untrained["scores"][0]["miou"],
        cosine_miou=cosine["scores"][0]["miou"],
        trained_miou=trained["scores"][0]["miou"],
        trained_miou_5_shot=trained["scores"][1]["miou"],
        episodes=EPISODES,
        sheet=sheet,
        masks=out / "masks",
        seconds=time.monotonic() - started,
    )


def _predict_class(
    data: Shapes, class_id: int, out: Path, run_dir: str, run: Run, weights: Sequence[str]
) -> list[list[render.Panel]]:
    """Write pictures of a class as files, predict them by the first one's mask, and draw what came of it."""
    name = data.index.classes[class_id].replace(" ", "-")
    photos, masks = out / "photos" / name, out / "masks" / name
    queries = photos / "queries"
    queries.mkdir(parents=True, exist_ok=True)
    support, *rest = data.index.split(FOLD, "test").by_class[class_id][: QUERIES_PER_CLASS + 1]
    data.image(support).save(photos / "support.jpg", quality=95)
    _save_mask(_object(data, support, class_id), photos / "support.png")
    for number, image in enumerate(rest, 1):
        data.image(image).save(queries / f"{number}.jpg", quality=95)
    run([
        "predict", "--checkpoint", run_dir, "--support", f"{photos / 'support.jpg'}:{photos / 'support.png'}",
        "--query", str(queries), "--out", str(masks), *weights,
    ])  # fmt: skip
    example = data.image(support), _object(data, support, class_id)
    rows = []
    for number, image in enumerate(rest, 1):
        photo, truth = data.image(image), _object(data, image, class_id)
        with Image.open(masks / f"{number}_mask.png") as written:
            said = np.asarray(written) > 0
        captions = (
            f"support: {data.index.classes[class_id]}",
            "query",
            "truth",
            f"prediction, IoU {_iou(said, truth)}",
        )
        row = render.strip(example, photo, said, truth, captions=captions, cell=180)
        rows.append([*row, render.Panel(render.error_map(photo, said, truth), "errors")])
    return rows


def _object(data: Shapes, image: int, class_id: int) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = data.label(image) == class_id + 1
    return mask


def _save_mask(mask: NDArray[np.bool_], path: Path) -> None:
    Image.fromarray(mask.astype(np.uint8) * np.uint8(255)).save(path)


def _iou(said: NDArray[np.bool_], truth: NDArray[np.bool_]) -> str:
    return f"{100 * (said & truth).sum() / max(1, (said | truth).sum()):.0f} %"
