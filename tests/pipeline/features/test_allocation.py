import numpy as np
import pytest

from hsnet.errors import ConfigError
from pipeline.features.allocation import LEVELS, allocate, share


def falling(channels: int, power: float = 2.0, scale: float = 1.0) -> np.ndarray:
    return scale * np.arange(1.0, channels + 1) ** -power


def size(runs) -> int:
    return int(np.prod(runs))


@pytest.mark.parametrize("nbytes", [100, 137, 200, 400, 900])
def test_the_budget_is_kept_and_nearly_used(nbytes):
    costs, positions = [falling(64), falling(64, 1.5), falling(128)], [9, 9, 4]
    found = allocate(costs, positions, nbytes)
    used = sum(p * len(runs) for p, runs in zip(positions, found, strict=True))
    assert nbytes - 3 * max(positions) < used <= nbytes
    for runs, cost in zip(found, costs, strict=True):
        assert all(1 < size(run) <= LEVELS for run in runs)
        assert sum(map(len, runs)) <= len(cost)


def test_what_costs_more_gets_more():
    (runs,) = allocate([falling(64)], [1], 16)
    levels = [count for run in runs for count in run]
    assert levels[0] == LEVELS
    assert levels[0] >= levels[4] >= levels[16] >= levels[-1]
    loud, quiet = allocate([falling(64, scale=100), falling(64)], [5, 5], 160)
    assert len(loud) > len(quiet)


def test_a_layer_with_more_positions_gets_fewer_bytes_at_each():
    fine, coarse = allocate([falling(64), falling(64)], [100, 4], 100 * 8 + 4 * 24)
    assert len(fine) < len(coarse)


def test_a_byte_is_filled():
    assert share(np.array([1.0])) == (256,)
    assert share(np.array([1.0] * 8)) == (2,) * 8
    uneven = share(np.array([1.0, 0.01]))
    assert uneven[0] > uneven[1] >= 2
    assert 200 < size(uneven) <= 256


def test_levels_share_a_byte_about_as_well_as_can_be():
    """Against every division of a byte between three directions."""
    cost = np.array([1.0, 0.3, 0.1])
    left = np.concatenate([[1.0, 0.3634, 0.1902], 2.7207 / (np.arange(4, 257) + 0.88) ** 2])
    error = lambda run: sum(c * left[k - 1] for c, k in zip(cost, run, strict=True))  # noqa: E731
    best = min(error((a, b, 256 // (a * b))) for a in range(1, 257) for b in range(1, 256 // a + 1))
    assert error(share(cost)) < 1.1 * best


def test_budgets_that_cannot_work():
    with pytest.raises(ConfigError, match="one byte per position and layer takes 20"):
        allocate([falling(8), falling(8)], [10, 10], 19)
    with pytest.raises(ConfigError, match="use --precision int8"):
        allocate([falling(8)], [10], 80)
    assert allocate([falling(8)], [10], 10)  # the least there is


def test_directions_that_cost_nothing_are_left_out():
    cost = np.array([1.0, 0.5] + [0.0] * 30)
    (runs,) = allocate([cost], [1], 10)
    assert sum(map(len, runs)) == 2
