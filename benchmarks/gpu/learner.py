"""Training steps and evaluation from device memory, every way in turn: part `learner`; and part `sparse`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import arithmetic, timing
from benchmarks.gpu.facts import clocks
from benchmarks.gpu.measuring import Bench, Memory, attempt
from benchmarks.gpu.ways import COMPILED, GRAPHS, LABELS, Build, OurWay, Scene, Variant, Way, Work, ways


def works(bench: Bench) -> dict[str, Work]:
    """What is timed, by name, less what --work leaves out."""
    options = bench.options
    found = {}
    for batch in options.train_batch:
        found[f"train{batch}"] = Work(f"training step, batch {batch}", "train", batch)
    one, five = options.eval_batch, options.shots_batch
    found[f"eval1x{one}"] = Work(f"1-shot evaluation, batch {one}", "evaluate", one)
    found[f"eval5x{five}"] = Work(f"5-shot evaluation, batch {five}", "evaluate", five, 5)
    return {name: work for name, work in found.items() if name.startswith(tuple(options.work))}


def learner(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every piece of work, every way."""
    options = bench.options
    left_out = {*(() if options.compile else COMPILED), *(() if options.graphs else GRAPHS)}
    if options.no_extra_baselines:
        left_out |= {"baseline-tf32", "baseline-bfloat16", "baseline-compiled"}
    chosen = tuple(name for name in options.ways or LABELS if name not in left_out)
    scene = Scene.make(bench.backbone, options.size, options.object_share, bench.device)
    for key, work in works(bench).items():
        built = {name: build for name, build in ways(chosen).items() if (name, work.task) != ("graph", "train")}
        yield measure(bench, scene, key, work, built, LABELS)


def sparse(bench: Bench) -> Iterator[dict[str, Any]]:
    """Leaving out the positions outside the object, which takes thousands of small launches, against computing all."""
    options = bench.options
    scene = Scene.make(bench.backbone, options.size, options.object_share, bench.device)
    batch = min(4, *options.train_batch)
    labels = {"dense": "ours, every support position, float32", "sparse": "ours, object positions only, float32"}
    built: dict[str, Build] = {
        name: lambda scene, work, name=name: OurWay(scene, work, Variant(labels[name], sparse=name == "sparse"))
        for name in labels
    }
    for task, title in (("train", "training step"), ("evaluate", "1-shot evaluation")):
        work = Work(f"sparse against dense: {title}, batch {batch}", task, batch)
        yield measure(bench, scene, f"sparse-{task}{batch}", work, built, labels, "dense", min(5, options.repeats))


def measure(
    bench: Bench,
    scene: Scene,
    key: str,
    work: Work,
    builds: Mapping[str, Build],
    labels: Mapping[str, str],
    baseline: str = "baseline",
    repeats: int | None = None,
) -> dict[str, Any]:
    """Time one piece of work in every way; a measurement as it is stored. A way that fails is a row that says why."""
    options, device = bench.options, scene.device
    built: dict[str, Timed] = {}
    failed: dict[str, str] = {}
    memory: dict[str, dict[str, int]] = {}
    logits: dict[str, Tensor] = {}
    for name, build in builds.items():
        before = Memory(device) if bench.cuda else None
        ready, reason = attempt(lambda build=build: _ready(build, scene, work))
        if ready is None:
            failed[name] = str(reason)
            continue
        way, found = ready
        if before is not None:
            before.begin()
            _, reason = attempt(way.run)
            if reason is not None:
                failed[name] = reason
                continue
            memory[name] = before.read()
        if found is not None:
            logits[name] = found
        built[name] = Timed(way)
        del ready, way
    outcome = bench.times({name: way.run for name, way in built.items()}, repeats)
    failed |= outcome.failed
    operations = arithmetic.count(scene.backbone, scene.masks.shape[-1], scene.masks)
    per_episode = operations.training if work.task == "train" else operations.evaluation * work.shots
    peak = options.peak_tflops or (arithmetic.peak_tflops(torch.cuda.get_device_name(device)) if bench.cuda else None)
    variants: dict[str, Any] = {}
    for name in builds:
        if name in failed:
            variants[name] = {"label": labels[name], "failed": failed[name]}
            continue
        taken = outcome.times[name]
        entry = timing.entry(labels[name], taken, outcome.times.get(baseline, taken))
        if baseline not in outcome.times:
            del entry["ratio"], entry["cpu_ratio"]
        rate = work.batch / entry["wall_s"]["median"]
        entry["episodes_per_s"] = rate
        if peak:
            entry["share_of_peak"] = 2 * per_episode * rate / (peak * 1e12)
        if bench.cuda:
            entry["device_s"] = timing.summary(built[name].seconds(len(taken.wall)))
        entry |= memory.get(name, {})
        if name in logits and baseline in logits:
            entry["logits_diff"] = float((logits[name] - logits[baseline]).abs().max())
        variants[name] = entry
    suffix, added = "", ""
    if torch.backends.cudnn.benchmark:
        suffix, added = "-cudnn-benchmark", ", cudnn.benchmark"
    if options.compile:
        suffix, added = f"{suffix}-compile", f"{added}, with torch.compile"
    return {
        "device": device.type,
        "backbone": scene.backbone,
        "work": key + suffix,
        "title": work.title + added,
        "image_size": scene.masks.shape[-1],
        "batch": work.batch,
        "shots": work.shots,
        "cudnn_benchmark": bool(torch.backends.cudnn.benchmark),
        "object_share": float(scene.masks.float().mean()),
        "mask": f"a disc of {options.object_share:.0%} of each picture",
        "weights": "random",
        "multiply_adds_per_episode": per_episode,
        "peak_tflops": peak,
        "features_bytes": sum(level.nbytes for level in scene.features[False]),
        "baseline": baseline,
        **({"clocks_after": clocks(device)} if bench.cuda else {}),
        "variants": variants,
    }


def _ready(build: Build, scene: Scene, work: Work) -> tuple[Way, Tensor | None]:
    """A way that ran once, which compiles and tries kernels out, and its logits on the host."""
    way = build(scene, work)
    found = way.logits()
    logits = None if found is None else found.cpu()
    way.run()
    return way, logits


class Timed:
    """A way with a pair of CUDA events around every run: the device's own time beside the wall clock's."""

    def __init__(self, way: Way) -> None:
        self.way = way
        self.events: list[tuple[Any, Any]] = []

    def run(self) -> None:
        if self.way.scene.device.type != "cuda":
            self.way.run()
            return
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        self.way.run()
        end.record()
        self.events.append((begin, end))

    def seconds(self, repeats: int) -> list[float]:
        """Of the last `repeats` runs."""
        return [begin.elapsed_time(end) / 1000 for begin, end in self.events[-repeats:]]
