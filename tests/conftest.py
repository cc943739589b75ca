"""Fixtures for every room."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

# Two OpenMP threads on shared cores are slower than one; set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

ROOT = Path(__file__).resolve().parent.parent
SLOW = {
    ".": "packaging python_api",
    "benchmarks": "backbones measuring pipeline published_way run store_benchmark",
    "cli": "analyze backbones compression demo episodes finetune growing main_job report store_commands sweep",
    "cluster": "crash_matrix faults grow two_nodes",
    "pipeline": "any_backbone compare finetune plan report report_gallery sweep",
    "pipeline/common": "files",
    "pipeline/features": "convert fitting timm_backbone",
    "pipeline/loading": "source",
    "pipeline/store": "export recompute",
    "pipeline/store/growth": "growth killed refused",
    "pipeline/store/hostile": "bombs index markers_and_data metadata",
}
"""Files that have the mark slow as a whole, by folder."""

STARTERS = {"local_ray": "ray", "two_nodes": "ray", "s3_server": "s3", "browser": "browser"}
"""Fixtures that start something, and the mark of the tests that use them."""

NO_RAY = "/dev/null/start Ray only in tests with the mark ray"
"""Where no process can make its temporary folder."""

_running: list[pytest.Item] = []


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        folder = str(item.path.parent.relative_to(ROOT / "tests"))
        if item.path.stem.removeprefix("test_") in SLOW.get(folder, "").split():
            item.add_marker("slow")
        for fixture in STARTERS.keys() & set(getattr(item, "fixturenames", ())):
            item.add_marker(STARTERS[fixture])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Ray cannot be started by a test without its mark, in whatever process."""
    _running[:] = [item]
    with pytest.MonkeyPatch.context() as patch:
        if not item.get_closest_marker("ray"):
            patch.setenv("RAY_TMPDIR", NO_RAY)
        result = yield
    _running.clear()
    return result


def _only_with_its_mark(event: str, arguments: tuple[Any, ...]) -> None:
    """A server or a browser is started by tests with their marks only: else `make test-fast` would start it, too."""
    if event == "socket.bind" and isinstance(arguments[1], tuple):
        needed = ("s3", "ray", "browser")
    elif event == "subprocess.Popen" and "chrom" in str(arguments[:2]):
        needed = ("browser",)
    else:
        return
    if _running and not any(map(_running[0].get_closest_marker, needed)):
        raise AssertionError(f"This needs the mark {' or '.join(needed)}: {event} {arguments}")


sys.addaudithook(_only_with_its_mark)


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
    """A module of tests/: tests are no package, so they cannot import what was not loaded before."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


by_path("fakes")  # for `from fakes import ...`
by_path("rle_pack")
by_path("tiny_bank")
by_path("tiny_runs")
