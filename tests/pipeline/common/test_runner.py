import threading
import time

import pytest
import torch

from hsnet.errors import DataError
from pipeline.common.runner import SerialRunner, in_groups, one_torch_thread, read_ahead


def make_doubler():
    return lambda item: 2 * item


def test_every_item_comes_back_once_and_in_order():
    assert list(SerialRunner().map(make_doubler, range(5))) == [(i, 2 * i) for i in range(5)]


def test_the_worker_is_made_once_and_only_if_needed():
    made = []

    def make():
        made.append(1)
        return lambda item: item

    assert list(SerialRunner().map(make, [])) == []
    assert made == []
    assert len(list(SerialRunner().map(make, "abc"))) == 3
    assert made == [1]


def test_errors_come_as_themselves():
    def make():
        def worker(item):
            raise DataError(f"bad {item}")

        return worker

    with pytest.raises(DataError, match="bad 7"):
        list(SerialRunner().map(make, [7]))


def test_torch_runs_with_one_thread_inside_and_as_before_outside():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        results = SerialRunner().map(lambda: lambda item: torch.get_num_threads(), [0, 1])
        for _, inside in results:
            assert inside == 1
            assert torch.get_num_threads() == 2
        with pytest.raises(ZeroDivisionError), one_torch_thread():
            _ = 1 / 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_groups_grow_with_quick_items_and_shrink_towards_the_end():
    assert list(in_groups([1, 2, 3], lambda: None, 10, 1)) == [(1,), (2,), (3,)]
    assert [len(group) for group in in_groups(range(20), lambda: 2.0, 10, 1)] == [5, 5, 5, 5]
    assert [len(group) for group in in_groups(range(20), lambda: 60.0, 10, 1)] == [1] * 20
    sizes = [len(group) for group in in_groups(range(20), lambda: 0.0, 10, 2)]
    assert sum(sizes) == 20
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] == 6, "no more than half of what a worker's share may be"
    assert sizes[-3:] == [1, 1, 1]


def test_groups_are_chosen_when_they_are_asked_for():
    known = [None]
    groups = in_groups(range(10), lambda: known[-1], 4, 1)
    assert next(groups) == (0,)
    known.append(1.0)
    assert next(groups) == (1, 2, 3, 4)


@pytest.mark.parametrize("depth", [0, 1, 3, 99])
def test_reading_ahead_keeps_order_and_its_bound(depth):
    taken, names = [], set()

    def read(item):
        names.add(threading.current_thread().name.rpartition("_")[0])
        return 2 * item

    items = (taken.append(item) or item for item in range(10))
    for used, (item, doubled) in enumerate(read_ahead(read, items, depth, "ahead")):
        assert (item, doubled) == (used, 2 * used)
        assert len(taken) == min(10, used + 1 + depth)
    assert names == ({"ahead"} if depth else {""})


@pytest.mark.parametrize("threads", [2, 3, 9])
def test_several_threads_read_at_a_time_and_the_order_stays(threads):
    """All of them are inside `read` at once: the barrier opens only then. Later items are ready before earlier ones."""
    wanted = min(threads, 4)
    together, begun, names, main = threading.Barrier(wanted, timeout=10), [], set(), threading.current_thread()

    def read(item):
        assert threading.current_thread() is not main
        names.add(threading.current_thread().name)
        if item < wanted:
            together.wait()
        time.sleep(0.002 * (11 - item) if item % 3 else 0)
        return 2 * item

    taken = []
    items = (taken.append(threading.current_thread() is main) or item for item in range(12))
    ahead = read_ahead(read, items, 4, "ahead", threads, lambda: begun.append(threading.current_thread().name))
    for used, (item, doubled) in enumerate(ahead):
        assert (item, doubled) == (used, 2 * used)
        assert len(taken) == min(12, used + 1 + 4), "no more than the depth"
    assert all(taken), "items are asked for by the caller alone"
    assert len(names) == wanted, "more than the depth would have nothing to do"
    assert sorted(begun) == sorted(names)


def test_several_threads_raise_an_error_at_its_item():
    failed = threading.Event()

    def read(item):
        if item == 2:
            failed.set()
            raise DataError("bad 2")
        assert failed.wait(10), "the error is there before any result"
        return item

    ahead = read_ahead(read, range(9), 4, "ahead", 3)
    assert [next(ahead)[0], next(ahead)[0]] == [0, 1]
    with pytest.raises(DataError, match="bad 2"):
        next(ahead)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_closing_stops_all_threads():
    go, started, read = threading.Event(), threading.Semaphore(0), []

    def slow(item):
        if item:
            started.release()
            assert go.wait(10)
        read.append(item)

    ahead = read_ahead(slow, range(99), 5, "ahead", 2)
    next(ahead)
    assert started.acquire(timeout=10)
    assert started.acquire(timeout=10)
    threading.Timer(0.2, go.set).start()
    ahead.close()
    assert sorted(read) == [0, 1, 2], "those that were being read, and no more"
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ahead")]


def test_an_error_of_reading_is_raised_at_its_item():
    def read(item):
        if item == 2:
            raise DataError("bad 2")
        return item

    ahead = read_ahead(read, range(9), 4, "ahead")
    assert [next(ahead)[0], next(ahead)[0]] == [0, 1]
    with pytest.raises(DataError, match="bad 2"):
        next(ahead)


def test_closing_stops_what_waits_to_be_read():
    started, go, read = threading.Event(), threading.Event(), []

    def slow(item):
        if item == 1:
            started.set()
            assert go.wait(10)
        read.append(item)

    ahead = read_ahead(slow, range(9), 5, "ahead")
    next(ahead)
    assert started.wait(10)
    threading.Timer(0.2, go.set).start()
    ahead.close()
    assert read == [0, 1], "the one that was being read, and no more"
