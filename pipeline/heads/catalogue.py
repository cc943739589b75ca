"""What can be evaluated, by name: a checkpoint, an untrained head, the cosine and the location baseline.

A `Method` is made once and sent to every worker; it says how to build the segmenter there and what to write into
the results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hsnet.backbone import backbone_spec
from hsnet.errors import ConfigError
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


@dataclass(frozen=True)
class Method:
    """How to answer episodes. `make` builds the segmenter, in any process; `facts` go into the results."""

    make: Callable[[], Segmenter]
    facts: Mapping[str, Any]


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
    return Method(partial(_load, checkpoint.path.absolute(), device, arithmetic), facts)


def tested_fold(method: Method) -> int:
    """The fold that a head held out, on which it is tested unless another is asked for; 0 if it does not say."""
    trained_on = method.facts.get("trained_on")
    return int(trained_on["fold"]) if trained_on else 0


def names_seen(method: Method, trained_on: DatasetIndex | None = None, fold: int | None = None) -> tuple[str, ...]:
    """Names of the classes that a head was trained on.

    Args:
        trained_on, fold: index of its training data and the fold it held out, for heads that do not say.

    Raises:
        ConfigError: the head does not say, and no index of its training data was given.
    """
    if method.facts.get("classes"):
        return tuple(method.facts["classes"])
    fold = (method.facts.get("trained_on") or {}).get("fold", fold)
    if trained_on is None or fold is None:
        raise ConfigError(
            "The checkpoint does not say which classes it was trained on (it was imported, or made by an earlier "
            "version). Give the store it was trained on with --trained-on, and the fold it held out with --fold."
        )
    return tuple(trained_on.classes[class_id] for class_id in trained_on.split(fold, "trn").class_ids)


def classes_seen(method: Method, source: FeatureSource, fold: int) -> tuple[int, ...]:
    """Test classes of the fold that the method was trained on: a score on them says nothing about new classes.

    Known for heads trained on the same data set; an imported checkpoint does not say what it saw.
    """
    trained_on = method.facts.get("trained_on")
    if not trained_on or trained_on["data"] != source.index.digest:
        return ()
    seen = set(source.index.split(trained_on["fold"], "trn").class_ids)
    return tuple(sorted(seen & set(source.index.split(fold, "test").class_ids)))


def untrained(source: FeatureSource, seed: int = 0, device: str = "cpu") -> Method:
    """A head with the initial weights of a training run of the same seed."""
    layers = tuple(reversed(backbone_spec(source.recipe.backbone).layers))
    return Method(partial(_initialise, layers, seed, device), {"name": "untrained", "seed": seed})


def cosine(source: FeatureSource, fold: int, seed: int = 0) -> Method:
    """The deepest level's cosine map, cut at the threshold that is best on training episodes of the fold."""
    segmenter = fit_cosine_threshold(source, fold, seed=seed)
    return Method(partial(CosineSegmenter, segmenter.threshold), {"name": "cosine", "threshold": segmenter.threshold})


def location(source: FeatureSource, fold: int, seed: int = 0) -> Method:
    """The same mask for every query: the mean object of training episodes of the fold, cut where it fits them best."""
    segmenter = fit_location_mask(source, fold, seed=seed)
    facts = {"name": "location", "object_share": float(segmenter.mask.float().mean())}
    return Method(partial(LocationSegmenter, segmenter.mask), facts)


def _load(path: Path, device: str, arithmetic: str) -> Segmenter:
    return LearnedSegmenter(load_checkpoint(path).learner().to(device), arithmetic)


def _initialise(layers: tuple[int, ...], seed: int, device: str) -> Segmenter:
    torch.manual_seed(seed)
    return LearnedSegmenter(HSNet(layers).to(device).eval())
