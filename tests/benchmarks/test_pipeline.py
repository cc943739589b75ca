"""The benchmark of what lies around the arithmetic, from end to end, tiny. Nothing here looks at a time."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import pipeline, timing
from pipeline.datasets import open_dataset

SIZE = 113


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return pipeline._make_store(lambda _: open_dataset("folder", pipeline.make_photos(folder / "p", 24)), 64, folder)


def test_photos_show_every_class_and_no_two_are_the_same(tmp_path):
    dataset = open_dataset("folder", pipeline.make_photos(tmp_path, 8))
    photos = [np.asarray(dataset.image(image)) for image in range(8)]
    assert {photo.shape for photo in photos} == {(375, 500, 3)}
    assert len({photo.tobytes() for photo in photos}) == 8
    assert {int(value) for image in range(8) for value in np.unique(dataset.label(image))} == {0, 1, 2, 3, 4}


def test_extraction_is_compared_with_the_bare_backbone(tmp_path):
    out = tmp_path / "results.json"
    arguments = f"--parts help,extract --backbones squeezenet1_1 --workers 0 --images 8 --size {SIZE} --repeats 1"
    assert pipeline.main([*arguments.split(), "--out", str(out), "--scratch", str(tmp_path)]) == out
    assert list(tmp_path.iterdir()) == [out], "photos and stores are removed"
    (run,) = timing.read(out)["runs"]
    assert {"date", "commit", "machine", "versions", "arguments"} <= set(run)
    told, extracted = run["measurements"]
    assert (told["work"], extracted["work"]) == ("help", "extract, 0 workers")
    assert (extracted["backbone"], extracted["image_size"], extracted["images"]) == ("squeezenet1_1", SIZE, 8)
    share = extracted["images_per_s"]["median"] / extracted["bare_images_per_s"]["median"]
    assert extracted["share_of_bare"] == pytest.approx(share, rel=1e-3)
    assert 0 < extracted["bare_cpu_s_per_image"]["median"] < extracted["cpu_s_per_image"]["median"]


def test_evaluation_and_training_are_timed_as_commands_and_inside(store, tmp_path):
    out = tmp_path / "results.json"
    arguments = "--parts evaluate,train --workers 0 --episodes 3 --batch 2 --steps 2 --repeats 1"
    pipeline.main([*arguments.split(), "--store", str(store), "--out", str(out), "--scratch", str(tmp_path)])
    assert list(tmp_path.iterdir()) == [out]
    ((evaluated, trained),) = [run["measurements"] for run in timing.read(out)["runs"]]
    assert (evaluated["backbone"], evaluated["image_size"]) == (trained["backbone"], trained["image_size"])
    assert {"command_1_episodes_0_workers_s", "command_3_episodes_0_workers_s"} <= set(evaluated)
    assert trained["first_step_s"] < trained["command_of_one_step_s"]
    for depth in ("prefetch_2", "prefetch_0"):
        assert 0 <= trained[depth]["waited_share"] < 1
        assert trained[depth]["waited_s"]["median"] <= trained[depth]["step_s"]["median"]


def test_an_unknown_part_runs_nothing(tmp_path):
    with pytest.raises(SystemExit, match=r"Unknown part: extrakt\. Choose of: help, extract"):
        pipeline.main(["--parts", "extrakt", "--out", str(tmp_path / "results.json")])
    assert list(tmp_path.iterdir()) == []
