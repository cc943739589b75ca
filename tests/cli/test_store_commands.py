"""`hsnet store verify` and `repair`: found, named, mended, the same bytes."""

import json
import os

import pytest
from fakes import fingerprints
from fakes import invoke as run

from pipeline.store.markers import marker_file, shard_file, summary_file

EXTRACT = ["shapes", "--data-option", "trn_per_class=2", "--data-option", "val_per_class=2", "--data-option", "size=64"]
EXTRACT += ["--backbone", "squeezenet1_1", "--image-size", "64", "--quiet"]


def test_damage_is_found_named_and_mended(tmp_path):
    store = tmp_path / "s.zarr"
    made = run("extract", *EXTRACT, "--store", store)
    assert made.exit_code == 0, made.output
    before = fingerprints(store)
    whole = run("store", "verify", store, "--quiet")
    assert (whole.exit_code, "no damage" in whole.output) == (0, True)
    file = shard_file(store, "level1", 0)
    damaged = bytearray(file.read_bytes())
    damaged[1000] ^= 4
    file.write_bytes(damaged)
    found = run("store", "verify", store, "--quiet")
    assert found.exit_code == 1
    assert "shard 0, array 'level1', image '" in found.output
    assert "checksum" in found.output
    assert "hsnet store repair" in found.output
    listed = run("store", "verify", store, "--json")
    assert listed.exit_code == 1
    (one,) = json.loads(listed.stdout)["damage"]
    assert (one["shard"], one["array"], one["file"]) == (0, "level1", str(file))
    damaged = fingerprints(store)
    refused = run("store", "repair", *EXTRACT, "--precision", "float32", "--store", store)
    assert refused.exit_code == 1
    assert fingerprints(store) == damaged, "with other options nothing may be deleted"
    mended = run("store", "repair", *EXTRACT, "--store", store, "--json")
    assert mended.exit_code == 0, mended.output
    assert json.loads(mended.stdout)["written_shards"] == 1
    assert fingerprints(store) == before


def test_a_damaged_summary_is_refused_and_repaired_without_extracting_anything(tmp_path):
    store = tmp_path / "s.zarr"
    made = run("extract", *EXTRACT, "--store", store)
    assert made.exit_code == 0, made.output
    before = fingerprints(store)
    damaged = bytearray(summary_file(store).read_bytes())
    damaged[-20] ^= 1
    summary_file(store).write_bytes(damaged)
    for command in (["store", "info", store], ["store", "verify", store], ["train", "--store", store, "--fold", "0"]):
        refused = run(*command, *(["--run-dir", tmp_path / "run"] if command[0] == "train" else []))
        assert refused.exit_code == 1
        assert "checksum does not match" in refused.output
        assert "hsnet store repair" in refused.output
        assert "Traceback" not in refused.output
    mended = run("store", "repair", *EXTRACT, "--store", store, "--json")
    assert mended.exit_code == 0, mended.output
    assert json.loads(mended.stdout)["written_shards"] == 0
    assert fingerprints(store) == before
    marker = marker_file(store, 0)
    text = marker.read_text()
    facts = read_marker_again(marker, sizes=[[1, 1]])
    found = run("store", "verify", store, "--quiet")
    assert found.exit_code == 1, facts
    assert "the markers of 1 shards say, such as 0" in found.output
    marker.write_text(text)
    assert run("store", "verify", store, "--quiet").exit_code == 0


def read_marker_again(marker, sizes):
    """Change a marker so that it still counts, as one of the first version, which had no checksum."""
    values = json.loads(marker.read_text())
    values["sizes"] = sizes * len(values["sizes"])
    values.pop("crc32")
    marker.write_text(json.dumps(values))
    return values


def test_the_size_of_shards_is_said_in_bytes_or_images(tmp_path):
    store = tmp_path / "s.zarr"
    both = run("extract", *EXTRACT, "--store", store, "--shard-mb", "5", "--shard-images", "5")
    assert (both.exit_code, "Give one of --shard-mb and --shard-images" in both.output) == (2, True)
    assert run("extract", *EXTRACT, "--store", store, "--shard-mb", "0").exit_code == 2
    made = run("extract", *EXTRACT, "--store", store, "--shard-mb", "3", "--json")
    assert made.exit_code == 0, made.output
    info = json.loads(run("store", "info", store, "--json").stdout)
    largest = info["bytes"] / info["images"] * info["shard_images"]
    assert 2.0e6 < largest < 3.1e6
    again = run("extract", *EXTRACT, "--store", store, "--shard-mb", "64", "--json")
    assert (again.exit_code, json.loads(again.stdout)["written_shards"]) == (0, 0), "a store keeps its own"


def test_recomputed_images_that_differ_are_named(tmp_path):
    store = tmp_path / "s.zarr"
    shapes = EXTRACT[1:7]
    made = run("extract", *EXTRACT, "--store", store)
    assert made.exit_code == 0, made.output
    again = run("store", "verify", store, "--recompute", "5%", "--dataset", "shapes", *shapes, "--quiet")
    assert again.exit_code == 0, again.output
    assert "7 images recomputed: 7 the same bit for bit" in again.output
    unsaid = run("store", "verify", store, "--recompute", "5%")
    assert (unsaid.exit_code, "--dataset" in unsaid.output) == (2, True)
    for share in ("0%", "101%", "few", "nan"):
        assert run("store", "verify", store, "--recompute", share).exit_code == 2


def test_a_sample_can_be_evaluated(tmp_path):
    store, small = tmp_path / "s.zarr", tmp_path / "small.zarr"
    assert run("extract", *EXTRACT, "--store", store).exit_code == 0
    made = run("store", "export-sample", store, small, "--images", "20", "--fold", "0")
    assert made.exit_code == 0, made.output
    assert "20 images" in made.stdout
    assert "108 images left out" in made.stdout
    for command in (["info", small], ["verify", small, "--quiet"]):
        shown = run("store", *command)
        assert shown.exit_code == 0, shown.output
    scored = run("evaluate", "--head", "cosine", "--store", small, "--fold", "0", "--episodes", "5")
    assert scored.exit_code == 0, scored.output
    again = run("store", "export-sample", store, small)
    assert (again.exit_code, "there already" in again.output) == (1, True)
    both = run("store", "export-sample", store, tmp_path / "x", "--image", "a", "--fold", "0")
    assert both.exit_code == 2


@pytest.mark.parametrize("options", [(), ("--bytes-per-image", "60KB")], ids=["int8", "coded"])
def test_damaged_attributes_are_restored(tmp_path, options):
    store = tmp_path / "s.zarr"
    assert run("extract", *EXTRACT, *options, "--store", store).exit_code == 0
    before = fingerprints(store)
    os.truncate(store / "zarr.json", 100)
    other = run("store", "repair", *EXTRACT, "--precision", "float32", "--store", store)
    assert (other.exit_code, "no shard in it says" in other.output) == (1, True)
    mended = run("store", "repair", *EXTRACT, *options, "--store", store, "--json")
    assert mended.exit_code == 0, mended.output
    assert json.loads(mended.stdout)["written_shards"] == 0
    assert fingerprints(store) == before
