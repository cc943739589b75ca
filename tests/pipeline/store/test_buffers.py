"""Memory is used again when, and only when, nothing refers to it."""

import numpy as np
import pytest
import torch
from fakes import in_threads

from pipeline.store.buffers import Buffers

SHAPE = (3, 1 << 20)


def address(array) -> int:
    return array.__array_interface__["data"][0]


def values(kept) -> np.ndarray:
    return kept.clone().numpy() if isinstance(kept, torch.Tensor) else np.array(kept)


@pytest.mark.parametrize("dtype", ["int8", "float16", "float32"])
def test_memory_is_used_again(dtype):
    buffers = Buffers()
    array = buffers.empty(SHAPE, dtype)
    assert (array.shape, array.dtype, array.flags.writeable, array.flags.c_contiguous) == (SHAPE, dtype, True, True)
    where = address(array)
    del array
    assert address(buffers.empty(SHAPE, dtype)) == where


@pytest.mark.parametrize(
    "derive",
    [
        lambda array: array,
        lambda array: array[1:, 5:],
        lambda array: array[1][3:].view(np.uint8).reshape(-1, 1),
        lambda array: memoryview(array),
        lambda array: torch.from_numpy(array),
        lambda array: torch.from_numpy(array)[1:].view(torch.uint8).transpose(0, 1),
        lambda array: torch.from_numpy(array).detach().split(1)[2],
        lambda array: torch.from_numpy(array)[:1].numpy()[0],
        lambda array: np.from_dlpack(torch.from_numpy(array)[2:]),
    ],
)
def test_what_is_referred_to_is_left_alone(derive):
    buffers = Buffers()
    array = buffers.empty(SHAPE, "float32")
    array[:] = 7
    where, kept = address(array), derive(array)
    before = values(kept)
    del array
    others = [buffers.empty(SHAPE, "float32") for _ in range(3)]
    for other in others:
        assert address(other) != where
        other[:] = 8
    np.testing.assert_array_equal(values(kept), before)
    del kept, others, other
    assert where in [address(one) for one in [buffers.empty(SHAPE, "float32") for _ in range(4)]]


def test_a_much_larger_block_is_not_given_for_a_small_one():
    buffers = Buffers()
    large = buffers.empty((8 << 20,), "int8")
    where = address(large)
    del large
    small, half = buffers.empty((2 << 20,), "int8"), buffers.empty((5 << 20,), "int8")
    assert address(small) != where
    assert address(half) == where


def test_no_more_is_kept_than_allowed():
    buffers = Buffers(keep_bytes=10 << 20)
    arrays = [buffers.empty((4 << 20,), "int8") for _ in range(6)]
    arrays.clear()
    buffers.empty((64 << 20,), "int8")
    assert sum(memory.nbytes for memory in buffers._free) <= 10 << 20


def test_small_arrays_are_plain():
    buffers = Buffers()
    assert buffers.empty((4,), "int8").base is None
    assert buffers.empty((0, 4), "float32").shape == (0, 4)


def test_several_threads_never_share_memory():
    buffers, wrong = Buffers(), []

    def work(number):
        for _ in range(200):
            array = buffers.empty((1 << 20,), "uint8")
            array[::4096] = number
            if (array[::4096] != number).any():
                wrong.append(number)

    in_threads(work)
    assert not wrong
