"""Run lengths row by row and Label Studio's packed form, against Label Studio's own code."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pycocotools import mask as coco_mask
from rle_pack import decode_rle, encode_rle

from pipeline.annotations.coco import compressed
from pipeline.annotations.found import whole_mask
from pipeline.annotations.runs import pack, placed_runs, row_runs, unpack

masks = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=20))


def rgba(mask: np.ndarray) -> np.ndarray:
    return np.repeat(mask.ravel(), 4).astype(np.uint8) * np.uint8(255)


@settings(max_examples=60, deadline=None)
@given(masks)
@example(np.ones((1, 1), bool))
@example(np.zeros((150, 150), bool))  # 90,000 values: longer than one record holds
@example(np.ones((128, 128), bool))  # 65,536 values: exactly one
def test_label_studio_reads_what_is_packed(mask: np.ndarray) -> None:
    assert np.array_equal(decode_rle(pack(row_runs(mask))), rgba(mask))


@settings(max_examples=60, deadline=None)
@given(masks)
@example(np.zeros((150, 150), bool))
def test_what_label_studio_packs_is_read(mask: np.ndarray) -> None:
    assert np.array_equal(unpack(encode_rle(rgba(mask)), *mask.shape), mask)


@settings(max_examples=60, deadline=None)
@given(masks)
@example(np.ones((128, 129), bool))
def test_packed_and_unpacked(mask: np.ndarray) -> None:
    assert np.array_equal(unpack(pack(row_runs(mask)), *mask.shape), mask)


def test_values_one_after_the_other_are_read() -> None:
    """The browser's code writes such records where values change often; the fourth channel decides, from 128 on."""
    values = [0, 0, 0, 127, 9, 9, 9, 128, 255, 255, 255, 0]
    bits = f"{12:032b}" + f"{7:05b}" + "0010" + "0011" + "0111" + "1111"
    bits += "0" + "01" + f"{11:04b}" + "".join(f"{value:08b}" for value in values)
    bits += "0" * (-len(bits) % 8)
    data = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert decode_rle(data).tolist() == values
    assert unpack(data, 1, 3).tolist() == [[False, True, False]]


def broken(change) -> list[int]:
    data = pack(row_runs(np.eye(8, dtype=bool)))
    change(data)
    return data


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda data: data.clear(), "0 values"),
        (lambda data: data.pop(3), "values, where 8 x 8 pixels have 256"),
        (lambda data: data.__delitem__(slice(-6, None)), "ends in the middle"),
        (lambda data: data.__setitem__(4, 255), "no bytes"),
        (lambda data: data.__setitem__(0, 256), "range"),
        (lambda data: data.__setitem__(slice(7, None), [255] * 20), "more values than the 256"),
    ],
)
def test_broken_run_lengths(change, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unpack(broken(change), 8, 8)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=60))
def test_bytes_of_chance_are_read_or_refused(data: list[int]) -> None:
    head = [*(4 * 4 * 4).to_bytes(4, "big")]
    with suppress(ValueError):
        assert unpack(head + data, 4, 4).shape == (4, 4)


@settings(max_examples=60, deadline=None)
@given(masks)
def test_row_runs(mask: np.ndarray) -> None:
    runs = row_runs(mask)
    assert runs.sum() == mask.size
    assert (runs[1:] > 0).all()
    assert np.array_equal(np.repeat(np.arange(len(runs)) % 2 == 1, runs), mask.ravel())


@settings(max_examples=60, deadline=None)
@given(masks, st.integers(0, 3), st.integers(0, 3), st.integers(0, 3), st.integers(0, 3))
def test_runs_of_a_part_are_those_of_the_whole(mask: np.ndarray, left: int, top: int, right: int, bottom: int) -> None:
    full = np.pad(mask, ((top, bottom), (left, right)))
    assert placed_runs(mask, left, top, *full.shape).tolist() == row_runs(full).tolist()


@settings(max_examples=60, deadline=None)
@given(masks)
def test_coco_reads_what_is_compressed_for_it(mask: np.ndarray) -> None:
    mask[0, 0] = True
    one = whole_mask(mask)
    assert one is not None
    theirs = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    assert compressed(one, *mask.shape) == {"size": list(mask.shape), "counts": theirs["counts"].decode()}
