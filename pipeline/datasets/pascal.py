"""PASCAL-5i: a VOC2012 tree in four folds, and any other data set laid out like it.

    VOC2012/JPEGImages/<name>.jpg
    VOC2012/SegmentationClassAug/<name>.png     class numbers from 1, 0 background, 255 boundary
    VOC2012/ImageSets/Segmentation/val.txt      and, if there is one, trainaug.txt
    classes.json                                in or beside VOC2012: {"1": "aeroplane", ...}; 20 VOC names without

Fold f holds out a quarter of the classes: 5f .. 5f+4 of the 20. Lists come from the published code's split files,
or, without `splits`, from the masks by this rule: images of val.txt are for testing; those of trainaug.txt, or
without it every other mask there is, are for training; an image is listed for each class that covers at least
`min_object_share` of it; order by image name, then class.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from hsnet.errors import DataError
from pipeline.datasets.images import class_label, image_size, read_image, read_index_mask, require_same_size
from pipeline.datasets.index import DatasetIndex, label_dtype
from pipeline.datasets.listing import MIN_OBJECT_SHARE, listed_classes, read_image_names, require_files
from pipeline.datasets.splits import Lists, fold_index, pascal_lists

FOLDS = 4
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining table", "dog",
    "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor",
)  # fmt: skip


class Pascal:
    """PASCAL-5i as a `Dataset`.

    Args:
        root: the VOC2012 folder, or the one that holds it (itself or in VOCdevkit).
        splits: folder with the published split files, or None for the rule above.
        min_object_share: for the rule: smallest share of the image that a listed class covers.

    Raises:
        DataError: no such tree, files missing, lists that do not fit. Everything listed is looked for here, so
            that a wrong folder is found at once and not in the middle of a run.
    """

    def __init__(self, root: Path, splits: Path | None = None, *, min_object_share: float = MIN_OBJECT_SHARE) -> None:
        tree = _tree(Path(root))
        self.photos = tree / "JPEGImages"
        self.masks, notes = _mask_folder(tree)
        self.classes = read_classes(tree)
        if splits is not None:
            self.index = pascal_index(Path(splits), self.classes)
        else:
            trn, val, rule = self._derived(tree, min_object_share)
            self.index = _index(trn, val, self.classes, (*notes, *rule))
        require_files([f"{name}.jpg" for name in self.index.images], self.photos, "photos")
        require_files([f"{name}.png" for name in self.index.images], self.masks, "masks")

    def image(self, i: int) -> Image.Image:
        return read_image(self._photo(self.index.images[i]))

    def label(self, i: int) -> np.ndarray:
        name = self.index.images[i]
        label = self._label(name)
        photo = self._photo(name)
        require_same_size(photo, image_size(photo), self._mask(name), (label.shape[0], label.shape[1]))
        return label

    def _photo(self, name: str) -> Path:
        return self.photos / f"{name}.jpg"

    def _mask(self, name: str) -> Path:
        return self.masks / f"{name}.png"

    def _label(self, name: str) -> np.ndarray:
        path = self._mask(name)
        return class_label(read_index_mask(path), path, self.classes, ignore=True)

    def _derived(self, tree: Path, min_share: float) -> tuple[Lists, Lists, tuple[str, ...]]:
        lists = tree / "ImageSets" / "Segmentation"
        test = sorted(set(read_image_names(lists / "val.txt")))
        held_out = set(test)
        if (lists / "trainaug.txt").is_file():
            train = sorted(set(read_image_names(lists / "trainaug.txt")))
            origin = "trainaug.txt"
        else:
            train = sorted(path.stem for path in self.masks.glob("*.png") if path.stem not in held_out)
            origin = f"every mask of {self.masks.name} that is not in val.txt"
        both = held_out.intersection(train)
        if both:
            raise DataError(f"{lists}: {len(both)} images are in trainaug.txt and in val.txt, such as {min(both)}.")
        require_files([f"{name}.png" for name in (*test, *train)], self.masks, "masks")
        rule = (
            f"Lists by rule, not the published ones: training images are {origin} ({len(train)}), test images val.txt "
            f"({len(test)}); a class counts from {min_share:.2%} of the image."
        )
        return self._listed(train, min_share), self._listed(test, min_share), (rule,)

    def _listed(self, names: list[str], min_share: float) -> Lists:
        ignore = int(np.iinfo(label_dtype(self.classes)).max)
        class_lists = listed_classes(lambda i: self._label(names[i]), len(names), ignore, min_share)
        lists: Lists = {fold: [] for fold in range(FOLDS)}
        for name, class_ids in zip(names, class_lists, strict=True):
            for class_id in class_ids:
                lists[_fold_of(class_id, self.classes)].append((name, class_id))
        return lists


def pascal_index(splits: Path, classes: Mapping[int, str] | None = None) -> DatasetIndex:
    """The index of the published split files alone; looks at no photo. Classes: VOC's 20 unless given."""
    names = dict(classes) if classes is not None else dict(enumerate(VOC_CLASSES))
    trn, val = pascal_lists(splits, "trn", names), pascal_lists(splits, "val", names)
    for side, lists in (("trn", trn), ("val", val)):
        for fold, entries in lists.items():
            _require_fold_classes(splits, side, fold, entries, names)
    return _index(trn, val, names, ())


def read_classes(tree: Path) -> dict[int, str]:
    """Class id -> name from classes.json in or beside the tree; VOC's 20 names if there is none.

    The file holds {"1": "name", ...}, keys being mask values, or a list of names for mask values 1, 2, ...

    Raises:
        DataError: another content, or a number of classes that does not divide into four folds.
    """
    path = next(
        (folder / "classes.json" for folder in (tree, tree.parent) if (folder / "classes.json").is_file()), None
    )
    if path is None:
        return dict(enumerate(VOC_CLASSES))
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        items = raw.items() if isinstance(raw, dict) else enumerate(raw, 1)
        classes = {int(value) - 1: name for value, name in items}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f'{path} must hold {{"1": "name", ...}} or a list of names: {error}.') from error
    if sorted(classes) != list(range(len(classes))) or not all(isinstance(n, str) for n in classes.values()):
        raise DataError(f"{path}: mask values must be 1, 2, ... without a gap, each with a name.")
    if not classes or len(classes) % FOLDS:
        raise DataError(
            f"{path} has {len(classes)} classes; the VOC layout needs a multiple of {FOLDS}, one share per fold. "
            f"Use the data set type `folder` with folds of your own."
        )
    return dict(sorted(classes.items()))


def _tree(root: Path) -> Path:
    for tree in (root, root / "VOC2012", root / "VOCdevkit" / "VOC2012"):
        if (tree / "JPEGImages").is_dir():
            return tree
    raise DataError(f"{root} is not a VOC tree: no JPEGImages in it, in VOC2012 or in VOCdevkit/VOC2012.")


def _mask_folder(tree: Path) -> tuple[Path, tuple[str, ...]]:
    if (tree / "SegmentationClassAug").is_dir():
        return tree / "SegmentationClassAug", ()
    if (tree / "SegmentationClass").is_dir():
        note = "Masks from SegmentationClass: without SBD's, which `hsnet prepare voc` adds as SegmentationClassAug."
        return tree / "SegmentationClass", (note,)
    raise DataError(f"{tree} has no SegmentationClassAug; `hsnet prepare voc` makes it from VOC and SBD.")


def _fold_of(class_id: int, classes: Mapping[int, str]) -> int:
    return class_id * FOLDS // len(classes)


def _novel(fold: int, classes: Mapping[int, str]) -> tuple[int, ...]:
    return tuple(class_id for class_id in sorted(classes) if _fold_of(class_id, classes) == fold)


def _require_fold_classes(
    splits: Path, side: str, fold: int, entries: Iterable[tuple[str, int]], classes: Mapping[int, str]
) -> None:
    if fold >= FOLDS:
        raise DataError(f"{splits}: {side}/fold{fold}.txt, but PASCAL-5i has folds 0 to {FOLDS - 1}.")
    novel = _novel(fold, classes)
    for name, class_id in entries:
        if class_id not in novel:
            raise DataError(
                f"{splits}: {side}/fold{fold}.txt lists image {name} with class {class_id + 1}, but the file of fold "
                f"{fold} holds classes {novel[0] + 1} to {novel[-1] + 1} only. Is it a file of another data set?"
            )


def _index(trn: Lists, val: Lists, classes: Mapping[int, str], notes: tuple[str, ...]) -> DatasetIndex:
    images = {name for lists in (trn, val) for listed in lists.values() for name, _ in listed}
    train: dict[int, list[tuple[str, int]] | None] = {}
    for fold in range(FOLDS):
        others = [trn.get(g) for g in range(FOLDS) if g != fold]
        parts = [part for part in others if part is not None]
        train[fold] = [entry for part in parts for entry in part] if len(parts) == len(others) else None
    test = {fold: val.get(fold) for fold in range(FOLDS)}
    novel = partial(_novel, classes=classes)
    return fold_index("pascal", train, test, novel, classes, images, "fold{}.txt", notes, has_ignore=True)
