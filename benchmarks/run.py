"""Time training steps and evaluation on this machine's CPU, the published way and ours, side by side.

    make bench
    python -m benchmarks.run --backbones resnet50 --work train4,eval1 --repeats 7 --out results.json

The first takes about ten minutes on two cores, most of it the published way. All ways of a piece of work run in turn
in one process, on the same pictures, with the same weights. Results are added to a JSON file; a part that is run again
counts as the newest. See benchmarks/variants.py for what is timed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.inputs import OBJECT_SHARE
from benchmarks.variants import BASELINE, VARIANTS, WORKS, Job, differences, mask_share

BACKBONES = ("resnet50", "resnet101", "vgg16")
DEFAULT_WORK = ("train4", "eval1", "eval5")


def measure(job: Job, names: list[str], repeats: int, budget: float | None, memory: bool) -> dict[str, Any]:
    """Time one job in every way; a measurement as it is stored."""
    ways = {name: job.build(name) for name in names}
    far = differences(ways)
    times = timing.alternate({name: way.run for name, way in ways.items()}, repeats, budget=budget)
    del ways
    work = job.details
    measured: dict[str, Any] = {
        "device": "cpu",
        "backbone": job.backbone,
        "work": job.work,
        "title": work.title,
        "image_size": job.size,
        "batch": work.batch,
        "shots": work.shots,
        "object_share": mask_share(job),
        "mask": f"a disc of {job.object_share:.0%} of each picture",
        "threads": torch.get_num_threads(),
        "weights": "random",
        "variants": {},
    }
    for name, taken in times.items():
        measured["variants"][name] = {
            **timing.entry("published way" if name == BASELINE else VARIANTS[name].label, taken, times[BASELINE]),
            **far[name],
            **(peak_of(job, name) if memory else {}),
        }
    return measured


def peak_of(job: Job, name: str) -> dict[str, int]:
    """Memory of doing the work in a process of its own, bytes: before the first time, and at the worst."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        before, peak = pool.submit(_peaks, job, name).result()
    return {"memory_before_bytes": before, "peak_bytes": peak}


def _peaks(job: Job, name: str) -> tuple[int, int]:
    torch.set_num_threads(job.threads or torch.get_num_threads())
    way = job.build(name)
    timing.forget_peak()
    before, _ = timing.memory()
    for _ in range(2 if job.details.task == "train" else 1):  # Adam's moments are there from the second step on
        way.run()
    return before, timing.memory()[1]


def print_measurement(measured: dict[str, Any]) -> None:
    """A few lines for a person."""
    size, threads = measured["image_size"], measured["threads"]
    print(f"\n{measured['backbone']}, {measured['title']}, {size} px, {threads} threads")
    for entry in measured["variants"].values():
        wall, ratio = entry["wall_s"], entry["ratio"]
        line = f"  {entry['label']:<22} {wall['median']:7.3f} s ({wall['q1']:.3f}-{wall['q3']:.3f})"
        line += f"  cpu {entry['cpu_s']['median']:7.3f} s"
        line += f"  {ratio['of_medians']:5.2f}x ({ratio['q1']:.2f}-{ratio['q3']:.2f})"
        if "peak_bytes" in entry:
            line += f"  peak {entry['peak_bytes'] / 1e9:.2f} GB"
        if "logits_diff" in entry:
            line += f"  logits {entry['logits_diff']:.1e}, loss {entry['loss_diff']:.1e}"
            line += f", pixels {entry['mask_diff_share']:.2%}"
        print(line, flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default=",".join(BACKBONES), help="commas between them")
    parser.add_argument("--work", default=",".join(DEFAULT_WORK), help=f"of: {', '.join(WORKS)}")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="beside the baseline")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--budget", type=float, default=30, help="seconds per measurement, after which three repeats will do"
    )
    parser.add_argument("--threads", type=int, help="torch threads; torch's own choice if left out")
    parser.add_argument("--size", type=int, default=400, help="side of the pictures, pixels")
    parser.add_argument("--object-share", type=float, default=OBJECT_SHARE, help="share of a picture its object covers")
    parser.add_argument(
        "--memory",
        default="train",
        choices=["train", "all", "none"],
        help="of which work peak memory is measured, in one more process per way",
    )
    parser.add_argument("--stores", type=Path, help="folder for the stores, kept; a temporary one if left out")
    parser.add_argument(
        "--out", type=Path, help="JSON file to add to; benchmarks/results/DATE-MACHINE.json if left out"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Path:
    """Run what the command line says; returns the file of results."""
    options = parse(arguments)
    chosen = {"work": options.work.split(","), "variants": options.variants.split(",")}
    for what, known in (("work", WORKS), ("variants", VARIANTS)):
        unknown = [name for name in chosen[what] if name not in known]
        if unknown:
            sys.exit(f"Unknown {what}: {', '.join(unknown)}. Choose of: {', '.join(known)}. Nothing was run.")
    names = [BASELINE, *chosen["variants"]]
    if options.threads:
        torch.set_num_threads(options.threads)
    out = options.out or timing.result_path()
    run = timing.describe_run("cpu", vars(options), "numpy", "zarr")
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        stores = options.stores or Path(folder)
        for backbone in options.backbones.split(","):
            for work in chosen["work"]:
                job = Job(backbone, work, options.size, stores, options.object_share, options.threads)
                memory = options.memory in ("all", job.details.task)
                measured = measure(job, names, options.repeats, options.budget, memory)
                print_measurement(measured)
                timing.record(run, measured, out)
    print(f"\nAdded to {out}")
    return out


if __name__ == "__main__":
    main()
