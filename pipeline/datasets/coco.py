"""COCO-20i: COCO 2014 in four folds of 20 classes.

    train2014/COCO_train2014_*.jpg, val2014/COCO_val2014_*.jpg
    annotations/{train2014,val2014}/*.png         class-number masks, class id + 1 (`hsnet prepare coco`), or
    annotations/instances_{train,val}2014.json    the official annotations (rules: pipeline.datasets.instances)

Class id k, 0..79, counts the categories in order of their id; fold f holds out f, f+4, ..., f+76. Mask value 255 is
background, as the published code counts it: COCO-20i has no ignore label.

Lists come from the published code's pickles, or, without `splits`, from the masks: train2014 is for training,
val2014 for testing, and an image is listed for each class that covers at least `min_object_share` of it. In PNG
masks its visible pixels are counted; from JSON its annotated areas are summed, crowds left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline.datasets.images import class_label, image_size, read_image, read_index_mask, require_same_size
from pipeline.datasets.index import DatasetIndex
from pipeline.datasets.instances import InstanceMasks
from pipeline.datasets.listing import MIN_OBJECT_SHARE, listed_classes, require_files, require_share
from pipeline.datasets.splits import Lists, coco_lists, fold_index

FOLDS = 4
SIDES = {"trn": "train2014", "val": "val2014"}
COCO_CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "mouse", "remote", "keyboard", "cell phone", "microwave", "oven", "toaster", "sink",
    "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)  # fmt: skip


class Coco:
    """COCO-20i as a `Dataset`.

    Args:
        root: the folder of train2014, val2014 and annotations, or the one that holds it as COCO2014.
        splits: folder with the published pickles, or None for the rule above.
        masks: "png", "json", or "auto": PNG if there are any.
        min_object_share: for the rule: smallest share of the image that a listed class covers.

    Raises:
        DataError: no such tree, files missing, lists that do not fit.
        ConfigError: `masks` is something else.
    """

    def __init__(
        self,
        root: Path,
        splits: Path | None = None,
        *,
        masks: str = "auto",
        min_object_share: float = MIN_OBJECT_SHARE,
    ) -> None:
        if masks not in ("auto", "png", "json"):
            raise ConfigError(f"masks is '{masks}', must be auto, png or json.")
        require_share(min_object_share, "min_object_share")
        self.root = _tree(Path(root))
        annotations = self.root / "annotations"
        has_png = any((annotations / side).is_dir() for side in SIDES.values())
        self.instances: dict[str, InstanceMasks] = {}
        if masks == "json" or (masks == "auto" and not has_png):
            self.instances = _instances(annotations)
        elif not has_png:
            raise DataError(f"{annotations} has no masks in train2014 or val2014; `hsnet prepare coco` makes them.")
        self.classes = _common_classes(self.instances)
        if splits is not None:
            self.index = coco_index(Path(splits), self.classes)
        else:
            self.index = self._derived(min_object_share)
        require_files(self.index.images, self.root, "photos")
        if not self.instances:
            require_files([_png(name) for name in self.index.images], self.root, "masks")

    def image(self, i: int) -> Image.Image:
        return read_image(self.root / self.index.images[i])

    def label(self, i: int) -> np.ndarray:
        name = self.index.images[i]
        label = self._label(name)
        origin = self.instances[name.split("/")[0]].path if self.instances else self.root / _png(name)
        photo = self.root / name
        require_same_size(photo, image_size(photo), origin, (label.shape[0], label.shape[1]))
        return label

    def _label(self, name: str) -> np.ndarray:
        if self.instances:
            side, _, file = name.partition("/")
            if side not in self.instances:
                raise DataError(f"{name} is not in {' or '.join(self.instances)}: no annotations for it.")
            return self.instances[side].label(file)
        path = self.root / _png(name)
        return class_label(read_index_mask(path), path, self.classes, ignore=False, as_background=(255,))

    def _derived(self, min_share: float) -> DatasetIndex:
        listed = {side: self._listed(folder, min_share) for side, folder in SIDES.items()}
        novel = {fold: _novel(fold, self.classes) for fold in range(FOLDS)}
        trn: Lists = {}
        val: Lists = {}
        for fold, held_out in novel.items():
            trn[fold] = [entry for entry in listed["trn"] if entry[1] not in held_out]
            val[fold] = [entry for entry in listed["val"] if entry[1] in held_out]
        rule = f"Lists by rule, not the published ones: a class counts from {min_share:.2%} of the image."
        return _index(trn, val, self.classes, (rule,))

    def _listed(self, side: str, min_share: float) -> list[tuple[str, int]]:
        if self.instances:
            if side not in self.instances:
                return []
            masks = self.instances[side]
            classes_of = {f"{side}/{file}": masks.listed_classes(file, min_share) for file in masks.files}
        else:
            files = sorted((self.root / "annotations" / side).glob("*.png"))
            names = [f"{side}/{path.stem}.jpg" for path in files]
            classes = listed_classes(lambda i: self._label(names[i]), len(names), 255, min_share)
            classes_of = dict(zip(names, classes, strict=True))
        entries = [(name, class_id) for name, class_ids in classes_of.items() for class_id in class_ids]
        return sorted(entries, key=lambda entry: (entry[1], entry[0]))


def coco_index(splits: Path, classes: Mapping[int, str] | None = None) -> DatasetIndex:
    """The index of the published split files alone; looks at no photo. Classes: COCO's 80 unless given."""
    names = dict(classes) if classes is not None else dict(enumerate(COCO_CLASSES))
    trn, val = coco_lists(splits, "trn", names), coco_lists(splits, "val", names)
    for side, lists in (("trn", trn), ("val", val)):
        for fold, entries in lists.items():
            if fold >= FOLDS:
                raise DataError(f"{splits}: {side}/fold{fold}.pkl, but COCO-20i has folds 0 to {FOLDS - 1}.")
            odd = next((entry for entry in entries if (entry[1] % FOLDS == fold) != (side == "val")), None)
            if odd is not None:
                raise DataError(
                    f"{splits}: {side}/fold{fold}.pkl lists {odd[0]} for class {odd[1]}, which is "
                    f"{'not ' if side == 'val' else ''}one of the classes that fold {fold} holds out "
                    f"({fold}, {fold + FOLDS}, ...). Is it a file of another fold or data set?"
                )
    return _index(trn, val, names, ())


def _tree(root: Path) -> Path:
    for tree in (root, root / "COCO2014"):
        if any((tree / side).is_dir() for side in SIDES.values()):
            return tree
    raise DataError(f"{root} is not a COCO tree: neither train2014 nor val2014 in it or in COCO2014.")


def _instances(annotations: Path) -> dict[str, InstanceMasks]:
    paths = {side: annotations / f"instances_{side}.json" for side in SIDES.values()}
    instances = {side: InstanceMasks(path) for side, path in paths.items() if path.is_file()}
    if not instances:
        raise DataError(
            f"No masks in {annotations}: neither PNG in train2014 and val2014 nor "
            f"{' or '.join(path.name for path in paths.values())}."
        )
    return instances


def _common_classes(instances: Mapping[str, InstanceMasks]) -> dict[int, str]:
    if not instances:
        return dict(enumerate(COCO_CLASSES))
    first, *others = instances.values()
    for other in others:
        if other.classes != first.classes:
            raise DataError(f"{first.path} and {other.path} have different categories.")
    return first.classes


def _novel(fold: int, classes: Mapping[int, str]) -> tuple[int, ...]:
    return tuple(class_id for class_id in sorted(classes) if class_id % FOLDS == fold)


def _png(name: str) -> str:
    return f"annotations/{name.rpartition('.')[0]}.png"


def _index(trn: Lists, val: Lists, classes: Mapping[int, str], notes: tuple[str, ...]) -> DatasetIndex:
    images = {name for lists in (trn, val) for listed in lists.values() for name, _ in listed}
    train, test = ({fold: lists.get(fold) for fold in range(FOLDS)} for lists in (trn, val))
    novel = partial(_novel, classes=classes)
    return fold_index("coco", train, test, novel, classes, images, "fold{}.pkl", notes, query_order="class")
