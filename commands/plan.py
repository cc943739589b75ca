"""`hsnet plan`: what a data set will take."""

from __future__ import annotations

import dataclasses
import os
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
from commands.steps import emit, image_size_for, open_data, pick_device
from commands.terminal import fact_lines, set_up_logging, table
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
@click.option("--nodes", type=Whole(), help="Also say what so many machines like this one would take.")
@click.option("--gpus", type=Whole(0), help="With --nodes: GPUs in all of them together. [default: 0]")
@click.option(
    "--bandwidth",
    type=click.FloatRange(0, min_open=True),
    metavar="GB/S",
    help="With --nodes: between the store and all of them. [default: this disk's, as measured]",
)
@click.option(
    "--speedup",
    type=click.FloatRange(0, min_open=True),
    help="With --gpus: a GPU against the device measured here. [default: 1 on a GPU; 50, an estimate, on a CPU]",
)
@click.option("--images", type=Whole(), help="With --nodes: as if the data set had so many photos.")
@click.option("--runs", type=Whole(), default=12, show_default=True, help="With --nodes: of a sweep.")
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
    nodes: int | None,
    gpus: int | None,
    bandwidth: float | None,
    speedup: float | None,
    images: int | None,
    runs: int,
    workers: int,
    device: str,
    as_json: bool,
    quiet: bool,
    **measured: Any,
) -> Any:
    """Say what DATASET will take: bytes of its store, seconds of extraction, training and evaluation, and what fits.

    A few of its own photos are measured on this machine; nothing stays on the disk. It also says from when a store is
    cheaper than running the backbone on the fly, and with --nodes what other machines would take (docs/scaling.md).

    \b
    Example:
      hsnet plan pascal --data-root VOC2012 --backbone resnet50 --workers 4
      hsnet plan pascal --data-root VOC2012 --backbone resnet50 --nodes 4 --gpus 32 --bandwidth 5 --images 1000000
    """
    if nodes is None and any(value is not None for value in (gpus, bandwidth, speedup, images)):
        raise click.UsageError("--gpus, --bandwidth, --speedup and --images are for --nodes.")
    if speedup is not None and not gpus:
        raise click.UsageError("--speedup is for --gpus.")
    set_up_logging(quiet)
    from pipeline.features.backbones import Reading
    from pipeline.features.weights import load_weights
    from pipeline.plan.costs import RUN_STEPS, STEP_EPISODES, measure_costs
    from pipeline.plan.scaling import GPU_SPEEDUP, Site, scaling
    from pipeline.store.bucket import address, local_path
    from pipeline.store.cache import cache_folder

    data = open_data(dataset, data_root, splits, data_options, quiet)
    # Of a store in a bucket the disk keeps what is being written and read.
    lies = cache_folder() / "store" if address(store) else local_path(store)
    folder = next(above for above in lies.absolute().parents if above.is_dir())
    chosen = pick_device(device, None)
    reading = Reading(taps, autocast or "")
    measured["image_size"] = image_size_for(measured["image_size"], backbone, reading)
    costs = measure_costs(
        data,
        load_weights(backbone, weights),
        folder=folder,
        workers=workers,
        device=chosen,
        reading=reading,
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
    even = costs.break_even
    weighed = f"reading {1000 * even.stored_seconds:.0f} ms, on the fly {1000 * even.fly_seconds:.0f} ms per photo"
    if even.uses is None or even.runs is None or even.seconds is None:
        facts["break-even"] = f"never: {weighed}; the backbone on the fly is as fast"
    else:
        facts["break-even"] = (
            f"after {even.runs:.3g} runs of {RUN_STEPS:,} steps, {time_text(even.seconds)} of training on the fly "
            f"({even.uses:,.0f} photos needed; {weighed})"
        )
    report = {**dataclasses.asdict(costs), "fits": costs.fits, "break_even": even}
    if nodes is None:
        return emit(report, fact_lines(facts), as_json)
    measured_rate = costs.bytes_per_image / max(costs.seconds_per_image["write"], 1e-9)
    site = Site(nodes, gpus or 0, os.cpu_count() or 1, 1e9 * bandwidth if bandwidth else measured_rate)
    fast = speedup or (1.0 if chosen.startswith("cuda") else GPU_SPEEDUP)
    needs = scaling(costs, site, speedup=fast, images=images, runs=runs)
    report["scaling"] = {
        "site": site,
        "speedup": fast,
        "images": images or costs.images,
        "stages": {name: {"seconds": need.seconds, "bound": need.bound, **vars(need)} for name, need in needs.items()},
    }
    what = {
        "extract": "extract",
        "train": "train, one run",
        "sweep": f"sweep, {runs} runs",
        "evaluate": "evaluate, 10^6",
    }
    lines = []
    for name, need in needs.items():
        each = ", ".join(f"{resource} {time_text(seconds)}" for resource, seconds in need.needs.items())
        lines.append([what.get(name, name), time_text(need.seconds), need.bound, each])
    rate = f"{size_text(site.bandwidth)}/s{'' if bandwidth else ' (this disk, writing)'}"
    guess = "" if speedup else " (an estimate)"
    power = f", each {fast:g} times what was measured{guess}" if site.gpus and fast != 1 else ""
    head = (
        f"{nodes} nodes of {site.cores} cores, {site.gpus} GPUs in all{power}, store at {rate}, "
        f"{images or costs.images:,} photos"
    )
    if not needs["extract"].fits:
        head += "\nthe store does not fit: "
        head += f"{size_text((images or costs.images) * costs.bytes_per_image)}, {size_text(costs.disk_free)} are free"
    text = f"{fact_lines(facts)}\n\n{head}\n{table(lines, ['', 'time', 'bound by', 'all'])}"
    return emit(report, text, as_json)
