"""The predict stage: a trained head, K photos with masks, and new photos -> their masks and overlays.

No store is needed: the backbone runs once per photo. Features are used in float32, whatever precision the head was
trained on; 8-bit codes differ from them by less than one thousandth of a correlation.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from hsnet.backbone import Backbone
from hsnet.errors import ConfigError, DataError, HSNetError
from hsnet.fused import FusedHSNet
from hsnet.fusion import foreground, fuse
from hsnet.model import HSNet, resize_logits
from pipeline.common import render
from pipeline.common.files import whole
from pipeline.common.runner import read_ahead
from pipeline.datasets.images import read_photo, resize_label
from pipeline.datasets.own_support import AnnotatedPhoto, read_support
from pipeline.datasets.queries import Queries, names_of
from pipeline.features.backbones import open_backbone, same_reading
from pipeline.features.forward import PhotoNetwork
from pipeline.features.weights import Weights
from pipeline.heads.checkpoint import Checkpoint

log = logging.getLogger(__name__)

PER_FOLDER = 10_000
"""Photos whose outputs lie in one folder; with more they are spread over subfolders, at most so many files in each."""
RESULTS = "results.jsonl"

_MASK, _OVERLAY = "_mask.png", "_overlay.jpg"
_TEXT = "hsnet"
"""Key of the PNG text that says what a mask was made with."""
_READ_AHEAD = 2


@dataclass(frozen=True)
class Prediction:
    """What was written for one query photo."""

    query: Path
    mask: Path
    """PNG, mode L, 0 background and 255 object, of the photo's size as viewers show it."""
    overlay: Path | None
    """JPEG of the photo with the object tinted and outlined; None if none was wanted."""
    object_share: float
    """Share of the pixels predicted as object, 0 to 1."""


@dataclass(frozen=True)
class PredictSummary:
    """What one call did. A line per photo is in `results` (`read_results`)."""

    results: Path
    """JSON lines, written as photos are done: query, mask, overlay, object_share, kept; or query, error."""
    photos: int
    kept: int
    """Photos whose mask was there, made with the same head, supports and settings of the same photo."""
    unusable: int
    """Photos that could not be read."""
    shots: int
    seconds: float

    @property
    def written(self) -> tuple[Prediction, ...]:
        """All masks, from the file of results, in the order of that file."""
        return tuple(item for item in read_results(self.results) if isinstance(item, Prediction))

    @property
    def failed(self) -> tuple[tuple[Path, str], ...]:
        """(photo, reason) of those that could not be read, from the file of results."""
        return tuple(item for item in read_results(self.results) if not isinstance(item, Prediction))


@dataclass(frozen=True)
class Task:
    """A photo, and where its mask and its overlay go."""

    query: Path
    mask: Path
    overlay: Path | None


@dataclass(frozen=True)
class Result:
    """A task that is done."""

    task: Task
    object_share: float | None = None
    """None if the photo could not be used."""
    kept: bool = False
    error: str = ""


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
        return self.segment_levels(self.encode(photo), (photo.height, photo.width), supports, fusion, tau)

    @torch.inference_mode()
    def segment_levels(
        self,
        query: list[Tensor],
        size: tuple[int, int],
        supports: Sequence[EncodedSupport],
        fusion: str = "vote",
        tau: float = 0.5,
    ) -> NDArray[np.bool_]:
        """The same from the photo's levels (`encode`) and its own (H, W)."""
        # One support after the other: memory stays that of one shot, whatever the number of supports.
        contexts = torch.stack([self.learner.encode(query, support.levels, support.mask) for support in supports])
        if fusion == "joint":
            masks = foreground(resize_logits(self.learner.joint(contexts), size), tau)
        else:
            masks = fuse(torch.stack([self.learner.decode(context) for context in contexts]), size, fusion, tau)
        mask: NDArray[np.bool_] = masks[0].cpu().numpy().astype(bool)
        return mask


@dataclass(frozen=True)
class Work:
    """All that prediction needs beside its photos; may be sent to other processes."""

    checkpoint: Checkpoint
    weights: Weights
    supports: tuple[AnnotatedPhoto, ...]
    fusion: str
    tau: float
    device: str
    settings: str
    """Digest of head, weights, supports, fusion and threshold: masks of other settings are made anew."""

    def open(self) -> Model:
        """Load the head and the backbone, and look at the supports once."""
        recipe = self.checkpoint.recipe
        backbone = open_backbone(recipe, self.weights)
        predictor = Predictor(self.checkpoint.learner(), backbone, recipe.image_size, self.device)
        return Model(predictor, [predictor.encode_support(support) for support in self.supports], self)

    def done_before(self, task: Task) -> Result | None:
        """The task's result, if its files are there and made with these settings of the same photo.

        A mask says in its PNG text what it was made with. It is there whole or not at all, and after its overlay.
        """
        try:
            with Image.open(task.mask) as picture:
                said = json.loads(picture.info.get(_TEXT, "{}"))
            there = said.get("made") == self._made(task) and (task.overlay is None or task.overlay.exists())
            return Result(task, float(said["object_share"]), kept=True) if there else None
        except (OSError, ValueError, TypeError, AttributeError, KeyError):
            return None

    def squeeze(self, photo: Image.Image) -> NDArray[np.uint8]:
        """A photo at network size, (S, S, 3): all that the model needs of it, and the least to send."""
        size = self.checkpoint.recipe.image_size
        return np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR))

    def write(self, task: Task, photo: Image.Image | None, mask: NDArray[np.bool_]) -> Result:
        """Write the overlay, if one is wanted, then the mask (H, W). Raises OSError."""
        task.mask.parent.mkdir(parents=True, exist_ok=True)
        if task.overlay is not None and photo is not None:
            _save(render.overlay(photo, mask), task.overlay, "JPEG", quality=90)
        else:  # one of an earlier mask would tell another story
            task.mask.with_name(task.mask.name.replace(_MASK, _OVERLAY)).unlink(missing_ok=True)
        share = float(mask.mean())
        text = PngInfo()
        text.add_text(_TEXT, json.dumps({"made": self._made(task), "object_share": share}))
        _save(Image.fromarray(mask.astype(np.uint8) * np.uint8(255)), task.mask, pnginfo=text)
        return Result(task, share)

    def _made(self, task: Task) -> str:
        facts = task.query.stat()
        text = f"{self.settings} {facts.st_size} {facts.st_mtime_ns} {os.fsencode(task.query.name)!r}"
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Model:
    """A predictor with its supports."""

    predictor: Predictor
    supports: list[EncodedSupport]
    work: Work

    def mask(self, photo: Image.Image) -> NDArray[np.bool_]:
        """Mask (H, W) of a photo at its own size."""
        return self.predictor.segment(photo, self.supports, self.work.fusion, self.work.tau)

    def masks(self, squeezed: Sequence[NDArray[np.uint8]], sizes: Sequence[tuple[int, int]]) -> list[NDArray[np.bool_]]:
        """Masks of photos that are at network size already (`squeeze`), by their own sizes (H, W).

        The backbone takes as many at a time as in extraction: one on a CPU, which gives the masks of `mask` to the bit.
        """
        network, work, masks = self.predictor.network, self.work, []
        pixels = [network.pixels(Image.fromarray(photo)) for photo in squeezed]
        for first in range(0, len(pixels), network.batch):
            with torch.inference_mode():
                levels = network.levels(pixels[first : first + network.batch])
            for number, size in enumerate(sizes[first : first + network.batch]):
                own = [level[number : number + 1] for level in levels]
                masks.append(self.predictor.segment_levels(own, size, self.supports, work.fusion, work.tau))
        return masks


def _save(picture: Image.Image, path: Path, kind: str = "PNG", **options: Any) -> None:
    with whole(path) as partial:
        picture.save(partial, format=kind, **options)


Pipe = Callable[[Work, Iterator[Task]], Iterator[Result]]
"""Does the work for every task; results in any order. `cluster.predict.RayPipe` is one."""


def in_process(work: Work, tasks: Iterator[Task]) -> Iterator[Result]:
    """One photo after the other, the next ones read ahead on a thread."""
    model = work.open()

    def read(task: Task) -> Result | Image.Image:
        try:
            return work.done_before(task) or read_photo(task.query)
        except HSNetError as error:
            return Result(task, error=str(error))

    with closing(read_ahead(read, tasks, _READ_AHEAD, "photos")) as found:
        for task, photo in found:
            if isinstance(photo, Result):
                yield photo
                continue
            try:
                yield work.write(task, photo, model.mask(photo))
            except HSNetError as error:
                yield Result(task, error=str(error))


def predict(
    checkpoint: Checkpoint,
    weights: Weights,
    supports: Sequence[tuple[Path, Path]],
    queries: Sequence[Path],
    out_dir: Path,
    *,
    fusion: str = "vote",
    tau: float = 0.5,
    overlay: bool = True,
    device: torch.device | str = "cpu",
    pipe: Pipe = in_process,
    on_event: Callable[[int, int], None] | None = None,
) -> PredictSummary:
    """Segment every query photo by the supports' example and write a mask and an overlay for each.

    What is there already, made with the same head, supports and settings of an unchanged photo, is kept: an
    interrupted call goes on when it is given again.

    Args:
        checkpoint: the trained head; its recipe decides backbone and image size.
        weights: backbone weights; must be those of the checkpoint's recipe.
        supports: (photo, mask) files, K >= 1; see `pipeline.datasets.own_support.read_mask` for what counts as object.
        queries: photo files (`pipeline.datasets.queries.list_queries`).
        out_dir: made if missing. `NAME_mask.png` and `NAME_overlay.jpg` per query, NAME from the photo's name, made
            unique when two photos share it; files of other settings with the same names are replaced. More than
            `PER_FOLDER` photos are spread over subfolders. `results.jsonl` has a line per photo as it is done.
        fusion, tau: how several supports make one mask; see `Predictor.segment`.
        overlay: whether to write overlays.
        pipe: does the work; in this process by default.
        on_event: called with (photos done, photos in all).

    A query that cannot be read is logged and listed in the results, and the others are done.

    Raises:
        CheckpointMismatch: other weights or another backbone than the head was trained on. Names both.
        DataError: a support cannot be used, or there is no query.
        ConfigError: no support; out_dir is a file, or the folder that a query lies in.
    """
    started = time.monotonic()
    offered = same_reading(checkpoint.recipe, weights)
    checkpoint.require(offered, f"the backbone {weights.backbone} ({weights.origin})")
    if not supports:
        raise ConfigError("At least one support (a photo with its mask) is needed")
    if not queries:
        raise DataError("There is no query photo")
    _check_out_dir(out_dir, queries)
    read = tuple(read_support(photo, mask) for photo, mask in supports)
    files = [hashlib.sha256(path.read_bytes()).hexdigest() for pair in supports for path in pair]
    settings = json.dumps([1, checkpoint.digest, weights.sha256, files, fusion, tau])
    digest = hashlib.sha256(settings.encode()).hexdigest()
    work = Work(checkpoint, weights, read, fusion, tau, str(device), digest)
    out_dir.mkdir(parents=True, exist_ok=True)
    results = out_dir / RESULTS
    kept, unusable = write_results(pipe(work, tasks_of(queries, out_dir, overlay)), results, len(queries), on_event)
    return PredictSummary(results, len(queries), kept, unusable, len(supports), time.monotonic() - started)


def write_results(
    found: Iterator[Result], path: Path, photos: int, on_event: Callable[[int, int], None] | None = None
) -> tuple[int, int]:
    """Write a line per result as it comes, and keep none; returns how many were kept and how many unusable."""
    path.unlink(missing_ok=True)  # a link is replaced, not followed
    done = kept = unusable = 0
    with path.open("x", encoding="utf-8") as lines, closing(_of(found)) as results:
        for result in results:
            done += 1
            kept += result.kept
            if result.error:
                log.warning("%s", result.error)
                unusable += 1
            lines.write(json.dumps(_line(result)) + "\n")
            lines.flush()
            if on_event:
                on_event(done, photos)
    return kept, unusable


def _of(results: Iterator[Result]) -> Generator[Result, None, None]:
    """The same, to be closed: whatever pipe it is, its work ends with it."""
    yield from results


def tasks_of(queries: Sequence[Path], out_dir: Path, overlay: bool) -> Iterator[Task]:
    """Photos and where their masks go, one by one."""
    for query, name in zip(queries, names_of(queries), strict=True):
        folder = out_dir / subfolder(name, len(queries))
        yield Task(query, folder / f"{name}{_MASK}", folder / f"{name}{_OVERLAY}" if overlay else None)


def subfolder(name: str, photos: int) -> str:
    """Where outputs of a name go among so many photos: "" for few; otherwise one of 256, or of 65,536, by its digest.

    >>> subfolder("dog", 4), subfolder("dog", 100_000), subfolder("dog", 100_000_000)
    ('', 'cd', 'cd63')
    """
    digits = 0 if photos <= PER_FOLDER else 2 if photos <= 100 * PER_FOLDER else 4
    return hashlib.sha256(name.encode()).hexdigest()[:digits]


def _line(result: Result) -> dict[str, Any]:
    task = result.task
    if result.error:
        return {"query": str(task.query), "error": result.error}
    return {
        "query": str(task.query),
        "mask": str(task.mask),
        "overlay": task.overlay and str(task.overlay),
        "object_share": result.object_share,
        "kept": result.kept,
    }


def read_results(path: Path) -> Iterator[Prediction | tuple[Path, str]]:
    """Predictions, and (photo, reason) of those that could not be used, from a file of results; one at a time.

    Raises:
        DataError: it cannot be read, or is no such file.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                said = json.loads(line)
                if "error" in said:
                    yield Path(said["query"]), str(said["error"])
                else:
                    overlay = said["overlay"] and Path(said["overlay"])
                    yield Prediction(Path(said["query"]), Path(said["mask"]), overlay, float(said["object_share"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no file of results of `hsnet predict`, or it is cut off: {error}") from error


def _check_out_dir(out_dir: Path, queries: Sequence[Path]) -> None:
    if out_dir.exists() and not out_dir.is_dir():
        raise ConfigError(f"The output {out_dir} is a file; give a folder")
    parents = queries.folders if isinstance(queries, Queries) else {query.parent for query in queries}
    if any(parent.resolve() == out_dir.resolve() for parent in parents):
        raise ConfigError(
            f"The output folder {out_dir} is a query's own folder: its masks would be taken for photos next time. "
            "Give another folder. Nothing was written."
        )
