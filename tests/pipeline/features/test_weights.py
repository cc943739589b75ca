"""Weights from the package, a file, a download or nowhere; and everything that can be wrong with them."""

from __future__ import annotations

import logging
import os
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hsnet.backbone import random_state_dict
from hsnet.errors import ConfigError, WeightsError
from pipeline.features import weights as module
from pipeline.features.weights import PACKAGED, hash_tensors, load_weights

NAME = "squeezenet1_1"


@pytest.fixture(scope="module")
def fresh() -> dict[str, torch.Tensor]:
    return random_state_dict(NAME, seed=3)


def test_packaged_weights_load_as_float32_and_have_their_recorded_hash():
    weights = load_weights(NAME)
    assert weights.sha256 == PACKAGED[NAME][1]
    assert {value.dtype for value in weights.state_dict.values()} == {torch.float32}
    assert not any(name.startswith("classifier") for name in weights.state_dict)
    assert PACKAGED[NAME][0].stat().st_size < 2_600_000


def test_packaged_weights_are_the_original_rounded_to_float16(shared: Path):
    original = torch.load(shared / "weights" / "squeezenet1_1_imagenet.pth", weights_only=True)
    packaged = load_file(PACKAGED[NAME][0])
    assert packaged.keys() == original.keys()
    for name, value in original.items():
        assert torch.equal(packaged[name], value.to(torch.float16)), name


def test_one_hash_for_both_file_formats_with_or_without_the_head(tmp_path, fresh):
    headless = {name: value for name, value in fresh.items() if not name.startswith("classifier")}
    torch.save(fresh, tmp_path / "a.pth")
    save_file(fresh, tmp_path / "a.safetensors")
    torch.save(headless, tmp_path / "b.pth")
    hashes = {load_weights(NAME, tmp_path / file).sha256 for file in ("a.pth", "a.safetensors", "b.pth")}
    assert hashes == {load_weights(NAME, "random:3").sha256}


def test_the_hash_sees_values_names_and_shapes():
    base = {"a": torch.arange(4.0), "b": torch.ones(2)}
    changed = (
        {**base, "b": torch.tensor([1.0, 2.0])},
        {"a": base["a"], "c": base["b"]},
        {**base, "a": base["a"].reshape(2, 2)},
        {**base, "b": base["b"].double()},
    )
    assert len({hash_tensors(tensors) for tensors in (base, *changed)}) == 5
    assert hash_tensors({"b": base["b"], "a": base["a"]}) == hash_tensors(base)


def test_random_weights_warn_and_follow_their_seed(caplog):
    with caplog.at_level(logging.WARNING):
        first = load_weights(NAME, "random")
    assert "features mean nothing" in caplog.text
    assert first.sha256 == load_weights(NAME, "random:0").sha256 != load_weights(NAME, "random:1").sha256
    with pytest.raises(ConfigError, match="whole number"):
        load_weights(NAME, "random:x")


def test_unknown_backbone_names_the_choices():
    with pytest.raises(ConfigError, match="resnet50"):
        load_weights("resnet5O")


def test_missing_file(tmp_path):
    with pytest.raises(WeightsError, match=r"none\.pth does not exist"):
        load_weights(NAME, tmp_path / "none.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty"])
def test_damaged_file(tmp_path, fresh, suffix, damage):
    path = tmp_path / f"w{suffix}"
    torch.save(fresh, path) if suffix == ".pth" else save_file(fresh, path)
    whole = path.read_bytes()
    path.write_bytes({"cut": whole[: len(whole) // 2], "garbage": os.urandom(5000), "empty": b""}[damage])
    with pytest.raises(WeightsError, match=rf"w\{suffix}"):
        load_weights(NAME, path)


def test_one_changed_value_fails_the_sha256(tmp_path, fresh):
    path = tmp_path / "w.safetensors"
    save_file(fresh, path)
    sha256 = load_weights(NAME, path).sha256
    assert load_weights(NAME, path, sha256).sha256 == sha256
    assert load_weights(NAME, path, sha256.removeprefix("sha256:")[:8]).sha256 == sha256
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(WeightsError, match=rf"(?s)found   sha256:.*wanted  {sha256}"):
        load_weights(NAME, path, sha256)
    with pytest.raises(ConfigError, match="hex digits"):
        load_weights(NAME, path, "sha256:xyz")


def test_corrupt_package_is_found(tmp_path, monkeypatch):
    tensors = load_file(PACKAGED[NAME][0])
    tensors["features.0.bias"][0] += 1
    save_file(tensors, tmp_path / "w.safetensors")
    monkeypatch.setitem(PACKAGED, NAME, (tmp_path / "w.safetensors", PACKAGED[NAME][1]))
    with pytest.raises(WeightsError, match="Install hsnet-pipeline again"):
        load_weights(NAME)


class Malicious:
    """Unpickling this makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_malicious_pickle_is_never_executed(tmp_path, zipped, suffix):
    path, trap = tmp_path / f"w{suffix}", tmp_path / "executed"
    torch.save({"features.0.weight": Malicious(trap)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match=r"w\."):
        load_weights(NAME, path)
    assert not trap.exists()


def test_weights_of_another_network_are_named(tmp_path):
    torch.save(random_state_dict("resnet50"), tmp_path / "r50.pth")
    with pytest.raises(WeightsError, match=r"r50\.pth: These are not weights of squeezenet1_1"):
        load_weights(NAME, tmp_path / "r50.pth")


def test_a_training_checkpoint_is_not_a_state_dict(tmp_path, fresh):
    torch.save({"state_dict": fresh, "epoch": 3}, tmp_path / "run.pth")
    with pytest.raises(WeightsError, match=r"entry 'state_dict' is a dict"):
        load_weights(NAME, tmp_path / "run.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(WeightsError, match="holds a list"):
        load_weights(NAME, tmp_path / "list.pth")


def test_nan_is_refused(tmp_path, fresh):
    torch.save({**fresh, "features.0.bias": fresh["features.0.bias"] * float("nan")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"NaN or infinity in features\.0\.bias"):
        load_weights(NAME, tmp_path / "w.pth")


@pytest.mark.parametrize(
    "failure",
    [
        urllib.error.URLError("Name or service not known"),
        RuntimeError('invalid hash value (expected "0676ba61", got "00000000")'),
    ],
    ids=["offline", "hash"],
)
def test_a_failed_download_says_what_else_works(monkeypatch, tmp_path, failure):
    def fail(url, *args, **kwargs):
        assert kwargs["check_hash"]
        assert kwargs["weights_only"]
        raise failure

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(WeightsError) as caught:
        load_weights("resnet50")
    text = str(caught.value)
    assert "https://download.pytorch.org/models/resnet50-0676ba61.pth" in text
    for part in (str(failure.args[0]), "--weights FILE", "squeezenet1_1 needs no download", str(tmp_path)):
        assert part in text


def test_a_download_is_used(monkeypatch):
    state = random_state_dict("resnet50")
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: state)
    weights = load_weights("resnet50")
    assert weights.origin == "torchvision ResNet50_Weights.IMAGENET1K_V1"
    assert torch.equal(weights.state_dict["conv1.weight"], state["conv1.weight"])
    assert not any("num_batches_tracked" in name or name.startswith("fc.") for name in weights.state_dict)


def test_every_packaged_file_is_in_the_third_party_notice():
    notice = (Path(module.__file__).parents[2] / "THIRD_PARTY.md").read_text()
    for path, _ in PACKAGED.values():
        assert path.name in notice
