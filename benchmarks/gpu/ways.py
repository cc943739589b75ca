"""The ways that are timed: the published one and ours, from what lies in device memory."""

from __future__ import annotations

import contextlib
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from benchmarks import published_way
from benchmarks.inputs import Work, disc, normalised, picture
from hsnet.backbone import FrozenBackbone, backbone_spec, random_state_dict
from hsnet.fused import FusedHSNet
from hsnet.fusion import vote
from hsnet.loss import episode_losses
from hsnet.model import HSNet, predict_mask, resize_logits
from hsnet.numerics import has_bfloat16

PICTURES = 16
"""Different pictures in device memory; episodes are drawn from them."""


@dataclass(frozen=True)
class Mode:
    """How a way computes."""

    tf32: bool = False
    """Whether float32 products and convolutions may be rounded to TensorFloat-32."""
    bfloat16: bool = False

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Compute so inside the block; not what bfloat16 means, which every way does its own way."""
        with tf32(self.tf32):
            yield


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow TensorFloat-32 inside the block, or forbid it."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@dataclass(frozen=True)
class Scene:
    """Everything in device memory that a way may begin from."""

    backbone: str
    device: torch.device
    photos: Tensor
    """(N, 3, S, S) float32, normalised."""
    masks: Tensor
    """(N, S, S) bool."""
    features: dict[bool, list[Tensor]]
    """Whether TF32 was allowed when they were made -> levels, finest first, each (N, L, H, W, C) int8."""
    state: dict[str, Tensor]
    """The backbone's weights."""

    @classmethod
    @functools.lru_cache(maxsize=2)
    def make(cls, backbone: str, size: int, share: float, device: torch.device) -> Scene:
        photos = normalised(torch.stack([picture(number, size) for number in range(PICTURES)])).to(device)
        masks = torch.stack([disc(number, size, share) for number in range(PICTURES)]).to(device)
        state = random_state_dict(backbone)
        network = FrozenBackbone(backbone, state).to(device)
        features = {}
        for allowed in (False, True) if device.type == "cuda" else (False,):
            with tf32(allowed):
                parts = [[int8(level) for level in network(photo[None])] for photo in photos]
            features[allowed] = [torch.cat(level) for level in zip(*parts, strict=True)]
        features.setdefault(True, features[False])
        return cls(backbone, device, photos, masks, features, state)

    def learner(self) -> HSNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return HSNet(tuple(reversed(backbone_spec(self.backbone).layers))).to(self.device)


def int8(level: Tensor) -> Tensor:
    """Each position's vector divided by its largest absolute value, times 127: what a default store holds."""
    largest = level.abs().amax(-1, keepdim=True)
    return (level / torch.where(largest > 0, largest, 1) * 127).round().to(torch.int8)


class Way(ABC):
    """One way of doing a piece of work; `run` does it once."""

    mode: Mode

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
    def logits(self) -> Tensor | None:
        """(B, 2, h, w) of the first shot at the learner's size; None if they cannot be had."""

    @abstractmethod
    def step(self) -> float: ...

    @abstractmethod
    def predict(self) -> Tensor: ...


class PublishedWay(Way):
    """The published way, from photos in device memory; `mode` says with what arithmetic."""

    def __init__(self, scene: Scene, work: Work, mode: Mode = Mode(), compiled: bool = False) -> None:
        super().__init__(scene, work)
        self.mode, self.compiled = mode, compiled
        self.model = published_way.PublishedHSNet(scene.backbone, scene.state, scene.learner()).to(scene.device)
        if compiled:
            self.model.compile()
        self.prepare(self.model)

    def arithmetic(self) -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        stack.enter_context(self.mode.on())
        stack.enter_context(torch.autocast(self.scene.device.type, torch.bfloat16, enabled=self.mode.bfloat16))
        return stack

    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        photos, masks = self.scene.photos, self.scene.masks
        return photos[self.queries], photos[self.supports], masks[self.supports].float()

    @torch.no_grad()
    def logits(self) -> Tensor | None:
        if self.compiled:  # what is compiled gives them at photo size only
            return None
        query, support, mask = self.inputs()
        with self.arithmetic():
            return self.model.coarse_logits(query, support[:, 0], mask[:, 0]).float()

    def step(self) -> float:
        query, support, mask = self.inputs()
        with self.arithmetic():
            logits = self.model(query, support[:, 0], mask[:, 0])
            loss = published_way.loss(logits, self.scene.masks[self.queries])
            self.optimiser.zero_grad()
            loss.backward()
            self.optimiser.step()
        return float(loss.detach())

    def predict(self) -> Tensor:
        with self.arithmetic():
            return self.model.predict(*self.inputs())


@dataclass(frozen=True)
class Variant:
    """One of our ways."""

    label: str
    mode: Mode = field(default_factory=Mode)
    as_commands: bool = False
    """Compute as `hsnet train` does on the device, whatever `mode` says: without TF32, in bfloat16 if it has that."""
    sparse: bool | None = None
    """As `FusedHSNet` takes it."""
    compiled: bool = False
    graph: bool = False

    @property
    def arithmetic(self) -> str:
        return "bfloat16" if self.mode.bfloat16 else "float32"


class OurWay(Way):
    """Ours, from int8 features in device memory: picking an episode's rows is part of its time."""

    def __init__(self, scene: Scene, work: Work, variant: Variant) -> None:
        super().__init__(scene, work)
        if variant.as_commands:
            variant = replace(variant, mode=Mode(bfloat16=has_bfloat16(str(scene.device))))
        self.mode = variant.mode
        self.features = scene.features[variant.mode.tf32]
        self.model = scene.learner()
        fused: Callable[..., Tensor] = FusedHSNet(self.model, variant.arithmetic, variant.sparse)
        self.forward = torch.compile(fused) if variant.compiled else fused
        self.prepare(self.model)
        self.graph = None
        if variant.graph:
            with self.mode.on():
                self.graph = capture(self.prediction)

    def episode_logits(self) -> Tensor:
        features, masks = self.features, self.scene.masks
        rows = self.supports.flatten()
        query, support = [level[self.queries] for level in features], [level[rows] for level in features]
        return self.forward(query, support, masks[rows])

    @torch.no_grad()
    def logits(self) -> Tensor:
        with self.mode.on():
            return self.episode_logits()[:: self.work.shots]

    def step(self) -> float:
        with self.mode.on():
            return self.learn(self.episode_logits)

    def learn(self, logits: Callable[[], Tensor]) -> float:
        """One optimiser step on the loss of what `logits` gives."""
        self.optimiser.zero_grad(set_to_none=True)
        losses = episode_losses(logits(), self.scene.masks[self.queries])
        (losses.sum() / len(losses)).backward()
        self.optimiser.step()
        return float(losses.detach().mean())

    @torch.no_grad()
    def prediction(self) -> Tensor:
        size = self.scene.masks.shape[-1]
        hard = predict_mask(resize_logits(self.episode_logits(), (size, size)))
        return vote(hard.view(self.work.batch, self.work.shots, size, size).transpose(0, 1))

    def predict(self) -> Tensor:
        with self.mode.on():
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


Build = Callable[[Scene, Work], Way]
FLOAT32, TF32, BFLOAT16 = Mode(), Mode(tf32=True), Mode(tf32=True, bfloat16=True)
BASELINES = {
    "baseline": ("published way, float32", Mode(), False),
    "baseline-tf32": ("published way, TF32", TF32, False),
    "baseline-bfloat16": ("published way, bfloat16 autocast", BFLOAT16, False),
    "baseline-compiled": ("published way, bfloat16 autocast, torch.compile", BFLOAT16, True),
}
OURS = {
    "exact": Variant("ours, int8 features, float32"),
    "default": Variant("ours, as hsnet train computes by default", as_commands=True),
    "tf32": Variant("ours, TF32", TF32),
    "fastest": Variant("ours, int8 features, bfloat16", BFLOAT16),
    "compiled": Variant("ours, bfloat16, torch.compile", BFLOAT16, compiled=True),
    "graph": Variant("ours, bfloat16, CUDA graph", BFLOAT16, graph=True),
}
LABELS = {name: label for name, (label, _, _) in BASELINES.items()} | {name: one.label for name, one in OURS.items()}
COMPILED, GRAPHS = ("baseline-compiled", "compiled"), ("graph",)


def ways(chosen: tuple[str, ...]) -> dict[str, Build]:
    """Name -> how to build it, in the order of the tables above; "baseline" first."""
    found: dict[str, Build] = {}
    for name, (_, mode, compiled) in BASELINES.items():
        if name in chosen:
            found[name] = lambda scene, work, mode=mode, compiled=compiled: PublishedWay(scene, work, mode, compiled)
    for name, variant in OURS.items():
        if name in chosen:
            found[name] = lambda scene, work, variant=variant: OurWay(scene, work, variant)
    return found
