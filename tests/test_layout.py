"""The rooms: who may import whom, what each room needs installed, and what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("hsnet", "pipeline", "cluster", "commands", "cli")
"""A room may import itself and the rooms before it."""

AT_HOME = {
    "ray": ["cluster"],
    "click": ["commands", "cli"],
    "zarr": ["pipeline"],
    "obstore": ["pipeline"],
    "pyarrow": ["pipeline"],
    "jinja2": ["pipeline"],
    "matplotlib": ["pipeline"],
    "timm": ["pipeline/features"],
    "huggingface_hub": [],
}
"""Where a dependency may be imported."""

MODULES = [ROOT / "cli.py", *(path for room in ROOMS[:4] for path in sorted((ROOT / room).rglob("*.py")))]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level names that a module imports, with the line: at its top, in functions, and for types only."""
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (room_of(path) if node.level else str(node.module).split(".")[0]), node.lineno


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    mine = ROOMS.index(room_of(path))
    for name, line in imported(path):
        assert name not in ROOMS or ROOMS.index(name) <= mine, f"{path}:{line} imports {name}"
        homes = AT_HOME.get(name, ROOMS)
        place = str(path.relative_to(ROOT))
        assert any(place.removesuffix(".py") == home or place.startswith(f"{home}/") for home in homes), (
            f"{path}:{line}: {name} belongs to {homes}"
        )


def test_hsnet_itself_imports_only_torch_and_torchvision():
    allowed = {"hsnet", "torch", "torchvision", *sys.stdlib_module_names}
    for path in (ROOT / "hsnet").rglob("*.py"):
        assert {name for name, _ in imported(path)} <= allowed, path


def test_no_package_files_under_tests():
    """With tests/hsnet/__init__.py, `import hsnet` finds the tests."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_hsnet_runs_with_torch_and_torchvision_alone():
    """All other dependencies of the project are hidden; numpy and Pillow come with torchvision."""
    code = """
import importlib, pkgutil, sys
names = set("ray zarr numcodecs click rich safetensors pyarrow yaml pycocotools scipy tensorboardX pandas "
            "pipeline cluster commands cli".split())
class Without:
    # A finder that does not find some names. Raising instead would break torch, which asks whether pandas is there.
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *args):
        return None if name.split(".")[0] in names else self.finder.find_spec(name, *args)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = map(Without, sys.meta_path)
try:
    import zarr
    raise SystemExit("zarr was not hidden")
except ModuleNotFoundError:
    import hsnet
for module in pkgutil.walk_packages(hsnet.__path__, "hsnet."):
    importlib.import_module(module.name)
from hsnet.backbone import FrozenBackbone, random_state_dict
import torch
print([tuple(level.shape) for level in FrozenBackbone("squeezenet1_1", random_state_dict("squeezenet1_1"))(
    torch.zeros(1, 3, 64, 64))])
"""
    assert run(code).startswith("[(1, 2, ")


@pytest.mark.parametrize(
    "statement",
    [
        "import cli",
        "import hsnet, hsnet.errors, pipeline, pipeline.datasets, cluster, commands",
        "import cli, contextlib\nwith contextlib.suppress(SystemExit): cli.main(['--help'])",
    ],
    ids=["cli", "packages", "help"],
)
def test_nothing_heavy_is_imported_before_it_is_needed(statement):
    heavy = {"torch", "torchvision", "ray", "zarr", "numcodecs", "numpy", "scipy", "pyarrow", "PIL", "tensorboardX"}
    heavy |= {"jinja2", "matplotlib", "timm", "huggingface_hub"}
    out = run(f"{statement}\nimport sys\nprint('loaded:', [name for name in {heavy} if name in sys.modules])")
    assert out.endswith("loaded: []\n"), out[-300:]
