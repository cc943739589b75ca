"""A reader of small photos, and photos with masks to fit to."""

import numpy as np
import pytest

from pipeline.bank.reading import Reader, Reading
from pipeline.datasets.shapes import Shapes
from pipeline.features.backbones import new_recipe
from pipeline.features.weights import load_weights

SIZE = 64


@pytest.fixture(scope="session")
def packaged():
    return load_weights("squeezenet1_1")


@pytest.fixture(scope="session")
def reader(packaged):
    return Reader(Reading(new_recipe("squeezenet1_1", packaged, SIZE, "float32")), packaged)


@pytest.fixture(scope="session")
def tiled(packaged):
    return Reader(Reading(new_recipe("squeezenet1_1", packaged, SIZE, "float32"), 48), packaged)


@pytest.fixture(scope="session")
def drawn():
    """Class -> (photo, mask) of shapes, 96 pixels a side; photos of one class do not show the other."""
    data = Shapes(size=96)
    found = {}
    for class_id in (0, 1):
        images = data.index.split(0, "test").by_class[class_id] if class_id == 0 else []
        images = images or data.index.split(0, "trn").by_class[class_id]
        pairs = [(data.image(i).resize((96, 80)), _mask(data.label(i) == class_id + 1)) for i in images]
        found[f"class {class_id}"] = [(photo, mask) for photo, mask in pairs if mask.any()][:8]
    return found


def _mask(mask):
    from pipeline.datasets.images import resize_label

    return np.ascontiguousarray(resize_label(mask.astype(np.uint8), (80, 96))).astype(bool)
