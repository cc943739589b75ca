"""Kill what can be lost while a command works on a cluster of two nodes, and see that the documents keep their word.

    python -m benchmarks.faults --stage train --count 20

First the command runs undisturbed, and it is seen from when to when its processes work. Then for each fault it starts
anew, and SIGKILL is sent at random moments of that span: to a node, the head or the command's own process once, to
single processes up to `--kills` times. Then the command either goes on by itself, or ends with a clear error; in that
case the same command is given again. In the end its result must be that of the undisturbed run.

    python -m benchmarks.faults --table done.jsonl

prints the table of injections that `--out` kept; docs/reliability.md has it. Linux only, needs no GPU.
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

LIMIT_S = 600.0
"""A command that takes longer hangs."""

PATIENCE_S = 60.0
"""How long a command may say nothing."""

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
    moments: list[float]
    """Seconds after the command's start, of every kill."""
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
            return [*words, "--run-dir", str(out / "run"), "--workers", "1:2"]
        if self.name == "evaluate":
            words = ["evaluate", "--checkpoint", run, "--store", store, "--shots", "1,5", "--episodes", "600"]
            return [*words, "--out", str(out / "rows.parquet")]
        words = ["sweep", "--store", store, "--folds", "0,1", "--vary", "seed=0,1,2", "--steps", "10"]
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


WORKING = (TITLES["worker"], TITLES["rank"])


def processes_of(nodes: Nodes) -> dict[int, str]:
    """Workers of all nodes, with their titles; a node that was lost has none."""
    return {pid: name for number in range(len(nodes.ids)) for pid, name in nodes.workers(number).items()}


def at_work(nodes: Nodes) -> bool:
    """Whether a process computes on one of the nodes."""
    return any(title in name for name in processes_of(nodes).values() for title in WORKING)


def undisturbed(nodes: Nodes, words: list[str]) -> tuple[Ran, float]:
    """A command that nothing happens to, and the seconds after its start when its processes began to work."""
    began = time.monotonic()
    process, said, printed = start(nodes, words)
    while process.poll() is None and not at_work(nodes):
        time.sleep(0.5)
    first = time.monotonic() - began
    return finish(process, said, printed, began, began), first


def strike(nodes: Nodes, fault: str, process: subprocess.Popen[str], chance: random.Random) -> bool:
    """Kill it; False if there is no such process now."""
    if fault in ("node", "head"):
        nodes.kill(len(nodes.ids) - 1 if fault == "node" else 0)
        return True
    if fault == "driver":
        process.kill()
        return True
    title = TITLES[fault]
    pids = [pid for pid, name in processes_of(nodes).items() if title in name]
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
    stage: Stage,
    fault: str,
    clusters: Clusters,
    expected: Any,
    usual: float,
    first: float,
    chance: random.Random,
    kills: int,
) -> Injection:
    """One fault, or several of a kind that a command can bear, at random moments of one command's work.

    Args:
        usual, first: seconds of an undisturbed command, and after which its processes begin to work.
        kills: how many at most.
    """
    kills = kills if fault in TITLES else 1
    waits = sorted(chance.uniform(0, 0.9 * (usual - first)) for _ in range(kills))
    with folder() as out:
        nodes = clusters.whole()
        began = started = time.monotonic()
        process, said, printed = start(nodes, stage.words(out))
        while process.poll() is None and not at_work(nodes):
            time.sleep(0.5)
        working, moments = time.monotonic(), []
        for wait in waits:
            while process.poll() is None and time.monotonic() - working < wait:
                time.sleep(0.05)
            while process.poll() is None:
                if strike(nodes, fault, process, chance):
                    moments.append(time.monotonic())
                    break
                time.sleep(0.05)
        since = moments[0] if moments else time.monotonic()
        ran = finish(process, said, printed, began, since)
        if moments and fault == "head":
            clusters.spoilt()
        elif moments and fault == "node":
            nodes.add(2)
        seconds, last = ran.seconds, ran
        trouble = []
        if "Traceback" in ran.said:
            trouble.append(f"a traceback: {ran.said[ran.said.index('Traceback') :][-600:]!r}")
        if ran.code == 124:
            trouble.append("hung")
        if ran.silent > PATIENCE_S:
            trouble.append(f"silent for {ran.silent:.0f} s")
        if ran.code != 0:
            clear = fault == "driver" or "Error: " in ran.said
            if not clear:
                trouble.append(f"ended with {ran.code} and no message: {ran.said.strip()[-200:]!r}")
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
            [round(moment - started, 1) for moment in moments],
            alone=ran.code == 0,
            again=ran.code != 0 and last.code == 0,
            equal=equal,
            lost=round(seconds - usual, 1),
            silent=round(ran.silent, 1),
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
    """One line per stage and fault, in Markdown. Commands that ended before anything was killed are not counted."""
    lines = [
        "| Stage | Killed | Kills | In commands | Went on alone | By the same command | Equal | "
        "Seconds more, median (most) | Longest silence, s | Trouble |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    done = [one for one in done if one.moments]
    for stage, fault in itertools.product(FAULTS, (*TITLES, "node", "driver", "head")):
        these = [one for one in done if (one.stage, one.fault) == (stage, fault)]
        if not these:
            continue
        lost = sorted(one.lost for one in these)
        lines.append(
            f"| {stage} | {fault} | {sum(len(one.moments) for one in these)} | {len(these)} | "
            f"{sum(one.alone for one in these)} | {sum(one.again for one in these)} | "
            f"{sum(one.equal for one in these)} of {len(these)} | "
            f"{lost[len(lost) // 2]:.0f} ({lost[-1]:.0f}) | {max(one.silent for one in these):.0f} | "
            f"{sum(bool(one.trouble) for one in these)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--stage", choices=[*FAULTS, "all"], default="all")
    parser.add_argument("--fault", help="only these, separated by commas")
    parser.add_argument("--count", type=int, default=20, help="commands per stage")
    parser.add_argument("--kills", type=int, default=3, help="of single processes, in one command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="append every command's injections as a line of JSON")
    parser.add_argument("--table", type=Path, help="print the table of such a file, and do nothing else")
    options = parser.parse_args()
    if options.table:
        print(table([Injection(**json.loads(line)) for line in options.table.read_text().splitlines()]))
        return
    chance = random.Random(options.seed)
    done: list[Injection] = []
    clusters = Clusters()
    with folder() as inputs:
        prepare(inputs)
        try:
            for name in FAULTS if options.stage == "all" else [options.stage]:
                stage = Stage(name, inputs)
                with folder() as out:
                    usual, first = undisturbed(clusters.whole(), stage.words(out))
                    assert usual.code == 0, usual.said
                    expected = stage.result(out, usual.printed)
                print(
                    f"{name}: {usual.seconds:.1f} s undisturbed, {usual.seconds - first:.1f} s of it work", flush=True
                )
                faults = options.fault.split(",") if options.fault else FAULTS[name]
                for number in range(options.count):
                    fault = faults[number % len(faults)]
                    one = inject(stage, fault, clusters, expected, usual.seconds, first, chance, options.kills)
                    done.append(one)
                    print(json.dumps(asdict(one)), flush=True)
                    if options.out:
                        with options.out.open("a") as file:
                            file.write(json.dumps(asdict(one)) + "\n")
        finally:
            clusters.spoilt()
    print(table(done))
    if any(one.moments and (not one.equal or one.trouble) for one in done):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
