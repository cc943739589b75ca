"""`hsnet plan`: what a data set will take."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from commands.options import (
    STORE,
    Whole,
    autocast_option,
    backbone_option,
    bytes_option,
    data_option,
    data_root_option,
    dataset_argument,
    device_option,
    image_size_option,
    json_option,
    options,
    precision_option,
    quiet_option,
    splits_option,
    taps_option,
    weights_option,
    workers_option,
)
from commands.steps import emit, open_data, pick_device
from commands.terminal import fact_lines, set_up_logging
from pipeline.common.text import size_text, time_text


@click.command(short_help="Bytes and seconds a data set will take; writes nothing.")
@dataset_argument
@options(data_root_option, splits_option, data_option)
@options(backbone_option, weights_option, image_size_option, taps_option, autocast_option)
@options(precision_option, bytes_option)
@click.option(
    "--store", type=STORE, metavar="S.zarr", default=Path("store.zarr"), help="Where it would lie. [default: here]"
)
@click.option("--photos", "sample", type=Whole(), default=4, show_default=True, help="How many to measure with.")
@options(workers_option, device_option, json_option, quiet_option)
def plan(
    dataset: str,
    data_root: Path | None,
    splits: Path | None,
    data_options: tuple[str, ...],
    backbone: str,
    weights: str | None,
    taps: str | None,
    autocast: str | None,
    store: str | Path,
    workers: int,
    device: str,
    as_json: bool,
    quiet: bool,
    **measured: Any,
) -> Any:
    """Say what DATASET will take: bytes of its store, seconds of extraction, training and evaluation, and what fits.

    A few of its own photos are measured on this machine; nothing stays on the disk.

    \b
    Example:
      hsnet plan pascal --data-root VOC2012 --backbone resnet50 --workers 4
    """
    set_up_logging(quiet)
    from pipeline.features.backbones import Reading
    from pipeline.features.weights import load_weights
    from pipeline.plan import STEP_EPISODES, measure_costs
    from pipeline.store.bucket import address, local_path
    from pipeline.store.cache import cache_folder

    data = open_data(dataset, data_root, splits, data_options, quiet)
    # Of a store in a bucket the disk keeps what is being written and read.
    lies = cache_folder() / "store" if address(store) else local_path(store)
    folder = next(above for above in lies.absolute().parents if above.is_dir())
    costs = measure_costs(
        data,
        load_weights(backbone, weights),
        folder=folder,
        workers=workers,
        device=pick_device(device, None),
        reading=Reading(taps, autocast or ""),
        **measured,
    )
    each = ", ".join(f"{name} {1000 * value:.0f}" for name, value in costs.seconds_per_image.items())
    room = {"disk": costs.disk_free, "memory": costs.memory_free, "device": costs.device_free}
    facts = {
        "store": f"{costs.images} images of at most {size_text(costs.bytes_per_image)}: {size_text(costs.bytes)}",
        **{
            f"fits in {where}": f"{'yes' if fits else 'no'}, {size_text(room[where] or 0)} may be filled"
            for where, fits in costs.fits.items()
        },
        "per photo": f"{each} ms, mean of {costs.measured_images}",
        "extract": f"{time_text(costs.extract_seconds)} with {max(1, workers)} worker{'s' if workers > 1 else ''}",
        "train": f"{time_text(costs.train_seconds_per_step)} a step of {STEP_EPISODES} episodes",
        "evaluate": f"{time_text(1000 * costs.evaluate_seconds_per_episode)} for 1,000 1-shot episodes on one worker",
    }
    return emit({**dataclasses.asdict(costs), "fits": costs.fits}, fact_lines(facts), as_json)
