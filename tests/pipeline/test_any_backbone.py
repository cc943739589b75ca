"""Networks of timm's through the whole job: extract, train, predict; and their stores where timm is not installed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import Photos, predict_with
from PIL import Image

from hsnet.errors import CheckpointMismatch, StoreMismatch
from pipeline.extract.stage import extract
from pipeline.features.backbones import Reading, new_recipe, open_backbone
from pipeline.features.weights import load_weights
from pipeline.heads import catalogue
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.heads.config import RunConfig
from pipeline.loading.source import OnlineSource, StoreSource
from pipeline.plan.costs import measure_costs
from pipeline.store.feature_store import FeatureStore
from pipeline.store.recompute import recompute
from pipeline.train import fit

ROOT = Path(__file__).resolve().parents[2]
SIZE = 64
KINDS = {
    "convolutional": ("timm:test_convnext", Reading()),
    "hierarchical transformer": ("timm:pvt_v2_b0", Reading()),
    "plain transformer": ("timm:test_vit", Reading()),
    "transformer with registers, two levels": ("timm:test_vit2", Reading("4,5/6,7")),
}
SLIM = {"channels": [4, 4, 8]}
SHORT = {"batch_size": 2, "validate_every": 1, "validate_episodes": 2, "learner": SLIM}


@pytest.fixture(scope="module")
def data():
    return Photos(range(12))


HIDDEN = """
import sys
class Hidden:
    def find_spec(self, name, *args):
        if name.split(".")[0] in ("timm", "huggingface_hub", "torchvision"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
from pathlib import Path
from pipeline.evaluate.stage import evaluate
from pipeline.heads.catalogue import trained
from pipeline.heads.config import RunConfig
from pipeline.loading.source import StoreSource
from pipeline.store.feature_store import FeatureStore
from pipeline.train import fit
for store in sorted(Path(sys.argv[1]).glob("*.zarr")):
    source, run = StoreSource(FeatureStore.open(store)), store.with_suffix(".run")
    config = RunConfig.of(source, fold=0, steps=1, batch_size=2, validate_every=1, validate_episodes=2,
                          learner={"channels": [4, 4, 8]})
    fit(config, source, run)
    print(store.stem, len(trained(run, source).make().model.squeeze))
"""


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    """A store of every kind, KIND.zarr, and a head for it, KIND.run, trained where timm is not installed."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind, (backbone, reading) in KINDS.items():
        weights = load_weights(backbone, "random:0")
        extract(data, weights, folder / f"{kind}.zarr", image_size=SIZE, precision="int8", reading=reading)
    done = subprocess.run(
        [sys.executable, "-c", HIDDEN, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    levels = {kind: len(FeatureStore.open(folder / f"{kind}.zarr").recipe.network.levels) for kind in sorted(KINDS)}
    assert done.stdout.splitlines() == [f"{kind} {count}" for kind, count in levels.items()]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_each_kind_is_extracted_trained_on_and_predicts(kind, data, made, tmp_path):
    backbone, reading = KINDS[kind]
    weights = load_weights(backbone, "random:0")
    source = StoreSource(FeatureStore.open(made / f"{kind}.zarr"))
    assert source.recipe == new_recipe(backbone, weights, SIZE, "int8", reading)
    assert source.recipe.network.source == "random, seed 0"

    # The same features as the network gives, in the store's precision; and again when they are recomputed.
    exact = replace(source.recipe, precision="float32")
    online = OnlineSource(data, open_backbone(exact, weights), exact)
    for stored, fresh in zip(source.features([3]), online.features([3]), strict=True):
        assert torch.nn.functional.cosine_similarity(stored.float(), fresh, dim=-1).min() > 0.999
    assert recompute(source.store, data, weights, share=0.1).different == ()

    checkpoint = load_checkpoint(made / f"{kind}.run")
    assert checkpoint.info.learner["layers"] == list(reversed(source.recipe.layout.layers))
    photo, mask = tmp_path / "photo.jpg", tmp_path / "photo.png"
    data.image(0).save(photo)
    Image.fromarray((data.label(0) > 0).astype(np.uint8) * 255).save(mask)
    summary = predict_with(checkpoint, weights, [(photo, mask)], [photo], tmp_path / "o")
    assert [item.query.name for item in summary.written] == ["photo.jpg"]
    assert np.asarray(Image.open(tmp_path / "o/photo_mask.png")).shape == data.label(0).shape
    with pytest.raises(CheckpointMismatch, match="weights"):
        predict_with(checkpoint, load_weights(backbone, "random:1"), [(photo, mask)], [photo], tmp_path / "x")


def test_a_run_of_online_features_goes_on_with_the_store_of_the_same_weights(data, tmp_path):
    """Where weights came from is told in the recipe, and makes no other run and no other store."""
    weights, path = load_weights("timm:test_vit", "random:0"), tmp_path / "s.zarr"
    extract(data, weights, path, image_size=SIZE, precision="float32")
    source = StoreSource(FeatureStore.open(path))
    renamed = replace(weights, source="elsewhere", licence="MIT")
    assert extract(data, renamed, path, image_size=SIZE, precision="float32").written_shards == 0
    recipe = new_recipe("timm:test_vit", renamed, SIZE, "float32")
    online = OnlineSource(data, open_backbone(recipe, renamed), recipe)
    configs = [RunConfig.of(one, fold=0, steps=1, **SHORT) for one in (source, online)]
    assert configs[0].digest == configs[1].digest
    fit(configs[0], source, tmp_path / "run")
    fit(replace(configs[1], steps=2), online, tmp_path / "run")
    assert RunConfig.from_dict(configs[1].to_dict()) == configs[1]


def test_other_layers_or_arithmetic_are_another_store(data, made):
    weights, path = load_weights("timm:test_vit", "random:0"), made / "plain transformer.zarr"
    for reading, field in ((Reading("0,1"), "taps"), (Reading(autocast="bfloat16"), "network autocast")):
        with pytest.raises(StoreMismatch) as raised:
            extract(data, weights, path, image_size=SIZE, precision="int8", reading=reading)
        assert set(raised.value.differences) == {field}


def test_a_budget_and_a_forecast_work_for_them(data, tmp_path):
    weights = load_weights("timm:test_vit", "random:0")
    path = tmp_path / "s.zarr"
    summary = extract(data, weights, path, image_size=SIZE, precision="int8", bytes_per_image=800)
    store = FeatureStore.open(path)
    assert summary.images == len(data.index.images)
    assert sum(level.nbytes for level in store.features([0])) <= 800
    assert recompute(store, data, weights, share=0.1).different == ()
    told = measure_costs(data, weights, SIZE, "int8", folder=tmp_path, sample=1, reading=Reading("5"))
    assert told.bytes_per_image < 4 * 4 * 64 + 64 * 64 + 100


def test_an_untrained_head_fits_any_levels(data):
    weights = load_weights("timm:test_vit", "random:0")
    recipe = new_recipe("timm:test_vit", weights, SIZE, "float32")
    source = OnlineSource(data, open_backbone(recipe, weights), recipe)
    model = catalogue.made("untrained", source).make().model
    assert len(model.squeeze) == 1
    assert len(model.mix) == 0
