"""FSS-1000: 1000 classes, ten photos each with one object.

    FSS-1000/<class>/{1..10}.jpg    with {1..10}.png: object from grey value 128 on

Lists come from the published code's trn.txt, val.txt and test.txt, or, without `splits`, by this rule: classes in
order of the sha256 of their name, the first 52 % for training, the next 24 % for choosing a model, the rest for
testing (the published proportions, 520/240/240). There is one fold, 0. Photos of a class are listed sorted as text:
1, 10, 2, ..., as the published code does.

Class ids: place in the sorted list of the split, + 0 for training, + 520 for val, + 760 for test; later offsets are
larger where a list is longer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from hsnet.errors import DataError
from pipeline.datasets.images import image_size, read_binary_mask, read_image, require_same_size, same_aspect
from pipeline.datasets.index import DatasetIndex, Split, small_class_notes
from pipeline.datasets.listing import require_files
from pipeline.datasets.splits import fss_lists

OFFSETS = {"trn": 0, "val": 520, "test": 760}


class Fss:
    """FSS-1000 as a `Dataset`.

    Args:
        root: the folder of the class folders, or the one that holds it as FSS-1000.
        splits: folder with the published lists, or None for the rule above.

    Raises:
        DataError: no class folders, a listed class or a mask missing.
    """

    def __init__(self, root: Path, splits: Path | None = None) -> None:
        root = Path(root)
        self.root = root / "FSS-1000" if (root / "FSS-1000").is_dir() else root
        folders = _class_folders(self.root)
        notes: tuple[str, ...] = ()
        if splits is not None:
            lists = fss_lists(Path(splits))
            missing = [name for names in lists.values() for name in names if name not in folders]
            if missing:
                raise DataError(
                    f"{self.root} lacks {len(missing)} of the listed classes: {', '.join(missing[:5])}"
                    f"{', ...' if len(missing) > 5 else ''}."
                )
        else:
            lists = _derived(folders)
            counts = ", ".join(f"{role} {len(names)}" for role, names in lists.items())
            notes = (f"Classes split by rule, not as published: {counts}.",)
        self.index = fss_index(lists, lambda name: _photos(self.root / name), notes)
        require_files([_mask(name) for name in self.index.images], self.root, "masks")
        self._class_of = {image: c for split in self.index.splits[0].values() for image, c in split.entries}

    def image(self, i: int) -> Image.Image:
        return read_image(self.root / self.index.images[i])

    def label(self, i: int) -> np.ndarray:
        """Label map as in `Dataset`. A mask may be a scaled copy of its photo (same aspect ratio), of its own size."""
        name = self.index.images[i]
        photo, path = self.root / name, self.root / _mask(name)
        mask = read_binary_mask(path)
        size, mask_size = image_size(photo), (mask.shape[0], mask.shape[1])
        if not same_aspect(size, mask_size):
            require_same_size(photo, size, path, mask_size)
        return (mask * (self._class_of[i] + 1)).astype(self.index.label_dtype)


def fss_index(
    lists: Mapping[str, Sequence[str]], photos: Callable[[str], Sequence[str]], notes: tuple[str, ...] = ()
) -> DatasetIndex:
    """The index of class lists (role -> sorted names), where `photos` gives the files of a class, sorted as text."""
    classes: dict[int, str] = {}
    images: list[str] = []
    splits: dict[str, Split] = {}
    end = 0
    for role, offset in OFFSETS.items():
        names = lists.get(role, ())
        start = max(offset, end)
        end = start + len(names)
        entries = []
        for class_id, name in enumerate(names, start):
            classes[class_id] = name
            for photo in photos(name):
                entries.append((len(images), class_id))
                images.append(f"{name}/{photo}")
        splits[role] = Split(tuple(entries), tuple(range(start, end)))
        if not names:
            notes = (*notes, f"No classes for '{role}'.")
    return DatasetIndex(
        name="fss",
        classes=classes,
        images=tuple(images),
        splits={0: splits},
        query_order="list",
        notes=(*notes, *small_class_notes({0: splits}, classes)),
    )


def _class_folders(root: Path) -> list[str]:
    if not root.is_dir():
        raise DataError(f"{root} is not a folder.")
    folders = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not any(any((root / name).glob("*.jpg")) for name in folders):
        raise DataError(f"{root} is not an FSS-1000 tree: no folder in it holds *.jpg.")
    return folders


def _photos(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.jpg") if not path.name.startswith("."))


def _mask(name: str) -> str:
    return f"{name.rpartition('.')[0]}.png"


def _derived(folders: Sequence[str]) -> dict[str, list[str]]:
    order = sorted(folders, key=lambda name: hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest())
    first, second = round(len(order) * 0.52), round(len(order) * 0.76)
    return {"trn": sorted(order[:first]), "val": sorted(order[first:second]), "test": sorted(order[second:])}
