"""Checkpoints: the learner's weights and what they were trained on, in one safetensors file.

The file's JSON header carries the recipe of the features and the run's configuration, so that a checkpoint can be
checked against a store before anything is computed. Nothing is ever unpickled, except tensors of a published
checkpoint under torch's `weights_only`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from hsnet.backbone import backbone_spec
from hsnet.errors import CheckpointError, CheckpointMismatch, ConfigError, HSNetError, WeightsError
from hsnet.model import HSNet
from hsnet.published import layers_of, split_published
from pipeline.common.fields import from_json
from pipeline.common.files import whole
from pipeline.features.recipe import Recipe, difference_lines
from pipeline.features.weights import Weights, weights_of
from pipeline.heads.config import RunConfig

log = logging.getLogger(__name__)

CHECKPOINT_FORMAT = 1
BEST, LAST = "best.safetensors", "last.safetensors"
BACKBONE = "backbone."
"""Begins the names of a finetuned backbone's tensors; torchvision's follow."""
_KEY = "hsnet"
SAME_FEATURES = ("backbone", "weights", "image_size", "taps", "normalisation", "resize", "network levels")
"""Fields of a recipe in which features must agree to be one kind; their precision may differ."""


@dataclass(frozen=True, kw_only=True)
class CheckpointInfo:
    """What a checkpoint says about itself."""

    recipe: Recipe
    """The features it goes with: those it was trained on, or those of its own backbone if that was `finetuned`."""
    learner: Mapping[str, Any]
    """Arguments of `hsnet.model.HSNet`."""
    step: int
    origin: str
    """"hsnet train", or the file it was imported from."""
    config: RunConfig | None = None
    """None for an imported one."""
    scores: Mapping[str, float] | None = None
    """Validation scores when it was saved, in percent."""
    classes: tuple[str, ...] | None = None
    """Names of the classes trained on; None where that was not written down."""
    averaged: bool = False
    """Whether the weights are a moving average of those trained (`RunConfig.average`)."""
    finetuned: bool = False
    """Whether the backbone was trained too: its weights are in the file, and its features are nobody else's."""

    def to_json(self) -> str:
        values = {
            "format": CHECKPOINT_FORMAT,
            **asdict(self),
            "recipe": self.recipe.to_dict(),
            "learner": dict(self.learner),
            "config": None if self.config is None else self.config.to_dict(),
            "scores": None if self.scores is None else dict(self.scores),
        }
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> CheckpointInfo:
        """Raises ConfigError or ValueError for what `to_json` did not write."""
        values = json.loads(text)
        if not isinstance(values, dict) or values.pop("format", None) != CHECKPOINT_FORMAT:
            raise ConfigError(f"its header is not of format {CHECKPOINT_FORMAT}")
        return from_json(cls, values, "its header")


@dataclass(frozen=True)
class Checkpoint:
    """A learner's weights with their description, and those of its backbone if they were trained."""

    state: dict[str, Tensor]
    info: CheckpointInfo
    digest: str
    """sha256 of the file."""
    path: Path
    backbone: dict[str, Tensor] = field(default_factory=dict)
    """Weights of a finetuned backbone by torchvision's names; empty where it was frozen."""

    @property
    def recipe(self) -> Recipe:
        """The features it goes with."""
        return self.info.recipe

    def learner(self) -> HSNet:
        """The learner, in eval mode.

        Raises:
            CheckpointError: weights and description do not fit each other.
        """
        try:
            model = HSNet(**self.info.learner)
            model.load_state_dict(self.state)
        except (RuntimeError, TypeError, ValueError, IndexError, ZeroDivisionError, ConfigError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1].strip()
            raise CheckpointError(f"{self.path}: weights and level layout do not fit: {reason}") from None
        return model.eval()

    def backbone_weights(self) -> Weights:
        """Weights of the backbone that was trained with this head.

        Raises:
            CheckpointError: it was not, or they are not those that the header names.
        """
        recipe = self.info.recipe
        if not self.info.finetuned:
            raise CheckpointError(
                f"{self.path} holds no backbone: it was frozen while the head was trained. Its features are those of "
                f"{recipe.backbone} with the weights {recipe.weights}. Nothing was written."
            )
        try:
            weights = weights_of(recipe.backbone, self.backbone, f"finetuned, step {self.info.step}")
        except WeightsError as error:
            raise CheckpointError(f"{self.path}: the backbone inside cannot be used: {error}") from None
        if weights.sha256 != recipe.weights:
            raise CheckpointError(
                f"{self.path} is damaged: the backbone inside has the sha256 {weights.sha256}, its header says "
                f"{recipe.weights}. Nothing was written."
            )
        return weights

    def require(self, recipe: Recipe, what: str) -> None:
        """Check that features of `recipe` are those this learner knows.

        Precision may differ: a learner trained on exact features can be used on coded ones.

        Raises:
            CheckpointMismatch: names every differing field with both values.
        """
        differing = self.info.recipe.differences(recipe)
        if differing := {name: pair for name, pair in differing.items() if name in SAME_FEATURES}:
            advice = "Use features of the checkpoint's kind, or a checkpoint trained on these."
            if self.info.finetuned and "weights" in differing:
                advice = (
                    "Its backbone was finetuned with the head, and only that gives its features: `hsnet checkpoint "
                    f"backbone {self.path} OUT.safetensors` writes its weights, `hsnet extract ... --weights "
                    "OUT.safetensors` makes a store of them."
                )
            raise CheckpointMismatch(
                f"{self.path} was trained on other features than {what} has:\n"
                f"{difference_lines(differing, 'checkpoint', 'offered')}\n"
                f"{advice} Nothing was computed.",
                differing,
            )


def save_checkpoint(path: Path, state: Mapping[str, Tensor], info: CheckpointInfo) -> None:
    """Write a checkpoint whole or not at all."""
    write_tensors(path, state, {_KEY: info.to_json()})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint, or a run directory's best one (its last where none was chosen).

    Raises:
        CheckpointError: not there, not a checkpoint, damaged, or of a later version. Published files are named as
            such, with the command that imports them.
    """
    file = path
    if path.is_dir():
        there = [path / name for name in (BEST, LAST) if (path / name).is_file()]
        if not there:
            raise CheckpointError(
                f"{path} holds neither {BEST} nor {LAST}. Give a checkpoint, or the --run-dir of a run that has "
                "validated or saved at least once."
            )
        file = there[0]
    if not file.is_file():
        raise CheckpointError(f"No checkpoint at {file}.")
    state, metadata = read_tensors(file)
    if _KEY not in metadata:
        raise CheckpointError(f"{file} is a safetensors file, but not an HSNet checkpoint: its header says nothing.")
    try:
        info = CheckpointInfo.from_json(metadata[_KEY])
    except (HSNetError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be used: {error}.") from None
    if info.config is not None and info.step == 0:
        log.warning("%s was saved before the first step of its run: the head is untrained", file)
    backbone = {name.removeprefix(BACKBONE): state.pop(name) for name in list(state) if name.startswith(BACKBONE)}
    if info.finetuned != bool(backbone):
        raise CheckpointError(
            f"{file} is damaged: by its header its backbone was {'finetuned' if info.finetuned else 'frozen'}, but "
            f"{len(backbone)} tensors of a backbone are in it."
        )
    return Checkpoint(state, info, "sha256:" + hashlib.sha256(file.read_bytes()).hexdigest(), file, backbone)


def save_backbone(checkpoint: Checkpoint, target: Path) -> Weights:
    """Write the finetuned backbone of a checkpoint as a weights file that `hsnet extract --weights` reads.

    Raises:
        CheckpointError: its backbone was frozen, `target` exists or cannot be written.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists and was left as it is. Choose another name.")
    if target.suffix != ".safetensors":
        raise CheckpointError(f"{target} must end in .safetensors, by which `--weights` knows its kind.")
    weights = checkpoint.backbone_weights()
    source = f"finetuned with a head, step {checkpoint.info.step} of {checkpoint.digest}"
    write_tensors(target, weights.state_dict, {"source": source})
    return weights


def import_published(source: Path, target: Path, backbone: str | None = None, image_size: int = 400) -> CheckpointInfo:
    """Turn a checkpoint of the published code into one of ours.

    Args:
        source: a `best_model.pt` of the published code; read with torch's `weights_only`, so no code in it runs.
        target: where to write; must not exist.
        backbone: its network; by default told from the learner's layers and the backbone inside.
        image_size: what it was trained at; the published models used 400.

    The backbone inside is not kept: its digest goes into the recipe, so that only features of exactly these weights
    are accepted later.

    Raises:
        CheckpointError: not such a file, or `target` exists.
    """
    if target.exists():
        raise CheckpointError(f"{target} exists and was left as it is. Choose another name.")
    if not source.is_file():
        raise CheckpointError(f"No checkpoint at {source}.")
    try:
        with warnings.catch_warnings():  # of pickles that are refused anyway
            warnings.simplefilter("ignore")
            content = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's reader raises anything at all on damaged bytes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than that."  # torch's own text advises to switch the safety off
        raise CheckpointError(
            f"{source} is not a file of plain tensors and was not executed: {reason} Nothing was imported."
        ) from None
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{source} holds no state dict (names to tensors). Nothing was imported.")
    learner, network = split_published(content)
    try:
        layers = layers_of(learner)
    except (KeyError, IndexError):
        raise CheckpointError(f"{source}: the learner inside is incomplete. Nothing was imported.") from None
    name = backbone or _backbone_by_layers(source, layers)
    spec = backbone_spec(name)
    if tuple(reversed(spec.layers)) != layers:
        raise CheckpointError(
            f"{source} has {layers} correlation layers per level (deepest first), {name} "
            f"{tuple(reversed(spec.layers))}. Nothing was imported."
        )
    recipe = Recipe.of(name, weights_of(name, network, str(source)).sha256, image_size, "float32")
    info = CheckpointInfo(
        recipe=recipe, learner={"layers": list(layers)}, step=0, origin=f"imported from {source.name}"
    )
    Checkpoint(learner, info, "", source).learner()
    save_checkpoint(target, learner, info)
    return info


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all. Raises CheckpointError if the disk refuses."""
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata))
    try:
        with whole(path) as partial:
            partial.write_bytes(data)
    except OSError as error:
        raise CheckpointError(f"Cannot write {path}: {error.strerror}. What was there before is unchanged.") from error


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header texts of a safetensors file. Raises CheckpointError if it is damaged or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        hint = (
            f" Files of the published code are imported first: hsnet checkpoint import {path} OUT.safetensors"
            if path.suffix in (".pt", ".pth")
            else ""
        )
        raise CheckpointError(f"{path} is not a checkpoint or is damaged ({error}).{hint}") from None


def _backbone_by_layers(source: Path, layers: tuple[int, ...]) -> str:
    names = {(1, 3, 3): "vgg16", (3, 6, 4): "resnet50", (3, 23, 4): "resnet101"}
    if layers not in names:
        raise CheckpointError(f"{source}: no published backbone has {layers} layers per level. Name it: --backbone.")
    return names[layers]
