"""Timing several ways of doing one thing: alternating in one process on the same inputs, and what to say about it.

Needs torch only.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = 1
LEAST_REPEATS = 3
"""Repeats before a time budget may end a measurement."""


@dataclass(frozen=True)
class Times:
    """What the repeats of one variant took, seconds, in order."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]
    """Of all threads of the process."""


def alternate(
    runs: Mapping[str, Callable[[], object]],
    repeats: int,
    warmup: int = 1,
    budget: float | None = None,
    synchronise: Callable[[], None] = lambda: None,
) -> dict[str, Times]:
    """Run each of `runs` once per repeat, in turn, and time it.

    Args:
        warmup: rounds before the first that counts.
        budget: stop after this many seconds of counted rounds, but not before three of them.
        synchronise: called before both readings of the clock; waits for a GPU.

    Which run comes first moves on by one each round, so that none always follows the same other.
    """
    names = list(runs)
    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    started = time.perf_counter()
    for number in range(-warmup, repeats):
        if number == 0:
            started = time.perf_counter()
        if budget is not None and number >= LEAST_REPEATS and time.perf_counter() - started > budget:
            break
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            synchronise()
            wall, cpu = time.perf_counter(), time.process_time()
            runs[name]()
            synchronise()
            taken = (time.perf_counter() - wall, time.process_time() - cpu)
            if number >= 0:
                samples[name].append(taken)
    return {name: Times(*zip(*taken, strict=True)) for name, taken in samples.items() if taken}


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles.

    >>> summary([3, 1, 2])
    {'median': 2.0, 'q1': 1.5, 'q3': 2.5}
    """
    if len(values) == 1:
        return {"median": values[0], "q1": values[0], "q3": values[0]}
    q1, middle, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "q1": q1, "q3": q3}


def ratio(baseline: Sequence[float], ours: Sequence[float]) -> dict[str, float]:
    """How many times faster: the ratio of the medians, and the quartiles of the ratios round by round.

    >>> ratio([4, 4, 5], [2, 2, 2])
    {'of_medians': 2.0, 'q1': 2.0, 'q3': 2.25}
    """
    pairs = summary([one / other for one, other in zip(baseline, ours, strict=True)])
    return {
        "of_medians": statistics.median(baseline) / statistics.median(ours),
        "q1": pairs["q1"],
        "q3": pairs["q3"],
    }


def entry(label: str, taken: Times, baseline: Times) -> dict[str, Any]:
    """What a result file says about the times of one variant."""
    return {
        "label": label,
        "wall_s": summary(taken.wall),
        "cpu_s": summary(taken.cpu),
        "ratio": ratio(baseline.wall, taken.wall),
        "cpu_ratio": ratio(baseline.cpu, taken.cpu),
        "wall_each_s": list(taken.wall),
        "cpu_each_s": list(taken.cpu),
    }


def memory() -> tuple[int, int]:
    """Resident memory of this process, bytes: now, and at its largest since `forget_peak`.

    Read from the kernel where that is possible: `ru_maxrss` also remembers the process this one was started from.
    """
    status = Path("/proc/self/status")
    if status.exists():
        kilobytes = dict(re.findall(r"^(VmRSS|VmHWM):\s*(\d+) kB", status.read_text(), re.MULTILINE))
        return int(kilobytes["VmRSS"]) * 1024, int(kilobytes["VmHWM"]) * 1024
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return most, most


def forget_peak() -> None:
    """Let the largest memory start again from what is resident now, where the kernel can do that."""
    gc.collect()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def cpu_model() -> str:
    """What the processor calls itself."""
    with_names = Path("/proc/cpuinfo")
    text = with_names.read_text() if with_names.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def machine(device: str = "cpu") -> dict[str, Any]:
    """Facts of this machine that a time depends on."""
    facts: dict[str, Any] = {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
    }
    if device != "cpu":
        facts["gpu"] = torch.cuda.get_device_name()
        facts["gpu_bytes"] = torch.cuda.get_device_properties(0).total_memory
    return facts


def versions(*modules: str) -> dict[str, str]:
    """Versions of Python and of imported packages."""
    import importlib

    from hsnet.torchvision_ops import ensure_importable

    ensure_importable()
    found = {"python": platform.python_version()}
    found |= {name: str(getattr(importlib.import_module(name), "__version__", "?")) for name in modules}
    return found


def commit() -> str:
    """The commit of this checkout, with "+changes" if files it tracks differ; "unknown" outside git."""
    try:
        git = ["git", "-C", str(ROOT)]
        number = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return number.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def result_path(device: str = "cpu") -> Path:
    """Where results of today on this kind of machine go."""
    facts = machine(device)
    kind = facts["gpu"] if device != "cpu" else f"{facts['cpu']} {facts['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")
    return RESULTS / f"{datetime.date.today().isoformat()}-{slug}.json"


def record(run: dict[str, Any], measurement: dict[str, Any], path: Path) -> None:
    """Add a measurement to a result file: to the run of the same start time, or to a new one."""
    stored: dict[str, Any] = dict(read(path)) if path.exists() else {"schema": SCHEMA, "runs": []}
    for known in stored["runs"]:
        if known["date"] == run["date"]:
            known["measurements"].append(measurement)
            break
    else:
        stored["runs"].append({**run, "measurements": [measurement]})
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")  # a run that is ended while it writes leaves the file before
    partial.write_text(_compact(json.dumps(_rounded(stored), indent=1)) + "\n")
    partial.replace(path)


def describe_run(device: str, arguments: Mapping[str, Any], *modules: str) -> dict[str, Any]:
    """Date, commit, machine and versions: what a result file says about a run."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(device),
        "versions": versions("torch", "torchvision", *modules),
        "arguments": {name: value for name, value in arguments.items() if isinstance(value, str | int | float | list)},
    }


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises SystemExit for another schema."""
    stored = json.loads(path.read_text())
    if stored.get("schema") != SCHEMA:
        raise SystemExit(f"{path} has schema {stored.get('schema')}, this version reads {SCHEMA}.")
    return stored


def newest(paths: Sequence[Path]) -> dict[tuple[str, str, str, int], dict[str, Any]]:
    """(device, backbone, work, image size) -> the newest measurement, with its run's facts under "run"."""
    runs = [run for path in paths for run in read(path)["runs"]]
    found = {}
    for run in sorted(runs, key=lambda run: run["date"]):
        facts = {name: value for name, value in run.items() if name != "measurements"}
        for one in run["measurements"]:
            found[one["device"], one["backbone"], one["work"], one["image_size"]] = {**one, "run": facts}
    return found


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


def _compact(text: str) -> str:
    """Objects and lists without another inside on one line each."""
    return re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
