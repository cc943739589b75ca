"""Time training steps and evaluation on a GPU, the published way and ours, side by side.

    python benchmarks/gpu/run.py
    python benchmarks/gpu/run.py --device cpu --size 96 --quick

Needs torch (2.9 or newer) and torchvision, and a checkout; nothing has to be installed. The published way runs from
photos in device memory, in float32 without TF32 (the GPUs of its day had none); the same with TF32, and under bfloat16
autocast, is timed beside it. Ours runs from int8 features of all pictures in device memory: picking an episode's rows
is part of its time. Every time ends with a wait for the device.

--compile adds our way under torch.compile, --graphs our evaluation as a CUDA graph. A way that fails is left out, and
why is printed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor, nn

from benchmarks import arithmetic, published_way, timing
from benchmarks.inputs import OBJECT_SHARE, disc, normalised, picture
from hsnet.backbone import FrozenBackbone, backbone_spec, random_state_dict
from hsnet.fused import FusedHSNet
from hsnet.fusion import vote
from hsnet.loss import episode_losses
from hsnet.model import HSNet, predict_mask, resize_logits

PICTURES = 16
"""Different pictures in device memory; episodes are drawn from them."""


@dataclass(frozen=True)
class Work:
    title: str
    task: str
    batch: int
    shots: int = 1


def works(train_batch: int, eval_batch: int, shots_batch: int) -> dict[str, Work]:
    """What is timed, by name."""
    return {
        f"train{train_batch}": Work(f"training step, batch {train_batch}", "train", train_batch),
        f"eval1x{eval_batch}": Work(f"1-shot evaluation, batch {eval_batch}", "evaluate", eval_batch),
        f"eval5x{shots_batch}": Work(f"5-shot evaluation, batch {shots_batch}", "evaluate", shots_batch, 5),
    }


@dataclass(frozen=True)
class Scene:
    """Everything in device memory that a way may begin from."""

    backbone: str
    device: torch.device
    photos: Tensor
    """(N, 3, S, S) float32, normalised."""
    masks: Tensor
    """(N, S, S) bool."""
    features: list[Tensor]
    """Levels, finest first, each (N, L, H, W, C) int8."""
    state: dict[str, Tensor]
    """The backbone's weights."""

    @classmethod
    def make(cls, backbone: str, size: int, share: float, device: torch.device) -> Scene:
        photos = normalised(torch.stack([picture(number, size) for number in range(PICTURES)])).to(device)
        masks = torch.stack([disc(number, size, share) for number in range(PICTURES)]).to(device)
        state = random_state_dict(backbone)
        network = FrozenBackbone(backbone, state).to(device)
        parts = [[int8(level) for level in network(photo[None])] for photo in photos]
        return cls(backbone, device, photos, masks, [torch.cat(level) for level in zip(*parts, strict=True)], state)

    def learner(self) -> HSNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return HSNet(tuple(reversed(backbone_spec(self.backbone).layers))).to(self.device)


def int8(level: Tensor) -> Tensor:
    """Each position's vector divided by its largest absolute value, times 127: what a default store holds."""
    largest = level.abs().amax(-1, keepdim=True)
    return (level / torch.where(largest > 0, largest, 1) * 127).round().to(torch.int8)


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TensorFloat-32 inside the block, or forbid it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


class Way(ABC):
    """One way of doing a piece of work; `run` does it once."""

    def __init__(self, scene: Scene, work: Work) -> None:
        self.scene, self.work = scene, work
        self.queries = torch.arange(work.batch, device=scene.device) % PICTURES
        supports = torch.arange(work.batch, work.batch * (1 + work.shots), device=scene.device)
        self.supports = (supports % PICTURES).view(work.batch, work.shots)

    def prepare(self, learner: nn.Module) -> None:
        self.optimiser = torch.optim.Adam(learner.parameters(), lr=1e-3)

    def run(self) -> object:
        return self.step() if self.work.task == "train" else self.predict()

    @abstractmethod
    def logits(self) -> Tensor: ...

    @abstractmethod
    def step(self) -> float: ...

    @abstractmethod
    def predict(self) -> Tensor: ...


class PublishedWay(Way):
    """The published way; `tf32` and `amp` say with what arithmetic."""

    def __init__(self, scene: Scene, work: Work, tf32: bool = False, amp: bool = False) -> None:
        super().__init__(scene, work)
        self.tf32, self.amp = tf32, amp
        self.model = published_way.PublishedHSNet(scene.backbone, scene.state, scene.learner()).to(scene.device)
        self.prepare(self.model)

    def mode(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(tf32(self.tf32))
        stack.enter_context(torch.autocast(self.scene.device.type, torch.bfloat16, enabled=self.amp))
        return stack

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        photos, masks = self.scene.photos, self.scene.masks
        return photos[self.queries], photos[self.supports], masks[self.supports].float()

    @torch.no_grad()
    def logits(self) -> Tensor:
        query, support, mask = self.inputs()
        with self.mode():
            return self.model.coarse_logits(query, support[:, 0], mask[:, 0]).float()

    def step(self) -> float:
        query, support, mask = self.inputs()
        with self.mode():
            logits = self.model(query, support[:, 0], mask[:, 0])
            loss = published_way.loss(logits, self.scene.masks[self.queries])
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
        return float(loss.detach())

    def predict(self) -> Tensor:
        with self.mode():
            return self.model.predict(*self.inputs())


@dataclass(frozen=True)
class Variant:
    """One of our ways."""

    label: str
    fused: dict[str, Any] = field(default_factory=dict)
    """Extra arguments for `FusedHSNet`."""
    compiled: bool = False
    graph: bool = False


class OurWay(Way):
    """Ours, from int8 features in device memory."""

    def __init__(self, scene: Scene, work: Work, variant: Variant) -> None:
        super().__init__(scene, work)
        self.variant = variant
        model = scene.learner()
        self.model = model
        fused: Callable[..., Tensor] = FusedHSNet(model, **variant.fused)
        self.forward = torch.compile(fused) if variant.compiled else fused
        self.prepare(model)
        with tf32(False):
            self.graph = capture(self.prediction) if variant.graph else None

    def episode_logits(self) -> Tensor:
        features, masks = self.scene.features, self.scene.masks
        rows = self.supports.flatten()
        query, support = [level[self.queries] for level in features], [level[rows] for level in features]
        return self.forward(query, support, masks[rows])

    @torch.no_grad()
    def logits(self) -> Tensor:
        with tf32(False):
            return self.episode_logits()[:: self.work.shots]

    def step(self) -> float:
        with tf32(False):
            self.optimiser.zero_grad(set_to_none=True)
            losses = episode_losses(self.episode_logits(), self.scene.masks[self.queries])
            (losses.sum() / len(losses)).backward()
            self.optimiser.step()
        return float(losses.detach().mean())

    @torch.no_grad()
    def prediction(self) -> Tensor:
        size = self.scene.masks.shape[-1]
        hard = predict_mask(resize_logits(self.episode_logits(), (size, size)))
        return vote(hard.view(self.work.batch, self.work.shots, size, size).transpose(0, 1))

    def predict(self) -> Tensor:
        with tf32(False):
            return self.graph() if self.graph else self.prediction()


def capture(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """`run` as a CUDA graph on the tensors it reads now."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def ways(options: argparse.Namespace) -> dict[str, Callable[[Scene, Work], Way]]:
    """Name -> how to build it; "baseline" first."""
    bfloat16 = {"arithmetic": "bfloat16"}
    ours = {
        "exact": Variant("ours, int8 features, float32"),
        "fastest": Variant("ours, int8 features, bfloat16", bfloat16),
    }
    if options.compile:
        ours["compiled"] = Variant("ours, bfloat16, torch.compile", bfloat16, compiled=True)
    if options.graphs:
        ours["graph"] = Variant("ours, bfloat16, CUDA graph", bfloat16, graph=True)
    found: dict[str, Callable[[Scene, Work], Way]] = {"baseline": PublishedWay}
    if not options.no_extra_baselines:
        found["baseline-tf32"] = lambda scene, work: PublishedWay(scene, work, tf32=True)
        found["baseline-bfloat16"] = lambda scene, work: PublishedWay(scene, work, tf32=True, amp=True)
    for name, variant in ours.items():
        found[name] = lambda scene, work, variant=variant: OurWay(scene, work, variant)
    LABELS.update({name: variant.label for name, variant in ours.items()})
    return found


LABELS = {
    "baseline": "published way, float32",
    "baseline-tf32": "published way, TF32",
    "baseline-bfloat16": "published way, bfloat16 autocast",
}


class Timed:
    """A way with a pair of CUDA events around every run: the device's own time beside the wall clock's."""

    def __init__(self, way: Way) -> None:
        self.way, self.events = way, []  # type: ignore[var-annotated]

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


def attempt(name: str, do: Callable[[], Any]) -> Any:
    """The result of `do`, or None with a line that says why not. The two that ratios rest on must work."""
    if name in ("baseline", "exact"):
        return do()
    try:
        return do()
    except Exception as error:  # a compiler or capture that fails is a finding, and other ways go on
        print(f"  left out '{name}': {type(error).__name__}: {str(error).splitlines()[0][:200]}", file=sys.stderr)
        return None


def measure(scene: Scene, key: str, work: Work, options: argparse.Namespace) -> dict[str, Any]:
    """Time one piece of work in every way; a measurement as it is stored."""
    cuda = scene.device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else lambda: None
    built: dict[str, Timed] = {}
    resident: dict[str, int] = {}
    peaks: dict[str, int] = {}
    logits: dict[str, Tensor] = {}
    for name, build in ways(options).items():
        if name == "graph" and work.task == "train":
            continue
        before = torch.cuda.memory_allocated() if cuda else 0
        way = attempt(name, lambda build=build: build(scene, work))
        found = None if way is None else attempt(name, way.logits)
        if found is None:
            continue
        logits[name] = found.cpu()
        if cuda:
            resident[name] = torch.cuda.memory_allocated() - before
            torch.cuda.reset_peak_memory_stats()
            start = torch.cuda.memory_allocated()
        if attempt(name, lambda way=way: (way.run(), True)) is None:
            continue
        if cuda:
            peaks[name] = torch.cuda.max_memory_allocated() - start + resident[name]
        built[name] = Timed(way)
    repeats = options.repeats
    times = timing.alternate({name: way.run for name, way in built.items()}, repeats, options.warmup, None, wait)
    operations = arithmetic.count(scene.backbone, scene.masks.shape[-1], scene.masks)
    per_episode = operations.training if work.task == "train" else operations.evaluation * work.shots
    peak = options.peak_tflops or (arithmetic.peak_tflops(torch.cuda.get_device_name()) if cuda else None)
    measured: dict[str, Any] = {
        "device": scene.device.type,
        "backbone": scene.backbone,
        "work": key,
        "title": work.title,
        "image_size": scene.masks.shape[-1],
        "batch": work.batch,
        "shots": work.shots,
        "object_share": float(scene.masks.float().mean()),
        "mask": f"a disc of {options.object_share:.0%} of each picture",
        "weights": "random",
        "multiply_adds_per_episode": per_episode,
        "peak_tflops": peak,
        "features_bytes": sum(level.nbytes for level in scene.features),
        "variants": {},
    }
    for name, taken in times.items():
        wall = timing.summary(taken.wall)
        rate = work.batch / wall["median"]
        entry = timing.entry(LABELS[name], taken, times["baseline"])
        entry["episodes_per_s"] = rate
        if peak:
            entry["share_of_peak"] = 2 * per_episode * rate / (peak * 1e12)
        if cuda:
            entry["device_s"] = timing.summary(built[name].seconds(len(taken.wall)))
            entry["peak_bytes"] = peaks[name]
        entry["logits_diff"] = float((logits[name] - logits["baseline"]).abs().max())
        measured["variants"][name] = entry
    return measured


def print_measurement(measured: dict[str, Any]) -> None:
    """A few lines for a person."""
    per_episode = measured["multiply_adds_per_episode"] / 1e9
    print(f"\n{measured['backbone']}, {measured['title']}, {measured['image_size']} px, on {measured['device']}")
    print(f"  {per_episode:.2f} G multiply-adds per episode are left after exact savings")
    for entry in measured["variants"].values():
        wall, ratio = entry["wall_s"], entry["ratio"]
        line = f"  {entry['label']:<34} {wall['median'] * 1e3:9.2f} ms ({wall['q1'] * 1e3:.2f}-{wall['q3'] * 1e3:.2f})"
        line += f" {entry['episodes_per_s']:8.1f} episodes/s {ratio['of_medians']:6.2f}x"
        if "share_of_peak" in entry:
            line += f"  {entry['share_of_peak']:.1%} of peak"
        if "peak_bytes" in entry:
            line += f"  {entry['peak_bytes'] / 1e9:.2f} GB"
        print(line + f"  logits {entry['logits_diff']:.1e}", flush=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backbones", default="resnet50,resnet101,vgg16", help="commas between them")
    parser.add_argument("--work", default="train,eval1,eval5", help="commas between them")
    parser.add_argument("--train-batch", type=int, default=20)
    parser.add_argument("--eval-batch", type=int, default=32)
    parser.add_argument("--shots-batch", type=int, default=8, help="episodes of the 5-shot evaluation")
    parser.add_argument("--size", type=int, default=400, help="side of the pictures, pixels")
    parser.add_argument("--object-share", type=float, default=OBJECT_SHARE, help="share of a picture its object covers")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--peak-tflops", type=float, help="of the device in bfloat16; a small table if left out")
    parser.add_argument("--no-extra-baselines", action="store_true", help="leave out TF32 and bfloat16 baselines")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--graphs", action="store_true")
    parser.add_argument("--quick", action="store_true", help="small batches, two repeats: does it run at all?")
    parser.add_argument("--out", type=Path, help="JSON file to add to; benchmarks/results/DATE-GPU.json if left out")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.quick:
        options.train_batch, options.eval_batch, options.shots_batch = 2, 2, 1
        options.repeats, options.warmup = 2, 1
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("No CUDA device here. Try out the script with --device cpu --size 96 --quick; its times mean nothing.")
    device = torch.device(options.device)
    if device.type == "cpu":
        print("On a CPU this only shows that the script runs; its times say nothing about a GPU.")
    run = timing.describe_run(device.type, vars(options))
    print(f"torch {run['versions']['torch']} on {run['machine'].get('gpu', run['machine']['cpu'])}, {run['date']}")
    for backbone in options.backbones.split(","):
        scene = Scene.make(backbone, options.size, options.object_share, device)
        for key, work in works(options.train_batch, options.eval_batch, options.shots_batch).items():
            if not key.startswith(tuple(options.work.split(","))):
                continue
            measured = measure(scene, key, work, options)
            print_measurement(measured)
            if device.type != "cpu" or options.out:
                timing.record(run, measured, options.out or timing.result_path(device.type))


if __name__ == "__main__":
    main()
