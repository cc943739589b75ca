"""Checkpoints: whole, described, never executed."""

import json
import pickle

import pytest
import torch
from safetensors.torch import save_file

from hsnet.backbone import random_state_dict
from hsnet.errors import CheckpointError, CheckpointMismatch
from hsnet.model import HSNet
from pipeline.features.recipe import Recipe
from pipeline.features.weights import load_weights
from pipeline.heads.checkpoint import (
    CheckpointInfo,
    import_published,
    load_checkpoint,
    save_checkpoint,
)

SLIM = {"layers": [4, 2, 2], "channels": [4, 8, 16]}


@pytest.fixture
def info(tiny_config):
    config = tiny_config()
    return CheckpointInfo(
        recipe=config.recipe, learner=SLIM, step=7, origin="hsnet train", config=config, scores={"miou": 12.5}
    )


@pytest.fixture
def saved(tmp_path, info):
    model = HSNet(**SLIM)
    save_checkpoint(tmp_path / "best.safetensors", model.state_dict(), info)
    return tmp_path / "best.safetensors", model


def test_comes_back_as_it_was(saved, info, tmp_path):
    path, model = saved
    checkpoint = load_checkpoint(path)
    assert checkpoint.info == info
    learner = checkpoint.learner()
    assert not learner.training
    assert all(torch.equal(a, b) for a, b in zip(learner.parameters(), model.parameters(), strict=True))
    assert load_checkpoint(tmp_path).digest == checkpoint.digest, "a run directory means its best checkpoint"
    assert [file.name for file in tmp_path.iterdir()] == ["best.safetensors"]


def test_features_of_another_kind_are_refused(saved, tiny_recipe):
    checkpoint = load_checkpoint(saved[0])
    checkpoint.require(tiny_recipe, "the store")
    from dataclasses import replace

    checkpoint.require(replace(tiny_recipe, precision="int8"), "the store")
    other = Recipe.of("resnet50", "sha256:" + "1" * 64, 96)
    with pytest.raises(CheckpointMismatch, match=r"backbone +checkpoint 'squeezenet1_1', offered 'resnet50'") as caught:
        checkpoint.require(other, "the store")
    assert {"backbone", "weights", "image_size", "taps"} == set(caught.value.differences)


def test_another_level_layout_is_refused(tmp_path, info):
    save_checkpoint(tmp_path / "c.safetensors", HSNet((3, 6, 4), (4, 8, 16)).state_dict(), info)
    with pytest.raises(CheckpointError, match="weights and level layout do not fit"):
        load_checkpoint(tmp_path / "c.safetensors").learner()


class Bomb:
    """Writes a file when unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("name", ["bomb.safetensors", "bomb.pt"])
def test_a_malicious_pickle_is_never_executed(tmp_path, name):
    target = tmp_path / "executed"
    torch.save({"module.hpn_learner.x": Bomb(target)}, tmp_path / "zip.pt")
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(target), protocol=2))
    with pytest.raises(CheckpointError, match="is not a checkpoint or is damaged"):
        load_checkpoint(tmp_path / name)
    for file in (name, "zip.pt"):
        with pytest.raises(CheckpointError, match="was not executed"):
            import_published(tmp_path / file, tmp_path / "out.safetensors")
    assert not target.exists()
    assert not (tmp_path / "out.safetensors").exists()


def test_damage_and_strangers_are_named(saved, tmp_path):
    path, _ = saved
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors is not a checkpoint or is damaged"):
        load_checkpoint(tmp_path / "cut.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match="but not an HSNet checkpoint"):
        load_checkpoint(tmp_path / "plain.safetensors")
    for header in ("[]", "{", json.dumps({"format": 99}), json.dumps({"format": 1, "recipe": None})):
        save_file({"a": torch.zeros(1)}, tmp_path / "later.safetensors", {"hsnet": header})
        with pytest.raises(CheckpointError, match=r"later\.safetensors cannot be used"):
            load_checkpoint(tmp_path / "later.safetensors")
    with pytest.raises(CheckpointError, match="No checkpoint at"):
        load_checkpoint(tmp_path / "none.safetensors")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"holds neither best\.safetensors nor last\.safetensors"):
        load_checkpoint(tmp_path / "empty")


def test_damaged_published_files_are_one_message(tmp_path):
    """Cut anywhere, changed anywhere, or empty."""
    torch.save({"module.hpn_learner.x": torch.zeros(50)}, tmp_path / "whole.pt")
    whole = (tmp_path / "whole.pt").read_bytes()
    changed = [whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :] for at in range(0, len(whole), 97)]
    for content in (b"", *(whole[:at] for at in range(1, len(whole), 97)), *changed):
        (tmp_path / "bad.pt").write_bytes(content)
        with pytest.raises(CheckpointError):  # a change where it does not matter leaves a file that is no checkpoint
            import_published(tmp_path / "bad.pt", tmp_path / "out.safetensors")
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize(
    "change",
    [{"step": "x"}, {"origin": 5}, {"scores": [1]}, {"scores": {"miou": "a"}}, {"learner": 3}, {"surprise": 1}],
)
def test_headers_of_another_type_are_refused(tmp_path, info, change):
    header = json.dumps({**json.loads(info.to_json()), **change})
    save_file({"a": torch.zeros(1)}, tmp_path / "c.safetensors", {"hsnet": header})
    with pytest.raises(CheckpointError, match=r"c\.safetensors cannot be used"):
        load_checkpoint(tmp_path / "c.safetensors")


def test_a_published_checkpoint_is_imported(tmp_path):
    """A file as the published code saves it: `module.`, the backbone and its classifier inside."""
    from hsnet.published import _BLOCKS, _SIDES  # the names, the other way round

    torch.manual_seed(0)
    model = HSNet((3, 6, 4))
    blocks = {ours: theirs for theirs, ours in _BLOCKS.items()}
    sides = {ours: (theirs, axis) for theirs, (ours, axis) in _SIDES.items()}
    published = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        block = blocks[parts[0]] if parts[0].startswith("decode") else blocks[".".join(parts[:2])]
        rest = parts[1:] if parts[0].startswith("decode") else parts[2:]
        if len(rest) == 3:
            side, axis = sides[rest[1]]
            rest[1] = side
            value = value.squeeze(axis) if rest[2] == "weight" else value
        published[f"module.hpn_learner.{block}.{'.'.join(rest)}"] = value
    network = random_state_dict("resnet50", 3)
    published |= {f"module.backbone.{name}": value for name, value in network.items()}
    torch.save(published, tmp_path / "best_model.pt")

    info = import_published(tmp_path / "best_model.pt", tmp_path / "ours.safetensors")
    assert info.recipe.backbone == "resnet50"
    assert info.recipe.image_size == 400
    checkpoint = load_checkpoint(tmp_path / "ours.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(checkpoint.learner().parameters(), model.parameters(), strict=True))
    assert (tmp_path / "ours.safetensors").stat().st_size < 12e6, "the learner alone"

    torch.save(network, tmp_path / "resnet.pt")
    weights = load_weights("resnet50", tmp_path / "resnet.pt")
    checkpoint.require(Recipe.of("resnet50", weights.sha256), "features of the backbone inside")
    with pytest.raises(CheckpointError, match="exists and was left as it is"):
        import_published(tmp_path / "best_model.pt", tmp_path / "ours.safetensors")
    with pytest.raises(CheckpointError, match=r"has \(3, 6, 4\) correlation layers.*vgg16 \(1, 3, 3\)"):
        import_published(tmp_path / "best_model.pt", tmp_path / "vgg.safetensors", "vgg16")
    with pytest.raises(CheckpointError, match="hsnet checkpoint import"):
        load_checkpoint(tmp_path / "best_model.pt")
