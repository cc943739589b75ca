"""Class-number masks from official sources, where the data sets do not come with them.

    prepare_voc    VOC2012's SegmentationClass + SBD's .mat files  ->  SegmentationClassAug/*.png, trainaug.txt
    prepare_coco   COCO's instances JSON                           ->  annotations/{train2014,val2014}/*.png

Every mask is written under another name first and then renamed, so that a mask that is there is whole; running
again writes only what is missing. Counts are compared with those of the published data sets before anything is
written. Masks are palette PNGs in VOC's colours: pixel values are class numbers, and a viewer shows them apart.
"""

from __future__ import annotations

import logging
import os
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import scipy.io
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline.common.files import replace_text, whole
from pipeline.datasets.images import class_label, image_size, read_index_mask, require_same_size
from pipeline.datasets.instances import InstanceMasks
from pipeline.datasets.listing import read_image_names, require_files

VOC_TRAIN_AUG = 10_582
VOC_VAL = 1_449
COCO_IMAGES = {"instances_train2014": 82_783, "instances_val2014": 40_504}
COCO_CATEGORIES = 80
COUNT_RULES = ("warn", "fail")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareSummary:
    """What was made."""

    masks: Path
    """Folder of the masks."""
    counts: Mapping[str, tuple[int, int]]
    """What was counted -> (found, in the published data set)."""
    written: int
    kept: int
    """Masks that were there already."""
    notes: tuple[str, ...]
    """Counts that differ, masks that were left out."""
    seconds: float


def prepare_voc(
    voc: Path,
    sbd: Path,
    out: Path | None = None,
    *,
    counts: str = "warn",
    on_event: Callable[[int, int], None] | None = None,
) -> PrepareSummary:
    """Make SegmentationClassAug: VOC's own masks, and SBD's for images without one.

    trainaug.txt lists every image with a mask that is not in VOC's val.txt. With the whole of VOC2012 and SBD these
    are 10,582 training and 1,449 test images. VOC masks keep their boundary (255); SBD masks have none.

    Args:
        voc: VOC2012, or the folder that holds it.
        sbd: SBD's folder (benchmark_RELEASE), or its `dataset` folder.
        out: tree to write into; None is `voc` itself. Another tree gets a link to VOC's photos.
        counts: what other numbers than the published ones do: "warn" or "fail" (nothing is written then).
        on_event: called with (masks done, masks in all) after every mask.

    Raises:
        DataError: a source is missing or broken, a mask does not fit its photo, or other counts with "fail".
        ConfigError: `counts` is something else.
    """
    started = time.monotonic()
    _require_rule(counts)
    tree = _folder(voc, ("JPEGImages",), "", "VOC2012", "VOCdevkit/VOC2012")
    extra = _folder(sbd, ("cls",), "", "dataset", "benchmark_RELEASE/dataset") / "cls"
    voc_masks = {path.stem: path for path in sorted((tree / "SegmentationClass").glob("*.png"))}
    sbd_masks = {path.stem: path for path in sorted(extra.glob("*.mat"))}
    if not voc_masks or not sbd_masks:
        raise DataError(
            f"No masks: {len(voc_masks)} PNG in {tree / 'SegmentationClass'}, {len(sbd_masks)} .mat in {extra}."
        )
    photos = {path.stem for path in (tree / "JPEGImages").glob("*.jpg")}
    without = sorted((set(voc_masks) | set(sbd_masks)) - photos)
    names = sorted((set(voc_masks) | set(sbd_masks)) & photos)
    val = read_image_names(tree / "ImageSets" / "Segmentation" / "val.txt")
    train = sorted(set(names) - set(val))
    require_files([f"{name}.png" for name in val], tree / "SegmentationClass", "masks of val.txt")
    counted = {"train_aug": (len(train), VOC_TRAIN_AUG), "val": (len(val), VOC_VAL)}
    notes = _check_counts(counted, counts, "VOC2012 with SBD")
    if without:
        notes += (f"{len(without)} masks have no photo in JPEGImages and were left out, such as {without[0]}.",)

    target = tree if out is None else Path(out)
    masks = target / "SegmentationClassAug"

    def draw(name: str) -> np.ndarray:
        source = voc_masks.get(name) or sbd_masks[name]
        mask = read_index_mask(source) if name in voc_masks else read_sbd_mask(source)
        label = class_label(mask, source, range(20), ignore=name in voc_masks)
        photo = tree / "JPEGImages" / f"{name}.jpg"
        require_same_size(photo, image_size(photo), source, (label.shape[0], label.shape[1]))
        return label

    masks.mkdir(parents=True, exist_ok=True)
    if target != tree:
        _link(tree / "JPEGImages", target / "JPEGImages")
    written, kept = _write_all({name: masks / f"{name}.png" for name in names}, draw, on_event)
    # The lists last: with them the tree is complete.
    lists = target / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True, exist_ok=True)
    if target != tree:
        _write_text(lists / "val.txt", val)
    _write_text(lists / "trainaug.txt", train)
    return PrepareSummary(masks, counted, written, kept, notes, time.monotonic() - started)


def prepare_coco(
    annotations: Path,
    photos: Path,
    out: Path,
    *,
    counts: str = "warn",
    on_event: Callable[[int, int], None] | None = None,
) -> PrepareSummary:
    """Draw the masks of one instances JSON, by the rules of `pipeline.datasets.instances`.

    For COCO-20i once for each side, such as annotations/instances_train2014.json with train2014 into
    annotations/train2014. A mask is written for every image of the JSON, an empty one where there is no object.

    Args:
        annotations: the JSON.
        photos: folder of its images; each must be there and have the size the JSON states.
        out: folder for the masks.
        counts: what other numbers of images and categories than COCO 2014's do, if the file has the name of one
            of its two: "warn" or "fail" (nothing is written then).
        on_event: called with (masks done, masks in all) after every mask.

    Raises:
        DataError: the JSON or a photo is missing or broken, or other counts with "fail".
        ConfigError: `counts` is something else.

    Memory: the parsed JSON, about 1 GB for COCO's training images, more while it is parsed.
    """
    started = time.monotonic()
    _require_rule(counts)
    annotations, photos, out = Path(annotations), Path(photos), Path(out)
    instances = InstanceMasks(annotations)
    files = instances.files
    counted: dict[str, tuple[int, int]] = {}
    if annotations.stem in COCO_IMAGES:
        counted["images"] = (len(files), COCO_IMAGES[annotations.stem])
        counted["categories"] = (len(instances.classes), COCO_CATEGORIES)
    notes = _check_counts(counted, counts, "COCO 2014")
    require_files(files, photos, "photos")
    targets = {file: out / f"{file.rpartition('.')[0] or file}.png" for file in files}
    if len(set(targets.values())) != len(targets):
        raise DataError(
            f"{annotations}: two images differ in their suffix alone, so that their masks would be one file."
        )

    def draw(file: str) -> np.ndarray:
        require_same_size(photos / file, image_size(photos / file), annotations, instances.size(file))
        return instances.label(file)

    for folder in {path.parent for path in targets.values()} | {out}:
        folder.mkdir(parents=True, exist_ok=True)
    written, kept = _write_all(targets, draw, on_event)
    return PrepareSummary(out, counted, written, kept, notes, time.monotonic() - started)


def read_sbd_mask(path: Path) -> np.ndarray:
    """The class numbers (H, W) uint8 of one of SBD's .mat files: GTcls.Segmentation.

    Raises:
        DataError: missing, not a .mat file, or without that field.
    """
    try:
        with path.open("rb") as file:  # given a path, loadmat hides why it cannot open it
            mask = scipy.io.loadmat(file, variable_names=["GTcls"])["GTcls"]["Segmentation"][0, 0]
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing.") from error
    except KeyError as error:
        raise DataError(f"{path} has no {error}: not a class mask of SBD (dataset/cls).") from error
    except (
        OSError, ValueError, TypeError, IndexError, EOFError, NotImplementedError, OverflowError, MemoryError,
        AttributeError, zlib.error, scipy.io.matlab.MatReadError,
    ) as error:  # fmt: skip
        raise DataError(f"{path} cannot be read as a .mat file: {error or type(error).__name__}.") from error
    if not isinstance(mask, np.ndarray) or mask.dtype != np.uint8 or mask.ndim != 2:
        raise DataError(f"{path}: GTcls.Segmentation is not a map of whole numbers from 0 to 255.")
    return np.ascontiguousarray(mask)


def _write_all(
    targets: Mapping[str, Path],
    draw: Callable[[str], np.ndarray],
    on_event: Callable[[int, int], None] | None,
) -> tuple[int, int]:
    there: dict[Path, set[str]] = {}
    for path in targets.values():
        if path.parent not in there:
            there[path.parent] = {entry.name for entry in os.scandir(path.parent)}
    missing = [name for name, path in targets.items() if path.name not in there[path.parent]]
    kept = len(targets) - len(missing)

    def make(name: str) -> None:
        _write_mask(targets[name], draw(name))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        waiting = [threads.submit(make, name) for name in missing]
        try:
            for done, future in enumerate(waiting, kept + 1):
                future.result()
                if on_event is not None:
                    on_event(done, len(targets))
        finally:
            for future in waiting:
                future.cancel()
    return len(missing), kept


def _write_mask(path: Path, label: np.ndarray) -> None:
    image = Image.fromarray(label)
    if label.dtype == np.uint8:
        image.putpalette(_palette())
    try:
        with whole(path) as partial:
            image.save(partial, "PNG")
    except OSError as error:
        raise DataError(
            f"{path} cannot be written: {error}. Masks written so far are whole; run again to finish."
        ) from error


def _write_text(path: Path, lines: Sequence[str]) -> None:
    try:
        replace_text(path, "".join(f"{line}\n" for line in lines))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error}.") from error


def _link(photos: Path, link: Path) -> None:
    if link.exists():
        return
    try:
        link.symlink_to(photos.absolute(), target_is_directory=True)
    except OSError as error:
        raise DataError(f"{link} cannot be made as a link to {photos}: {error}. Copy the photos there.") from error


@lru_cache(maxsize=1)
def _palette() -> bytes:
    """VOC's colours: bit 3k of a value goes to red, 3k+1 to green, 3k+2 to blue, from the highest colour bit down."""
    colours = bytearray()
    for value in range(256):
        for channel in range(3):
            colours.append(sum((value >> (3 * k + channel) & 1) << (7 - k) for k in range(3)))
    return bytes(colours)


def _folder(root: Path, holds: tuple[str, ...], *places: str) -> Path:
    for inner in places:
        folder = Path(root) / inner if inner else Path(root)
        if all((folder / name).is_dir() for name in holds):
            return folder
    where = ", ".join(inner or "." for inner in places)
    raise DataError(f"{root} does not hold {' and '.join(holds)} (looked in {where}).")


def _require_rule(counts: str) -> None:
    if counts not in COUNT_RULES:
        raise ConfigError(f"counts is '{counts}', must be one of {', '.join(COUNT_RULES)}.")


def _check_counts(counted: Mapping[str, tuple[int, int]], rule: str, what: str) -> tuple[str, ...]:
    wrong = [f"{name} {have:,} instead of {want:,}" for name, (have, want) in counted.items() if have != want]
    if not wrong:
        return ()
    text = f"These are not the counts of {what}: {', '.join(wrong)}."
    if rule == "fail":
        raise DataError(f"{text} Complete the sources, or allow other counts. Nothing was written.")
    log.warning(text)
    return (text,)
