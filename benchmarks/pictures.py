"""The pictures of `benchmarks.inputs` as a data set that can be extracted into a store."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from PIL import Image

from benchmarks.inputs import OBJECT_SHARE, disc, picture
from pipeline.datasets.index import DatasetIndex, Split


@dataclass(frozen=True)
class Pictures:
    """`count` square pictures of one class; see `pipeline.datasets.Dataset`."""

    count: int
    size: int
    object_share: float = OBJECT_SHARE

    @cached_property
    def index(self) -> DatasetIndex:
        entries = Split(tuple((number, 0) for number in range(self.count)))
        return DatasetIndex(
            name=f"benchmark pictures, {self.size} px, object {self.object_share}",
            classes={0: "disc"},
            images=tuple(f"{number}" for number in range(self.count)),
            splits={0: {"trn": entries, "val": entries, "test": entries}},
        )

    def image(self, i: int, /) -> Image.Image:
        return Image.fromarray(picture(i, self.size).numpy())

    def label(self, i: int, /) -> np.ndarray:
        return disc(i, self.size, self.object_share).numpy().astype(np.uint8)
