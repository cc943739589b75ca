"""One local Ray for all tests of this folder: starting it takes five seconds."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator

import fakes
import pytest

from benchmarks.two_nodes import Nodes
from cluster.runner import RayRunner
from cluster.session import session


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("RAY_AUTH_MODE", "disabled")
        with session("local", num_cpus=3, num_gpus=0, object_store_bytes=100 << 20):
            yield


@pytest.fixture
def ray_runner(local_ray: None, request: pytest.FixtureRequest) -> Iterator[RayRunner]:
    """Two workers. The test's module and fakes are sent along with what they define: workers cannot import tests."""
    from ray import cloudpickle

    modules = (sys.modules[request.module.__name__], fakes)
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    runner = RayRunner(2)
    yield runner
    runner.close()
    for module in modules:
        cloudpickle.unregister_pickle_by_value(module)


@pytest.fixture(scope="session")
def two_nodes() -> Iterator[Nodes]:
    """Two nodes of two CPUs whose processes do not find this project. Not to be harmed: who kills makes his own."""
    with Nodes() as nodes:
        yield nodes
