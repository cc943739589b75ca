"""`hsnet extract`: run the backbone once over a data set."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import click

from commands.groups import on_interrupt
from commands.options import (
    STORE,
    Bytes,
    Whole,
    address_option,
    autocast_option,
    backbone_option,
    bytes_option,
    common_options,
    data_option,
    data_root_option,
    dataset_argument,
    device_option,
    image_size_option,
    options,
    precision_option,
    splits_option,
    taps_option,
    weights_option,
    workers_option,
)
from commands.steps import emit, image_size_for, open_data, open_runner, pick_device
from commands.terminal import Progress, set_up_logging
from pipeline.common.text import printable, size_text, time_text


@click.command(short_help="Run the backbone once over all photos; keep features.")
@dataset_argument
@options(data_root_option, splits_option, data_option)
@options(backbone_option, weights_option, image_size_option, taps_option, autocast_option)
@click.option(
    "--store",
    type=STORE,
    metavar="S.zarr",
    required=True,
    help="Store to make, or to finish; a path or s3://BUCKET/NAME.",
)
@options(precision_option, bytes_option)
@click.option("--budget", type=Bytes(), metavar="SIZE", help="The same for all images together, such as 60GB.")
@options(workers_option, address_option, device_option)
@click.option(
    "--on-error",
    type=click.Choice(("fail", "skip")),
    default="fail",
    show_default=True,
    help="What an unreadable image does: stop, or be left out of all episodes.",
)
@click.option(
    "--shard-mb",
    type=Whole(),
    metavar="MB",
    help="Size of a shard of a new store, in 10^6 bytes. [default: 64, less where photos are few]",
)
@click.option("--shard-images", type=Whole(), metavar="N", help="Instead of --shard-mb: images per shard.")
@click.option("--dry-run", is_flag=True, help="Say what would be done and how large it gets; write nothing.")
@common_options
def extract(**options: Any) -> Any:
    """Run the frozen backbone once over all photos of DATASET and keep its features.

    Running it again finishes what is missing and skips the rest. One store serves every fold, shot and seed.

    \b
    Example:
      hsnet extract pascal --data-root VOC2012 --backbone resnet50 --store voc.zarr --workers 4
    """
    return run_extraction(**options)


def run_extraction(
    dataset: str,
    data_root: Path | None,
    splits: Path | None,
    data_options: tuple[str, ...],
    backbone: str,
    weights: str | None,
    image_size: int | None,
    taps: str | None,
    autocast: str | None,
    store: str | Path,
    precision: str,
    bytes_per_image: int | None,
    budget: int | None,
    workers: int,
    address: str | None,
    device: str,
    on_error: str,
    shard_mb: int | None,
    shard_images: int | None,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    damaged: Collection[int] = (),
) -> Any:
    set_up_logging(quiet)
    on_interrupt("Finished shards are kept: run the same command again to go on.")
    given = click.get_current_context().get_parameter_source("precision")
    chosen = [given == click.core.ParameterSource.COMMANDLINE, bytes_per_image is not None, budget is not None]
    if sum(chosen) > 1:
        raise click.UsageError("Give one of --precision, --bytes-per-image and --budget.")
    if shard_mb is not None and shard_images is not None:
        raise click.UsageError("Give one of --shard-mb and --shard-images.")
    from pipeline.extract.plan import ExtractionPlan, plan_extraction
    from pipeline.extract.stage import extract as stage
    from pipeline.features.backbones import Reading, new_recipe
    from pipeline.features.fitting import Fitting
    from pipeline.features.weights import load_weights

    data = open_data(dataset, data_root, splits, data_options, quiet)
    if budget is not None:
        bytes_per_image = budget // max(1, len(data.index.images))
    sizes: dict[str, Any] = {"bytes_per_image": bytes_per_image, "shard_images": shard_images}
    sizes["shard_bytes"] = None if shard_mb is None else shard_mb * 1_000_000
    reading = Reading(taps, autocast or "")
    image_size = image_size_for(image_size, backbone, reading)
    if dry_run:
        exact = new_recipe(backbone, None, image_size, precision, reading)
        plan = plan_extraction(data, exact, store, **sizes, weights=lambda: load_weights(backbone, weights)).plan
        return emit(plan, f"{_plan_text(plan)} Nothing was written.", as_json)
    loaded = load_weights(backbone, weights)
    device = pick_device(device, address)
    with open_runner(workers, address, device) as runner, Progress("extract", "images", quiet) as progress:
        done = total = 0

        def show(event: Any) -> None:
            nonlocal done, total
            if isinstance(event, Fitting):
                progress.say(f"Fitting the codec to {event.images} training photos.")
                return
            if isinstance(event, ExtractionPlan):
                done, total = event.images_done, event.images
                progress.say(_plan_text(event))
            else:
                done += event.images
            progress.update(done, total)

        summary = stage(
            data,
            loaded,
            store,
            image_size=image_size,
            precision=precision,
            reading=reading,
            **sizes,
            on_error=on_error,
            damaged=damaged,
            runner=runner,
            device=device,
            on_event=show,
        )
    lines = [
        f"{printable(summary.path)}: {summary.images} images, {size_text(summary.bytes)} "
        f"({size_text(summary.bytes / summary.images)} per image)",
        f"{summary.written_images} images in {time_text(summary.seconds)} ({summary.images_per_s:.1f} images/s), "
        f"{summary.reused_shards} of {summary.reused_shards + summary.written_shards} shards were there",
    ]
    if summary.skipped:
        lines.append(f"{len(summary.skipped)} unreadable images left out: {', '.join(summary.skipped[:5])}")
    return emit(summary, "\n".join(lines), as_json)


def _plan_text(plan: Any) -> str:
    there = f" ({plan.images_done} of them are there)" if plan.images_done else ""
    if plan.grown is None:
        grown = ""
    elif plan.grown.images_new:
        grown = (
            f"The data set has grown: {plan.grown.images_new} new images, {plan.grown.images_before} there already. "
        )
    else:
        grown = f"The data set's lists have changed; its {plan.grown.images_before} images stay as they are. "
    room = "into a bucket" if plan.bytes_free is None else f"{size_text(plan.bytes_free)} free"
    return (
        f"{grown}{plan.images} images in {plan.shards} shards{there}; "
        f"up to {size_text(plan.bytes_needed)} to write, {room}."
    )
