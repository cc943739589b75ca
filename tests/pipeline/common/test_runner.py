import pytest
import torch

from hsnet.errors import DataError
from pipeline.common.runner import SerialRunner, in_groups, one_torch_thread


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
