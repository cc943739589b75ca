"""What a training run keeps on disk, and how it goes on after an interruption.

run/
├── config.json            what the run is (`RunConfig`)
├── environment.json       what it was last worked on with: versions, processor, GPU and how that rounds
├── resume.safetensors     weights, Adam's moments, the weights' average if the run has one, and the position:
│                          all that an exact continuation needs
├── last.safetensors       checkpoint of the last save: the average, or the weights where there is none; the backbone's
│                          are in it where they are trained
├── best.safetensors       checkpoint with the best validation mIoU, likewise
├── metrics.jsonl          one line per step and per validation
└── tensorboard/           the same as scalars
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hsnet.errors import CheckpointError, ConfigError
from hsnet.finetune import FinetunedHSNet
from pipeline.common.files import PARTIAL, replace_text
from pipeline.common.machine import environment
from pipeline.features.recipe import difference_lines
from pipeline.features.weights import weights_of
from pipeline.heads.checkpoint import (
    BACKBONE,
    BEST,
    LAST,
    CheckpointInfo,
    read_tensors,
    save_checkpoint,
    write_tensors,
)
from pipeline.heads.config import TRAINING, RunConfig
from pipeline.heads.training import recipe_name

log = logging.getLogger(__name__)

RESUME = "resume.safetensors"
CONFIG = "config.json"
METRICS = "metrics.jsonl"
ENVIRONMENT = "environment.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Position:
    """Where a run stands: what `resume.safetensors` says beside its tensors."""

    step: int = 0
    """Optimiser steps done; the next episode follows from it."""
    best_miou: float = -1.0
    best_step: int = -1
    best_of: int = 0
    """Episodes that `best_miou` is of; 0 in what an earlier version wrote."""


class RunDir:
    """The files of one run. Only rank 0 writes.

    Args:
        classes: names of the classes trained on, for the checkpoints.

    Raises:
        ConfigError: the folder holds a run of another configuration. Names every differing field.
        CheckpointError: it holds something else, or cannot be written.
    """

    def __init__(self, path: Path, config: RunConfig, write: bool = True, classes: Sequence[str] = ()) -> None:
        self.path = path
        self.config = config
        self.classes = tuple(classes)
        self._validated_on = config.validate_episodes
        """Episodes of a validation of the run so far."""
        if self._config_file.is_file():
            self._compare()
        elif path.is_dir() and any(entry.suffix != PARTIAL for entry in path.iterdir()):
            raise CheckpointError(f"{path} is not empty and holds no run ({self._config_file.name}). Choose another.")
        if write:
            try:
                path.mkdir(parents=True, exist_ok=True)
                replace_text(self._config_file, json.dumps(config.to_dict(), indent=1, sort_keys=True) + "\n")
                replace_text(path / ENVIRONMENT, json.dumps(environment(), indent=1) + "\n")
            except OSError as error:
                raise CheckpointError(f"Cannot write the run directory {path}: {error.strerror}.") from error

    @property
    def _config_file(self) -> Path:
        return self.path / CONFIG

    @property
    def _metrics_file(self) -> Path:
        return self.path / METRICS

    def load(self, model: nn.Module, optimiser: torch.optim.Optimizer, average: nn.Module | None = None) -> Position:
        """Put model, optimiser and average where the run stopped; at the beginning if it never saved."""
        file = self.path / RESUME
        if not file.is_file():
            return Position()
        tensors, metadata = read_tensors(file)
        try:
            position = Position(**json.loads(metadata["progress"]))
            _load(model, tensors, "model")
            if average is not None:
                _load(average, tensors, "average")
            for name, parameter in model.named_parameters() if position.step else ():
                moments = {m: tensors[f"{m}.{name}"].to(parameter.device) for m in _MOMENTS}
                optimiser.state[parameter] = {"step": torch.tensor(float(position.step)), **moments}
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{file} is damaged ({error}). Nothing was changed; delete it to start anew."
            ) from None
        self._restart_choice(position)
        return position

    def _restart_choice(self, position: Position) -> None:
        """Validations on more or fewer episodes than the best so far cannot be compared with it."""
        before, now = position.best_of or self._validated_on, self.config.validate_episodes
        if position.best_step < 0 or before == now or position.step >= self.config.steps:
            return
        log.warning(
            "validations were on %d episodes and are on %d from here: the best checkpoint (mIoU %.1f at step %d) stays "
            "until the next validation, and is chosen among later ones then.",
            before,
            now,
            position.best_miou,
            position.best_step,
        )
        position.best_miou, position.best_step, position.best_of = -1.0, -1, 0

    def save(
        self,
        model: nn.Module,
        optimiser: torch.optim.Optimizer,
        position: Position,
        average: nn.Module | None = None,
    ) -> None:
        """Write the resume file, then the last checkpoint, of `average` if there is one; each whole or not at all."""
        tensors = {f"model.{name}": value for name, value in model.named_parameters()}
        if average is not None:
            tensors |= {f"average.{name}": value for name, value in average.named_parameters()}
        for name, parameter in model.named_parameters():
            for moment in _MOMENTS if optimiser.state[parameter] else ():
                tensors[f"{moment}.{name}"] = optimiser.state[parameter][moment]
        write_tensors(self.path / RESUME, tensors, {"progress": json.dumps(vars(position))})
        self.save_checkpoint(LAST, model if average is None else average, position.step, None)

    def save_best(self, model: nn.Module, step: int, scores: Mapping[str, float]) -> None:
        self.save_checkpoint(BEST, model, step, scores)

    def save_checkpoint(self, name: str, model: nn.Module, step: int, scores: Mapping[str, float] | None) -> None:
        recipe, state = self.config.recipe, model.state_dict()
        if isinstance(model, FinetunedHSNet):
            # The features that go with this head are those of the backbone as it is now.
            weights = weights_of(recipe.backbone, model.backbone.weights(), f"the backbone at step {step}")
            recipe = replace(recipe, weights=weights.sha256)
            state = {**model.head_state(), **{BACKBONE + name: value for name, value in weights.state_dict.items()}}
        info = CheckpointInfo(
            recipe=recipe,
            learner=self.config.learner_arguments,
            step=step,
            origin="hsnet train",
            config=self.config,
            scores=scores,
            classes=self.classes or None,
            averaged=self.config.average > 0,
            finetuned=self.config.finetune_backbone,
        )
        save_checkpoint(self.path / name, state, info)

    def trim_metrics(self, step: int) -> None:
        """Forget metrics after `step`: an interrupted run may have written some that it will compute again."""
        if self._metrics_file.is_file():
            kept = [json.dumps(line) + "\n" for line in read_metrics(self.path) if line["step"] <= step]
            replace_text(self._metrics_file, "".join(kept))

    def log(self, values: Mapping[str, Any]) -> None:
        with self._metrics_file.open("a") as stream:
            stream.write(json.dumps(values) + "\n")

    def _compare(self) -> None:
        try:
            stored = RunConfig.from_dict(read_config(self.path))
        except ConfigError as error:
            raise CheckpointError(f"{self._config_file} cannot be read: {error}. Nothing was changed.") from None
        self._validated_on = stored.validate_episodes
        differences = stored.differences(self.config)
        if differences:
            raise ConfigError(
                f"{self.path} holds a run with another configuration:\n{difference_lines(differences)}\n"
                f"{_hint(stored, differences)}Give the stored values to continue it, or another --run-dir. Nothing was "
                "changed."
            )


def _load(model: nn.Module, tensors: Mapping[str, Tensor], kind: str) -> None:
    """Parameters from a resume file; statistics of a backbone's normalisations are not trained and stay."""
    parameters = {name: tensors[f"{kind}.{name}"] for name, _ in model.named_parameters()}
    model.load_state_dict({**dict(model.named_buffers()), **parameters})


def _hint(stored: RunConfig, differences: Mapping[str, object]) -> str:
    """What helps beside the list of differing fields; "" if nothing does."""
    name = recipe_name(stored)
    if "steps" in differences:
        return (
            f"Its {stored.schedule} schedule ends with its last step, so a run of another length is another run from "
            "its first step on. "
        )
    return f"It was begun with --recipe {name}. " if name and differences.keys() <= TRAINING.keys() else ""


def stored_config(path: Path) -> RunConfig | None:
    """The configuration of the run in a folder; None if there is none that can be read."""
    try:
        return RunConfig.from_dict(read_config(path))
    except (CheckpointError, ConfigError):
        return None


def read_config(path: Path) -> dict[str, Any]:
    """The configuration in a run directory as it stands there; `RunConfig.from_dict` checks it.

    Raises:
        CheckpointError: there is none, or it is no JSON object.
    """
    file = path / CONFIG
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}. Nothing was changed.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file} does not describe a run. Nothing was changed.")
    return values


def run_data(path: Path) -> str | None:
    """Digest of the data set that the run in a folder was begun with; None if there is no run that says so."""
    try:
        data = read_config(path).get("data")
    except CheckpointError:
        return None
    return data if isinstance(data, str) else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a run directory's metrics, each with its `step`; lines cut short by a crash are left out.

    Raises:
        CheckpointError: the file is there but cannot be read.
    """
    file = path / METRICS
    try:
        texts = file.read_text(errors="replace").splitlines() if file.is_file() else []
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error}.") from error
    lines = []
    for text in texts:
        with suppress(ValueError, RecursionError):
            lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict) and type(line.get("step")) is int]
