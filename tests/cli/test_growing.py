"""A data set that grows, from the command line: what is said, and a run that goes on with what it began with."""

import json
import re
import shutil
from pathlib import Path

import pytest
from fakes import invoke, machine

from commands.steps import store_source

OPTIONS = ("--data-option", "size=64", "--data-option", "val_per_class=2", "--backbone", "squeezenet1_1")
QUICK = ("--batch-size", "4", "--validate-every", "2", "--validate-episodes", "4")


def extract(store: Path, per_class: int) -> tuple[str | Path, ...]:
    count = ("--data-option", f"trn_per_class={per_class}", "--image-size", "64")
    return ("extract", "shapes", *OPTIONS, *count, "--store", store)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grown") / "s.zarr"
    machine(*extract(path, 2))
    return path


def test_growing_is_said_before_and_done_once(store: Path, tmp_path: Path) -> None:
    run = ("train", "--store", store, "--run-dir", tmp_path / "run", *QUICK)
    machine(*run, "--steps", "2")
    before = machine("store", "info", store)
    plan = machine(*extract(store, 3), "--dry-run")
    assert plan["grown"] == {"images_before": 128, "images_new": 32, "classes_new": []}
    assert (plan["images"], plan["images_done"]) == (160, 128)
    assert machine("store", "info", store) == before
    said = invoke(*extract(store, 3))
    assert "The data set has grown: 32 new images, 128 there already." in said.stderr
    assert "32 images in" in said.stdout
    after = machine("store", "info", store)
    assert (after["images"], after["growths"], after["complete"]) == (160, [128, 160], True)
    assert "has grown" not in invoke(*extract(store, 3)).output
    refused = invoke(*extract(store, 2))
    assert refused.exit_code == 1
    assert "image in the data set stored 'trn/00_002 and 31 more', wanted 'not there'" in refused.stderr
    assert "Put back what is gone, or extract into a new store" in refused.stderr
    assert re.search(r"grown +128 images first, then 32\n", invoke("store", "info", store).stdout)

    gone_on = invoke(*run, "--steps", "4", "--json")
    assert gone_on.exit_code == 0, gone_on.output
    assert "has grown since; this goes on with the images and lists it began with" in gone_on.stderr
    assert json.loads(gone_on.stdout)["resumed_at"] == 2
    new = invoke("train", "--store", store, "--run-dir", tmp_path / "new", *QUICK, "--steps", "2")
    assert "has grown" not in new.output


def test_a_worker_that_starts_late_reads_what_the_others_read(store: Path, tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    shutil.copytree(store, path)
    images = machine("store", "info", path)["images"]
    make_source = store_source(path)
    machine(*extract(path, 4))
    assert len(make_source().index.images) == images < machine("store", "info", path)["images"]
