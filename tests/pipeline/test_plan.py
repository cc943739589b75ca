"""What is told beforehand, against what then happens."""

import dataclasses

import pytest
import torch
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline import plan as module
from pipeline.extract.stage import extract
from pipeline.plan import measure_costs


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
