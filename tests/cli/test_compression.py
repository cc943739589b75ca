"""Budgets on the command line, and `store compare`."""

from __future__ import annotations

import json
from pathlib import Path

import click
import pytest
from fakes import printed as invoke

from commands.options import Bytes

SHAPES = ("extract", "shapes", "--backbone", "squeezenet1_1", "--image-size", "64")
SMALL = ("--data-option", "size=64", "--data-option", "trn_per_class=3", "--data-option", "val_per_class=2")


@pytest.mark.parametrize(
    ("text", "number"),
    [("2MB", 2_000_000), ("60 GB", 60_000_000_000), ("1.5MB", 1_500_000), ("500kB", 500_000), ("700", 700), ("3B", 3)],
)
def test_sizes(text: str, number: int) -> None:
    assert Bytes().convert(text, None, None) == number


@pytest.mark.parametrize("text", ["", "MB", "-2MB", "2 mb per image", "0", "two", "1e6"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Bytes().convert(text, None, None)


def test_one_codec_at_a_time(tmp_path: Path) -> None:
    store = ("--store", tmp_path / "s.zarr")
    for two in (("--precision", "int8", "--budget", "1GB"), ("--budget", "1GB", "--bytes-per-image", "1MB")):
        assert "Give one of --precision, --bytes-per-image and --budget" in invoke(*SHAPES, *store, *two, code=2)


def test_a_comparison_needs_something_to_compare_with(tmp_path: Path) -> None:
    assert "Give --against B.zarr, or --dataset" in invoke("store", "compare", "--store", tmp_path / "s.zarr", code=2)


def test_a_budget_from_extraction_to_comparison(tmp_path: Path) -> None:
    path = tmp_path / "s.zarr"
    arguments = (*SHAPES, *SMALL, "--store", path)
    plan = json.loads(invoke(*arguments, "--bytes-per-image", "30KB", "--dry-run", "--json"))
    assert not path.exists()
    images = plan["images"]
    made = json.loads(invoke(*arguments, "--budget", str(30_000 * images + 5), "--json"))
    assert 0.9 * 30_000 * images < made["bytes"] < plan["bytes_needed"]
    again = json.loads(invoke(*arguments, "--bytes-per-image", "30KB", "--json"))
    assert again["written_images"] == 0
    assert "coded, 30.0 KB per image asked for" in invoke("store", "info", path)
    assert "coding bytes_per_image stored 30000, wanted 20000" in invoke(
        *arguments, "--bytes-per-image", "20KB", code=1
    )
    said = invoke("store", "compare", "--store", path, "--dataset", "shapes", *SMALL, "--pairs", "2")
    assert said.count("level ") == 8
    assert "per image, against not stored" in said
