"""The report on this machine: one bad check does not hide the others, and trouble is named with its remedy."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from pipeline import doctor


def by_name(findings: list[doctor.Finding]) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in findings}


def test_this_machine_can_do_the_main_job(tmp_path: Path) -> None:
    findings = doctor.examine(tmp_path)
    failed = [finding for finding in findings if finding.status == "fail" and finding.name != "import names"]
    assert not failed
    names = by_name(findings)
    assert {"python", "torch", "ray", "zarr", "cpu", "memory", "disk", "store", "weights squeezenet1_1"} <= set(names)
    assert all(finding.todo for finding in findings if finding.status == "warn" and finding.name != "memory")
    assert not list(tmp_path.iterdir()), "a look leaves nothing behind"


def test_every_declared_dependency_is_checked() -> None:
    """The list is read from the project's own declaration, so that it cannot lag behind."""
    packages = {wanted.name: wanted for wanted in doctor._requirements()}
    assert {"torch", "torchvision", "ray", "zarr", "click", "rich", "Pillow", "safetensors"} <= set(packages)
    assert "pytest" not in packages, "an extra"
    assert str(packages["ray"]) == "ray[train]>=2.50"


def test_a_package_that_is_missing_or_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["no-such-package>=1.0", "numpy>=99.1", "click>=8.1", "zarr>=3.1,<3.1.1"]
    monkeypatch.setattr(doctor, "_requirements", lambda: [Requirement(text) for text in wanted])
    findings = by_name(list(doctor._packages()))
    assert findings["no-such-package"].status == "fail"
    assert "pip install 'no-such-package>=1.0'" in findings["no-such-package"].todo
    assert findings["numpy"].status == "fail"
    assert "99.1" in findings["numpy"].detail
    assert importlib.metadata.version("numpy") in findings["numpy"].detail
    assert findings["click"].status == "ok"
    assert findings["zarr"].detail.endswith("but <3.1.1,>=3.1 is needed"), "too new is told, too"


def test_another_owner_of_our_names_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyPI's `cluster` overwrites our folder of that name without a word."""
    owners = {"cluster": [doctor.DISTRIBUTION, "cluster"], "hsnet": [doctor.DISTRIBUTION]}
    monkeypatch.setattr(importlib.metadata, "packages_distributions", lambda: owners)
    failed = [finding for finding in doctor._names() if finding.status == "fail"]
    assert any("'cluster' is also installed by cluster" in finding.detail for finding in failed)
    assert any(f"pip uninstall cluster, then install {doctor.DISTRIBUTION}" in finding.todo for finding in failed)


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> list[doctor.Finding]:
        raise RuntimeError("the driver is gone")

    monkeypatch.setattr(doctor, "_devices", broken)
    monkeypatch.setattr(doctor, "_packages", list)
    findings = by_name(doctor.examine(tmp_path))
    assert findings["devices"].status == "fail"
    assert "the driver is gone" in findings["devices"].detail
    assert findings["disk"].status in ("ok", "warn")


def test_little_disk_and_shared_memory_are_warnings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(2**30, 2**30 - 1000, 1000))
    (disk, *_), (shared,) = list(doctor._disk(tmp_path)), list(doctor._shared_memory())
    assert disk.status == "warn"
    assert "MB an image" in disk.todo
    assert shared.status == "warn"
    assert "--workers 0" in shared.todo


def test_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    disk, *_ = doctor._disk(tmp_path / "new" / "deep")
    assert str(tmp_path) in disk.detail


def test_worst() -> None:
    ok, warn = doctor.Finding("a", "ok", ""), doctor.Finding("b", "warn", "")
    assert doctor.worst([ok, warn]) == "warn"
    assert doctor.worst([]) == "ok"
