"""Networks of timm's through the whole job: extract, train, predict; and their stores where timm is not installed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hsnet.errors import CheckpointMismatch, StoreMismatch
from pipeline.datasets.shapes import Shapes
from pipeline.extract.stage import extract
from pipeline.features.backbones import Reading, new_recipe, open_backbone
from pipeline.features.weights import load_weights
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.heads.config import RunConfig
from pipeline.heads.methods import untrained
from pipeline.loading.source import OnlineSource, StoreSource
from pipeline.plan import forecast
from pipeline.predict import predict
from pipeline.store.feature_store import FeatureStore
from pipeline.store.recompute import recompute
from pipeline.train import fit

ROOT = Path(__file__).resolve().parents[2]
KINDS = {
    "convolutional": ("timm:test_convnext", Reading()),
    "hierarchical transformer": ("timm:pvt_v2_b0", Reading()),
    "plain transformer": ("timm:test_vit", Reading()),
    "transformer with registers, two levels": ("timm:test_vit2", Reading("4,5/6,7")),
}
SLIM = {"channels": [4, 4, 8]}


@pytest.fixture(scope="module")
def data():
    return Shapes(size=64, trn_per_class=2, val_per_class=2)


def photo_files(data, folder: Path) -> list[tuple[Path, Path]]:
    folder.mkdir()
    data.image(0).save(folder / "photo.jpg")
    Image.fromarray((data.label(0) > 0).astype(np.uint8) * 255).save(folder / "photo.png")
    return [(folder / "photo.jpg", folder / "photo.png")]


HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, *args):
        if name.split(".")[0] in ("timm", "huggingface_hub", "torchvision"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
from pathlib import Path
from pipeline.heads.config import RunConfig
from pipeline.loading.source import StoreSource
from pipeline.store.feature_store import FeatureStore
from pipeline.heads.methods import trained
from pipeline.evaluate import evaluate
from pipeline.train import fit
source = StoreSource(FeatureStore.open(sys.argv[1]))
config = RunConfig(fold=0, recipe=source.recipe, data=source.index.digest, steps=2, batch_size=2, validate_every=1,
                   validate_episodes=2, learner={"channels": [4, 4, 8]})
print(fit(config, source, Path(sys.argv[2])).steps)
print(trained(Path(sys.argv[2]), source).make())
"""


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_each_kind_is_extracted_trained_on_and_predicts(kind, data, tmp_path):
    backbone, reading = KINDS[kind]
    weights = load_weights(backbone, "random:0")
    path = tmp_path / "s.zarr"
    extract(data, weights, backbone, 64, "int8", path, reading=reading)
    source = StoreSource(FeatureStore.open(path))
    assert source.recipe == new_recipe(backbone, weights, 64, "int8", reading)
    assert source.recipe.network.source == "random, seed 0"

    # The same features as the network gives, in the store's precision; and again when they are recomputed.
    exact = replace(source.recipe, precision="float32")
    online = OnlineSource(data, open_backbone(exact, weights), exact)
    for stored, fresh in zip(source.features([3]), online.features([3]), strict=True):
        assert torch.nn.functional.cosine_similarity(stored.float(), fresh, dim=-1).min() > 0.999
    assert recompute(source.store, data, weights, 0.1).different == ()

    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, str(path), str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("2\n")

    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint.info.learner["layers"] == list(reversed(source.recipe.layout.layers))
    summary = predict(
        checkpoint, weights, photo_files(data, tmp_path / "in"), [tmp_path / "in/photo.jpg"], tmp_path / "o"
    )
    assert [item.query.name for item in summary.written] == ["photo.jpg"]
    assert np.asarray(Image.open(tmp_path / "o/photo_mask.png")).shape == (64, 64)
    with pytest.raises(CheckpointMismatch, match="weights"):
        predict(checkpoint, load_weights(backbone, "random:1"), photo_files(data, tmp_path / "i"), [], tmp_path / "x")


def test_a_run_of_online_features_goes_on_with_the_store_of_the_same_weights(data, tmp_path):
    """Where weights came from is told in the recipe, and makes no other run and no other store."""
    weights = load_weights("timm:test_vit", "random:0")
    extract(data, weights, "timm:test_vit", 64, "float32", tmp_path / "s.zarr")
    source = StoreSource(FeatureStore.open(tmp_path / "s.zarr"))
    renamed = replace(weights, source="elsewhere", licence="MIT")
    summary = extract(data, renamed, "timm:test_vit", 64, "float32", tmp_path / "s.zarr")
    assert summary.written_shards == 0
    recipe = new_recipe("timm:test_vit", renamed, 64, "float32")
    online = OnlineSource(data, open_backbone(recipe, renamed), recipe)
    configs = [
        RunConfig(fold=0, recipe=s.recipe, data=s.index.digest, steps=1, batch_size=2, validate_every=1,
                  validate_episodes=2, learner=SLIM)
        for s in (source, online)
    ]  # fmt: skip
    assert configs[0].digest == configs[1].digest
    fit(configs[0], source, tmp_path / "run")
    fit(replace(configs[1], steps=2), online, tmp_path / "run")
    assert RunConfig.from_dict(configs[1].to_dict()) == configs[1]


def test_other_layers_or_arithmetic_are_another_store(data, tmp_path):
    weights = load_weights("timm:test_vit", "random:0")
    extract(data, weights, "timm:test_vit", 64, "int8", tmp_path / "s.zarr")
    for reading, field in ((Reading("0,1"), "taps"), (Reading(autocast="bfloat16"), "network autocast")):
        with pytest.raises(StoreMismatch) as raised:
            extract(data, weights, "timm:test_vit", 64, "int8", tmp_path / "s.zarr", reading=reading)
        assert set(raised.value.differences) == {field}


def test_a_budget_and_a_forecast_work_for_them(data, tmp_path):
    weights = load_weights("timm:test_vit", "random:0")
    summary = extract(data, weights, "timm:test_vit", 64, "int8", tmp_path / "s.zarr", bytes_per_image=800)
    store = FeatureStore.open(tmp_path / "s.zarr")
    assert summary.images == len(data.index.images)
    assert sum(level.nbytes for level in store.features([0])) <= 800
    assert recompute(store, data, weights, 0.1).different == ()
    told = forecast(data, weights, 64, "int8", folder=tmp_path, sample=1, reading=Reading("5"))
    assert told.bytes_per_image < 4 * 4 * 64 + 64 * 64 + 100


def test_an_untrained_head_fits_any_levels(data, tmp_path):
    weights = load_weights("timm:test_vit", "random:0")
    recipe = new_recipe("timm:test_vit", weights, 64, "float32")
    source = OnlineSource(data, open_backbone(recipe, weights), recipe)
    model = untrained(source).make().model
    assert len(model.squeeze) == 1
    assert len(model.mix) == 0
