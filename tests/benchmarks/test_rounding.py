import numpy as np
import pytest
import torch

from benchmarks import rounding


@pytest.fixture(scope="module")
def found() -> dict[str, rounding.Rounded]:
    generator = torch.Generator().manual_seed(0)
    photos = [[torch.randn(1, 2, 6, 6, 16, generator=generator).relu()] for _ in range(3)]
    return {each.way: each for each in rounding.measure(photos)}


def test_every_way_is_measured(found):
    assert len(found) == 2 + 2 + len(rounding.KEPT_BITS) * 2 - 1 + 2 * len(rounding.DIGITS)
    assert all(np.isfinite([each.mean, each.largest]).all() for each in found.values())
    assert found[rounding.PLAIN].bytes_per_value == 1
    assert found["float32"].mean == 0
    assert rounding.line(found["float32"]).startswith("| float32 | ")
    assert set(rounding.facts(list(found.values()))) == set(found)


def test_more_bits_less_error_more_bytes(found):
    for dtype in ("float32", "float16"):
        few, many = found[f"{dtype}, BitRound 4"], found[f"{dtype}, BitRound 8"]
        assert few.mean > 8 * many.mean
        assert few.bytes_per_value < many.bytes_per_value
    assert found["float32, Quantize 1"].mean > 10 * found["float32, Quantize 3"].mean


def test_what_is_packed_comes_back():
    values = np.arange(60, dtype=np.float32).reshape(3, 20)
    for kind in ("plain", "zstd", "shuffled"):
        assert np.array_equal(rounding._unpack(rounding._pack(values, kind), values.shape, values.dtype, kind), values)
