"""Time what lies around the arithmetic: extraction, the commands' start, waiting for data, evaluation as a command.

    make bench-pipeline
    python -m benchmarks.pipeline --parts extract --backbones resnet50 --repeats 3
    python -m benchmarks.pipeline --parts evaluate,train --store voc.zarr --run-dir runs/voc-0

Without --data or --store it makes photos (JPEG, 500 x 375) and masks of its own, and the stores with random weights:
how long anything takes does not depend on what the photos show. Results are added to a JSON file with the same facts
of machine and versions as benchmarks/run.py's.

    extract   images per second of `extract` in this process and on Ray workers, beside those of the bare backbone
    evaluate  episodes per second of the whole command, of the stage, and of the segmenter alone
    train     time to the first step of the command; share of a step spent waiting for data, read ahead or not
    help      `hsnet --help`
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import timing
from benchmarks.inputs import disc, picture
from hsnet.backbone import FrozenBackbone, random_state_dict
from pipeline.common.runner import one_torch_thread
from pipeline.datasets import Dataset, open_dataset

PARTS = ("help", "extract", "evaluate", "train")
BACKBONES = ("squeezenet1_1", "resnet50", "vgg16")
IMAGES = {"squeezenet1_1": 192, "resnet50": 64, "resnet101": 48, "vgg16": 32}
"""Photos of one extraction: some ten to forty seconds of work."""
CLASSES = 4


def make_photos(folder: Path, count: int) -> Path:
    """A data set in the layout `masks`: JPEG photos of 500 x 375 pixels, one object each, PNG masks beside them."""
    for sub in ("images", "masks"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    for number in range(count):
        photo, mask = picture(number, 500)[:375].numpy(), disc(number, 500).numpy()[62:437]
        Image.fromarray(photo).save(folder / "images" / f"{number:04d}.jpg", quality=92)
        Image.fromarray((mask * (1 + number % CLASSES)).astype(np.uint8)).save(folder / "masks" / f"{number:04d}.png")
    return folder


# ---------------------------------------------------------------------------------------------- extraction


def measure_extract(
    data: Callable[[int], Dataset], backbone: str, size: int, images: int, repeats: int, workers: int, scratch: Path
) -> dict[str, Any]:
    """Rates of extraction and of the bare backbone, in turn; with Ray if workers > 0, each process with one thread."""
    from pipeline.extract.stage import extract
    from pipeline.features.weights import load_weights

    dataset, weights = data(images), load_weights(backbone, "random")
    many = len(dataset.index.images)
    bare: list[tuple[float, float]] = []
    ours, cpu = [], []
    with _ray(workers) as runner, _bare(backbone, size, max(1, workers)) as run_bare:
        for number in range(-1 if workers else 0, repeats):
            # Ray's processes import everything in a first round that does not count.
            some = data(4 * workers) if number < 0 else dataset
            path, before = scratch / f"{backbone}-{workers}-{number}.zarr", time.process_time()
            summary = extract(some, weights, path, image_size=size, precision="int8", runner=runner)
            if number >= 0:
                ours.append(summary.images_per_s)
                cpu.append((time.process_time() - before) / many)
                bare.append(run_bare(max(4, min(64, many // 2))))
            if number != repeats - 1 or workers:
                _remove(path)
    return {
        "images": many,
        "workers": workers,
        "images_per_s": timing.summary(ours),
        "bare_images_per_s": timing.summary([rate for rate, _ in bare]),
        "share_of_bare": statistics.median(ours) / statistics.median(rate for rate, _ in bare),
        "bare_cpu_s_per_image": timing.summary([seconds for _, seconds in bare]),
        # Ray's processes are not this one's children: their CPU seconds are not known here.
        **({} if workers else {"cpu_s_per_image": timing.summary(cpu)}),
    }


@contextmanager
def _bare(backbone: str, size: int, processes: int) -> Iterator[Callable[[int], tuple[float, float]]]:
    """A function: what nothing but the backbone does, in as many processes of one thread at once.

    It gives images per second of all processes, and CPU seconds per image.
    """
    with multiprocessing.get_context("spawn").Pool(processes, _build_bare, (backbone, size)) as pool:

        def run(images: int) -> tuple[float, float]:
            each = pool.map(_run_bare, [images] * processes, chunksize=1)
            return sum(rate for rate, _ in each), statistics.mean(seconds for _, seconds in each)

        run(2)
        yield run


_network: FrozenBackbone
_pixels: torch.Tensor


def _build_bare(backbone: str, size: int) -> None:
    global _network, _pixels
    torch.set_num_threads(1)
    _network = FrozenBackbone(backbone, random_state_dict(backbone))
    _pixels = torch.randn(1, 3, size, size)


def _run_bare(images: int) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(images):
        _network.taps(_pixels)
    return images / (time.perf_counter() - wall), (time.process_time() - cpu) / images


@contextmanager
def _ray(workers: int) -> Iterator[Any]:
    if not workers:
        yield None
        return
    from cluster.runner import RayRunner
    from cluster.session import session

    with session("local", num_cpus=max(workers, os.cpu_count() or 1)):
        yield RayRunner(workers)


# ---------------------------------------------------------------------------------------------- commands


def measure_help(repeats: int) -> dict[str, Any]:
    """Seconds of `hsnet --help`, a warm disk presumed."""
    _command("--help")
    return {"wall_s": timing.summary([_command("--help")[0] for _ in range(repeats)])}


def measure_evaluate(
    store: Path, run_dir: Path | None, shots: int, episodes: Sequence[int], workers: Sequence[int], repeats: int
) -> dict[str, Any]:
    """Rates of evaluation: the command, the stage in this process, and the segmenter on batches that are there.

    The stage is timed with and without reading ahead; the command for each number of episodes and of workers.
    """
    from hsnet.fusion import fuse
    from hsnet.metrics import count
    from pipeline.episodes.protocols import resolve
    from pipeline.episodes.stream import EpisodeStream
    from pipeline.evaluate import blocks, stage
    from pipeline.evaluate.plan import EvaluationPlan
    from pipeline.heads import catalogue
    from pipeline.loading.batch import load_batch
    from pipeline.loading.source import StoreSource
    from pipeline.store.feature_store import FeatureStore

    chosen = ["--checkpoint", str(run_dir)] if run_dir else ["--head", "untrained"]
    options = ["evaluate", *chosen, "--store", str(store), "--shots", str(shots), "--quiet", "--device", "cpu"]
    source = StoreSource(FeatureStore.open(store))
    method = catalogue.trained(run_dir, source) if run_dir else catalogue.made("untrained", source)
    plan = EvaluationPlan(method=method, source=source, fold=0, protocol=resolve(shots=(shots,), episodes=episodes[0]))
    stream = EpisodeStream(source.index, 0, "test", shots, 0)
    drawn = [stream[number] for number in range(min(min(episodes), max(1, blocks.BLOCK // shots)))]
    with one_torch_thread():
        segmenter, batch = method.make(), load_batch(source, drawn)

        def inner() -> None:
            masks = fuse(segmenter.answer(batch).logits, (batch.target.shape[1], batch.target.shape[2]))
            count(masks, batch.target, batch.ignore), count(masks, batch.target)

        def load() -> None:
            load_batch(source, drawn)

        def whole(ahead: int) -> Callable[[], None]:
            def run() -> None:
                before, blocks.READ_AHEAD = blocks.READ_AHEAD, ahead
                try:
                    stage.evaluate(plan)
                finally:
                    blocks.READ_AHEAD = before

            return run

        parts = {"inner": inner, "load": load, "ahead": whole(blocks.READ_AHEAD), "in_line": whole(0)}
        times = timing.alternate(parts, repeats)
    result: dict[str, Any] = {
        "shots": shots,
        "inner_episodes_per_s": len(drawn) / statistics.median(times["inner"].wall),
        "load_s_per_episode": statistics.median(times["load"].wall) / len(drawn),
        "stage_episodes_per_s": episodes[0] / statistics.median(times["ahead"].wall),
        "stage_reading_in_line_episodes_per_s": episodes[0] / statistics.median(times["in_line"].wall),
    }
    for number in workers:
        for size in (1, *episodes):
            taken = [_command(*options, "--episodes", str(size), "--workers", str(number))[0] for _ in range(repeats)]
            result[f"command_{size}_episodes_{number}_workers_s"] = statistics.median(taken)
    return result


def measure_train(store: Path, batch: int, steps: int, threads: int | None, scratch: Path) -> dict[str, Any]:
    """Seconds from the start of `hsnet train` to its first step, and the share of steps spent waiting for data."""
    from pipeline.heads.config import RunConfig
    from pipeline.loading.source import StoreSource
    from pipeline.store.feature_store import FeatureStore
    from pipeline.train import StepDone, fit

    run = scratch / "train-command"
    options = ["train", "--store", str(store), "--run-dir", str(run), "--batch-size", str(batch), "--steps", "1"]
    wall, _ = _command(*options, "--select-on", "none", "--quiet", "--device", "cpu")
    (line,) = (run / "metrics.jsonl").read_text().splitlines()
    first = json.loads(line)["train"]["seconds"]
    _remove(run)

    source = StoreSource(FeatureStore.open(store))
    config = RunConfig.of(source, fold=0, steps=steps + 1, batch_size=batch, select_on="none")
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    result: dict[str, Any] = {
        "batch": batch,
        "steps": steps,
        "threads": torch.get_num_threads(),
        "command_of_one_step_s": wall,
        "first_step_s": first,
        "before_and_after_the_first_step_s": wall - first,
    }
    for depth in (2, 0, 2, 0):
        events: list[StepDone] = []
        folder = scratch / f"train-{depth}"
        fit(config, source, folder, prefetch_depth=depth, on_event=events.append)  # type: ignore[arg-type]
        _remove(folder)
        entry = result.setdefault(f"prefetch_{depth}", {"step_s": [], "waited_s": []})
        entry["step_s"] += [event.seconds for event in events[1:]]  # nothing is read ahead of the first
        entry["waited_s"] += [event.waited for event in events[1:]]
    torch.set_num_threads(before)
    for depth in (2, 0):
        entry = result[f"prefetch_{depth}"]
        entry["waited_share"] = sum(entry["waited_s"]) / sum(entry["step_s"])
        entry["step_s"], entry["waited_s"] = timing.summary(entry["step_s"]), timing.summary(entry["waited_s"])
    return result


def _command(*arguments: str) -> tuple[float, str]:
    """(seconds, stdout) of an `hsnet` command of this checkout."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(timing.ROOT / "cli.py"), *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"hsnet {' '.join(arguments)} failed:\n{done.stderr}")
    return time.perf_counter() - start, done.stdout


def _remove(path: Path) -> None:
    import shutil

    shutil.rmtree(path, ignore_errors=True)


# ---------------------------------------------------------------------------------------------- running


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--backbones", default=",".join(BACKBONES), help="of the extraction, commas between them")
    parser.add_argument(
        "--workers", default="0,2", help="of extraction and evaluation: 0 is this process, others are on Ray"
    )
    parser.add_argument("--images", type=int, help="photos of an extraction; by backbone if left out")
    parser.add_argument("--size", type=int, default=400, help="side of the network input, pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--data", type=Path, help="folder of photos and masks to extract (data set `folder`)")
    parser.add_argument("--store", type=Path, help="store to train and evaluate from; made if left out")
    parser.add_argument("--run-dir", type=Path, help="run to evaluate; an untrained head if left out")
    parser.add_argument("--shots", type=int, default=1)
    parser.add_argument("--episodes", default="50", help="of evaluations, the fewest first, commas between them")
    parser.add_argument("--batch", type=int, default=4, help="episodes of a training step")
    parser.add_argument("--steps", type=int, default=5, help="training steps that count, twice for each setting")
    parser.add_argument("--threads", type=int, help="torch threads of training; torch's own choice if left out")
    parser.add_argument(
        "--scratch", type=Path, help="folder for photos and stores; the system's temporary one if left out"
    )
    parser.add_argument("--out", type=Path, help="JSON file to add to; benchmarks/results/pipeline/DATE-MACHINE.json")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> Path:
    """Run what the command line says; returns the file of results."""
    options = parse(arguments)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        sys.exit(f"Unknown part: {', '.join(sorted(unknown))}. Choose of: {', '.join(PARTS)}. Nothing was run.")
    out = options.out or timing.RESULTS / "pipeline" / timing.result_path().name
    run = timing.describe_run("cpu", vars(options), "numpy", "zarr", "PIL")

    def keep(work: str, backbone: str, size: int, measured: dict[str, Any]) -> None:
        facts = {"device": "cpu", "backbone": backbone, "work": work, "image_size": size}
        print_measurement({**facts, **measured})
        timing.record(run, {**facts, **measured}, out)

    with tempfile.TemporaryDirectory(prefix="bench-", dir=options.scratch) as folder:
        scratch = Path(folder)

        def data(count: int) -> Dataset:
            if options.data:
                return open_dataset("folder", options.data)
            place = scratch / f"photos-{count}"
            return open_dataset("folder", place if place.exists() else make_photos(place, count))

        if "help" in parts:
            keep("help", "", options.size, measure_help(max(5, options.repeats)))
        for backbone in options.backbones.split(",") if "extract" in parts else ():
            for workers in map(int, options.workers.split(",")):
                images = options.images or IMAGES[backbone]
                size = _size(backbone, options.size)
                measured = measure_extract(
                    data, backbone, size, images * max(1, workers), options.repeats, workers, scratch
                )
                keep(f"extract, {workers} workers", backbone, size, measured)
        if {"evaluate", "train"} & set(parts):
            store = options.store or _make_store(data, options.size, scratch)
            backbone, size = _made_for(store)
            if "evaluate" in parts:
                episodes = sorted(map(int, options.episodes.split(",")))
                processes = list(map(int, options.workers.split(",")))
                measured = measure_evaluate(store, options.run_dir, options.shots, episodes, processes, options.repeats)
                keep(f"evaluate, {options.shots} shots", backbone, size, measured)
            if "train" in parts:
                measured = measure_train(store, options.batch, options.steps, options.threads, scratch)
                keep(f"train, batch {options.batch}", backbone, size, measured)
    print(f"\nAdded to {out}")
    return out


def _size(backbone: str, size: int) -> int:
    return 401 if (backbone, size) == ("squeezenet1_1", 400) else size  # SqueezeNet's grids at 400 cannot be mixed


def _make_store(data: Callable[[int], Dataset], size: int, scratch: Path) -> Path:
    from pipeline.extract.stage import extract
    from pipeline.features.weights import load_weights

    weights = load_weights("resnet50", "random")
    return Path(extract(data(48), weights, scratch / "store.zarr", image_size=size, precision="int8").path)


def _made_for(store: Path) -> tuple[str, int]:
    """Backbone and image size of a store."""
    from pipeline.store.feature_store import FeatureStore

    recipe = FeatureStore.open(store).recipe
    return recipe.backbone, recipe.image_size


def print_measurement(measured: dict[str, Any]) -> None:
    """A few lines for a person."""
    print(f"\n{measured['backbone']} {measured['work']}, {measured['image_size']} px".strip())
    for name, value in measured.items():
        if name not in ("device", "backbone", "work", "image_size"):
            print(f"  {name:<34} {_text(value)}", flush=True)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) and math.isfinite(value) else str(value)


if __name__ == "__main__":
    main()
