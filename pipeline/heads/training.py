"""How a head is trained: named recipes, the learning rate of every step, the optimiser, the average of its weights.

A recipe is a name for values of `RunConfig`. The configuration keeps the values, not the name, so a recipe that a later
version changes leaves old runs what they were.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from hsnet.errors import ConfigError
from hsnet.finetune import FinetunedHSNet
from hsnet.model import HSNet
from pipeline.heads.config import TRAINING, RunConfig

PUBLISHED: Mapping[str, Any] = MappingProxyType(TRAINING)
"""What the published code does: Adam at 1e-3, and nothing else."""

RECIPES: Mapping[str, Mapping[str, Any]] = MappingProxyType({
    "hsnet": PUBLISHED,
    "stable": MappingProxyType({**PUBLISHED, "average": 0.999}),
})  # fmt: skip
"""Name -> value of every training choice."""

DEFAULT_RECIPE = "stable"
"""What `hsnet train` and `hsnet sweep` take for a new run; docs/training-and-evaluation.md says why."""


def training_choices(recipe: str | None = None, stored: RunConfig | None = None, **explicit: Any) -> dict[str, Any]:
    """Values of the training choices (the keys of `PUBLISHED`) of a run.

    Args:
        recipe: a name of `RECIPES`. None: what `stored` has, or `DEFAULT_RECIPE` for a new run.
        stored: the run that is to go on, if there is one.
        explicit: choices given one by one, which win; None stands for one that was not given.

    Raises:
        ConfigError: no such recipe, or a choice that is none.

    >>> training_choices("hsnet", clip=1.0) == {**PUBLISHED, "clip": 1.0}
    True
    """
    if unknown := set(explicit) - set(PUBLISHED):
        raise ConfigError(f"Not a training choice: {', '.join(sorted(unknown))}; there are {', '.join(PUBLISHED)}.")
    if recipe is None and stored is not None:
        chosen = {name: getattr(stored, name) for name in PUBLISHED}
    elif (name := recipe or DEFAULT_RECIPE) in RECIPES:
        chosen = dict(RECIPES[name])
    else:
        raise ConfigError(f"Unknown training recipe '{recipe}'. Choose one of: {', '.join(RECIPES)}.")
    return chosen | {name: value for name, value in explicit.items() if value is not None}


def recipe_name(config: RunConfig) -> str | None:
    """The recipe whose values a run has; None if it has a choice of its own."""
    values = {name: getattr(config, name) for name in PUBLISHED}
    return next((name for name, recipe in RECIPES.items() if values == recipe), None)


def rate_at(config: RunConfig, step: int) -> float:
    """Learning rate of optimiser step `step`, counted from 0.

    It rises over the first `warmup` steps, in equal parts, to `learning_rate`. Then "constant" keeps it there; "cosine"
    lets it fall along half a cosine that would reach 0 at step `steps`, one after the last (Loshchilov & Hutter 2017,
    Eq. 5, without restarts).
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup) / (config.steps - config.warmup)
    return config.learning_rate * (1 + math.cos(math.pi * done)) / 2


def make_optimiser(config: RunConfig, model: nn.Module) -> torch.optim.Adam:
    """The optimiser of a run: Adam (Kingma & Ba 2015), or AdamW (Loshchilov & Hutter 2019).

    The weights of a backbone that is trained (`hsnet.finetune`) are a group of their own, whose `share` is its learning
    rate as a share of the learner's; see `set_rate`.

    With "adam" a weight decay is added to the gradient (an L2 penalty); with "adamw" it shrinks the weights directly,
    by `learning rate * weight_decay` of their value per step.
    """
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    backbone = list(model.backbone.parameters()) if isinstance(model, FinetunedHSNet) else []
    known = set(map(id, backbone))
    head = [parameter for parameter in model.parameters() if id(parameter) not in known]
    groups: list[dict[str, Any]] = [{"params": head, "share": 1.0}]
    if backbone:
        groups.append({"params": backbone, "share": config.backbone_share})
    return kinds[config.optimiser](groups, lr=config.learning_rate, weight_decay=config.weight_decay)


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group of `make_optimiser` its share of the learner's learning rate (`rate_at`)."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["share"]


def less_memory(config: RunConfig, micro_batch: int | None, resident: str) -> str:
    """What to ask for less of where a training step does not fit."""
    now, least = micro_batch or config.batch_size, config.directions
    if now > least:
        first = f"Use --micro-batch {max(least, now // 2)} (it is {now}; the steps are the same up to rounding)"
    else:
        first = "Use a store of a smaller --image-size: a step computes one episode at a time already"
    return f"{first}{'' if resident == 'off' else ', or --resident off'}."


class WeightAverage:
    """Exponential moving average of a model's parameters: `model`, a copy that is never trained itself.

    A backbone that is trained is averaged too.

    After optimiser step t = 1, 2, ... average = d average + (1 - d) parameters with d = min(decay, (1 + t) / (10 + t)).
    The second term keeps the untrained weights, where the average starts, from weighing on it for long. While it is the
    smaller one, for about 9 / (1 - decay) steps, the average reaches back over about a ninth of the run.
    """

    def __init__(self, model: HSNet, decay: float) -> None:
        self.decay = decay
        # eval after the copy: copies of torchvision's traced networks come back in training mode.
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: HSNet, step: int) -> None:
        """Take in the parameters that `model` has after optimiser step `step`, counted from 1."""
        keep = min(self.decay, (1 + step) / (10 + step))
        for mine, theirs in zip(self.model.parameters(), model.parameters(), strict=True):
            mine.lerp_(theirs, 1 - keep)
