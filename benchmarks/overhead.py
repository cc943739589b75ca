"""What Ray costs beside the work: its start, one worker against this process, a save, memory of each process.

    python -m benchmarks.overhead                          # generated photos, SqueezeNet at 112 px, some minutes
    python -m benchmarks.overhead --store voc.zarr --batch 10 --out overhead.json

Both ways compute with one thread and take turns, so that what else runs on the machine meets both. Beside seconds there
are CPU seconds of all processes together, Ray's own, too, which other programs change less. Ray's workers run with this
process's niceness, not with the 15 that they usually have. Memory (Linux only) is the share of each
process in what is resident (PSS): pages that several of them use are counted once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.two_nodes import ROOT, below

TRAINS, MAPS = "ray::RayTrainWorker", "ray::_run"
SECOND = 0.3
"""Seconds between two looks at memory."""


def open_source(store: Path) -> Any:
    """The store's features."""
    from pipeline.loading.source import StoreSource
    from pipeline.store.feature_store import FeatureStore

    return StoreSource(FeatureStore.open(store))


def _nothing() -> Callable[[int], int]:
    return lambda item: item


def measure_start() -> dict[str, float]:
    """Seconds until a local Ray is there, until a worker of it has answered, and to end it."""
    from cluster.runner import RayRunner
    from cluster.session import session

    began, cpu = time.perf_counter(), cpu_seconds()
    with session("local", num_cpus=1, num_gpus=0):
        there = time.perf_counter()
        list(RayRunner(1).map(_nothing, [0]))
        answered, cpu = time.perf_counter(), cpu_seconds() - cpu
    return {
        "cpu_s": cpu,
        "start_s": there - began,
        "first_answer_s": answered - there,
        "end_s": time.perf_counter() - answered,
    }


def measure_train(store: Path, batch: int, steps: int, repeats: int, scratch: Path) -> dict[str, Any]:
    """Seconds a step in this process and in a group of one on Ray, and how long each call takes around its steps."""
    from cluster.train import fit_on_ray
    from pipeline.heads.config import RunConfig
    from pipeline.train import StepDone, fit

    make_source = partial(open_source, store)
    config = RunConfig.of(make_source(), fold=0, steps=steps + 1, batch_size=batch, select_on="none")
    step: dict[str, list[float]] = {"here": [], "ray": []}
    cpu: dict[str, list[float]] = {"here": [], "ray": []}
    around: dict[str, list[float]] = {"here": [], "ray": []}

    def run(way: str, number: int) -> None:
        events: list[StepDone] = []
        spent: dict[int, float] = {}

        def note(event: Any) -> None:
            events.append(event)
            spent[event.step] = cpu_seconds()

        folder, began = scratch / f"{way}{number}", time.perf_counter()
        if way == "here":
            fit(config, make_source(), folder, on_event=note)
        else:
            fit_on_ray(config, make_source, folder, workers=1, on_event=note)
        seconds = [event.seconds for event in events]
        # Of the last step the driver may hear when the worker, whose seconds are counted, has gone.
        cpu[way].append((spent[steps] - spent[1]) / (steps - 1))
        around[way].append(time.perf_counter() - began - sum(seconds))
        step[way] += seconds[1:]  # nothing is read ahead of the first

    for number in range(repeats):
        for way in ("here", "ray") if number % 2 else ("ray", "here"):
            run(way, number)
    return {
        "step_here_s": timing.summary(step["here"]),
        "step_ray_s": timing.summary(step["ray"]),
        "rate_of_ray": timing.ratio(step["here"], step["ray"]),
        "cpu_step_here_s": timing.summary(cpu["here"]),
        "cpu_step_ray_s": timing.summary(cpu["ray"]),
        "around_here_s": timing.summary(around["here"]),
        "around_ray_s": timing.summary(around["ray"]),
    }


def measure_evaluate(store: Path, episodes: int, repeats: int) -> dict[str, Any]:
    """Seconds an evaluation takes in this process and on one worker of a Ray that is there."""
    from cluster.runner import RayRunner
    from pipeline.episodes.protocols import resolve
    from pipeline.evaluate.plan import plan_evaluation
    from pipeline.evaluate.stage import evaluate

    def run(runner: RayRunner | None) -> None:
        rules = resolve(shots=(1,), episodes=episodes)
        evaluate(plan_evaluation(partial(open_source, store), rules, head="untrained", fold=0), runner=runner)

    cpu: dict[str, list[float]] = {"here": [], "ray": []}

    def counted(way: str, runner: RayRunner | None) -> None:
        before = cpu_seconds()
        run(runner)
        cpu[way].append(cpu_seconds() - before)

    taken = timing.alternate(
        {"here": lambda: counted("here", None), "ray": lambda: counted("ray", RayRunner(1))}, repeats
    )
    here, ray = taken["here"].wall, taken["ray"].wall
    return {
        "here_s": timing.summary(here),
        "ray_s": timing.summary(ray),
        "rate_of_ray": timing.ratio(here, ray),
        "cpu_here_s": timing.summary(cpu["here"][1:]),  # the first was to warm up
        "cpu_ray_s": timing.summary(cpu["ray"][1:]),
    }


def measure_save(store: Path, saves: int, scratch: Path) -> dict[str, Any]:
    """Seconds to save a run (weights, their average, Adam's moments, the last checkpoint), and its bytes."""
    from pipeline.heads.config import RunConfig
    from pipeline.heads.run_dir import RunDir
    from pipeline.heads.training import training_choices
    from pipeline.train import fit

    taken: list[float] = []
    before = RunDir.save

    def timed(self: RunDir, *words: Any, **more: Any) -> None:
        began = time.perf_counter()
        before(self, *words, **more)
        taken.append(time.perf_counter() - began)

    source = open_source(store)
    config = RunConfig.of(source, fold=0, steps=1, batch_size=1, select_on="none", **training_choices("stable"))
    RunDir.save = timed  # type: ignore[method-assign]
    try:
        for number in range(saves):
            fit(config, source, scratch / f"save{number}")
    finally:
        RunDir.save = before  # type: ignore[method-assign]
    files = list((scratch / "save0").glob("*.safetensors"))
    return {"save_s": timing.summary(taken), "bytes": sum(file.stat().st_size for file in files)}


_ticks: dict[int, int] = {}


def cpu_seconds() -> float:
    """Of this process and of all below it; of one that has ended, up to the last time that this was asked."""
    for pid in below(os.getpid()):
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            _ticks[pid] = int(fields[11]) + int(fields[12])
    return time.process_time() + sum(_ticks.values()) / os.sysconf("SC_CLK_TCK")


class Memory:
    """Looks at the processes below this one, on a thread; what each kind held at most, bytes."""

    def __init__(self) -> None:
        self.most: dict[str, int] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(SECOND):
            kinds: dict[str, list[int]] = {}
            for pid, name in below(os.getpid()).items():
                kinds.setdefault(kind_of(name), []).append(share_of_memory(pid))
            for kind, held in kinds.items():
                many = sum(held) if kind == "Ray itself" else max(held)
                self.most[kind] = max(self.most.get(kind, 0), many)


def kind_of(name: str) -> str:
    """What a process below this one is: by the title Ray gives it.

    >>> kind_of("ray::RayTrainWorker.execute"), kind_of("ray::IDLE"), kind_of("/x/raylet --node")
    ('rank', 'idle worker', 'Ray itself')
    """
    if name.startswith(TRAINS):
        return "rank"
    if name.startswith(MAPS):
        return "worker"
    return "idle worker" if name.startswith("ray::IDLE") else "Ray itself"


def share_of_memory(pid: int) -> int:
    """A process's share of resident pages, bytes; 0 if it is gone."""
    try:
        found = re.search(r"^Pss:\s*(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


@contextmanager
def made_store(given: Path | None, scratch: Path) -> Iterator[Path]:
    """The store to work on: the one given, or one of generated photos with random weights."""
    if given is None:
        given = scratch / "s.zarr"
        words = ["extract", "shapes", "--data-option", "size=112", "--data-option", "trn_per_class=8"]
        words += ["--backbone", "squeezenet1_1", "--weights", "random", "--image-size", "112", "--store", str(given)]
        subprocess.run([sys.executable, "cli.py", *words, "-q"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    yield given.absolute()


def main() -> None:
    """Print every figure: median and quartiles."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--store", type=Path)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=15, help="of each training run")
    parser.add_argument("--episodes", type=int, default=150, help="of each evaluation")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also as JSON")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_worker_niceness", "0")  # read when Ray is imported
    from cluster.session import session

    told: dict[str, Any] = {"machine": timing.machine(), "versions": timing.versions("torch", "ray")}

    def tell(name: str, value: Any) -> None:
        told[name] = value
        print(f"{name:<12} {json.dumps(value, default=float)}", flush=True)

    with tempfile.TemporaryDirectory() as folder, made_store(options.store, Path(folder)) as store:
        scratch = Path(folder)
        starts = [measure_start() for _ in range(options.repeats)]
        tell("start", {name: timing.summary([one[name] for one in starts]) for name in starts[0]})
        tell("save", measure_save(store, 2 * options.repeats, scratch))
        with session("local", num_cpus=1, num_gpus=0), Memory() as memory:
            tell("evaluate", measure_evaluate(store, options.episodes, options.repeats))
            tell("train", measure_train(store, options.batch, options.steps, options.repeats, scratch))
        tell("memory", {**memory.most, "this process": timing.memory()[1]})
    if options.out:
        options.out.write_text(json.dumps(told, indent=1, default=float) + "\n")


if __name__ == "__main__":
    main()
