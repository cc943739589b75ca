"""A store of ten photos, before and after it took thirteen more, and one of all."""

import shutil
from pathlib import Path

import pytest
from fakes import Photos
from growing import FIRST, MORE, run


@pytest.fixture(scope="session")
def made(tmp_path_factory, squeezenet) -> Path:
    """A store of the first photos."""
    path = tmp_path_factory.mktemp("first") / "s.zarr"
    run(Photos(FIRST), squeezenet, path)
    return path


@pytest.fixture(scope="session")
def fresh(tmp_path_factory, squeezenet) -> Path:
    """A store of all photos, made at once."""
    path = tmp_path_factory.mktemp("fresh") / "s.zarr"
    run(Photos(MORE), squeezenet, path)
    return path


@pytest.fixture
def path(made, tmp_path) -> Path:
    """A copy of the store of the first photos."""
    return Path(shutil.copytree(made, tmp_path / "s.zarr"))


@pytest.fixture(scope="session")
def made_grown(made, tmp_path_factory, squeezenet) -> Path:
    path = Path(shutil.copytree(made, tmp_path_factory.mktemp("grown") / "s.zarr"))
    run(Photos(MORE), squeezenet, path)
    return path


@pytest.fixture
def grown(made_grown, tmp_path) -> Path:
    """A copy of the store of the first photos after it took the others."""
    return Path(shutil.copytree(made_grown, tmp_path / "grown.zarr"))
