"""What can be evaluated, by name: heads that are trained, fitted, or need nothing, each with where it comes from.

A `Method` is a head made ready once and sent to every worker; it says how to build the segmenter there and what to
write into the results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hsnet.errors import ConfigError, DataError
from hsnet.model import HSNet
from pipeline.common.text import did_you_mean
from pipeline.datasets.index import DatasetIndex
from pipeline.datasets.unseen import canonical_name
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.heads.contrast import ContrastSegmenter
from pipeline.heads.cosine import CosineSegmenter, fit_cosine_threshold
from pipeline.heads.location import LocationSegmenter, fit_location_mask
from pipeline.heads.segmenters import LearnedSegmenter, Segmenter
from pipeline.heads.tune import TuneSegmenter
from pipeline.loading.source import FeatureSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """How to answer episodes."""

    make: Callable[[], Segmenter]
    """Builds the segmenter, in any process."""
    facts: Mapping[str, Any]
    """Its name and what it was made with, for the results; `made_again` reads them."""
    path: Path | None = None
    """Where its checkpoint was given, absolute; None for a head without one."""

    @property
    def head(self) -> Head | None:
        """Its entry of `HEADS`; None for a head that is none of them."""
        return HEADS.get(str(self.facts.get("name")))

    @property
    def checkpoint(self) -> str:
        """Digest of its checkpoint; "" for a head without one."""
        return str(self.facts.get("checkpoint", ""))

    @property
    def held_out(self) -> int | None:
        """The fold that its training held out; None if nothing says so."""
        trained_on = self.facts.get("trained_on")
        return int(trained_on["fold"]) if trained_on else None

    def names_seen(self, trained_on: DatasetIndex | None = None, fold: int | None = None) -> tuple[str, ...]:
        """Names of the classes that the head was trained on.

        Args:
            trained_on, fold: index of its training data and the fold it held out, for heads that do not say.

        Raises:
            ConfigError: the head does not say, and no index of its training data was given.
        """
        if self.facts.get("classes"):
            return tuple(self.facts["classes"])
        fold = fold if self.held_out is None else self.held_out
        if trained_on is None and not self.checkpoint and self.head is not None and self.head.needs == NOTHING:
            return ()
        if trained_on is None or fold is None:
            raise ConfigError(
                "The checkpoint does not say which classes it was trained on (it was imported, or made by an earlier "
                "version). Give the store it was trained on with --trained-on, and the fold it held out with --fold."
            )
        return tuple(trained_on.classes[class_id] for class_id in trained_on.split(fold, "trn").class_ids)

    def classes_seen(self, index: DatasetIndex, fold: int, role: str = "test") -> tuple[int, ...]:
        """Tested classes of a fold that the head was trained on: a score on them says nothing about new classes.

        By the names in the checkpoint, whatever data set it was trained on (`canonical_name`); of a checkpoint without
        names known only on its own data set. An imported checkpoint does not say what it saw.
        """
        tested = index.split(fold, role).class_ids
        trained_on = self.facts.get("trained_on")
        if trained_on and trained_on["data"] == index.digest:
            seen = set(index.split(trained_on["fold"], "trn").class_ids)
            return tuple(class_id for class_id in tested if class_id in seen)
        names = {canonical_name(name) for name in self.facts.get("classes") or ()}
        return tuple(class_id for class_id in tested if canonical_name(index.classes[class_id]) in names)


def trained(path: Path, source: FeatureSource, device: str = "cpu", arithmetic: str = "float32") -> Method:
    """A checkpoint's head, or a run directory's best one.

    Raises:
        CheckpointError: no checkpoint there, or damaged.
        CheckpointMismatch: it was trained on other features than the source's.
    """
    checkpoint = load_checkpoint(path)
    checkpoint.require(source.recipe, "the store")
    config = checkpoint.info.config
    facts = {
        "name": "hsnet+bg" if checkpoint.info.learner.get("background") else "hsnet",
        "checkpoint": checkpoint.digest,
        "step": checkpoint.info.step,
        "arithmetic": arithmetic,
        "trained_on": None if config is None else {"data": config.data, "fold": config.fold},
        "classes": checkpoint.info.classes,
    }
    return Method(partial(_load, checkpoint.path.absolute(), device, arithmetic), facts, path.absolute())


TRAINING, FOLD, NOTHING = "a checkpoint", "training classes", "nothing"
"""What a head needs before it can answer: a trained checkpoint, episodes of the fold's training classes, nothing."""


@dataclass(frozen=True)
class Head:
    """A way to answer episodes, as `hsnet heads` lists it."""

    summary: str
    """What it answers with, in a line."""
    source: str
    """Where it comes from."""
    needs: str
    """One of `TRAINING`, `FOLD` and `NOTHING`. Only what needs `NOTHING` needs no fold: no class is known to it."""
    fusion: str | None = None
    """Its own way to combine supports, a word of `pipeline.episodes.protocols.FUSIONS`; None: the protocol's."""
    joint: bool = False
    """Whether it can answer several supports together (fusion joint)."""
    background: bool = False
    """Whether it needs a support to show more than its object."""
    values: Callable[[FeatureSource, int, int], Mapping[str, Any]] = lambda source, fold, seed: {}
    """(source, fold, seed) -> what it is made with, beside its name."""
    segmenter: Callable[[Mapping[str, Any], FeatureSource, str], Callable[[], Segmenter]] | None = None
    """(values, source, device) -> what builds the segmenter in any process; None: a checkpoint's, by `trained`."""
    told: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    """Values -> what results say of them; None: all of them, so that the head can be made again from the results."""
    stands: bool = False
    """Whether it can stand on a trained head, as `TuneSegmenter` does."""


HEADS: dict[str, Head] = {
    "hsnet": Head(
        "the trained learner: hypercorrelations squeezed by 4D convolutions",
        "Min et al., ICCV 2021",
        TRAINING,
        joint=True,
    ),
    "hsnet+bg": Head(
        "the trained learner that also sees the support's background",
        "HSNet and contrast, put together here",
        TRAINING,
        joint=True,
    ),
    "contrast": Head(
        "nearest object position against nearest background position of the support",
        "nearest-neighbour matching of both sides; form measured here",
        NOTHING,
        fusion="joint",
        joint=True,
        background=True,
        segmenter=lambda values, source, device: ContrastSegmenter,
    ),
    "tune": Head(
        "a logistic regression fitted to the episode's supports; beside a checkpoint's head, if one is given",
        "linear read-outs of frozen features, fitted per episode",
        NOTHING,
        fusion="joint",
        joint=True,
        background=True,
        segmenter=lambda values, source, device: TuneSegmenter,
        stands=True,
    ),
    "cosine": Head(
        "the deepest level's cosine map, cut at one fitted threshold",
        "the correlations of Min et al., ICCV 2021, without a learner",
        FOLD,
        values=lambda source, fold, seed: {"threshold": fit_cosine_threshold(source, fold, seed=seed).threshold},
        segmenter=lambda values, source, device: partial(CosineSegmenter, float(values["threshold"])),
    ),
    "location": Head(
        "one mask for every query: where training objects usually are",
        "a check of the data, not a method",
        FOLD,
        values=lambda source, fold, seed: {"mask": fit_location_mask(source, fold, seed=seed).mask},
        segmenter=lambda values, source, device: partial(LocationSegmenter, values["mask"]),
        told=lambda values: {"object_share": float(values["mask"].float().mean())},
    ),
    "untrained": Head(
        "the learner with its initial weights",
        "a check of the data, not a method",
        NOTHING,
        joint=True,
        values=lambda source, fold, seed: {"seed": seed},
        segmenter=lambda values, source, device: partial(
            _initialise, source.recipe.learner_arguments(), int(values["seed"]), device
        ),
    ),
}
"""Name -> head. Adding one is adding a module with its segmenter and an entry here."""


def head_named(name: str) -> Head:
    """The head of a name. Raises ConfigError with the nearest name if there is none."""
    if name not in HEADS:
        near = did_you_mean(name, HEADS) or "."
        raise ConfigError(f"No head '{name}': choose of {', '.join(HEADS)} (`hsnet heads`){near} Nothing was computed.")
    return HEADS[name]


def made(name: str, source: FeatureSource, *, fold: int = 0, seed: int = 0, device: str = "cpu") -> Method:
    """A head that needs no checkpoint, ready to answer.

    Args:
        fold: whose training classes a head that needs them is fitted on.
        seed: of the episodes it is fitted on, or of its initial weights.

    Raises:
        ConfigError: no such head, or one that needs a checkpoint.
    """
    head = head_named(name)
    if head.segmenter is None:
        raise ConfigError(
            f"Head '{name}' must be trained: give its run or checkpoint with --checkpoint instead of --head. Nothing "
            f"was computed."
        )
    if head.needs == FOLD:
        log.info("Fitting head %s on training episodes", name)
    values = head.values(source, fold, seed)
    return Method(head.segmenter(values, source, device), {"name": name, **(head.told or dict)(values)})


def on_trained(name: str, method: Method) -> Method:
    """A head that stands on a trained one.

    Raises:
        ConfigError: no such head, or one that answers without a checkpoint only.
    """
    head = head_named(name)
    if not head.stands:
        able = ", ".join(other for other, one in HEADS.items() if one.stands)
        raise ConfigError(
            f"Head '{name}' does not stand on a checkpoint; {able} does. Give --head or --checkpoint alone. Nothing "
            f"was computed."
        )
    return _beside(name, method)


def made_again(
    facts: Mapping[str, Any], source: FeatureSource, *, checkpoint: Path | None = None, device: str = "cpu"
) -> Method:
    """The method whose facts a result holds.

    Args:
        checkpoint: where its checkpoint is now; must be the one of the facts.

    Raises:
        DataError: the facts do not suffice, or the checkpoint is another one or not given.
        CheckpointError, CheckpointMismatch: as `trained`.
    """
    name = str(facts.get("name"))
    head = HEADS.get("hsnet" if name == "trained" else name)  # as rows called it before there were two
    if head is None or head.told is not None:
        raise DataError(f"Answers of the method '{name}' cannot be made again from what the rows say.")
    stands = head.stands and "checkpoint" in facts
    try:
        if head.segmenter is not None and not stands:
            return Method(head.segmenter(facts, source, device), facts)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"The rows do not say how their '{name}' method was made: {error!r}.") from error
    if stands:
        on = made_again({**facts, "name": facts.get("on")}, source, checkpoint=checkpoint, device=device)
        return _beside(name, on)
    if checkpoint is None:
        raise DataError("The rows do not say where their checkpoint is: give --checkpoint.")
    method = trained(checkpoint, source, device, str(facts.get("arithmetic", "float32")))
    if method.checkpoint != facts.get("checkpoint"):
        raise DataError(
            f"{checkpoint} is not the checkpoint of the rows:\n  rows        {facts.get('checkpoint')}\n"
            f"  checkpoint  {method.checkpoint}\nGive that one with --checkpoint."
        )
    return method


def _beside(name: str, method: Method) -> Method:
    """A head of `TuneSegmenter` that stands on a trained one."""
    facts = {**method.facts, "name": name, "on": method.facts["name"]}
    return Method(partial(_load_beside, method.make), facts, method.path)


def _load_beside(make: Callable[[], Segmenter]) -> Segmenter:
    return TuneSegmenter(make())


def _load(path: Path, device: str, arithmetic: str) -> Segmenter:
    return LearnedSegmenter(load_checkpoint(path).learner().to(device), arithmetic)


def _initialise(arguments: dict[str, Any], seed: int, device: str) -> Segmenter:
    torch.manual_seed(seed)
    return LearnedSegmenter(HSNet(**arguments).to(device).eval())
