"""A lack of memory: what to ask for less of, and every other error as it is."""

import pytest
import torch

from hsnet.errors import DeviceMemoryError
from pipeline.common.out_of_memory import lacked_memory, memory_told

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes.")


@pytest.mark.parametrize("error", [GPU, CPU, MemoryError()])
def test_it_is_told_in_one_line_with_what_to_do(error):
    with pytest.raises(DeviceMemoryError) as told, memory_told("Use less.", "Nothing was lost."):
        raise error
    first = str(error).splitlines()[0].rstrip(".") if str(error) else "MemoryError"
    assert str(told.value) == f"Out of memory ({first}). Use less. Nothing was lost."
    assert told.value.__cause__ is error
    assert lacked_memory(error)
    assert lacked_memory(told.value)


@pytest.mark.parametrize("error", [RuntimeError("sizes differ"), ValueError("no"), KeyError("memory")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, memory_told("Use less.", "Nothing was lost."):
        raise error
    assert raised.value is error
    assert not lacked_memory(error)
