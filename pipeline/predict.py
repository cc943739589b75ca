"""The predict stage: a trained head, K photos with masks, and new photos -> their masks and overlays.

No store is needed: the backbone runs once per photo. Features are used in float32, whatever precision the head was
trained on; 8-bit codes differ from them by less than one thousandth of a correlation.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from hsnet.backbone import Backbone
from hsnet.errors import ConfigError, DataError, HSNetError
from hsnet.fused import FusedHSNet
from hsnet.fusion import foreground, fuse
from hsnet.model import HSNet, resize_logits
from pipeline.common import render
from pipeline.common.files import whole
from pipeline.datasets.images import PHOTO_SUFFIXES, read_photo, resize_label
from pipeline.datasets.own_support import AnnotatedPhoto, read_support
from pipeline.features.backbones import open_backbone, same_reading
from pipeline.features.forward import PhotoNetwork
from pipeline.features.weights import Weights
from pipeline.heads.checkpoint import Checkpoint

log = logging.getLogger(__name__)

_NAME_BYTES = 120  # file systems allow 255 bytes; leaves room for numbering and suffixes


@dataclass(frozen=True)
class Prediction:
    """What was written for one query photo."""

    query: Path
    mask: Path
    """PNG, mode L, 0 background and 255 object, of the photo's size as viewers show it."""
    overlay: Path
    """JPEG of the photo with the object tinted and outlined."""
    object_share: float
    """Share of the pixels predicted as object, 0 to 1."""


@dataclass(frozen=True)
class PredictSummary:
    """All queries of one run; `failed` holds (photo, reason) of those that could not be read."""

    written: tuple[Prediction, ...]
    failed: tuple[tuple[Path, str], ...]
    shots: int
    seconds: float


@dataclass(frozen=True)
class EncodedSupport:
    """A support as the learner needs it: its levels (1, L, U, V, C) and its mask (1, S, S) at network size."""

    levels: list[Tensor]
    mask: Tensor


class Predictor:
    """A head with its backbone, ready for photos. Keeps no state between calls.

    Args:
        learner: the trained head.
        backbone: the network whose features it was trained on.
        image_size: side of the square that photos are squashed to, pixels.
        device: where to compute.
    """

    def __init__(self, learner: HSNet, backbone: Backbone, image_size: int, device: torch.device | str = "cpu") -> None:
        self.network = PhotoNetwork(backbone, image_size, device)
        self.learner = FusedHSNet(learner.to(self.network.device).eval())

    @torch.inference_mode()
    def encode(self, photo: Image.Image) -> list[Tensor]:
        """Levels of one photo, shallow to deep, each (1, L, H, W, C) float32."""
        return self.network([photo])

    def encode_support(self, support: AnnotatedPhoto) -> EncodedSupport:
        """Features and network-size mask of a support; to be computed once and used for any number of queries."""
        side = (self.network.image_size, self.network.image_size)
        mask = torch.from_numpy(np.ascontiguousarray(resize_label(support.mask.astype(np.uint8), side)))
        return EncodedSupport(self.encode(support.photo), mask[None].to(self.network.device))

    @torch.inference_mode()
    def segment(
        self, photo: Image.Image, supports: Sequence[EncodedSupport], fusion: str = "vote", tau: float = 0.5
    ) -> NDArray[np.bool_]:
        """Mask (H, W) of the photo at its own size: one prediction per support, voted as published.

        Other ways to combine supports, and their threshold, are those of `hsnet.fusion.fuse`, and "joint"
        (`FusedHSNet.joint`).

        Logits go from the learner's size straight to the photo's (bilinear, aligned corners) and are cut there, as
        the published code does for original image sizes: no detour over the network size.
        """
        query = self.encode(photo)
        size = (photo.height, photo.width)
        # One support after the other: memory stays that of one shot, whatever the number of supports.
        contexts = torch.stack([self.learner.encode(query, support.levels, support.mask) for support in supports])
        if fusion == "joint":
            masks = foreground(resize_logits(self.learner.joint(contexts), size), tau)
        else:
            masks = fuse(torch.stack([self.learner.decode(context) for context in contexts]), size, fusion, tau)
        mask: NDArray[np.bool_] = masks[0].cpu().numpy().astype(bool)
        return mask


def predict(
    checkpoint: Checkpoint,
    weights: Weights,
    supports: Sequence[tuple[Path, Path]],
    queries: Sequence[Path],
    out_dir: Path,
    *,
    fusion: str = "vote",
    tau: float = 0.5,
    device: torch.device | str = "cpu",
    on_event: Callable[[int, int], None] | None = None,
) -> PredictSummary:
    """Segment every query photo by the supports' example and write a mask and an overlay for each.

    Args:
        checkpoint: the trained head; its recipe decides backbone and image size.
        weights: backbone weights; must be those of the checkpoint's recipe.
        supports: (photo, mask) files, K >= 1; see `pipeline.datasets.own_support.read_mask` for what counts as object.
        queries: photo files (`list_queries`).
        out_dir: made if missing. `NAME_mask.png` and `NAME_overlay.jpg` per query, NAME from the photo's name, made
            unique when two photos share it; files of an earlier run with the same names are replaced.
        fusion, tau: how several supports make one mask; see `Predictor.segment`.
        on_event: called with (photos done, photos in all).

    A query that cannot be read is logged and listed in the summary, and the others are done.

    Raises:
        CheckpointMismatch: other weights or another backbone than the head was trained on. Names both.
        DataError: a support cannot be used, or there is no query.
        ConfigError: no support; out_dir is a file, or the folder that a query lies in.
    """
    started = time.monotonic()
    recipe = checkpoint.recipe
    offered = same_reading(recipe, weights)
    checkpoint.require(offered, f"the backbone {weights.backbone} ({weights.origin})")
    if not supports:
        raise ConfigError("At least one support (a photo with its mask) is needed")
    if not queries:
        raise DataError("There is no query photo")
    _check_out_dir(out_dir, queries)
    read = [read_support(photo, mask) for photo, mask in supports]

    backbone = open_backbone(recipe, weights)
    predictor = Predictor(checkpoint.learner(), backbone, recipe.image_size, device)
    encoded = [predictor.encode_support(support) for support in read]
    out_dir.mkdir(parents=True, exist_ok=True)

    written: list[Prediction] = []
    failed: list[tuple[Path, str]] = []
    for done, (query, name) in enumerate(zip(queries, output_names(queries), strict=True), 1):
        try:
            photo = read_photo(query)
            mask = predictor.segment(photo, encoded, fusion, tau)
            files = out_dir / f"{name}_mask.png", out_dir / f"{name}_overlay.jpg"
            _save(Image.fromarray(mask.astype(np.uint8) * np.uint8(255)), files[0])
            _save(render.overlay(photo, mask), files[1])
            written.append(Prediction(query, *files, float(mask.mean())))
        except HSNetError as error:
            log.warning("%s", error)
            failed.append((query, str(error)))
        if on_event:
            on_event(done, len(queries))
    return PredictSummary(tuple(written), tuple(failed), len(supports), time.monotonic() - started)


def list_queries(paths: Iterable[Path]) -> list[Path]:
    """Photos to segment: files as given, folders by their photos in order of name (not of their subfolders).

    Raises:
        DataError: a path does not exist, or a folder holds no photo. Says what suffixes count.
    """
    queries: list[Path] = []
    for path in paths:
        if path.is_dir():
            photos = sorted(p for p in path.iterdir() if p.suffix.lower() in PHOTO_SUFFIXES and p.is_file())
            photos = _without_masks(photos)
            if not photos:
                raise DataError(
                    f"The folder {path} holds no photo ({', '.join(PHOTO_SUFFIXES)}); subfolders are not searched"
                )
            queries += photos
        elif path.exists():
            queries.append(path)
        else:
            raise DataError(f"The query {path} does not exist")
    return queries


def _without_masks(photos: list[Path]) -> list[Path]:
    """Leave out X.png beside X.jpg: the mask of an annotated photo."""
    stems = {photo.stem for photo in photos if photo.suffix.lower() != ".png"}
    kept = [photo for photo in photos if photo.suffix.lower() != ".png" or photo.stem not in stems]
    if len(kept) < len(photos):
        log.warning(
            "%s: %d PNG files beside a photo of the same name taken as masks, not as queries",
            photos[0].parent, len(photos) - len(kept),
        )  # fmt: skip
    return kept


def output_names(queries: Sequence[Path]) -> list[str]:
    """A file name stem for each query: readable, never twice (also not by case alone), never another folder.

    >>> output_names([Path("a/dog.jpg"), Path("b/Dog.png"), Path("..jpg")])
    ['dog', 'Dog-2', 'query']
    """
    names: list[str] = []
    taken: set[str] = set()
    for query in queries:
        # Names of the file system may hold anything but "/": bytes that are no text, control characters, dots only.
        text = os.fsencode(query.stem).decode("utf-8", "replace")
        text = "".join(letter if letter.isprintable() and letter not in '\\/:*?"<>|' else "_" for letter in text)
        base = text.encode()[:_NAME_BYTES].decode("utf-8", "ignore").strip(". ").lstrip("-") or "query"
        name, number = base, 1
        while name.casefold() in taken:
            number += 1
            name = f"{base}-{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _check_out_dir(out_dir: Path, queries: Sequence[Path]) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise ConfigError(f"The output {out_dir} is a file; give a folder")
    if any(query.parent.resolve() == out_dir.resolve() for query in queries):
        raise ConfigError(
            f"The output folder {out_dir} is a query's own folder: its masks would be taken for photos next time. "
            "Give another folder. Nothing was written."
        )


def _save(picture: Image.Image, path: Path) -> None:
    with whole(path) as partial:
        picture.save(partial, format="PNG" if path.suffix == ".png" else "JPEG", quality=90)
