"""`hsnet backbones`, `hsnet weights convert`, and a network of timm's through the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import cli
from pipeline.features import timm_registry

DATA = ("shapes", "--data-option", "size=64", "--data-option", "trn_per_class=2", "--data-option", "val_per_class=2")
NETWORK = ("--backbone", "timm:test_vit", "--image-size", "64")


def invoke(*args: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.stdout if code == 0 else result.stderr


def test_one_backbone_says_all_of_it() -> None:
    text = invoke("backbones", "timm:vit_small_patch14_dinov2")
    for part in (
        "16x16 of 4 layers",
        "blocks.8, blocks.9",
        "393.2 KB",
        "timm/vit_small_patch14_dinov2.lvd142m",
        "apache",
    ):
        assert part in text
    assert "patches of 14 pixels" in invoke("backbones", "timm:vit_small_patch14_dinov2", "--image-size", "400")
    facts = json.loads(invoke("backbones", "timm:test_vit", "--image-size", "64", "--taps", "1,2,3", "--json"))
    assert (facts["grids"], facts["layers"], facts["bytes_per_photo"]) == ([[4, 4]], [3], 3 * 16 * 64)
    assert "support grids end at 3x3, 4x4, 4x4" in invoke("backbones", "squeezenet1_1", "--image-size", "400")
    assert "Nearest: timm:resnet10t" in invoke("backbones", "timm:resnet10", code=1)


def test_the_list_has_built_in_networks_and_those_of_timms(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.features import known_networks

    monkeypatch.setattr(known_networks, "TRIED", ("test_vit", "test_resnet"))
    found = {one["backbone"]: one for one in json.loads(invoke("backbones", "--json"))}
    assert list(found) == ["vgg16", "resnet50", "resnet101", "squeezenet1_1", "timm:test_vit", "timm:test_resnet"]
    assert found["resnet50"]["bytes_per_photo"] == 3_110_912
    assert found["squeezenet1_1"]["licence"] == "MIT"
    assert found["timm:test_vit"]["problem"] is None
    text = invoke("backbones", "--image-size", "72")
    assert "does not fit" in text
    assert "Nearest sizes: 64 and 80" in text
    monkeypatch.setattr(timm_registry, "available", lambda: False)
    text = invoke("backbones")
    assert "timm:test_vit" not in text
    assert "pip install 'hsnet-pipeline[timm]'" in text


def test_names_that_are_no_backbone_are_wrong_usage(tmp_path: Path) -> None:
    for name in ("resnet5O", "timm:", "hf-hub:timm/resnet50"):
        assert "see `hsnet backbones`" in invoke(
            "extract", *DATA, "--backbone", name, "--store", tmp_path / "s", code=2
        )
    wrong = ("extract", *DATA, "--image-size", "64", "--store", tmp_path / "s.zarr")
    assert "Nearest sizes: 64 and 80" in invoke(
        "extract", *DATA, "--backbone", "timm:test_vit", "--weights", "random", "--image-size", "70", "--store",
        tmp_path / "s.zarr", code=1,
    )  # fmt: skip
    assert "what is read of vgg16 is fixed" in invoke(
        *wrong, "--backbone", "vgg16", "--weights", "random", "--taps", "3", code=1
    )
    assert not (tmp_path / "s.zarr").exists()


def test_from_weights_of_elsewhere_to_a_mask(tmp_path: Path) -> None:
    from pipeline.features.weights import load_weights

    state = load_weights("timm:test_vit", "random:5").state_dict
    torch.save({f"backbone.{name}": value for name, value in state.items()}, tmp_path / "w.pth")
    weights = tmp_path / "w.safetensors"
    made = invoke("weights", "convert", tmp_path / "w.pth", weights, "--backbone", "timm:test_vit", "--licence", "MIT")
    assert str(len(state)) in made

    store, given = tmp_path / "s.zarr", (*NETWORK, "--weights", str(weights), "--taps", "3,4,5")
    planned = json.loads(invoke("extract", *DATA, *given, "--store", store, "--dry-run", "--json"))
    assert not store.exists()
    invoke("extract", *DATA, *given, "--store", store, "-q")
    assert json.loads(invoke("extract", *DATA, *given, "--store", store, "--json"))["written_images"] == 0
    info = invoke("store", "info", store)
    for part in ("timm:test_vit", "3x4x4x64", "blocks.3, blocks.4, blocks.5", "w.pth, MIT"):
        assert part in info
    assert planned["images"] == json.loads(invoke("store", "info", store, "--json"))["images"]
    again = ("--recompute", "5%", "--dataset", *DATA, "--weights", str(weights), "-q", "--json")
    assert json.loads(invoke("store", "verify", store, *again))["recomputed"]["different"] == []
    compared = ("--dataset", *DATA, "--weights", str(weights), "--pairs", "2", "--json", "-q")
    assert json.loads(invoke("store", "compare", "--store", store, *compared))["layers"][0]["mean"] < 0.01

    run = tmp_path / "run"
    steps = ("--steps", "1", "--batch-size", "2", "--validate-every", "1", "--validate-episodes", "2", "-q")
    invoke("train", "--store", store, "--run-dir", run, *steps)
    online = ("--features", "online", "--dataset", *DATA, *given, "--run-dir", tmp_path / "online")
    invoke("train", *online, *steps)
    assert "timm:test_vit" in invoke("checkpoint", "info", run)
    from PIL import Image

    from pipeline.datasets.shapes import Shapes

    data = Shapes(size=64, trn_per_class=2, val_per_class=2)
    data.image(0).save(tmp_path / "a.png")
    Image.fromarray((data.label(0) > 0).astype("uint8") * 255).save(tmp_path / "m.png")
    asked = ("--support", f"{tmp_path / 'a.png'}:{tmp_path / 'm.png'}", "--query", tmp_path / "a.png")
    invoke("predict", "--checkpoint", run, *asked, "--out", tmp_path / "out", "--weights", weights, "-q")
    assert (tmp_path / "out" / "a_mask.png").is_file()


def test_a_damaged_store_of_theirs_is_mended_with_the_same_options(tmp_path: Path) -> None:
    store, given = tmp_path / "s.zarr", (*NETWORK, "--weights", "random:1", "--taps", "4,5", "-q")
    invoke("extract", *DATA, *given, "--store", store)
    (store / "zarr.json").unlink()
    invoke("store", "repair", *DATA, *given, "--store", store)
    assert "no damage" in invoke("store", "verify", store)
