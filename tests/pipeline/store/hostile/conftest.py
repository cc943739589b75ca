"""A store, and one of coded features, each a copy that may be attacked."""

import shutil
from pathlib import Path

import pytest
import stores_by_hand as helpers

from pipeline.datasets.shapes import Shapes
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain") / "s.zarr"
    helpers.fill(path)
    return path


@pytest.fixture(scope="session")
def made_coded(tmp_path_factory):
    path = tmp_path_factory.mktemp("coded") / "s.zarr"
    data = Shapes(size=64, trn_per_class=2, val_per_class=2)
    weights = load_weights("squeezenet1_1")
    extract(data, weights, path, image_size=64, precision="int8", shard_images=32, bytes_per_image=40_000)
    return path


@pytest.fixture
def path(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "s.zarr"))


@pytest.fixture
def coded(made_coded, tmp_path):
    return Path(shutil.copytree(made_coded, tmp_path / "coded.zarr"))
