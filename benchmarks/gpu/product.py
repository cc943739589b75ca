"""The product itself on the device: part `product` extracts real stores, trains and evaluates from them, and resumes.

It calls what the commands call, with zarr and the rest installed; without them the part is left out, and says so.
"""

from __future__ import annotations

import importlib.util
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.gpu.measuring import Bench, Row, attempt

NEEDED = ("zarr", "numcodecs", "google_crc32c", "PIL", "safetensors", "pyarrow", "yaml")
DIFFERENT = 64
"""Different photos; the others are files of the same bytes."""
WARM = 3
"""Steps of a run that do not count: kernels are chosen, nothing is read ahead of the first."""


def product(bench: Bench) -> Iterator[dict[str, Any]]:
    """Extraction, training and evaluation as `hsnet` does them, from photos and stores on disk."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        rows: dict[str, Row] = {"product": {"failed": f"left out: needs {', '.join(missing)}"}}
        yield bench.measurement("product", "the product from a store", rows)
        return
    with tempfile.TemporaryDirectory(prefix="gpu-bench-", dir=bench.options.scratch) as folder:
        scratch = Path(folder)
        photos = make_photos(scratch / "photos", bench.options.images)
        stores: dict[str, Path] = {}
        yield from _extraction(bench, photos, scratch, stores)
        yield from _training(bench, scratch, stores)


def make_photos(folder: Path, count: int) -> Path:
    """A data set of JPEG photos of 500 x 375 pixels with masks, `DIFFERENT` of them different."""
    from benchmarks.pipeline import CLASSES
    from benchmarks.pipeline import make_photos as make

    different = DIFFERENT - DIFFERENT % CLASSES
    make(folder, min(count, different))
    for number in range(different, count):
        for sub, end in (("images", "jpg"), ("masks", "png")):
            shutil.copyfile(folder / sub / f"{number % different:04d}.{end}", folder / sub / f"{number:04d}.{end}")
    return folder


def _extraction(bench: Bench, photos: Path, scratch: Path, stores: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """Photos a second, and the stores that training reads: int8, and in a byte budget."""
    from pipeline.datasets import open_dataset
    from pipeline.extract.stage import extract
    from pipeline.features.backbones import Reading
    from pipeline.features.weights import load_weights

    options, device = bench.options, str(bench.device)
    dataset, weights = open_dataset("folder", photos), load_weights(bench.backbone, "random")
    budget = options.codec_bytes
    kinds: dict[str, dict[str, Any]] = {
        "int8": {},
        "bfloat16": {"reading": Reading(autocast="bfloat16")},
        "coded": {"bytes_per_image": budget},
    }
    labels = {
        "int8": "int8, float32 backbone",
        "bfloat16": "int8, bfloat16 backbone",
        "coded": f"{budget / 1e6:g} MB a photo (its fit included)",
    }
    rows: dict[str, Row] = {}
    for kind, more in kinds.items():
        path = scratch / f"{kind}.zarr"
        summary, reason = attempt(
            lambda path=path, more=more: extract(
                dataset, weights, path, image_size=options.size, precision="int8", device=device, **more
            )
        )
        if summary is None:
            rows[labels[kind]] = {"failed": str(reason)}
            continue
        note = f"{summary.images} photos, {summary.bytes / summary.images / 1e6:.2f} MB each"
        rows[labels[kind]] = {"value": summary.images_per_s, "unit": "photos/s", "note": note}
        if kind == "bfloat16":
            shutil.rmtree(path)
        else:
            stores[kind] = path
    yield bench.measurement("extract", f"extraction of {options.images} photos, one process", rows)


def _training(bench: Bench, scratch: Path, stores: dict[str, Path]) -> Iterator[dict[str, Any]]:
    """`fit` and `evaluate` on every store, kept where they can be kept."""
    options = bench.options
    arithmetics = ("float32", "bfloat16")
    trained: Path | None = None
    for kind, store in stores.items():
        rows: dict[str, Row] = {}
        for resident in ("off", "host", "device"):
            for arithmetic in arithmetics:
                run = scratch / f"run-{kind}-{resident}-{arithmetic}"
                found, reason = attempt(lambda r=run, k=resident, a=arithmetic, s=store: _steps(bench, s, r, k, a))
                rows[f"resident {resident}, {arithmetic}"] = found or {"failed": str(reason)}
                if found and trained is None:
                    trained = run
        batch = max(options.train_batch)
        yield bench.measurement(f"fit-{kind}", f"training from the {kind} store, batch {batch}", rows, batch=batch)
    if trained is None:
        return
    for kind, store in stores.items():
        if kind == "coded":  # a head belongs to the features it was trained on
            continue
        rows = {}
        for shots in (1, 5):
            for resident in ("off", "device"):
                for arithmetic in arithmetics:
                    row, reason = attempt(
                        lambda s=store, t=trained, k=shots, r=resident, a=arithmetic: _evaluation(bench, s, t, k, r, a)
                    )
                    rows[f"{shots}-shot, resident {resident}, {arithmetic}"] = row or {"failed": str(reason)}
        yield bench.measurement(f"evaluate-{kind}", f"evaluation from the {kind} store", rows)
    first = next(iter(stores.values()))
    row, reason = attempt(lambda: _resumed(bench, first, scratch))
    yield bench.measurement(
        "resume",
        "a run that was stopped and went on, against one that was not",
        {"float32": row or {"failed": str(reason)}},
    )


def _steps(bench: Bench, store: Path, run: Path, resident: str, arithmetic: str) -> Row:
    """Milliseconds of a step of `fit`, and the share of it spent waiting for data."""
    from pipeline.heads.config import RunConfig
    from pipeline.loading.source import StoreSource
    from pipeline.store.feature_store import FeatureStore
    from pipeline.train import StepDone, fit

    batch = max(bench.options.train_batch)
    source = StoreSource(FeatureStore.open(store))
    steps = bench.options.steps + WARM
    config = RunConfig.of(source, fold=0, steps=steps, batch_size=batch, select_on="none", arithmetic=arithmetic)
    events: list[Any] = []
    fit(config, source, run, device=str(bench.device), resident=resident, on_event=events.append)
    done = [event for event in events if isinstance(event, StepDone)][WARM:]
    seconds = timing.summary([event.seconds for event in done])
    waited = sum(event.waited for event in done) / sum(event.seconds for event in done)
    return {
        **{("value" if name == "median" else name): 1e3 * value for name, value in seconds.items()},
        "unit": "ms/step",
        "episodes_per_s": batch / statistics.mean(event.seconds for event in done),
        "waited_share": waited,
        "note": f"{waited:.0%} of it waiting for data",
    }


def _evaluation(bench: Bench, store: Path, run: Path, shots: int, resident: str, arithmetic: str) -> Row:
    """Episodes a second of the stage; a first, short run chooses kernels."""
    from pipeline.episodes.protocols import resolve
    from pipeline.evaluate.plan import plan_evaluation
    from pipeline.evaluate.stage import evaluate
    from pipeline.loading.source import StoreSource
    from pipeline.store.feature_store import FeatureStore

    source, taken = StoreSource(FeatureStore.open(store)), 0.0
    episodes = bench.options.episodes
    for count in (min(8, episodes), episodes):
        plan = plan_evaluation(
            lambda: source,
            resolve(shots=(shots,), episodes=count),
            checkpoint=run,
            fold=0,
            resident=resident,
            arithmetic=arithmetic,
            device=str(bench.device),
            source=source,
        )
        bench.wait()
        start = time.perf_counter()
        evaluate(plan)
        bench.wait()
        taken = time.perf_counter() - start
    return {"value": episodes / taken, "unit": "episodes/s", "note": f"{episodes} episodes, opening included"}


def _resumed(bench: Bench, store: Path, scratch: Path) -> Row:
    """Share of the weights that differ between 2 n steps, and n steps and then n more."""
    from pipeline.heads.checkpoint import load_checkpoint
    from pipeline.heads.config import RunConfig
    from pipeline.loading.source import StoreSource
    from pipeline.store.feature_store import FeatureStore
    from pipeline.train import StepDone, fit

    source, half = StoreSource(FeatureStore.open(store)), max(2, bench.options.steps // 2)
    batch = max(bench.options.train_batch)
    config = RunConfig.of(source, fold=0, steps=2 * half, batch_size=batch, select_on="none")
    whole, parts = scratch / "whole", scratch / "parts"
    fit(config, source, whole, device=str(bench.device))
    done: list[int] = []

    def count(event: Any) -> None:
        done.extend([event.step] if isinstance(event, StepDone) else [])

    fit(config, source, parts, device=str(bench.device), stop=lambda: len(done) >= half, on_event=count)
    fit(config, source, parts, device=str(bench.device))
    ends = [
        torch.cat([one.detach().flatten() for one in load_checkpoint(path).learner().parameters()])
        for path in (whole, parts)
    ]
    away = (ends[0] - ends[1]).abs()
    share, note = 100 * float((away > 0).float().mean()), f"by at most {float(away.max()):.1e}; stopped after {half}"
    return {"value": share, "unit": "% of weights differ", "note": note}
