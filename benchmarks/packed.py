"""N heads packed into one process against N processes on the same core: photos read, seconds, memory.

    python -m benchmarks.packed                              # SqueezeNet at 128 px, 4 heads
    python -m benchmarks.packed --backbone resnet50 --size 200 --heads 4 --steps 4 --out packed.json

All are bound to one core, so neither way gains by taking more of them. Two kinds of heads: those that differ in the
learning rate see the same episodes, and share reading and correlations; those that differ in the seed share what photos
they happen to have in common. The weights at the end are compared: they are the same bits.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

KINDS = ("rates", "seeds")
WAYS = ("processes", "packed")


def config_choices(kind: str, number: int) -> dict[str, Any]:
    """What makes head `number` another one."""
    return {"learning_rate": 1e-4 * (number + 1)} if kind == "rates" else {"seed": number}


def train(store: str, kind: str, numbers: Sequence[int], steps: int, batch: int, out: str) -> dict[str, Any]:
    """Train heads in this process, as a pack if they are several; what it took, and what came out."""
    import torch

    from pipeline.heads.checkpoint import load_checkpoint
    from pipeline.heads.config import RunConfig
    from pipeline.loading.source import StoreSource
    from pipeline.packed import fit_packed
    from pipeline.store.feature_store import FeatureStore
    from pipeline.train import fit

    torch.set_num_threads(1)
    read = 0

    class Counting(StoreSource):
        def features(self, images: Sequence[int]) -> list[torch.Tensor]:
            nonlocal read
            read += len(images)
            return super().features(images)

    source = Counting(FeatureStore.open(Path(store)))
    choices = {"fold": 0, "steps": steps, "batch_size": batch, "select_on": "none"}
    configs = [RunConfig.of(source, **choices, **config_choices(kind, number)) for number in numbers]
    folders = [Path(out, f"{number}") for number in numbers]
    wall, cpu = time.perf_counter(), time.process_time()
    if len(numbers) == 1:
        fit(configs[0], source, folders[0])
    else:
        for outcome in fit_packed(configs, source, folders):
            if isinstance(outcome, Exception):
                raise outcome
    return {
        "photos": read,
        "wall": time.perf_counter() - wall,
        "cpu": time.process_time() - cpu,
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "weights": {number: load_checkpoint(folder).digest for number, folder in zip(numbers, folders, strict=True)},
    }


def start(core: int, *given: Any) -> subprocess.Popen[str]:
    """`train` in a process of its own, on one core."""
    command = [sys.executable, "-m", "benchmarks.packed", "--child", json.dumps([core, *given])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    printed, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"A process ended with {process.returncode}.")
    found: dict[str, Any] = json.loads(printed)
    return found


def measure(store: Path, kind: str, heads: int, steps: int, batch: int, core: int, scratch: Path) -> dict[str, Any]:
    """Every way to train the heads of a kind."""
    told: dict[str, Any] = {}
    weights: list[dict[str, str]] = []
    for way in WAYS:
        given = [[number] for number in range(heads)] if way != "packed" else [list(range(heads))]
        out = str(scratch / kind / way)
        began = time.perf_counter()
        words = [(core, str(store), kind, numbers, steps, batch, out) for numbers in given]
        found = [result(process) for process in [start(*each) for each in words]]
        weights.append({number: digest for one in found for number, digest in one["weights"].items()})
        told[way] = {
            "photos": sum(one["photos"] for one in found),
            "cpu_seconds": sum(one["cpu"] for one in found),
            "wall_seconds": time.perf_counter() - began,
            "memory": sum(one["memory"] for one in found),
        }
    told["same_weights"] = all(one == weights[0] for one in weights)
    return told


def main(
    backbone: str, size: int, images: int, heads: int, steps: int, batch: int, core: int, out: Path | None
) -> None:
    from benchmarks.store import make_store
    from pipeline.features.recipe import Recipe

    measured: dict[str, Any] = {
        "backbone": backbone, "size": size, "heads": heads, "steps": steps, "batch": batch, "load": os.getloadavg()[0]
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "s.zarr")
        make_store(store, Recipe.of(backbone, "sha256:" + "0" * 64, size, "int8"), images)
        for kind in KINDS:
            measured[kind] = told = measure(store, kind, heads, steps, batch, core, Path(folder))
            print(f"{backbone} at {size} px, {heads} {kind}, {steps} steps of {batch} episodes, one core")
            for way in WAYS:
                one = told[way]
                print(
                    f"  {way:<10} {one['photos']:6,} photos read  {one['cpu_seconds']:7.2f} CPU s"
                    f"  {one['wall_seconds']:7.2f} s  {one['memory'] / 1e6:7.0f} MB",
                    flush=True,
                )
            print(f"  the same weights: {'yes' if told['same_weights'] else 'NO'}")
    if out:
        out.write_text(json.dumps(measured, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="squeezenet1_1")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--core", type=int, default=min(os.sched_getaffinity(0)))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    said = vars(parser.parse_args())
    if child := said.pop("child"):
        on, *words = json.loads(child)
        os.sched_setaffinity(0, {on})
        print(json.dumps(train(*words)))
    else:
        main(**said)
