"""Kill what can be lost while a command works on a cluster of two nodes, and see that the documents keep their word.

    python -m benchmarks.faults --stage train --count 20

Each injection starts the command anew, waits for a random moment of it, and sends SIGKILL. Then the command either goes
on by itself, or ends with a clear error; in that case the same command is given again. In the end its result must be
that of an undisturbed run. Prints a table; docs/reliability.md says what it came to. Linux only, needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.two_nodes import ROOT, Nodes, driver

LIMIT_S = 300.0
"""A command that takes longer hangs."""

DATA = ("shapes", "--data-option", "size=64", "--data-option", "trn_per_class=8", "--data-option", "val_per_class=6")
BACKBONE = ("--backbone", "squeezenet1_1", "--image-size", "64", "--shard-images", "2")
FAULTS = {
    "extract": ("worker", "node", "driver", "head"),
    "train": ("rank", "node", "mailbox", "controller", "driver", "head"),
    "evaluate": ("worker", "node", "driver", "head"),
    "sweep": ("worker", "node", "driver", "head"),
}
"""What is killed: a process that works; a rank; the second node whole; the process of the driver's mailbox; of Ray
Train's controller; the command's own process; the node that the command stands on, which is the cluster's head."""

TITLES = {"worker": "_run", "rank": "RayTrainWorker", "mailbox": "Mailbox", "controller": "TrainController"}
"""What Ray calls such a process."""


@dataclass
class Injection:
    """What one fault came to."""

    stage: str
    fault: str
    moment: float
    """Seconds after the command's start."""
    alone: bool
    """The command ended well by itself."""
    again: bool
    """It ended with a clear error, and the same command then ended well."""
    equal: bool
    lost: float
    """Seconds more than undisturbed, over all commands it took."""
    silent: float
    """The longest time after the fault without a line of the command."""
    trouble: str = ""


@dataclass
class Ran:
    """One command."""

    code: int
    printed: str
    said: str
    seconds: float
    silent: float


class Stage:
    """A command with its inputs, and how results are compared."""

    def __init__(self, name: str, inputs: Path) -> None:
        self.name, self.inputs = name, inputs

    def words(self, out: Path) -> list[str]:
        store, run = str(self.inputs / "s.zarr"), str(self.inputs / "run")
        if self.name == "extract":
            return ["extract", *DATA, *BACKBONE, "--store", str(out / "s.zarr")]
        if self.name == "train":
            words = ["train", "--store", store, "--fold", "0", "--steps", "16", "--batch-size", "2"]
            words += ["--validate-every", "4", "--validate-episodes", "2"]
            return [*words, "--run-dir", str(out / "run"), "--workers", "2"]
        if self.name == "evaluate":
            words = ["evaluate", "--checkpoint", run, "--store", store, "--shots", "1,5", "--episodes", "400"]
            return [*words, "--out", str(out / "rows.parquet")]
        words = ["sweep", "--store", store, "--folds", "0,1", "--vary", "seed=0,1", "--steps", "6"]
        words += ["--fix", "batch_size=2", "--fix", "validate_every=2", "--fix", "validate_episodes=2"]
        return [*words, "--episodes", "20", "--out", str(out / "out")]

    def result(self, out: Path, printed: str) -> Any:
        """What must be the same whatever was killed."""
        if self.name == "extract":
            import hashlib

            files = (file for file in (out / "s.zarr").rglob("*") if file.is_file())
            return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}
        if self.name == "train":
            lines = map(json.loads, (out / "run" / "metrics.jsonl").read_text().splitlines())
            return {line["step"]: line["train"]["loss"] for line in lines if "train" in line}
        if self.name == "evaluate":
            import pyarrow.parquet as pq

            rows = pq.read_table(out / "rows.parquet")
            return rows.drop_columns(["seconds"]).to_pylist()
        told = json.loads(printed)["configurations"]
        return [(one["name"], one["scores"][0]["miou"], one["scores"][0]["fb_iou"]) for one in told]

    def same(self, one: Any, other: Any) -> bool:
        """Equal; a run whose group was smaller for a while sums in another order."""
        if self.name != "train":
            return bool(one == other)
        return one.keys() == other.keys() and max(abs(one[step] - other[step]) for step in one) < 5e-3

    def left(self, out: Path) -> list[str]:
        """Files of a killed command that the next one should have cleared."""
        found = [*out.rglob("*.partial"), *out.rglob(".*.ray-*"), *out.rglob("_owner.json")]
        return [str(path.relative_to(out)) for path in found]


def start(nodes: Nodes, words: list[str]) -> tuple[subprocess.Popen[str], list[tuple[float, str]], list[str]]:
    """The command, with the lines it says (and when) and prints filled in by threads."""
    process = driver(nodes, *words, "--device", "cpu", "--json")
    said: list[tuple[float, str]] = []
    printed: list[str] = []

    def read(stream: Any, keep: Any) -> None:
        with stream:
            for line in stream:
                keep(line)

    for stream, keep in (
        (process.stderr, lambda line: said.append((time.monotonic(), line))),
        (process.stdout, printed.append),
    ):
        threading.Thread(target=read, args=(stream, keep), daemon=True).start()
    return process, said, printed


def finish(process: subprocess.Popen[str], said: list, printed: list, began: float, since: float) -> Ran:
    """Wait for a command's end; 124 if it hangs."""
    try:
        code = process.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        code = 124
    except BaseException:
        process.kill()
        raise
    ended = time.monotonic()
    time.sleep(0.3)
    moments = [since, *(moment for moment, _ in said if moment > since), ended]
    silent = max(after - before for before, after in itertools.pairwise(moments))
    return Ran(code, "".join(printed), "".join(line for _, line in said), ended - began, silent)


def strike(nodes: Nodes, fault: str, process: subprocess.Popen[str], chance: random.Random) -> bool:
    """Kill it; False if there is no such process now."""
    if fault in ("node", "head"):
        nodes.kill(1 if fault == "node" else 0)
        return True
    if fault == "driver":
        process.kill()
        return True
    title = TITLES[fault]
    pids = [pid for number in range(2) for pid, name in nodes.workers(number).items() if title in name]
    if not pids:
        return False
    with contextlib.suppress(ProcessLookupError):
        os.kill(chance.choice(sorted(pids)), signal.SIGKILL)
    return True


class Clusters:
    """Two nodes that are whole at the beginning of every injection."""

    def __init__(self) -> None:
        self.nodes: Nodes | None = None

    def whole(self) -> Nodes:
        if self.nodes is None:
            self.nodes = Nodes()
        return self.nodes

    def spoilt(self) -> None:
        if self.nodes is not None:
            self.nodes.close()
        self.nodes = None


def inject(
    stage: Stage, fault: str, clusters: Clusters, expected: Any, usual: float, chance: random.Random
) -> Injection:
    """One fault at a random moment of one command."""
    moment = chance.uniform(0.1, 0.95) * usual
    with folder() as out:
        nodes = clusters.whole()
        began = time.monotonic()
        process, said, printed = start(nodes, stage.words(out))
        time.sleep(moment)
        while process.poll() is None and not strike(nodes, fault, process, chance):
            time.sleep(0.05)
        since = time.monotonic()
        struck = process.poll() is None or fault == "driver"
        first = finish(process, said, printed, began, since)
        if fault in ("node", "head"):
            clusters.spoilt()
        seconds, last = first.seconds, first
        trouble = [] if struck else ["the command had ended before"]
        if "Traceback" in first.said:
            trouble.append("a traceback")
        if first.code == 124:
            trouble.append("hung")
        if first.code != 0:
            clear = fault == "driver" or "Error: " in first.said
            if not clear:
                trouble.append(f"ended with {first.code} and no message: {first.said.strip()[-200:]!r}")
            began = time.monotonic()
            last = finish(*start(clusters.whole(), stage.words(out)), began, began)
            seconds += last.seconds
            if last.code != 0:
                trouble.append(f"the same command ended with {last.code}: {last.said.strip()[-300:]!r}")
        equal = last.code == 0 and stage.same(stage.result(out, last.printed), expected)
        if last.code == 0 and (left := stage.left(out)):
            trouble.append(f"left behind: {', '.join(left[:3])}")
        return Injection(
            stage.name,
            fault,
            round(since - began if first.code == 0 else moment, 1),
            alone=first.code == 0,
            again=first.code != 0 and last.code == 0,
            equal=equal,
            lost=round(seconds - usual, 1),
            silent=round(first.silent, 1),
            trouble="; ".join(trouble),
        )


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder."""
    path = Path(tempfile.mkdtemp(prefix="hsnet-faults-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def prepare(inputs: Path) -> None:
    """The store and the run that the stages begin with, made in one process."""
    run = [sys.executable, "cli.py"]
    store = str(inputs / "s.zarr")
    train = ["train", "--store", store, "--steps", "4", "--batch-size", "2", "--validate-episodes", "2"]
    for words in (
        ["extract", *DATA, *BACKBONE, "--store", store],
        [*train, "--run-dir", str(inputs / "run")],
    ):
        subprocess.run([*run, *words, "-q"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def table(done: list[Injection]) -> str:
    """One line per stage and fault, in Markdown."""
    lines = [
        "| Stage | Killed | Injections | Went on alone | By the same command | Seconds more, median (most) | "
        "Longest silence, s | Equal | Trouble |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, fault in dict.fromkeys((one.stage, one.fault) for one in done):
        these = [one for one in done if (one.stage, one.fault) == (stage, fault)]
        lost = sorted(one.lost for one in these)
        lines.append(
            f"| {stage} | {fault} | {len(these)} | {sum(one.alone for one in these)} | "
            f"{sum(one.again for one in these)} | {lost[len(lost) // 2]:.0f} ({lost[-1]:.0f}) | "
            f"{max(one.silent for one in these):.0f} | {sum(one.equal for one in these)} of {len(these)} | "
            f"{sum(bool(one.trouble) for one in these)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--stage", choices=[*FAULTS, "all"], default="all")
    parser.add_argument("--fault", help="only this one")
    parser.add_argument("--count", type=int, default=20, help="injections per stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append every injection as a line of JSON")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    done: list[Injection] = []
    clusters = Clusters()
    with folder() as inputs:
        prepare(inputs)
        try:
            for name in FAULTS if options.stage == "all" else [options.stage]:
                stage = Stage(name, inputs)
                with folder() as out:
                    began = time.monotonic()
                    usual = finish(*start(clusters.whole(), stage.words(out)), began, began)
                    assert usual.code == 0, usual.said
                    expected = stage.result(out, usual.printed)
                print(f"{name}: {usual.seconds:.1f} s undisturbed", flush=True)
                faults = [options.fault] if options.fault else FAULTS[name]
                for number in range(options.count):
                    fault = faults[number % len(faults)]
                    one = inject(stage, fault, clusters, expected, usual.seconds, chance)
                    done.append(one)
                    print(json.dumps(asdict(one)), flush=True)
                    if options.out:
                        with options.out.open("a") as file:
                            file.write(json.dumps(asdict(one)) + "\n")
        finally:
            clusters.spoilt()
    print(table(done))
    if any(not one.equal or one.trouble for one in done):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
