import numpy as np
import pytest

from hsnet.errors import ConfigError
from pipeline.statistics import interval, miou_interval, paired_difference, resampled_miou

CLASSES = 4


def population(seed: int, shift: float = 0.0, size: int = 40_000) -> np.ndarray:
    """(classes, size, 2, 2) intersections and unions of two methods; the second is `shift` worse."""
    random = np.random.default_rng(seed)
    union = random.integers(200, 3000, (CLASSES, size))
    hard = random.beta(2, 2, (CLASSES, size)) * np.linspace(0.5, 1, CLASSES)[:, None]
    noise = random.normal(0, 0.05, (2, CLASSES, size))
    noise[1] -= shift
    share = np.clip(hard + noise, 0, 1)
    return np.stack([np.stack([(s * union).astype(np.int64), union], -1) for s in share], 1)


def test_the_value_is_the_plain_miou():
    counts = np.array([[10, 20], [0, 20], [30, 40]])
    found = miou_interval(counts, [5, 5, 7], [5, 7, 9])
    assert found.value == pytest.approx((25 + 75 + 0) / 3)  # class 9 has no episode
    assert found.low <= found.value <= found.high


def test_intervals_hold_the_truth_as_often_as_they_say():
    """300 tests of 160 episodes from a population whose mIoU, and difference of two methods, is known."""
    everything = population(0, shift=0.02)
    totals = everything.sum(2)
    truth = (100 * totals[..., 0] / totals[..., 1]).mean(0)
    random = np.random.default_rng(1)
    classes = np.repeat(np.arange(CLASSES), 40)
    inside = np.zeros(2)
    tests = 300
    for test in range(tests):
        chosen = random.integers(0, everything.shape[2], (CLASSES, 40))
        counts = np.concatenate([everything[c, :, chosen[c]] for c in range(CLASSES)]).transpose(1, 0, 2)
        values, samples = resampled_miou(counts, classes, range(CLASSES), seed=test, resamples=400)
        assert values.shape == (2,)
        one, both = samples[:, 0], samples[:, 0] - samples[:, 1]
        for kind, (drawn, true) in enumerate(((one, truth[0]), (both, truth[0] - truth[1]))):
            found = interval(true, drawn)
            inside[kind] += found.low <= true <= found.high
    assert ((inside / tests > 0.90) & (inside / tests < 0.985)).all(), inside / tests


def test_pairing_cancels_what_is_hard_for_both():
    everything = population(2, shift=0.01)[:, :, :50]
    first, second = (everything[:, m].reshape(-1, 2) for m in range(2))
    classes = np.repeat(np.arange(CLASSES), 50)
    paired = paired_difference(first, second, classes, range(CLASSES))
    alone = miou_interval(first, classes, range(CLASSES))
    assert paired.high - paired.low < 0.5 * (alone.high - alone.low)
    assert paired.value == pytest.approx(alone.value - miou_interval(second, classes, range(CLASSES)).value)


def test_equal_methods_differ_by_nothing():
    counts = population(3)[:, 0, :20].reshape(-1, 2)
    same = paired_difference(counts, counts, np.repeat(np.arange(CLASSES), 20), range(CLASSES))
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert str(same) == "0.00 [0.00, 0.00]"


def test_the_same_seed_gives_the_same_interval():
    counts = population(4)[:, 0, :20].reshape(-1, 2)
    classes = np.repeat(np.arange(CLASSES), 20)
    assert miou_interval(counts, classes, range(CLASSES), 1) == miou_interval(counts, classes, range(CLASSES), 1)
    assert miou_interval(counts, classes, range(CLASSES), 1) != miou_interval(counts, classes, range(CLASSES), 2)


def test_other_episodes_cannot_be_paired():
    with pytest.raises(ConfigError, match="same episodes: 3 and 2"):
        paired_difference(np.ones((3, 2)), np.ones((2, 2)), [0] * 3, [0])
