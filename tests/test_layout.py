"""The rooms: who may import whom, what each room needs installed, and what importing costs."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
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
    "flask": ["pipeline/serve", "pipeline/review"],
    "waitress": ["pipeline/serve"],
    "cvat_sdk": ["pipeline/serve/cvat"],
    "huggingface_hub": [],
}
"""Where a dependency may be imported."""

FOLDERS = ("common", "datasets", "annotations", "episodes", "features", "store", "loading", "heads", "bank", "scores")
"""Inside pipeline/: a folder may import itself and the folders before it. What is none of them is a stage."""

SCORES_STAND_ON = {"common", "episodes", "scores"}
"""Rows are read where there is no store and no head."""

STAGES_OF_STAGES = {
    "compare": {"evaluate"},
    "packed": {"train"},
    "report": {"analyze"},
    "review": {"predict", "serve"},
    "serve": {"predict"},
    "sweep": {"train", "analyze", "sweep_case", "sweep_status"},
    "sweep_case": {"train", "packed", "evaluate", "sweep_status"},
    "sweep_file": {"sweep", "sweep_case"},
    "sweep_plan": {"train", "sweep", "sweep_case"},
}
"""A stage may import every folder, and of the other stages these."""

LONG = 500
"""Lines that a file of the product may have."""

LONGER: dict[str, str] = {}
"""Files that are longer, and why each is one subject all the same."""

MODULES = [ROOT / "cli.py", *(path for room in ROOMS[:4] for path in sorted((ROOT / room).rglob("*.py")))]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name_of(path: Path) -> str:
    """As it is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in MODULES}


@cache
def imports(path: Path) -> list[tuple[str, int]]:
    """Modules that a module imports, with the line: at its top, in functions, and for types only."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(), path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: names of modules are written out here"
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(name if name in NAMES else str(node.module), node.lineno) for name in inside]
    return found


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Top-level names that a module imports, with the line."""
    return ((name.split(".")[0], line) for name, line in imports(path))


def entry_of(name: str) -> str:
    """Folder or stage of a module of pipeline/."""
    return name.split(".")[1]


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


INSIDE = [name for name in NAMES if name.startswith("pipeline.")]
ENTRIES = sorted({entry_of(name) for name in INSIDE})


def allowed_in(entry: str) -> set[str]:
    """What an entry of pipeline/ may import of the others."""
    if entry == "scores":
        return SCORES_STAND_ON
    if entry in FOLDERS:
        return set(FOLDERS[: FOLDERS.index(entry) + 1])
    return {entry, *FOLDERS, *STAGES_OF_STAGES.get(entry, set())}


@pytest.mark.parametrize("name", INSIDE)
def test_folders_of_the_pipeline_import_those_below_them(name):
    for other, line in imports(NAMES[name]):
        if other in INSIDE:
            entry = entry_of(name)
            assert entry_of(other) in allowed_in(entry), f"{NAMES[name]}:{line}: {entry} may not import {other}"


def test_the_table_of_stages_says_no_more_than_there_is():
    used = {
        (entry_of(name), entry_of(other)) for name in INSIDE for other, _ in imports(NAMES[name]) if other in INSIDE
    }
    assert not {(stage, other) for stage, others in STAGES_OF_STAGES.items() for other in others} - used


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that lead back to the first of them, or nothing."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := visit(other, [*way, name]):
                    return found
            done.add(name)
        return []

    return next(filter(None, (visit(name, []) for name in graph)), [])


def test_no_circle_between_modules_or_folders():
    modules = {name: {other for other, _ in imports(path) if other in NAMES} - {name} for name, path in NAMES.items()}
    assert circle(modules) == []
    entries: dict[str, set[str]] = {}
    for name in INSIDE:
        others = {entry_of(other) for other in modules[name] if other in INSIDE}
        entries.setdefault(entry_of(name), set()).update(others - {entry_of(name)})
    assert circle(entries) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"d", "b"}}) == ["b", "c", "b"]


def test_files_are_short():
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in MODULES}
    assert {name for name, count in lines.items() if count > LONG} == set(LONGER)


def test_the_map_of_the_design_is_the_listing_of_the_folder():
    """A block of docs/design.md whose first line begins with pipeline/, and every other with an entry of it."""
    text = (ROOT / "docs" / "design.md").read_text()
    (block,) = re.findall(r"^```text\npipeline/.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "pipeline").iterdir()} - {"__pycache__/"}
    named = re.findall(r"^(?:[├└]── )?([\w.]+/?) ", block, re.MULTILINE)
    assert sorted(named) == sorted(there)


def test_the_pipeline_says_what_each_stage_and_folder_is():
    named = re.findall(
        r"^([a-z_]+)  +\S", str(ast.get_docstring(ast.parse(NAMES["pipeline"].read_text()))), re.MULTILINE
    )
    assert sorted(named) == ENTRIES


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


def test_nothing_is_started_without_its_mark():
    """The marks of `make test-fast`, kept by tests/conftest.py."""
    with socket.socket() as server, pytest.raises(AssertionError, match="needs the mark s3 or ray"):
        server.bind(("127.0.0.1", 0))
    with pytest.raises(AssertionError, match="needs the mark browser"):
        subprocess.Popen(["chromedriver"])
    code = """
from cluster.session import session
try:
    with session("local"):
        print("started")
except Exception as error:
    print(error)
"""
    assert "start Ray only in tests with the mark ray" in run(code)


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
    heavy |= {"jinja2", "matplotlib", "timm", "huggingface_hub", "flask", "waitress", "werkzeug", "cvat_sdk"}
    out = run(f"{statement}\nimport sys\nprint('loaded:', [name for name in {heavy} if name in sys.modules])")
    assert out.endswith("loaded: []\n"), out[-300:]
