"""Fixtures for every room."""

from __future__ import annotations

import importlib.util
import os
import sys
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
    """tests/rows_by_hand.py."""
    return by_path("rows_by_hand")


@pytest.fixture(scope="session")
def report_inputs() -> ModuleType:
    """tests/report_inputs.py."""
    return by_path("report_inputs")


@pytest.fixture(scope="session")
def tiny_report(report_inputs, tmp_path_factory):
    """A store, a run and rows of both, see tests/report_inputs.py."""
    return report_inputs.tiny(tmp_path_factory.mktemp("report"))


def by_path(name: str) -> ModuleType:
    """A module of tests/: tests are no package, so they cannot import it."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
