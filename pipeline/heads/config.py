"""A training run as one small value that can be written, compared and hashed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

from hsnet.backbone import BACKBONES
from hsnet.errors import ConfigError
from hsnet.fused import ARITHMETIC
from pipeline.common.fields import from_json
from pipeline.features.recipe import Recipe

if TYPE_CHECKING:
    from pipeline.loading.source import FeatureSource

DEFAULT = "default"
"""Stands for an argument of the learner that a configuration does not name, where two are compared."""
SELECT_ON = ("val", "test", "none")
OPTIMISERS = ("adam", "adamw")
SCHEDULES = ("constant", "cosine")

TRAINING: dict[str, Any] = {
    "learning_rate": 1e-3,
    "optimiser": "adam",
    "weight_decay": 0.0,
    "schedule": "constant",
    "warmup": 0,
    "clip": 0.0,
    "average": 0.0,
    "both_directions": False,
}
"""Fields of `RunConfig` that say how the learner is trained, with the published values."""
FINETUNING: dict[str, Any] = {"finetune_backbone": False, "backbone_lr": 0.0}
"""Fields of `RunConfig` that say whether and how the backbone is trained too, with the published values. They are in no
recipe and in no sweep: a store's features are frozen."""
SCENES: dict[str, Any] = {"novel_pixels": "background"}
"""Fields of `RunConfig` that say what held-out classes are in training photos, with the published values."""
VALIDATION = ("validate_every", "validate_episodes")
"""Fields of `RunConfig` that change no weight: a run may go on with others."""
_LATER = {name: value for name, value in (TRAINING | FINETUNING | SCENES).items() if name != "learning_rate"}
"""Those that came after the first runs, with the published values."""


def skipped_digest(ids: Collection[str]) -> str:
    """Identity of a set of left-out image ids: leaving out others gives other episodes, and so another run."""
    return "sha256:" + hashlib.sha256("\n".join(sorted(ids)).encode()).hexdigest() if ids else ""


def features_of(source: FeatureSource) -> dict[str, Any]:
    """The fields of a run that its features decide: `recipe`, `data` and `skipped`."""
    left_out = [source.index.images[image] for image in source.skipped]
    return {"recipe": source.recipe, "data": source.index.digest, "skipped": skipped_digest(left_out)}


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run learns. Paths, worker counts and devices are not in it.

    Raises:
        ConfigError: a value is out of range; names the field, the value and the range.
    """

    fold: int
    """Fold whose classes are held out."""
    recipe: Recipe
    """The features it learns from."""
    data: str
    """Digest of the data-set index."""
    skipped: str = ""
    """Digest of the images that could not be read and are never drawn (`skipped_digest`); "" if there are none."""
    steps: int
    """Optimiser steps. A finished run may be continued with more, unless its schedule ends with it (`fixed_length`)."""
    batch_size: int = 20
    """Losses per optimiser step, over all workers and micro-batches: one per episode, two with `both_directions`."""
    learning_rate: float = TRAINING["learning_rate"]
    """The greatest, which the schedule starts from."""
    optimiser: str = TRAINING["optimiser"]
    """"adam" or "adamw" (`pipeline.heads.training.make_optimiser`)."""
    weight_decay: float = TRAINING["weight_decay"]
    """Of the optimiser; at least 0."""
    schedule: str = TRAINING["schedule"]
    """"constant" or "cosine" (`pipeline.heads.training.rate_at`)."""
    warmup: int = TRAINING["warmup"]
    """Steps over which the learning rate rises from 0."""
    clip: float = TRAINING["clip"]
    """Greatest norm of a step's gradient over all parameters; a longer one is scaled down to it. 0: none is."""
    average: float = TRAINING["average"]
    """Decay of the moving average of the weights, which then is what is validated and kept as checkpoints; 0: none."""
    both_directions: bool = TRAINING["both_directions"]
    """Whether each episode is trained on a second time with query and support exchanged."""
    finetune_backbone: bool = FINETUNING["finetune_backbone"]
    """Whether the backbone's weights are trained too (`hsnet.finetune`); `recipe` names those that it begins with."""
    backbone_lr: float = FINETUNING["backbone_lr"]
    """Greatest learning rate of the backbone's weights; 0: `learning_rate`."""
    seed: int = 0
    """Seed of the initial weights and of the training episodes."""
    arithmetic: str = "float32"
    """Precision of the learner's activations and products (`hsnet.fused.ARITHMETIC`); weights are always float32."""
    boundary: str = "background"
    """What boundary pixels are in the loss: "background" as the published code, "ignore" as the paper says."""
    drop_novel_images: bool = False
    """Leave out training images that show a novel class. The published code keeps them."""
    novel_pixels: str = SCENES["novel_pixels"]
    """What pixels of held-out classes are in the loss: "background" as the published code, or "ignore". In photos of
    scenes, which show many classes, "background" teaches that the held-out ones are never an object."""
    repeat_supports: bool = True
    """Whether the supports of an episode may repeat, as in the published code."""
    select_on: str = "val"
    """Episodes the best checkpoint is chosen on: "val" (never a test episode), "test" (the published habit), "none"
    (the last one)."""
    validate_every: int = 500
    """Steps between validations."""
    validate_episodes: int = 200
    learner: Mapping[str, Any] = field(default_factory=dict)
    """Arguments of `hsnet.model.HSNet` beside those that follow from the features (`pipeline.heads.learner`)."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "validate_every", "validate_episodes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("weight_decay", "warmup", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be finite and at least 0, got {getattr(self, name)}.")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"learning_rate must be between 0 and 1, got {self.learning_rate}.")
        self._check_finetuning()
        if not 0 <= self.average < 1:
            raise ConfigError(f"average must be at least 0 and below 1, got {self.average}.")
        if self.both_directions and self.batch_size % 2:
            raise ConfigError(f"With both_directions batch_size must be even, got {self.batch_size}.")
        for name, known in (("optimiser", OPTIMISERS), ("schedule", SCHEDULES)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name} must be one of {', '.join(known)}, got '{getattr(self, name)}'.")
        if self.boundary not in ("background", "ignore"):
            raise ConfigError(f"boundary must be 'background' or 'ignore', got '{self.boundary}'.")
        if self.novel_pixels not in ("background", "ignore"):
            raise ConfigError(f"novel_pixels must be 'background' or 'ignore', got '{self.novel_pixels}'.")
        if self.arithmetic not in ARITHMETIC:
            raise ConfigError(f"arithmetic must be one of {', '.join(ARITHMETIC)}, got '{self.arithmetic}'.")
        if self.select_on not in SELECT_ON:
            raise ConfigError(f"select_on must be one of {', '.join(SELECT_ON)}, got '{self.select_on}'.")

    def _check_finetuning(self) -> None:
        if not 0 <= self.backbone_lr < 1:
            raise ConfigError(f"backbone_lr must be at least 0 and below 1, got {self.backbone_lr}.")
        if not self.finetune_backbone:
            if self.backbone_lr:
                raise ConfigError(
                    f"backbone_lr is {self.backbone_lr}, but the backbone is not trained: add --finetune-backbone, or "
                    "leave out --backbone-lr. Nothing was changed."
                )
            return
        if self.recipe.network is not None:
            raise ConfigError(
                f"Only the built-in backbones can be finetuned ({', '.join(BACKBONES)}), not {self.recipe.backbone}: "
                "networks of timm's are read without gradients here. Nothing was changed."
            )
        if self.recipe.precision != "float32":
            raise ConfigError(
                f"Features in {self.recipe.precision} have no gradient: only exact ones (float32), made from photos "
                "in every step, can finetune a backbone. Use --features online. Nothing was changed."
            )

    @classmethod
    def of(cls, source: FeatureSource, **choices: Any) -> RunConfig:
        """A run on the features of a source; `choices` are the fields that the source does not decide."""
        return cls(**features_of(source), **choices)

    @property
    def learner_arguments(self) -> dict[str, Any]:
        """All arguments of `hsnet.model.HSNet`."""
        return {**self.recipe.learner_arguments(), **self.learner}

    @property
    def digest(self) -> str:
        """sha256 over all fields but the number of steps, where that is free: runs with one digest are the same run.

        Training choices that are the published ones are left out, so that runs of earlier versions keep theirs.
        """
        values = {name: value for name, value in self.to_dict().items() if name not in _LATER or value != _LATER[name]}
        if not self.fixed_length:
            del values["steps"]
        values["recipe"] = self.recipe.identity()
        return "sha256:" + hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @property
    def fixed_length(self) -> bool:
        """Whether the number of steps decides what every step does, so that a longer run is another one."""
        return self.schedule != "constant"

    @property
    def backbone_share(self) -> float:
        """Learning rate of the backbone's weights as a share of that of the learner's."""
        return self.backbone_lr / self.learning_rate if self.backbone_lr else 1.0

    @property
    def directions(self) -> int:
        """Losses per episode."""
        return 2 if self.both_directions else 1

    @property
    def episodes_per_step(self) -> int:
        """Episodes read for an optimiser step."""
        return self.batch_size // self.directions

    def differences(self, other: RunConfig) -> dict[str, tuple[object, object]]:
        """Field -> (value here, value in `other`), for fields that make it another run.

        Not `VALIDATION`, and steps only as `fixed_length` says.
        """
        differing: dict[str, tuple[object, object]] = {}
        for item in fields(self):
            mine, theirs = getattr(self, item.name), getattr(other, item.name)
            if item.name in VALIDATION:
                continue
            if item.name == "recipe":
                differing |= mine.differences(theirs)
            elif item.name == "learner":
                for name in sorted({*mine, *theirs}):
                    values = mine.get(name, DEFAULT), theirs.get(name, DEFAULT)
                    differing |= {f"learner {name}": values} if values[0] != values[1] else {}
            elif mine != theirs and (item.name != "steps" or self.fixed_length or other.fixed_length):
                differing[item.name] = (mine, theirs)
        return differing

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {**asdict(self), "recipe": self.recipe.to_dict(), "learner": dict(self.learner)}

    @classmethod
    def from_dict(cls, values: object) -> RunConfig:
        """Read what `to_dict` gave, by this version or an earlier one: a field that came later has its default.

        Raises:
            ConfigError: an unknown field, a missing one without a default, or a value of another type.
        """
        return from_json(cls, values, "A run configuration")
