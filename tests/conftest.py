"""Fixtures for every room."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType

# Two OpenMP threads on shared cores are slower than one; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def golden() -> Path:
    """Folder of the golden arrays; their origin is in its README.md."""
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def shared() -> Path:
    """Folder with real photos, weights and large golden files; not part of a clone."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip(f"needs real photos and weights in {path}, which are not part of the repository")
    return path


@pytest.fixture(scope="session")
def rows_by_hand() -> ModuleType:
    """tests/rows_by_hand.py: tests are no package, so they cannot import it."""
    spec = importlib.util.spec_from_file_location("rows_by_hand", ROOT / "tests" / "rows_by_hand.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
