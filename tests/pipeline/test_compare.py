import pytest

from hsnet.errors import StoreMismatch
from hsnet.model import HSNet
from pipeline.compare import compare, compare_scores
from pipeline.extract.stage import extract
from pipeline.heads.checkpoint import CheckpointInfo, save_checkpoint
from pipeline.loading.source import StoreSource
from pipeline.store.feature_store import FeatureStore


@pytest.fixture(scope="module")
def sources(tmp_path_factory, tiny_shapes, squeezenet):
    """The same photos in float32, int8, and two budgets."""
    folder, made = tmp_path_factory.mktemp("compare"), {}
    for name, budget in (("float32", None), ("int8", None), ("large", 30_000), ("small", 8_000)):
        path = folder / f"{name}.zarr"
        precision = "int8" if budget else name
        extract(tiny_shapes, squeezenet, path, image_size=64, precision=precision, bytes_per_image=budget)
        made[name] = StoreSource(FeatureStore.open(path))
    return made


@pytest.fixture(scope="module")
def head(tmp_path_factory, tiny_recipe):
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    model = HSNet([4, 2, 2], channels=[4, 8, 16])
    info = CheckpointInfo(
        recipe=tiny_recipe, learner={"layers": [4, 2, 2], "channels": [4, 8, 16]}, step=1, origin="a test"
    )
    save_checkpoint(path, model.state_dict(), info)
    return path


def test_a_source_against_itself(sources):
    found = compare(sources["float32"], sources["float32"], pairs=2)
    assert len(found.layers) == 8
    assert all(layer.largest == 0 and layer.spread > 0.05 for layer in found.layers)
    assert found.bytes_per_image == 4 * 101_120


def test_smaller_is_worse(sources):
    errors = {}
    for name in ("int8", "large", "small"):
        found = compare(sources[name], sources["float32"], pairs=4)
        errors[name] = sum(layer.mean for layer in found.layers) / 8
        assert all(layer.mean < layer.p99 <= layer.largest for layer in found.layers)
        assert found.encode_per_s > 0
        assert found.decode_per_s > 0
    assert errors["int8"] < 0.001 < errors["large"] < errors["small"]
    assert compare(sources["small"], sources["float32"], pairs=2).bytes_per_image <= 8_000


def test_the_same_pairs_every_time(sources):
    one, other = (compare(sources["small"], sources["int8"], pairs=2).layers for _ in range(2))
    assert one == other
    assert one != compare(sources["small"], sources["int8"], pairs=2, seed=1).layers


def test_exact_features_on_the_fly(sources, tiny_source):
    found = compare(sources["int8"], tiny_source, pairs=2)
    assert found.bytes_per_image_against is None
    assert found.encode_per_s > 0
    stored = compare(sources["int8"], sources["float32"], pairs=2)
    assert [layer.mean for layer in found.layers] == pytest.approx([layer.mean for layer in stored.layers], rel=0.01)
    assert compare(tiny_source, sources["small"], pairs=2).encode_per_s is None  # nothing exact to encode


def test_other_photos_or_networks_are_refused(sources, tiny_shapes, squeezenet, tmp_path):
    extract(tiny_shapes, squeezenet, tmp_path / "96.zarr", image_size=96, precision="int8")
    with pytest.raises(StoreMismatch, match=r"image_size    first 64, second 96"):
        compare(sources["int8"], StoreSource(FeatureStore.open(tmp_path / "96.zarr")))


def test_scores_on_the_same_episodes(sources, head):
    done = []
    change = compare_scores(
        head,
        lambda: sources["small"],
        lambda: sources["float32"],
        episodes=30,
        on_event=lambda now, total: done.append((now, total)),
    )
    assert done[-1] == (60, 60)
    assert change.difference.value == pytest.approx(change.miou.value - change.miou_against.value)
    assert change.difference.low <= change.difference.value <= change.difference.high
    same = compare_scores(head, lambda: sources["int8"], lambda: sources["int8"], episodes=10)
    assert (same.difference.low, same.difference.high) == (0, 0)
