"""What rows were made from, opened again and checked against them: the store, the head, the photos."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from hsnet.errors import DataError, HSNetError, StoreError
from pipeline.report.inputs import as_dict
from pipeline.scores.rows import Results

if TYPE_CHECKING:
    from pipeline.datasets import Dataset
    from pipeline.heads.segmenters import Segmenter
    from pipeline.loading.source import StoreSource


@dataclass(frozen=True)
class Origins:
    """Where store, checkpoint and photos are; None is where the rows say."""

    store: str | Path | None = None
    checkpoint: Path | None = None
    data_root: Path | None = None
    splits: Path | None = None
    data_options: tuple[tuple[str, Any], ...] = ()


def open_store(file: Results, path: str | Path | None = None) -> StoreSource:
    """The store of the rows, at `path` or where they say. Raises StoreError if it is not there or is another one."""
    from pipeline.loading.source import StoreSource
    from pipeline.store.feature_store import FeatureStore

    path = path or as_dict(file.facts.get("paths")).get("store")
    if not path:
        raise StoreError("The rows do not say where their store is: give --store.")
    digest = str(file.facts["data"])
    try:
        store = FeatureStore.open(path, index_digest=digest)
    except HSNetError:
        # The rows may be of some of its classes only (domain shift): then their data's digest is their own.
        store = FeatureStore.open(path)
    if store.identity != file.store:
        raise StoreError(
            f"{path} is not the store of {file.path}:\n  rows   {file.store}\n  store  {store.identity}\n"
            f"Give that one with --store."
        )
    return StoreSource(store)


def open_segmenter(file: Results, source: StoreSource, checkpoint: Path | None, device: str) -> Segmenter:
    """What answered the episodes of the rows, its checkpoint at the path given or where they say.

    Raises:
        CheckpointError, DataError: it cannot be had again.
    """
    from pipeline.heads.catalogue import made_again

    checkpoint = checkpoint or _said_path(file, "checkpoint")
    return made_again(as_dict(file.facts.get("method")), source, checkpoint=checkpoint, device=device).make()


def open_photos(file: Results, origins: Origins) -> tuple[Callable[[StoreSource, int], Image.Image] | None, str]:
    """A function (source, image number) -> photo, or None with the reason why there are no photos."""
    from pipeline.datasets import DATASETS, open_dataset, reader_of

    name = reader_of(str(file.facts["dataset"]))
    root = origins.data_root or _said_path(file, "data_root")
    if name not in DATASETS:
        return None, f"'{name}' is no reader of data sets."
    if root is None and name != "shapes":
        return None, "the rows do not say where the data set is; give --data-root."
    try:
        dataset = open_dataset(name, root, origins.splits, **dict(origins.data_options))
    except HSNetError as error:
        return None, str(error).splitlines()[0]
    return _MatchedPhotos(dataset), ""


class _MatchedPhotos:
    """Photos by the store's numbers; one whose mask is not the store's is refused."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    @cached_property
    def numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.dataset.index.images)}

    def __call__(self, source: StoreSource, number: int) -> Image.Image:
        from pipeline.datasets.images import resize_label

        name = source.index.images[number]
        if name not in self.numbers:
            raise DataError(f"The data set has no image '{name}'.")
        there = self.numbers[name]
        if self.dataset.index.digest != source.index.digest:
            # Other lists of the same photos, or other photos: the masks tell.
            side = source.recipe.image_size
            mask = resize_label(self.dataset.label(there), (side, side)) != 0
            if (mask != (source.store.labels([number])[0] != 0)).any():
                raise DataError(f"The data set's '{name}' is not the image of the store: their masks differ.")
        return self.dataset.image(there)


def _said_path(file: Results, name: str) -> Path | None:
    """A path that the rows name; None if they do not."""
    text = as_dict(file.facts.get("paths")).get(name)
    return Path(text) if isinstance(text, str) and text else None
