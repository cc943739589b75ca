"""Prediction as a pipeline of Ray Data: the masks of one process, resumed, and photos that cannot be read."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from fakes import predict_with
from PIL import Image

from cluster.predict import RayPipe
from hsnet.backbone import BACKBONES
from hsnet.errors import ClusterError
from hsnet.model import HSNet
from pipeline.datasets.images import resize_label
from pipeline.datasets.shapes import Shapes
from pipeline.features.recipe import Recipe
from pipeline.features.weights import load_weights
from pipeline.heads.checkpoint import CheckpointInfo, load_checkpoint, save_checkpoint

SIZE = 64

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")
"""Ray Data warns of its own settings as it copies them."""


@pytest.fixture(scope="module")
def weights():
    return load_weights("squeezenet1_1")


@pytest.fixture(scope="module")
def checkpoint(weights, tmp_path_factory):
    """Answers both ways: the last layer's weights are large, its bias nothing."""
    torch.manual_seed(3)
    layers = list(reversed(BACKBONES["squeezenet1_1"].layers))
    head = HSNet(layers).eval()
    with torch.no_grad():
        head.decode_fine[-1].weight.mul_(10)
        head.decode_fine[-1].bias.zero_()
    path = tmp_path_factory.mktemp("run") / "best.safetensors"
    recipe = Recipe.of("squeezenet1_1", weights.sha256, SIZE, "int8")
    save_checkpoint(
        path, head.state_dict(), CheckpointInfo(recipe=recipe, learner={"layers": layers}, step=0, origin="test")
    )
    return load_checkpoint(path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Twenty photos of several sizes, one of them cut off, and a mask."""
    folder, data = tmp_path_factory.mktemp("photos"), Shapes(size=96)
    images = data.index.split(0, "test").by_class[0]
    for number in range(20):
        data.image(images[number % len(images)]).resize((96 + 3 * number, 80)).save(folder / f"{number:02d}.jpg")
    (folder / "07.jpg").write_bytes((folder / "07.jpg").read_bytes()[:600])
    mask = resize_label((data.label(images[0]) == 1).astype(np.uint8) * 255, (80, 96))
    Image.fromarray(mask).save(folder / "mask.gif")  # no suffix of a photo
    return folder


def run(checkpoint, weights, photos, out, **how):
    queries = sorted(photos.glob("*.jpg"))
    return predict_with(checkpoint, weights, [(photos / "00.jpg", photos / "mask.gif")], queries, out, **how)


def masks(out: Path):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(out.glob("*_mask.png"))}


@pytest.mark.usefixtures("ray_runner")
def test_masks_are_those_of_one_process(checkpoint, weights, photos, tmp_path):
    expected = run(checkpoint, weights, photos, tmp_path / "one")
    one = masks(tmp_path / "one")
    assert len(one) == 19
    assert 0 < np.mean([mask.mean() / 255 for mask in one.values()]) < 1
    shutil.copytree(tmp_path / "one", tmp_path / "ray")
    for number in (1, 4, 17):
        (tmp_path / "ray" / f"{number:02d}_mask.png").unlink()
    events = []
    pipe = RayPipe(2)
    done = run(checkpoint, weights, photos, tmp_path / "ray", pipe=pipe, on_event=lambda *event: events.append(event))
    assert (done.photos, done.kept, done.unusable) == (20, 16, 1)
    assert [path.name for path, _ in done.failed] == ["07.jpg"]
    assert events == [(number, 20) for number in range(1, 21)]
    again = masks(tmp_path / "ray")
    assert again.keys() == one.keys()
    assert all(np.array_equal(again[name], one[name]) for name in one)
    shares = {item.query: item.object_share for item in expected.written}
    assert {item.query: item.object_share for item in done.written} == shares


@pytest.mark.usefixtures("ray_runner")
def test_models_that_leave_no_cpu_are_refused(checkpoint, weights, photos, tmp_path):
    with pytest.raises(ClusterError, match=r"3 models and one decoder need 4 CPUs, Ray has 3. Use --workers 2"):
        run(checkpoint, weights, photos, tmp_path, pipe=RayPipe(3))
    assert not masks(tmp_path)
