"""What is told beforehand, against what then happens."""

import dataclasses

import pytest
import torch
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline.extract.stage import extract
from pipeline.plan import costs as module
from pipeline.plan.costs import RUN_STEPS, STEP_EPISODES, measure_costs
from pipeline.plan.scaling import Site, scaling


def test_bytes_are_an_upper_limit_of_the_store(tiny_shapes, squeezenet, tmp_path):
    told = measure_costs(tiny_shapes, squeezenet, 64, "int8", folder=tmp_path, sample=2)
    assert list(tmp_path.iterdir()) == []
    made = extract(tiny_shapes, squeezenet, tmp_path / "s.zarr", image_size=64, precision="int8")
    assert told.images == made.images
    assert 0.5 * told.bytes < made.bytes < 1.2 * told.bytes
    assert told.fits == {"disk": True, "memory": True}


def test_every_part_is_measured(tiny_shapes, squeezenet, tmp_path):
    told = measure_costs(tiny_shapes, squeezenet, 64, "float32", folder=tmp_path, sample=3)
    assert list(told.seconds_per_image) == ["read", "backbone", "encode", "write"]
    assert all(seconds > 0 for seconds in told.seconds_per_image.values())
    assert told.measured_images == 3
    assert told.train_seconds_per_step > told.evaluate_seconds_per_episode > 0
    alone = told.images * sum(told.seconds_per_image.values())
    assert told.extract_seconds == pytest.approx(alone)


def test_workers_divide_extraction_alone(tiny_shapes, squeezenet, tmp_path):
    told = measure_costs(tiny_shapes, squeezenet, 64, "int8", folder=tmp_path, sample=1, workers=4)
    alone = told.images * sum(told.seconds_per_image.values())
    assert told.extract_seconds == pytest.approx(alone / 4)


def test_a_budget_replaces_the_features_bytes(tiny_shapes, squeezenet, tmp_path):
    exact, small = (
        measure_costs(tiny_shapes, squeezenet, 64, "int8", budget, folder=tmp_path, sample=1)
        for budget in (None, 10_000)
    )
    labels = 64 * 64
    assert labels < small.bytes_per_image - 10_000 < labels + 1000
    assert small.bytes_per_image < exact.bytes_per_image


def test_what_does_not_fit_is_said(tiny_shapes, squeezenet, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "free_on", lambda device: 1000)
    told = measure_costs(tiny_shapes, squeezenet, 64, "int8", folder=tmp_path, sample=1)
    assert told.fits == {"disk": True, "memory": False}
    assert dataclasses.replace(told, device_free=1 << 50).fits["device"]


def test_unreadable_photos_are_left_out_and_none_at_all_is_an_error(tiny_shapes, squeezenet, tmp_path):
    class Broken:
        index = tiny_shapes.index
        readable = 0

        def image(self, number):
            if number >= self.readable:
                raise DataError("cut off")
            return Image.new("RGB", (30, 20))

        def label(self, number):
            return tiny_shapes.label(number)

    with pytest.raises(ConfigError, match=r"None of 4 sample photos of shapes .* can be read"):
        measure_costs(Broken(), squeezenet, 64, "int8", folder=tmp_path)
    Broken.readable = 1
    assert measure_costs(Broken(), squeezenet, 64, "int8", folder=tmp_path).measured_images == 1


def test_threads_are_as_before(tiny_shapes, squeezenet, tmp_path):
    before = torch.get_num_threads()
    measure_costs(tiny_shapes, squeezenet, 64, "int8", folder=tmp_path, sample=1)
    assert torch.get_num_threads() == before


def costs(**changes):
    values = {
        "images": 1000,
        "bytes_per_image": 10_000_000,
        "bytes": 10**10,
        "disk_free": 10**12,
        "memory_free": 10**9,
        "device_free": None,
        "measured_images": 4,
        "seconds_per_image": {"read": 0.02, "backbone": 0.1, "encode": 0.03, "write": 0.01},
        "workers": 0,
        "extract_seconds": 160.0,
        "train_seconds_per_step": 4.0,
        "evaluate_seconds_per_episode": 0.1,
        "load_seconds_per_image": 0.02,
    }
    return module.Costs(**{**values, **changes})


def test_break_even_is_where_both_ways_have_cost_the_same():
    found = costs().break_even
    assert found.uses == pytest.approx(160 / (0.12 - 0.02))
    assert 160 + found.uses * found.stored_seconds == pytest.approx(found.uses * found.fly_seconds)
    assert found.runs == pytest.approx(found.uses / (2 * STEP_EPISODES * RUN_STEPS))
    steps = found.uses / (2 * STEP_EPISODES)
    assert found.seconds == pytest.approx(steps * 4 + found.uses * 0.12)


def test_a_store_that_reads_slower_than_the_backbone_computes_never_pays():
    found = costs(load_seconds_per_image=0.2).break_even
    assert found.uses is found.runs is found.seconds is None


def test_reading_back_is_measured(tiny_shapes, squeezenet, tmp_path):
    told = measure_costs(tiny_shapes, squeezenet, 64, "int8", folder=tmp_path, sample=2)
    assert 0 < told.load_seconds_per_image < 1


def test_a_stage_takes_as_long_as_what_binds_it():
    slow = Site(nodes=1, gpus=0, cores=10, bandwidth=1e12)
    extract = scaling(costs(), slow, speedup=1.0)["extract"]
    assert extract.bound == "compute"
    assert extract.seconds == pytest.approx(1000 * 0.15 / 10)
    narrow = scaling(costs(), dataclasses.replace(slow, bandwidth=1e6), speedup=1.0)
    assert narrow["extract"].bound == "store"
    assert narrow["extract"].seconds == pytest.approx(1000 * 10_000_000 / 1e6)
    assert narrow["train"].bound == "store"


def test_gpus_take_the_networks_and_cores_the_photos():
    site = Site(nodes=2, gpus=4, cores=8, bandwidth=1e12)
    extract = scaling(costs(), site, speedup=50.0)["extract"]
    assert extract.needs["GPU"] == pytest.approx(1000 * 0.1 / 50 / 4)
    assert extract.needs["CPU"] == pytest.approx(1000 * 0.05 / 16)
    assert extract.bound == "CPU"
    one, many = (scaling(costs(), dataclasses.replace(site, gpus=n), speedup=50.0, runs=8)["sweep"] for n in (1, 8))
    assert one.needs["GPU"] == pytest.approx(8 * many.needs["GPU"])


def test_an_evaluation_on_many_gpus_is_bound_by_the_one_that_adds_up():
    site = Site(nodes=1000, gpus=10_000, cores=64, bandwidth=1e15)
    assert scaling(costs(), site, speedup=50.0, episodes=10**6)["evaluate"].bound == "driver"


def test_more_photos_scale_the_store_and_may_fill_the_disk():
    site = Site(nodes=1, gpus=0, cores=1, bandwidth=1e9)
    few, many = (scaling(costs(), site, speedup=1.0, images=n)["extract"] for n in (1000, 10**6))
    assert many.seconds == pytest.approx(1000 * few.seconds)
    assert few.fits
    assert not many.fits
