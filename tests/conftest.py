"""Fixtures for every room."""

from __future__ import annotations

import os
from pathlib import Path

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
