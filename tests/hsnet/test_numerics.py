"""How a device calculates: decided in one place, and told as it is."""

from contextlib import nullcontext

import pytest
import torch

from hsnet.numerics import facts, has_bfloat16, set_numerics


@pytest.fixture
def restored():
    """The settings of the test's process as they were."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, matmul.allow_bf16_reduced_precision_reduction, cudnn.allow_tf32, cudnn.benchmark
    yield
    torch.set_float32_matmul_precision("high" if before[0] else "highest")
    matmul.allow_bf16_reduced_precision_reduction, cudnn.allow_tf32, cudnn.benchmark = before[1:]


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda index: "Fake 100")
    monkeypatch.setattr("torch.cuda.device", lambda device: nullcontext())


@pytest.mark.usefixtures("restored", "two_gpus")
def test_every_setting_is_made_and_told():
    """From a state in which all of them are the other way."""
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    loose = facts()
    assert (loose["GPU"], loose["float32 matrix products"]) == ("2 x Fake 100", "medium")
    switches = [name for name, value in loose.items() if value == "on"]
    assert len(switches) == 4
    set_numerics()
    strict = facts()
    assert [strict[name] for name in switches] == ["off"] * 4
    assert strict["float32 matrix products"] == "highest"
    set_numerics(benchmark=True)
    assert facts()["cuDNN benchmark"] == "on"


@pytest.mark.usefixtures("restored")
def test_a_cpu_calculates_as_before():
    a, b = torch.randn(64, 64), torch.randn(64, 64)
    before = a @ b, torch.nn.functional.conv2d(a[None, None], b[None, None, :3, :3])
    set_numerics()
    after = a @ b, torch.nn.functional.conv2d(a[None, None], b[None, None, :3, :3])
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))


def test_without_a_gpu_there_is_nothing_to_tell(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert facts() == {}
    assert not has_bfloat16("cpu")


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("there", [True, False])
def test_an_imitated_bfloat16_is_none(monkeypatch, there):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: including_emulation or there)
    assert has_bfloat16("cuda:1") is there
