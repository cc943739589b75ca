"""`hsnet demo`: the whole main job on the generated data set, through the very commands that a user would type.

    extract -> evaluate (untrained, cosine) -> train -> evaluate -> predict -> pictures

It ends in figures before and after training on episodes of classes that were held out, and one sheet of pictures.
"""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.groups import on_interrupt
from commands.options import ANY_PATH, BACKBONE_NAMES, Backbone, Whole, json_option, options, weights_option
from commands.steps import emit, open_runner
from commands.terminal import table
from pipeline.common.text import printable, time_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pipeline.common.render import Panel
    from pipeline.datasets.shapes import Shapes

Run = Callable[[Sequence[str]], Any]

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


@click.command(short_help="The whole job once, on generated pictures.")
@click.option("--out", type=ANY_PATH, default=Path("demo-output"), show_default=True, help="Folder for all of it.")
@click.option("--workers", type=Whole(0), default=2, show_default=True, help="Ray workers; 0 needs no Ray.")
@click.option(
    "--backbone", type=Backbone(), metavar=BACKBONE_NAMES, default=BACKBONE, show_default=True, help="Network."
)
@options(weights_option)
@click.option(
    "--image-size",
    type=Whole(32),
    default=IMAGE_SIZE,
    show_default=True,
    help="Side of the square network input, pixels.",
)
@json_option
@click.pass_context
def demo(
    ctx: click.Context,
    out: Path,
    workers: int,
    backbone: str,
    weights: str | None,
    image_size: int,
    as_json: bool,
) -> Any:
    """Do the whole job once on generated pictures: extract, train, evaluate, predict. A few minutes.

    Prints every command it runs, as you would type it. Running it again goes on with what is there.

    \b
    Example:
      hsnet demo --out demo-output
    """
    program = ctx.find_root().command

    def run(arguments: Sequence[str]) -> Any:
        click.secho(f"\n$ hsnet {shlex.join(arguments)}", bold=True, err=True)
        with contextlib.redirect_stdout(sys.stderr):
            result = program.main(list(arguments), prog_name="hsnet", standalone_mode=False)
        if isinstance(result, int):  # the exit code of a command that stopped by itself
            ctx.exit(result)
        return result

    on_interrupt("Run the demo again to go on.")
    with open_runner(workers, None, "cpu"):  # one Ray for all commands: they use the one that is running
        summary = _main_job(out, run, workers, backbone, weights, image_size)
    titles = {
        "untrained_miou": "untrained head",
        "cosine_miou": "cosine map, best threshold",
        "trained_miou": "trained head",
        "trained_miou_5_shot": "trained head, 5 supports",
    }
    rows = [[title, f"{summary[name]:.1f}"] for name, title in titles.items()]
    text = (
        f"\n{table(rows, [f'{EPISODES} episodes of held-out classes', 'mIoU'])}\n\n"
        f"mIoU before training {summary['untrained_miou']:.1f}, after {summary['trained_miou']:.1f}, "
        f"in {time_text(summary['seconds'])}.\n"
        f"Pictures: {printable(summary['sheet'])}   masks and overlays: {printable(summary['masks'])}"
    )
    return emit(summary, text, as_json)


def _main_job(out: Path, run: Run, workers: int, backbone: str, weights: str | None, image_size: int) -> dict[str, Any]:
    """Do the main job in `out`, about 300 MB; `run` runs `hsnet ARGS` and returns its JSON result.

    Returns figures in percent, on episodes of classes never trained on, and where to look.
    """
    from pipeline.common import render
    from pipeline.datasets.shapes import Shapes

    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    store, run_dir, rows = str(out / "shapes.zarr"), str(out / "run"), str(out / "episodes.parquet")
    # On the CPU also where there is a GPU: it is small enough, and two workers would need two GPUs.
    spread = ("--workers", str(workers), "--device", "cpu")
    held_out = ("--store", store, "--fold", str(FOLD), "--episodes", str(EPISODES))

    given = ("--weights", weights) if weights else ()
    network = ("--backbone", backbone, "--image-size", str(image_size), *given)
    run(["extract", "shapes", *DATA_OPTIONS, *network, "--store", store, *spread])
    untrained = run(["evaluate", "--head", "untrained", *held_out])
    cosine = run(["evaluate", "--head", "cosine", *held_out])
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
    return {
        "untrained_miou": untrained["scores"][0]["miou"],
        "cosine_miou": cosine["scores"][0]["miou"],
        "trained_miou": trained["scores"][0]["miou"],
        "trained_miou_5_shot": trained["scores"][1]["miou"],
        "episodes": EPISODES,
        "sheet": sheet,
        "masks": out / "masks",
        "seconds": time.monotonic() - started,
    }


def _predict_class(
    data: Shapes, class_id: int, out: Path, run_dir: str, run: Run, weights: Sequence[str]
) -> list[list[Panel]]:
    """Write pictures of a class as files, predict them by the first one's mask, and draw what came of it."""
    import numpy as np
    from PIL import Image

    from pipeline.common import render

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
    from PIL import Image

    Image.fromarray(mask.astype("uint8") * 255).save(path)


def _iou(said: NDArray[np.bool_], truth: NDArray[np.bool_]) -> str:
    return f"{100 * (said & truth).sum() / max(1, (said | truth).sum()):.0f} %"
