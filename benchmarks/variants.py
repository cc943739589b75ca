"""What is timed: one piece of work, done the published way and ours.

A *way* is built once, then called once per repeat. Ours begins at the store on disk: reading and decoding features and
labels is part of its time. The published way begins at decoded photos in memory, which is in its favour.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import published_way
from benchmarks.inputs import OBJECT_SHARE, Work
from benchmarks.pictures import Pictures
from hsnet.backbone import backbone_spec
from hsnet.fused import FusedHSNet
from hsnet.fusion import fuse
from hsnet.loss import episode_losses
from hsnet.model import HSNet
from pipeline.datasets.images import network_image
from pipeline.episodes.stream import Episode
from pipeline.extract.stage import extract
from pipeline.features.weights import Weights, load_weights
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.loading.batch import load_batch
from pipeline.loading.source import StoreSource
from pipeline.store.feature_store import FeatureStore

LEARNING_RATE = 1e-3
IMAGES = 8
"""Pictures in a store: what the largest work reads."""


WORKS: dict[str, Work] = {
    "train1": Work("training step, batch 1", "train", 1),
    "train2": Work("training step, batch 2", "train", 2),
    "train4": Work("training step, batch 4", "train", 4),
    "eval1": Work("1-shot evaluation", "evaluate", 1),
    "eval5": Work("5-shot evaluation", "evaluate", 1, 5),
    "eval1x4": Work("1-shot evaluation, batch 4", "evaluate", 4),
}


@dataclass(frozen=True)
class Variant:
    """One of our ways: which store, and extra arguments for `FusedHSNet` and `LearnedSegmenter`."""

    label: str
    store: str
    """Precision of the store."""
    fused: Mapping[str, Any] = field(default_factory=dict)
    segmenter: Mapping[str, Any] = field(default_factory=dict)


VARIANTS: dict[str, Variant] = {
    "exact": Variant("float32 store, exact", "float32"),
    "default": Variant("default int8 store", "int8"),
    "fastest": Variant("int8 store, bfloat16", "int8", {"arithmetic": "bfloat16"}, {"arithmetic": "bfloat16"}),
}
BASELINE = "baseline"


@dataclass(frozen=True)
class Job:
    """Work on a backbone at a size. Builds the ways of doing it; pickled to the processes that measure memory."""

    backbone: str
    work: str
    size: int
    stores: Path
    object_share: float = OBJECT_SHARE
    threads: int | None = None

    @property
    def details(self) -> Work:
        return WORKS[self.work]

    @property
    def pictures(self) -> Pictures:
        return Pictures(IMAGES, self.size, self.object_share)

    @property
    def episodes(self) -> list[Episode]:
        """Queries are the first pictures, supports those after them, from the first again when there are no more."""
        batch, shots = self.details.batch, self.details.shots
        number = iter(range(batch, batch + batch * shots))
        return [
            Episode(query, tuple(next(number) % IMAGES for _ in range(shots)), class_id=0) for query in range(batch)
        ]

    @property
    def weights(self) -> Weights:
        """Made anew each time, so that no copy of them counts in what a way needs."""
        logger = logging.getLogger("pipeline.features.weights")
        logger.addFilter(_silent)  # it warns of random weights
        try:
            return load_weights(self.backbone, "random:0")
        finally:
            logger.removeFilter(_silent)

    def store(self, precision: str) -> Path:
        """Make the store of a precision, unless it is there."""
        path = self.stores / f"{self.backbone}-{self.size}-{self.object_share}-{precision}.zarr"
        if path.exists() and FeatureStore.open(path, require_complete=False).complete:
            return path
        extract(self.pictures, self.weights, path, image_size=self.size, precision=precision)
        return path

    def learner(self) -> HSNet:
        """The learner as it is at the start of every way."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return HSNet(tuple(reversed(backbone_spec(self.backbone).layers)))

    def build(self, name: str) -> Way:
        """A way of doing the work: "baseline" or a key of VARIANTS."""
        return PublishedWay(self) if name == BASELINE else OurWay(self, VARIANTS[name])


class Way(Protocol):
    """One way of doing a job's work."""

    def run(self) -> object:
        """Do the work once."""
        ...

    def outcome(self) -> tuple[Tensor, float]:
        """Logits at the learner's size, (B K, 2, h, w), and the loss, before any training."""
        ...

    def masks(self) -> Tensor:
        """(B, S, S) bool predictions after the vote."""
        ...


class PublishedWay:
    """The published way, from photos in memory."""

    def __init__(self, job: Job) -> None:
        self.work = job.details
        self.model = published_way.PublishedHSNet(job.backbone, job.weights.state_dict, job.learner())
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE)
        pictures, episodes = job.pictures, job.episodes
        photos = [torch.from_numpy(network_image(pictures.image(i), job.size)) for i in range(IMAGES)]
        discs = [torch.from_numpy(pictures.label(i) == 1) for i in range(IMAGES)]
        self.query = torch.stack([photos[episode.query] for episode in episodes])
        self.target = torch.stack([discs[episode.query] for episode in episodes])
        self.support = torch.stack([torch.stack([photos[i] for i in episode.supports]) for episode in episodes])
        self.mask = torch.stack([torch.stack([discs[i] for i in episode.supports]) for episode in episodes]).float()

    def run(self) -> object:
        return self._step() if self.work.task == "train" else self.masks()

    def outcome(self) -> tuple[Tensor, float]:
        with torch.no_grad():
            per_shot = [
                self.model.coarse_logits(self.query, self.support[:, shot], self.mask[:, shot])
                for shot in range(self.work.shots)
            ]
            logits = torch.stack(per_shot, 1).flatten(0, 1)
            losses = episode_losses(logits, self.target.repeat_interleave(self.work.shots, 0))
        return logits, float(losses.mean())

    def masks(self) -> Tensor:
        return self.model.predict(self.query, self.support, self.mask)

    def _step(self) -> float:
        logits = self.model(self.query, self.support[:, 0], self.mask[:, 0])
        loss = published_way.loss(logits, self.target)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return float(loss.detach())


class OurWay:
    """Our way, from a store on disk, as `pipeline.train` and `pipeline.evaluate` go it."""

    def __init__(self, job: Job, variant: Variant) -> None:
        self.work, self.episodes = job.details, job.episodes
        self.source = StoreSource(FeatureStore.open(job.store(variant.store)))
        model = job.learner()
        self.model = model
        self.fused = FusedHSNet(model, **variant.fused)
        self.segmenter = LearnedSegmenter(model, **variant.segmenter)
        self.optimiser = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def run(self) -> object:
        return self._step() if self.work.task == "train" else self.masks()

    def outcome(self) -> tuple[Tensor, float]:
        batch = load_batch(self.source, self.episodes)
        with torch.no_grad():
            logits = self.fused(batch.query, batch.support, batch.support_mask)
            losses = episode_losses(logits, batch.target.repeat_interleave(batch.shots, 0))
        return logits, float(losses.mean())

    def masks(self) -> Tensor:
        batch = load_batch(self.source, self.episodes)
        return fuse(self.segmenter.answer(batch).logits, (batch.target.shape[1], batch.target.shape[2]))

    def _step(self) -> float:
        self.optimiser.zero_grad(set_to_none=True)
        batch = load_batch(self.source, self.episodes)
        logits = self.fused(batch.query, batch.support, batch.support_mask)
        losses = episode_losses(logits, batch.target, batch.ignore)
        (losses.sum() / len(losses)).backward()
        gradients = [one.grad for one in self.model.parameters() if one.grad is not None]
        if not torch.isfinite(nn.utils.get_total_norm(gradients)):
            raise ArithmeticError("A gradient is not a number.")
        self.optimiser.step()
        return float(losses.detach().mean())


def differences(ways: Mapping[str, Way]) -> dict[str, dict[str, float]]:
    """How far each way's logits, loss and masks are from the baseline's. Call it before any training."""
    wanted, wanted_loss = ways[BASELINE].outcome()
    wanted_masks = ways[BASELINE].masks()
    found = {}
    for name, way in ways.items():
        if name == BASELINE:
            continue
        logits, loss = way.outcome()
        found[name] = {
            "logits_diff": float((logits.float() - wanted).abs().max()),
            "loss_diff": abs(loss - wanted_loss),
            "mask_diff_share": float((way.masks() != wanted_masks).float().mean()),
        }
    found[BASELINE] = {"logits_size": float(wanted.abs().max()), "loss": wanted_loss}
    return found


def mask_share(job: Job) -> float:
    """Share of object pixels over the job's supports, as it really is."""
    images = sorted({i for episode in job.episodes for i in episode.supports})
    return float(np.mean([job.pictures.label(i).mean() for i in images]))


def _silent(record: logging.LogRecord) -> bool:
    return False
