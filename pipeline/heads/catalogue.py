"""What can be evaluated, by name: a checkpoint's head, and baselines to compare it with.

A `Method` is made once and sent to every worker; it says how to build the segmenter there and what to write into
the results.
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
from pipeline.datasets.index import DatasetIndex
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.heads.segmenters import (
    CosineSegmenter,
    LearnedSegmenter,
    LocationSegmenter,
    Segmenter,
    fit_cosine_threshold,
    fit_location_mask,
)
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
    """Where its checkpoint was given, absolute; None for a baseline."""

    @property
    def checkpoint(self) -> str:
        """Digest of its checkpoint; "" for a baseline."""
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
        if trained_on is None or fold is None:
            raise ConfigError(
                "The checkpoint does not say which classes it was trained on (it was imported, or made by an earlier "
                "version). Give the store it was trained on with --trained-on, and the fold it held out with --fold."
            )
        return tuple(trained_on.classes[class_id] for class_id in trained_on.split(fold, "trn").class_ids)

    def classes_seen(self, index: DatasetIndex, fold: int) -> tuple[int, ...]:
        """Test classes of the fold that the head was trained on: a score on them says nothing about new classes.

        Known for heads trained on the same data set; an imported checkpoint does not say what it saw.
        """
        trained_on = self.facts.get("trained_on")
        if not trained_on or trained_on["data"] != index.digest:
            return ()
        seen = set(index.split(trained_on["fold"], "trn").class_ids)
        return tuple(sorted(seen & set(index.split(fold, "test").class_ids)))


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
        "name": "trained",
        "checkpoint": checkpoint.digest,
        "step": checkpoint.info.step,
        "arithmetic": arithmetic,
        "trained_on": None if config is None else {"data": config.data, "fold": config.fold},
        "classes": checkpoint.info.classes,
    }
    return Method(partial(_load, checkpoint.path.absolute(), device, arithmetic), facts, path.absolute())


def cosine(source: FeatureSource, *, fold: int, seed: int = 0, device: str = "cpu") -> Method:
    """The deepest level's cosine map, cut at the threshold that is best on training episodes of the fold."""
    log.info("Fitting the cosine baseline on training episodes")
    threshold = fit_cosine_threshold(source, fold, seed=seed).threshold
    return Method(partial(CosineSegmenter, threshold), {"name": "cosine", "threshold": threshold})


def location(source: FeatureSource, *, fold: int, seed: int = 0, device: str = "cpu") -> Method:
    """The same mask for every query: the mean object of training episodes of the fold, cut where it fits them best."""
    log.info("Fitting the location baseline on training episodes")
    mask = fit_location_mask(source, fold, seed=seed).mask
    return Method(partial(LocationSegmenter, mask), {"name": "location", "object_share": float(mask.float().mean())})


def untrained(source: FeatureSource, *, fold: int = 0, seed: int = 0, device: str = "cpu") -> Method:
    """A head with the initial weights of a training run of the same seed, whatever the fold."""
    arguments = source.recipe.learner_arguments()
    return Method(partial(_initialise, arguments, seed, device), {"name": "untrained", "seed": seed})


BASELINES: dict[str, Callable[..., Method]] = {"cosine": cosine, "location": location, "untrained": untrained}
"""Name -> what makes the method from (source, fold=, seed=, device=). Adding one is adding a function and a name."""


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
    name = facts.get("name")
    try:
        if name == "cosine":
            return Method(partial(CosineSegmenter, float(facts["threshold"])), facts)
        if name == "untrained":
            return untrained(source, seed=int(facts["seed"]), device=device)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"The rows do not say how their '{name}' method was made: {error!r}.") from error
    if name != "trained":
        raise DataError(f"Answers of the method '{name}' cannot be made again from what the rows say.")
    if checkpoint is None:
        raise DataError("The rows do not say where their checkpoint is: give --checkpoint.")
    method = trained(checkpoint, source, device, str(facts.get("arithmetic", "float32")))
    if method.checkpoint != facts.get("checkpoint"):
        raise DataError(
            f"{checkpoint} is not the checkpoint of the rows:\n  rows        {facts.get('checkpoint')}\n"
            f"  checkpoint  {method.checkpoint}\nGive that one with --checkpoint."
        )
    return method


def _load(path: Path, device: str, arithmetic: str) -> Segmenter:
    return LearnedSegmenter(load_checkpoint(path).learner().to(device), arithmetic)


def _initialise(arguments: dict[str, Any], seed: int, device: str) -> Segmenter:
    torch.manual_seed(seed)
    return LearnedSegmenter(HSNet(**arguments).to(device).eval())
