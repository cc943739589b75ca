"""Measure everything that training and evaluation do on a GPU, beside the published way, in one run.

    python benchmarks/gpu/run.py --hour
    python benchmarks/gpu/run.py --parts learner,copies --backbones resnet50,vgg16
    python benchmarks/gpu/run.py --device cpu --size 64 --quick

Needs torch (2.9 or newer) and torchvision, and a checkout; nothing has to be installed. Only the parts `product`
(extraction, training and evaluation from stores on disk) and a row of `files` need the project's packages, and are left
out without.

    learner    training steps and evaluation from device memory, the published way and ours, with memory
    profile    blocks and kernels of a step, gaps between them
    conv       the learner's layers as 3D convolutions and as rows
    sparse     leaving out positions outside the object, against computing all
    agreement  CPU against device against float64: logits, masks, gradients, features
    repeat     the same training twice: equal to the bit?
    copies     host to device, pageable and pinned
    files      reading a store's files
    codec      the budgeted codec on the device
    prefetch   training fed from a file: in line, ahead, through pinned memory
    product    extraction, training, evaluation and resuming, as `hsnet` does them

The published way runs from photos in device memory, in float32 without TF32 (the GPUs of its day had none); the same
with TF32, under bfloat16 autocast and compiled is timed beside it. Ours runs from int8 features of all pictures in
device memory: picking an episode's rows is part of its time. Every time ends with a wait for the device. A way that
fails, for lack of memory or otherwise, is a row that says why.

--hour runs every part in a process of its own, each with its share of 55 minutes; one that passes it is ended, and what
it had measured stays. Results are written after every measurement: one JSON file, and a table of it in Markdown.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch

from benchmarks import timing
from benchmarks.gpu import table
from benchmarks.gpu.agreement import agreement, repeat
from benchmarks.gpu.blocks import conv, profile
from benchmarks.gpu.data import codec, copies, files, prefetch
from benchmarks.gpu.facts import gpu_facts
from benchmarks.gpu.learner import learner, sparse
from benchmarks.gpu.measuring import Bench, release, why
from benchmarks.gpu.product import product
from benchmarks.gpu.ways import LABELS
from benchmarks.inputs import OBJECT_SHARE
from hsnet.numerics import facts as numerics_facts
from hsnet.numerics import set_numerics

PARTS: dict[str, Callable[[Bench], Iterator[dict[str, Any]]]] = {
    "learner": learner,
    "profile": profile,
    "conv": conv,
    "sparse": sparse,
    "agreement": agreement,
    "repeat": repeat,
    "copies": copies,
    "files": files,
    "codec": codec,
    "prefetch": prefetch,
    "product": product,
}


@dataclass(frozen=True)
class Step:
    """A part of the hour, in a process of its own."""

    part: str
    seconds: int
    """It is ended after them."""
    arguments: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join((self.part, *self.arguments))


HOUR = (
    Step("learner", 540, ("--train-batch", "20,4", "--seconds", "10", "--graphs")),
    Step("learner", 240, ("--train-batch", "20,4", "--seconds", "5", "--cudnn-benchmark")),
    Step("product", 840),
    Step("profile", 150),
    Step("conv", 300, ("--seconds", "10")),
    Step("copies", 60),
    Step("codec", 120),
    Step("prefetch", 150),
    Step("repeat", 120),
    Step("agreement", 120),
    Step("files", 90),
    Step("sparse", 120, ("--seconds", "15")),
    Step("learner", 360, ("--work", "train,eval1", "--ways", "baseline,baseline-compiled,compiled", "--compile")),
)
"""The most valuable first: who has less than an hour has most of it."""
LONGEST = 55 * 60


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def words(text: str) -> list[str]:
    return text.split(",")


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda")
    made.add_argument("--parts", type=words, help=f"of: {', '.join(PARTS)}; or all. [default: learner]")
    made.add_argument("--hour", action="store_true", help="all parts, each in its share of 55 minutes")
    made.add_argument("--backbones", type=words, default=["resnet50", "resnet101", "vgg16"], help="commas between them")
    made.add_argument("--work", type=words, default=["train", "eval1", "eval5"], help="of the learner, commas between")
    made.add_argument("--ways", type=words, help=f"of the learner: {', '.join(LABELS)}; all if left out")
    made.add_argument("--train-batch", type=numbers, default=[20], help="commas between several")
    made.add_argument("--eval-batch", type=int, default=32)
    made.add_argument("--shots-batch", type=int, default=8, help="episodes of the 5-shot evaluation")
    made.add_argument("--size", type=int, default=400, help="side of the pictures, pixels")
    made.add_argument("--object-share", type=float, default=OBJECT_SHARE, help="share of a picture its object covers")
    made.add_argument("--repeats", type=int, default=20)
    made.add_argument("--warmup", type=int, default=3)
    made.add_argument("--seconds", type=float, help="end a timing after so many, but not before three repeats")
    made.add_argument("--steps", type=int, default=20, help="training steps of `prefetch`, `product` and `repeat`")
    made.add_argument("--images", type=int, default=1000, help="photos of `product`; of `files` at most 64")
    made.add_argument("--episodes", type=int, default=1000, help="of an evaluation of `product`")
    made.add_argument("--codec-bytes", type=int, default=2_000_000, help="budget of a photo's features")
    made.add_argument("--peak-tflops", type=float, help="of the device in bfloat16; a small table if left out")
    made.add_argument("--no-extra-baselines", action="store_true", help="leave out all baselines but float32")
    made.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN try its kernels out")
    made.add_argument("--compile", action="store_true", help="torch.compile, ours and the published way: minutes")
    made.add_argument("--graphs", action="store_true", help="our evaluation as a CUDA graph")
    made.add_argument("--quick", action="store_true", help="small batches, two repeats: does it run at all?")
    made.add_argument("--scratch", type=Path, help="folder for files; the system's temporary one if left out")
    made.add_argument("--out", type=Path, help="JSON file to add to; benchmarks/results/DATE-GPU.json if left out")
    made.add_argument("--date", help=argparse.SUPPRESS)  # of the run that a process of --hour adds to
    return made


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, checked. Raises SystemExit."""
    options = parser().parse_args(arguments)
    options.codec_images, options.codec_positions, options.codec_channels = 16, 4096, None
    options.parts = options.parts or (["all"] if options.hour else ["learner"])
    if options.parts == ["all"]:
        options.parts = list(PARTS)
    for given, known, what in ((options.parts, PARTS, "part"), (options.ways or [], LABELS, "way")):
        if unknown := [name for name in given if name not in known]:
            sys.exit(f"Unknown {what}: {', '.join(unknown)}. Choose of: {', '.join(known)}. Nothing was run.")
    if options.quick:
        options.train_batch, options.eval_batch, options.shots_batch = [2], 2, 1
        options.repeats, options.warmup, options.steps, options.images, options.episodes = 2, 1, 2, 16, 2
        options.codec_images, options.codec_positions, options.codec_channels = 4, 64, 32
        options.codec_bytes = 20_000
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("No CUDA device here. Try out the script with --device cpu --size 96 --quick; its times mean nothing.")
    return options


class Results:
    """One run's results: the JSON file after every measurement, and the table beside it."""

    def __init__(self, run: dict[str, Any], path: Path | None) -> None:
        self.run, self.path = run, path

    def add(self, measured: dict[str, Any]) -> None:
        print_measurement(measured)
        if self.path is not None:
            timing.record(self.run, measured, self.path)
            self.write_table()

    def write_table(self) -> None:
        if self.path is not None and self.path.exists():
            table.write(table.stored(self.path, self.run["date"]), self.path.with_suffix(".md"))

    def say(self, part: str, said: str) -> None:
        """That something of a part is not there, and why."""
        nothing = {"device": "", "work": part, "backbone": "", "image_size": 0, "title": part}
        self.add({**nothing, "rows": {part: {"failed": said}}})


def print_measurement(measured: dict[str, Any]) -> None:
    """A few lines for a person."""
    print(f"\n{measured['backbone']} {measured['title']}, {measured['image_size']} px, {measured['device']}".strip())
    for label, *cells in table._cells(measured):
        print(f"  {label:<52} " + "  ".join(cell for cell in cells if cell), flush=True)


def run_here(options: argparse.Namespace, results: Results) -> None:
    """The parts, one after the other, in this process. One that fails is said, and others go on."""
    set_numerics(options.cudnn_benchmark)
    for part in options.parts:
        for backbone in options.backbones if part == "learner" else options.backbones[:1]:
            bench = Bench(options, torch.device(options.device), backbone)
            said = None
            try:
                for measured in PARTS[part](bench):
                    results.add(measured)
            except Exception as error:  # what is measured stays, and other parts go on
                said = why(error)
            if said is not None:
                results.say(part, said)
            release()


def run_hour(
    steps: Sequence[Step],
    results: Results,
    arguments: Sequence[str],
    longest: float = LONGEST,
    scratch: Path | None = None,
) -> None:
    """Every step in a process of its own, ended when its time is over. Its results are in the file by then."""
    began = time.monotonic()
    for step in steps:
        left = min(step.seconds, longest - (time.monotonic() - began))
        if left < 1:
            results.say(step.name, "left out: the hour is over")
            continue
        print(f"\n== {step.name}: at most {left:.0f} s", flush=True)
        with tempfile.TemporaryDirectory(prefix="gpu-bench-", dir=scratch) as folder:  # what is ended removes nothing
            chosen = ["--parts", step.part, *step.arguments, "--scratch", folder]
            code = run_child([sys.executable, str(Path(__file__).resolve()), *arguments, *chosen], left)
        if code is None:
            results.say(step.name, f"cut: not done after {left:.0f} s; what it had measured is kept")
        elif code != 0:
            results.say(step.name, f"its process ended with {code}; what it had measured is kept")


def run_child(command: Sequence[str], seconds: float) -> int | None:
    """Exit status of a command, or None if it was ended because its time was over. It never outlives this function."""
    with subprocess.Popen(command, start_new_session=True) as child:  # with all that it starts, such as compilers
        try:
            return child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM inside the block raises SystemExit, as SIGINT raises KeyboardInterrupt: what is done gets written."""

    def end(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What a result file says about this run."""
    device = torch.device(options.device)
    run = timing.describe_run(device.type, vars(options))
    run["machine"] |= gpu_facts(device)
    set_numerics(options.cudnn_benchmark)
    run["switches"] = {"cudnn.benchmark": options.cudnn_benchmark, **numerics_facts()}
    return run


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(given)
    device = torch.device(options.device)
    if device.type == "cpu":
        print("On a CPU this only shows that the script runs; its times say nothing about a GPU.")
    run = describe(options)
    if options.date:
        run["date"] = options.date
    else:
        print(f"torch {run['versions']['torch']} on {run['machine'].get('gpu', run['machine']['cpu'])}, {run['date']}")
    out = options.out or (timing.result_path(device.type) if device.type != "cpu" else None)
    results = Results(run, out)
    if not options.hour:
        run_here(options, results)
        return
    if out is None:
        sys.exit("--hour on a CPU only tries the script out: say where results go with --out. Nothing was run.")
    shown = [argument for argument in given if argument != "--hour"]
    if not any(argument.startswith("--backbones") for argument in given):
        shown += ["--backbones", "resnet50"]
    steps = [step for step in HOUR if step.part in options.parts]
    with ended_by_signals():
        try:
            handed = [*shown, "--out", str(out.absolute()), "--date", run["date"]]
            run_hour(steps, results, handed, scratch=options.scratch)
        except (KeyboardInterrupt, SystemExit):
            results.say("interrupted", "the run was ended before its last part; what it had measured is kept")
            raise
    print(f"\n{out} and {out.with_suffix('.md')}")


if __name__ == "__main__":
    main()
