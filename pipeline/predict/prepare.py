"""From what a user gives to what predicts: a bank or annotated photos, a checkpoint or none, a network and a size."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hsnet.errors import ConfigError
from pipeline.bank.folder import Bank
from pipeline.bank.heads import HSNET, STANDING, TUNE, WHOLE_PHOTOS, Trained
from pipeline.bank.reading import Reader, Reading, default_size
from pipeline.datasets.own_support import read_support
from pipeline.features.backbones import new_recipe, same_reading
from pipeline.features.timm_registry import INSTALL
from pipeline.features.weights import PACKAGED, Weights, load_weights
from pipeline.heads.checkpoint import Checkpoint
from pipeline.predict.model import AUTO, LEAST_SCORE, Answering, PhotoModel, example_of, fit_class
from pipeline.predict.trust import Note, notes_on_supports
from pipeline.predict.writing import Outputs, Work

log = logging.getLogger(__name__)

OBJECT = "object"
"""Name of the class of photos that were given without a bank."""

BETTER = "timm:vit_small_patch14_dinov2"
"""A network whose features find objects far better than the packaged one's (docs/predict.md)."""


@dataclass(frozen=True)
class Choices:
    """How to answer; see the options of `hsnet predict`."""

    head: str = AUTO
    """`AUTO`, or a head of `pipeline.bank.heads.HEADS`; with a checkpoint "tune" stands on it."""
    backbone: str | None = None
    """None: the bank's or the checkpoint's, else the packaged network."""
    weights: str | Path | Weights | None = None
    """The backbone's weights or their file; None for the published or packaged ones, or those inside the checkpoint."""
    image_size: int | None = None
    tile: int | None = None
    fusion: str | None = None
    """How a trained head's supports make one mask; None: by the published vote."""
    tau: float = 0.5
    overlapping: bool = False
    refine: bool = True
    least_score: float = LEAST_SCORE
    classes: tuple[str, ...] = ()
    """Of a bank; empty for all."""
    device: str = "cpu"


@dataclass(frozen=True, eq=False)
class Prepared:
    """What predicts."""

    work: Work
    supports: Mapping[str, tuple[str, ...]]
    """Class -> names of the annotated photos that show it."""
    notes: Mapping[str, tuple[Note, ...]]
    """Class -> what is wrong with its annotated photos."""
    model: PhotoModel


def prepare(
    choices: Choices,
    *,
    bank: Bank | None = None,
    supports: Sequence[tuple[Path, Path]] = (),
    checkpoint: Checkpoint | None = None,
    outputs: Outputs = Outputs(),  # noqa: B008
    keep: Path | None = None,
) -> Prepared:
    """Fit the heads.

    Args:
        bank: annotated photos of named classes; or
        supports: (photo, mask) files of one class; see `pipeline.datasets.own_support.read_mask` for what is object.
        checkpoint: a trained head; its recipe decides backbone and size.
        keep: where features of photos are kept, see `pipeline.bank.kept`.

    Raises:
        ConfigError: neither or both of bank and supports; a head that needs a checkpoint without one; another backbone
            or size than the checkpoint's.
        CheckpointMismatch: other weights than the head was trained on. Names both.
        DataError: an annotated photo cannot be used; the bank has none, or no such class.
        WeightsError: see `pipeline.features.weights.load_weights`.
    """
    if (bank is None) == (not supports):
        raise ConfigError("Give either --bank or --support PHOTO:MASK: what is to be found is learned from them.")
    head = STANDING if checkpoint is not None and choices.head == TUNE else choices.head
    if checkpoint is None and head in (HSNET, STANDING):
        raise ConfigError(f"Head '{head}' needs a trained one: give its run or checkpoint with --checkpoint.")
    if checkpoint is None and choices.fusion is not None:
        raise ConfigError("--fusion is how a trained head's supports make one mask: give it with --checkpoint only.")
    read, weights = _reading(choices, bank, checkpoint)
    trained = None
    if checkpoint is not None:
        trained = Trained.of(checkpoint.learner(), read.recipe.image_size, choices.fusion or "vote")
    reader = Reader(read, weights, choices.device)
    answers = choices.tau, choices.overlapping, choices.refine, choices.least_score
    given: list[object]
    if bank is not None:
        model = PhotoModel.of_bank(bank, reader, head=head, classes=choices.classes, trained=trained)
        model = replace(model, answering=Answering(model.answering.classes, *answers))
        names = model.answering.names
        photos = [one for one in bank.photos() if any(one.knows(name) for name in names)]
        given = [[photo.id, dict(photo.item.masks), photo.item.absent, photo.item.ignore] for photo in photos]
        shown = {name: bank.of_class(name)[0] for name in names}
        named = {name: tuple(photo.item.name for photo in some) for name, some in shown.items()}
        masks = {name: [mask for one in some if (mask := one.mask(name)) is not None] for name, some in shown.items()}
    else:
        pairs = [read_support(photo, mask) for photo, mask in supports]
        files = [str(photo) for photo, _ in supports]
        examples = [
            example_of(reader, pair.photo, pair.mask, f"the support {file}")
            for pair, file in zip(pairs, files, strict=True)
        ]
        fitted = fit_class(OBJECT, files, examples, head, trained)
        model = PhotoModel(reader, Answering((fitted,), *answers))
        given = [hashlib.sha256(path.read_bytes()).hexdigest() for pair in supports for path in pair]
        named, masks = {OBJECT: tuple(files)}, {OBJECT: [pair.mask for pair in pairs]}
    heads = [[one.name, one.fitted.name] for one in model.answering.classes]
    facts = [2, keep is not None, read.digest, heads, given, checkpoint and checkpoint.digest, choices.fusion, *answers]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
    notes = {}
    if read.tile is None:
        size = read.recipe.image_size
        notes = {name: tuple(notes_on_supports(named[name], some, size)) for name, some in masks.items()}
    work = Work(read, weights, model.answering, digest, outputs, choices.device, keep)
    return Prepared(work, named, {name: some for name, some in notes.items() if some}, model)


def _reading(choices: Choices, bank: Bank | None, checkpoint: Checkpoint | None) -> tuple[Reading, Weights]:
    """The network, and how it reads photos."""
    if checkpoint is not None:
        if choices.tile is not None:
            raise ConfigError(WHOLE_PHOTOS)
        recipe = checkpoint.recipe
        for what, wanted, own in (
            ("--backbone", choices.backbone, recipe.backbone),
            ("--image-size", choices.image_size, recipe.image_size),
        ):
            if wanted not in (None, own):
                raise ConfigError(
                    f"{what} {wanted}, but the head of the checkpoint was trained on {own}. Leave it out."
                )
        inside = choices.weights is None and checkpoint.info.finetuned
        weights = checkpoint.backbone_weights() if inside else _weights(recipe.backbone, choices)
        offered = same_reading(recipe, weights)
        checkpoint.require(offered, f"the backbone {weights.backbone} ({weights.origin})")
        return Reading(offered), weights
    if bank is not None:
        recipe = bank.reading.recipe
        backbone = choices.backbone or recipe.backbone
        weights = _weights(backbone, choices)
        same = (backbone, weights.sha256) == (recipe.backbone, recipe.weights)
        if choices.backbone is None and not same:
            raise ConfigError(
                f"{bank.root} was made with other weights of {backbone}:\n  bank   {recipe.weights}\n  given  "
                f"{weights.sha256}\nGive the same ones with --weights, or name the network with --backbone to compute "
                f"the features anew."
            )
        size = choices.image_size or (recipe.image_size if same else default_size(backbone))
        if same and size == recipe.image_size:
            return Reading(recipe, choices.tile or bank.reading.tile), weights
        return Reading(new_recipe(backbone, weights, size, "float32"), choices.tile), weights
    backbone = choices.backbone or next(iter(PACKAGED))
    if choices.backbone is None:
        log.info(
            "The network is %s, which comes with hsnet; --backbone %s finds far more (%s).", backbone, BETTER, INSTALL
        )
    weights = _weights(backbone, choices)
    size = choices.image_size or default_size(backbone)
    return Reading(new_recipe(backbone, weights, size, "float32"), choices.tile), weights


def _weights(backbone: str, choices: Choices) -> Weights:
    return choices.weights if isinstance(choices.weights, Weights) else load_weights(backbone, choices.weights)
