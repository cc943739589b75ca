import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr

import cli
from hsnet.errors import ConfigError, DataError, StoreError, StoreMismatch
from pipeline.common.runner import SerialRunner
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.stream import EpisodeStream
from pipeline.extract.stage import extract
from pipeline.features.budgeted import unit_vectors
from pipeline.features.fitting import Fitting, fit_codec, nominal_recipe, sample_images
from pipeline.features.recipe import Recipe
from pipeline.loading.batch import load_batch
from pipeline.loading.source import OnlineSource, StoreSource
from pipeline.store.feature_store import FeatureStore

SIZE = 64
BUDGET = 30_000
"""Of 101,120 values at 64 px: 2.4 bits each."""


def make(tmp_path, shapes, weights, budget=BUDGET, **options):
    events = []
    path = options.pop("path", tmp_path / "s.zarr")
    options = {"precision": "int8", "bytes_per_image": budget, **options}
    extract(shapes, weights, path, image_size=SIZE, on_event=events.append, **options)
    return path, events


@pytest.fixture(scope="module")
def coded(tmp_path_factory, tiny_shapes, squeezenet):
    return make(tmp_path_factory.mktemp("coded"), tiny_shapes, squeezenet)


def test_a_store_in_a_budget(coded, tiny_source):
    path, events = coded
    assert isinstance(events[0], Fitting)
    store = FeatureStore.open(path)
    sizes = [level[0].nbytes for level in store.features([0])]
    assert 0.9 * BUDGET < sum(sizes) <= BUDGET
    recipe = store.recipe
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert recipe.coding.fit == store.codec.digest
    assert recipe.coding.images == events[0].images
    exact, found = tiny_source.features([3]), store.codec.decode(StoreSource(store).features([3]))
    for level, out in zip(exact, found, strict=True):
        for layer in range(level.shape[1]):
            x, y = unit_vectors(level[:, layer]), out[:, layer].flatten(0, 2)
            assert (x @ x.t() - y @ y.t()).abs().mean() < 0.02


def test_the_sample_is_of_every_folds_training_list_and_of_no_label(tiny_shapes):
    index = tiny_shapes.index
    drawn = sample_images(index)
    listed = {image for fold in index.folds for image, _ in index.split(fold, "trn").entries}
    assert set(drawn) == listed
    assert drawn != sorted(drawn)
    assert drawn == sample_images(index)


def test_resuming_keeps_the_fit_and_gives_the_same_bytes(tmp_path, coded, tiny_shapes, squeezenet):
    path, _ = make(tmp_path, tiny_shapes, squeezenet, runner=SerialRunner(), shard_images=5)  # another division
    one, other = FeatureStore.open(path), FeatureStore.open(coded[0])
    assert one.recipe == other.recipe
    with one.writing():
        one.drop({0})
    _, events = make(tmp_path, tiny_shapes, squeezenet)
    assert not any(isinstance(event, Fitting) for event in events)
    again = FeatureStore.open(path)
    images = range(len(again.index.images))
    assert all(np.array_equal(a, b) for a, b in zip(again.features(images), other.features(images), strict=True))


def test_another_budget_is_another_recipe(coded, tmp_path, tiny_shapes, squeezenet):
    path, _ = coded
    with pytest.raises(StoreMismatch, match=r"coding bytes_per_image stored 30000, wanted 20000"):
        make(tmp_path, tiny_shapes, squeezenet, 20_000, path=path)
    with pytest.raises(StoreMismatch, match=r"precision     stored 'coded', wanted 'int8'"):
        extract(tiny_shapes, squeezenet, path, image_size=SIZE, precision="int8")


def test_budgets_that_cannot_work(tmp_path, tiny_shapes, squeezenet):
    for budget in (100, 10**9):
        with pytest.raises(ConfigError, match="one byte per position and layer takes"):
            make(tmp_path, tiny_shapes, squeezenet, budget)
    assert not list(tmp_path.iterdir())


def test_a_plan_needs_no_fit(tiny_recipe):
    nominal = nominal_recipe(dataclasses.replace(tiny_recipe, precision="int8"), BUDGET)
    shapes = nominal.stored_shapes()
    assert 0.8 * BUDGET < sum(np.prod(shape) for shape in shapes) <= BUDGET


def test_batches_are_decoded_where_they_go(coded, tiny_source):
    source = StoreSource(FeatureStore.open(coded[0]))
    stream = EpisodeStream(source.index, 0, "trn", 2, 0)
    batch = load_batch(source, [stream[0], stream[1]])
    assert batch.query[0].dtype == torch.uint8
    moved = batch.to("cpu")
    assert moved.unit
    assert moved.codec is None
    assert moved.query[0].dtype == torch.float32
    assert moved.support[0].shape[:2] == (4, 2)
    exact = load_batch(tiny_source, [stream[0]])
    assert not exact.unit
    assert exact.to("cpu").query[0] is exact.query[0]


def test_a_damaged_fit_is_refused(tmp_path, coded):
    path = shutil.copytree(coded[0], tmp_path / "s.zarr")
    file = next((path / "codec" / "level0.layer0.levels").rglob("c/*/*"), None)
    assert file is not None
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match=r"level0\.layer0\.\w+ cannot be read"):
        _ = FeatureStore.open(path).codec


def test_a_fit_that_is_not_the_recipes_is_refused(tmp_path, coded):
    path = shutil.copytree(coded[0], tmp_path / "s.zarr")
    basis = zarr.open_array(path / "codec" / "level0.layer0.basis", mode="r+")
    basis[...] = -basis[...]  # as good a fit, but not the one its codes were made with
    with pytest.raises(StoreError, match="is not the recipe's"):
        _ = FeatureStore.open(path).codec


def test_an_unreadable_training_photo(tmp_path, tiny_shapes, squeezenet, tiny_recipe):
    class Torn(Shapes):
        def image(self, number):
            if number == sample_images(self.index)[0]:
                raise DataError("torn")
            return super().image(number)

    torn = Torn(size=64, trn_per_class=3, val_per_class=4)
    recipe = dataclasses.replace(tiny_recipe, precision="int8")
    with pytest.raises(DataError, match=r"torn.*Nothing was written"):
        fit_codec(torn, squeezenet, recipe, BUDGET)
    _, fitted = fit_codec(torn, squeezenet, recipe, BUDGET, skip=True)
    assert fitted.coding.images == len(sample_images(torn.index)) - 1


def test_threads_are_as_before(tiny_shapes, squeezenet, tiny_recipe):
    before = torch.get_num_threads()
    fit_codec(tiny_shapes, squeezenet, dataclasses.replace(tiny_recipe, precision="int8"), BUDGET)
    assert torch.get_num_threads() == before


def test_features_on_the_fly_are_never_coded(coded, tiny_shapes, tiny_source):
    with pytest.raises(ConfigError, match="needs their store"):
        OnlineSource(tiny_shapes, tiny_source.network.backbone, FeatureStore.open(coded[0]).recipe)


def test_the_documented_reading_without_this_program(coded):
    path, _ = coded
    text = (Path(cli.__file__).parent / "docs" / "compression.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names = {}
    exec(example.replace("voc-2mb.zarr", str(path)), names)
    store = FeatureStore.open(path)
    mine = store.codec.decode(StoreSource(store).features([0]))[0][0, 0]
    theirs = names["coordinates"](0)
    assert np.array_equal(theirs, mine[..., : theirs.shape[-1]].numpy())
