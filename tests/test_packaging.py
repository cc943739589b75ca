"""The wheel: what is in it, and that it works installed somewhere else."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("hsnet", "pipeline", "cluster", "commands")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy: setuptools leaves build/ and *.egg-info behind, and would read them again."""
    source = tmp_path_factory.mktemp("build") / "source"
    skipped = shutil.ignore_patterns(
        ".*", "*.egg-info", "__pycache__", "build", "dist", "runs", "*.zarr", "demo-output"
    )
    shutil.copytree(ROOT, source, ignore=skipped)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel unpacked into a folder of its own, without its dependencies."""
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def run_elsewhere(installed: Path, folder: Path, *command: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "100"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_rooms_the_weights_and_the_page_only(wheel):
    wanted = {
        "cli.py",
        "pipeline/features/data/squeezenet1_1_imagenet_f16.safetensors",
        "pipeline/episodes/data/published_episodes.json",
    }
    for room in ROOMS:
        wanted |= {path.relative_to(ROOT).as_posix() for path in (ROOT / room).rglob("*.py")}
    wanted |= {f"pipeline/report/page/page.{suffix}" for suffix in ("html", "css", "js")}
    for stage in ("serve", "review"):
        pages = (ROOT / "pipeline" / stage / "pages").iterdir()
        wanted |= {path.relative_to(ROOT).as_posix() for path in pages}
    names = set(zipfile.ZipFile(wheel).namelist())
    about = {name for name in names if ".dist-info/" in name}
    assert names - about == wanted
    assert {name.split("/")[-1] for name in about if "/licenses/" in name} == {"LICENSE", "THIRD_PARTY.md"}
    assert wheel.stat().st_size < 4_000_000


def test_the_command_works_elsewhere(installed, tmp_path):
    out = run_elsewhere(installed, tmp_path, sys.executable, str(installed / "bin" / "hsnet"), "--help")
    assert "extract" in out
    assert "Example" in out


def test_packaged_weights_load_elsewhere(installed, tmp_path):
    code = "import pipeline.features.weights as w; print(w.__file__); print(w.load_weights('squeezenet1_1').origin)"
    place, origin = run_elsewhere(installed, tmp_path, sys.executable, "-c", code).splitlines()
    assert Path(place).is_relative_to(installed)
    assert origin == "packaged squeezenet1_1_imagenet_f16.safetensors"


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines)}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_dependency_is_pinned_exactly():
    text = (ROOT / "pyproject.toml").read_text()
    blocks = re.findall(r"^(?:dependencies|dev|timm|serve) = \[(.*?)^\]", text, re.M | re.S)
    names = [canonical(name) for block in blocks for name in re.findall(r'^\s*"([A-Za-z0-9_.-]+)', block, re.M)]
    assert {"torch", "zarr", "pytest"} <= set(names)
    assert not set(names) - set(pins())
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins().values())  # no local parts such as +cpu


def test_torch_and_torchvision_are_one_pair_everywhere():
    assert (pins()["torch"], pins()["torchvision"]) == ("2.13.0", "0.28.0")
    assert "torch==2.13.0 torchvision==0.28.0" in (ROOT / "Makefile").read_text()
