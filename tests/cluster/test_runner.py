"""One contract, every runner; and what only processes can do: die."""

import os
import re
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from cluster.crew import first_done
from cluster.runner import RayRunner
from hsnet import errors
from hsnet.errors import ClusterError, DataError, StoreIncomplete, StoreMismatch
from pipeline.common.runner import SerialRunner

CREWS = ("tasks", "actors")
"""Ray's tasks, and one actor per share of a device (here of the CPUs)."""


@pytest.fixture(scope="module")
def actors(local_ray):
    """Kept from test to test: an actor that has begun has imported torch."""
    runner = RayRunner(2, actors=True)
    yield runner
    runner.close()


@pytest.fixture(params=["serial", *(pytest.param(crew, marks=pytest.mark.ray) for crew in CREWS)])
def runner(request):
    if request.param == "serial":
        return SerialRunner()
    tasks = request.getfixturevalue("ray_runner")
    return tasks if request.param == "tasks" else request.getfixturevalue("actors")


@pytest.fixture(params=CREWS)
def on_ray(request, ray_runner, actors):
    return ray_runner if request.param == "tasks" else actors


def make_doubler():
    return lambda item: 2 * item


def test_every_item_comes_back_once(runner):
    assert sorted(runner.map(make_doubler, range(9))) == [(i, 2 * i) for i in range(9)]
    assert list(runner.map(make_doubler, [])) == []


def test_closures_and_partials_can_make_workers(runner):
    factor = 7

    def make():
        return lambda item: factor * item

    assert sorted(runner.map(make, [1, 2])) == [(1, 7), (2, 14)]
    assert dict(runner.map(partial(_Adder, 5), [1, 2])) == {1: 6, 2: 7}


class _Adder:
    def __init__(self, number):
        self.number = number

    def __call__(self, item):
        return self.number + item


def test_torch_has_one_thread(runner):
    assert {n for _, n in runner.map(lambda: lambda item: torch.get_num_threads(), range(4))} == {1}


def test_the_worker_is_made_once_per_process(runner, tmp_path):
    def make():
        (tmp_path / f"{os.getpid()}-{threading.get_ident()}-{os.urandom(4).hex()}").touch()
        return lambda item: os.getpid()

    processes = {pid for _, pid in runner.map(make, range(12))}
    assert len(list(tmp_path.iterdir())) <= len(processes) + 2  # a process may have started but got no item


ERRORS = [
    DataError("photo 3 is broken"),
    StoreMismatch("other recipe", {"backbone": ("a", "b")}),
    StoreIncomplete("half", [1, 2]),
    errors.CheckpointMismatch("other", {"backbone": ("a", "b")}),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_user_errors_come_as_themselves_with_what_they_carry(runner, error):
    def make():
        def worker(item):
            raise error

        return worker

    with pytest.raises(type(error)) as caught:
        list(runner.map(make, [1, 2, 3]))
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert vars(caught.value) == vars(error)


def test_an_error_while_making_the_worker(runner):
    def make():
        raise DataError("no such folder")

    with pytest.raises(DataError, match="no such folder"):
        list(runner.map(make, [1]))


def test_bugs_keep_their_type(runner):
    with pytest.raises(ZeroDivisionError):
        list(runner.map(lambda: lambda item: 1 // item, [0]))


def test_items_are_asked_for_as_they_are_needed(on_ray):
    asked = []

    def items():
        for i in range(100):
            asked.append(i)
            yield i

    results = on_ray.map(make_doubler, items())
    next(results)
    assert len(asked) <= 4
    results.close()


def test_an_item_whose_process_is_killed_is_done_by_another(on_ray, tmp_path):
    def make():
        def worker(item):
            if item == 2:
                die_once(tmp_path / "died")
            return 2 * item

        return worker

    assert sorted(on_ray.map(make, range(6))) == [(i, 2 * i) for i in range(6)]
    assert (tmp_path / "died").exists()


def test_an_item_that_kills_every_process_is_a_clear_error(on_ray, monkeypatch):
    monkeypatch.setattr("cluster.runner.ATTEMPTS", 2)

    def make():
        def worker(item):
            os.kill(os.getpid(), signal.SIGKILL)

        return worker

    with pytest.raises(ClusterError, match=r"item 'photo' for good.*fewer workers"):
        list(on_ray.map(make, ["photo"]))


def test_actors_are_as_many_as_places_and_stay_for_the_next_map(ray_runner, actors):
    """A task may meet any idle process, and each that has had a GPU keeps memory there."""

    def make():
        return lambda item: os.getpid()

    first, second = ({pid for _, pid in actors.map(make, range(12))} for _ in range(2))
    assert len(first | second) == 2
    assert os.getpid() not in first
    assert RayRunner(1, gpus=0.25).actors
    assert not RayRunner(1).actors


def test_a_map_that_was_left_early_does_not_come_into_the_next(on_ray):
    def make():
        return lambda item: time.sleep(0.2) or item

    left = on_ray.map(make, range(100))
    next(left)
    left.close()
    assert dict(on_ray.map(make_doubler, range(5))) == {i: 2 * i for i in range(5)}


def test_a_long_wait_is_said(local_ray, monkeypatch, caplog):
    """Ever less often where there is room, so that the work may be long; as often as before where there is none."""
    import ray

    monkeypatch.setattr("cluster.crew.SILENT_SECONDS", 0.1)
    sleep = ray.remote(num_cpus=0)(lambda seconds: time.sleep(seconds))
    ray.get(sleep.remote(0))  # a process is there
    for share, text, least, most in (
        ({"CPU": 1, "GPU": 0}, "1 items are being worked on", 1, 6),
        ({"CPU": 1, "GPU": 0.5}, "no machine of the cluster has 1 CPUs and 0.5 GPUs", 8, 100),
    ):
        with caplog.at_level("INFO"):
            slow = sleep.remote(1.5)
            assert first_done([slow], share) == slow
        assert least <= caplog.text.count("Nothing for") <= most
        assert caplog.text.count("Nothing for") == caplog.text.count(text)
        caplog.clear()


def test_without_a_session_it_says_so(monkeypatch):
    from cluster import runner as module

    monkeypatch.setattr(module.ray, "is_initialized", lambda: False)
    with pytest.raises(ClusterError, match="session"):
        list(module.RayRunner(1).map(make_doubler, [1]))
    with pytest.raises(ValueError, match="at least one"):
        module.RayRunner(0)


def die_once(marker: Path) -> None:
    """Kill this process as the kernel would, but only the first that comes here."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def make_fragile():
    def work(item):
        if item == 1:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB\nmore of it")
        if item == 2:
            raise DataError("photo 'x.jpg' is truncated")
        return item

    return work


def test_an_item_that_fails_does_not_end_the_others_where_the_caller_asks(runner):
    failed = {}

    def on_failure(item, failure):
        failed[item] = failure
        return -item

    results = dict(runner.map(make_fragile, range(5), on_failure))
    assert results == {0: 0, 1: -1, 2: -2, 3: 3, 4: 4}
    assert failed[1].reason == "RuntimeError: CUDA out of memory. Tried to allocate 2 GiB"
    assert "in work" in failed[1].detail
    assert failed[2].reason == "photo 'x.jpg' is truncated"
    assert failed[2].detail == ""
    if not isinstance(runner, SerialRunner):
        assert re.search(r"^process \d+ on [\d.]+; its log is worker-\*-\d+\.err in", failed[1].place)
    with pytest.raises(RuntimeError, match="CUDA out of memory"):
        list(runner.map(make_fragile, [1]))


def test_an_item_whose_processes_all_die_does_not_end_the_others_either(on_ray, monkeypatch):
    monkeypatch.setattr("cluster.runner.ATTEMPTS", 2)

    def make():
        return lambda item: os.kill(os.getpid(), signal.SIGKILL) if item == 1 else item

    results = dict(on_ray.map(make, range(3), lambda item, failure: failure.reason))
    assert (results[0], results[2]) == (0, 2)
    assert "lost the work on item 1 for good" in results[1]
