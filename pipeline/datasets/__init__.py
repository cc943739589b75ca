"""Data sets by name. Nothing heavy is imported until one is opened."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from hsnet.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from pipeline.datasets.index import DatasetIndex

DATASETS: dict[str, str] = {
    "pascal": "pipeline.datasets.pascal:Pascal",
    "coco": "pipeline.datasets.coco:Coco",
    "fss": "pipeline.datasets.fss:Fss",
    "folder": "pipeline.datasets.folder:Folder",
    "shapes": "pipeline.datasets.shapes:Shapes",
}
"""Name -> where its reader is. Adding a data set is adding a line and a module."""


class Dataset(Protocol):
    """Images with label maps, by their number in the index. Can be pickled: every worker gets a copy."""

    @property
    def index(self) -> DatasetIndex:
        """Classes, images and lists."""
        ...

    def image(self, i: int, /) -> Image.Image:
        """Image `i` as RGB at its own size. Raises DataError naming the file."""
        ...

    def label(self, i: int, /) -> np.ndarray:
        """Label map (H, W) of image `i`, `index.label_dtype`: 0 background, class id + 1, `index.ignore_label`.

        Of the image's size or a scaled copy of it: from there it is resized to network size once, as published.

        Raises DataError naming the file.
        """
        ...


def reader_of(name: str) -> str:
    """The reader that made a data set of this name (`DatasetIndex.name` begins with it); may be none of `DATASETS`."""
    return name.partition(" ")[0]


def open_dataset(name: str, root: Path | None, splits: Path | None = None, **options: Any) -> Dataset:
    """Open a data set for reading.

    Args:
        name: pascal, coco, fss, folder or shapes.
        root: its folder, see the reader of that name. None for shapes, which is generated.
        splits: folder with the published code's split files (pascal, coco, fss); None derives the lists from the
            data set by the reader's rule.
        options: passed to the reader, such as `min_object_share`.

    Raises:
        ConfigError: no such data set or option, or root missing.
        DataError: the folder is not such a data set.
    """
    if name not in DATASETS:
        raise ConfigError(f"No data set '{name}': choose one of {', '.join(DATASETS)}.")
    module, _, class_name = DATASETS[name].partition(":")
    reader = getattr(import_module(module), class_name)
    given = {"root": root, "splits": splits}
    takes = {p: spec for p, spec in inspect.signature(reader).parameters.items() if p not in given}
    odd = sorted(set(options) - set(takes))
    if odd:
        raise ConfigError(f"Data set '{name}' has no option '{odd[0]}'; it has: {', '.join(takes) or 'none'}.")
    parameters = inspect.signature(reader).parameters
    if "root" in parameters and root is None:
        raise ConfigError(f"Data set '{name}' needs its folder (--data-root).")
    if "splits" not in parameters and splits is not None:
        raise ConfigError(f"Data set '{name}' has no published split files; leave --splits out.")
    dataset: Dataset = reader(**{p: value for p, value in given.items() if p in parameters}, **options)
    return dataset
