import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hsnet.backbone import FrozenBackbone, pack_levels, random_state_dict
from hsnet.errors import ConfigError, StoreError
from pipeline.features.precision import encode, encode_taps


def level(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(scale=scale, size=shape).astype(np.float32)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / (np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1))


def test_float32_keeps_every_bit():
    features = level(2, 3, 4, 4, 8)
    (stored,) = encode([features], "float32")
    assert stored.dtype == np.float32
    assert stored.tobytes() == features.tobytes()


def test_int8_uses_its_range_and_keeps_directions():
    features = level(2, 3, 5, 5, 128, scale=37.0)
    (stored,) = encode([features], "int8")
    assert stored.dtype == np.int8
    assert stored.shape == features.shape
    assert (np.abs(stored.astype(int)).max(-1) == 127).all()
    # Rounding to 1/254 of the largest of 128 normal values turns a vector by about 0.006 rad; 4 % of it are the tail.
    assert cosines(features, stored).min() > 0.9998


def test_int8_rounds_half_to_even():
    features = np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5], np.float32).reshape(1, 1, 1, 1, 7)
    (stored,) = encode([features], "int8")
    assert stored.ravel().tolist() == [127, 0, 2, 2, 0, -2, 126]


@settings(max_examples=200, deadline=None)
@given(
    arrays(
        np.float32,
        (1, 1, 2, 2, 4),
        elements=st.floats(-3.0000000054977558e38, 3.0000000054977558e38, width=32, allow_subnormal=True),
    )
)
def test_int8_error_is_at_most_half_a_step_for_any_finite_input(features):
    (stored,) = encode([features], "int8")
    largest = np.abs(features).max(-1, keepdims=True).astype(np.float64)
    exact = np.divide(127 * features.astype(np.float64), largest, where=largest > 0, out=np.zeros(features.shape))
    # 1e-4: the quotient is rounded to float32 twice before it is rounded to a whole number.
    assert np.abs(exact - stored).max() <= 0.5 + 1e-4
    assert stored.min() >= -127  # -128 means "not there"


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_zero_vectors_stay_zero(precision):
    features = level(1, 1, 2, 2, 8)
    features[0, 0, 1, 0] = 0
    (stored,) = encode([features], precision)
    assert (stored[0, 0, 1, 0] == 0).all()
    assert (stored[0, 0, 0, 0] != 0).any()


@pytest.mark.parametrize("factor", [1e6, 3e37, 1e-9, 1e-38])
def test_float16_keeps_directions_beyond_its_range(factor):
    features = level(1, 2, 3, 3, 64)
    features[0, 0, 0, 0] *= np.float32(factor)
    (stored,) = encode([features], "float16")
    assert stored.dtype == np.float16
    assert np.isfinite(stored).all()
    # float16 has 11 bits: a part in 2048, whatever the scale (1e-38 is subnormal and has fewer bits itself).
    assert cosines(features, stored).min() > 1 - 1e-6
    # Everything that fits is plainly rounded.
    assert (stored[0, 1] == features[0, 1].astype(np.float16)).all()


def test_float16_leaves_its_largest_value_alone():
    features = np.array([65504, 1.0], np.float32).reshape(1, 1, 1, 1, 2)
    assert encode([features], "float16")[0].ravel().tolist() == [65504, 1]


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_named(precision, value):
    levels = [level(3, 1, 2, 2, 4), level(3, 1, 2, 2, 4)]
    levels[1][2, 0, 1, 1, 3] = value
    with pytest.raises(StoreError, match=r"image 'c\.jpg' hold NaN or infinity at level 1"):
        encode(levels, precision, ["a.jpg", "b.jpg", "c.jpg"])
    with pytest.raises(StoreError, match="image 2 of the batch"):
        encode(levels, precision)


def test_tensors_and_arrays_give_the_same():
    features = level(1, 2, 3, 3, 16)
    assert (encode([torch.from_numpy(features)], "int8")[0] == encode([features], "int8")[0]).all()


def test_input_is_left_alone():
    features = level(1, 2, 3, 3, 16, scale=1e6)
    before = features.copy()
    for precision in ("float16", "int8"):
        encode([features], precision)
    assert (features == before).all()


def test_unknown_precision_and_type():
    with pytest.raises(ConfigError, match="float32, float16, int8"):
        encode([level(1, 1, 1, 1, 4)], "int4")
    with pytest.raises(StoreError, match="float64"):
        encode([level(1, 1, 1, 1, 4).astype(np.float64)], "int8")


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_taps_are_encoded_as_packed_levels_are(precision):
    """To the bit, zero channels of narrower layers and vectors of zeros included."""
    backbone = FrozenBackbone("squeezenet1_1", random_state_dict("squeezenet1_1"))
    taps = backbone.taps(torch.randn(2, 3, 97, 97, generator=torch.Generator().manual_seed(0)))
    taps = [tap.clone() for tap in taps]
    taps[0][0, :, 3, 4] = 0
    taps[1] *= 1e-39
    taps[2] *= 1e30
    taps[3] = taps[3].contiguous()  # not channels-last
    wanted = encode(pack_levels(taps, backbone.spec), precision)
    found = [np.zeros_like(level) for level in wanted]
    encode_taps(taps, backbone.spec, precision, found, ["a", "b"])
    assert all(one.tobytes() == other.tobytes() for one, other in zip(found, wanted, strict=True))


def test_nan_in_a_tap_is_named():
    backbone = FrozenBackbone("squeezenet1_1", random_state_dict("squeezenet1_1"))
    taps = [tap.clone() for tap in backbone.taps(torch.zeros(2, 3, 65, 65))]
    out = encode(pack_levels(taps, backbone.spec), "int8")
    taps[-1][1, 5, 0, 0] = torch.inf
    with pytest.raises(StoreError, match="image 'b' hold NaN or infinity at level 2"):
        encode_taps(taps, backbone.spec, "int8", out, ["a", "b"])
