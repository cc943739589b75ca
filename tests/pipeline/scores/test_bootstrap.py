import numpy as np
import pytest
import torch
from scipy import stats

from hsnet.errors import ConfigError
from hsnet.metrics import class_iou, foreground_background_iou, mean_iou, sum_by_class
from pipeline.scores.bootstrap import (
    Interval,
    episodes_for,
    interval,
    p_value,
    resample,
    swapped_differences,
)

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


def whole(counts: np.ndarray, size: int = 4000) -> np.ndarray:
    """(..., 2) foreground counts with the background of photos of `size` pixels: (..., 2, 2)."""
    inside, union = counts[..., 0], counts[..., 1]
    background = np.stack([size - union, size - inside], -1)
    return np.stack([background, counts], -1)


def miou_of(methods, classes, class_ids, **choices):
    """Values and samples of mIoU from foreground counts (M, n, 2)."""
    return resample(whole(np.asarray(methods)), classes, class_ids, **choices).miou()


def miou_interval(counts, classes, class_ids, seed=0):
    values, samples = miou_of([counts], classes, class_ids, seed=seed)
    return interval(values[0], samples[:, 0])


def paired_difference(first, second, classes, class_ids):
    values, samples = miou_of([first, second], classes, class_ids)
    return interval(values[0] - values[1], samples[:, 0] - samples[:, 1])


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
        values, samples = miou_of(counts, classes, range(CLASSES), seed=test, resamples=400)
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


def test_values_are_exactly_those_of_the_metrics():
    """Point estimates equal hsnet.metrics, whatever is resampled: classes to the last bit, means up to the order in
    which torch and numpy add a few numbers."""
    random = np.random.default_rng(5)
    classes, class_ids = random.integers(0, 6, 90) * 2, [0, 2, 4, 6, 8, 10, 12]  # no episode of 12
    counts = whole(population(6, size=60)[:, 0].reshape(-1, 2)[:90])
    totals = sum_by_class(torch.tensor(counts), classes.tolist(), class_ids)
    queries = random.integers(0, 9, 90).tolist()
    for groups in (None, queries):
        found = resample(counts[None], classes, class_ids, resamples=3, groups=groups)
        assert found.class_iou()[0][0].tolist() == class_iou(totals).tolist()
        assert found.miou()[0][0] == pytest.approx(mean_iou(totals), rel=1e-15)
        assert found.fb_iou()[0][0] == pytest.approx(foreground_background_iou(totals), rel=1e-15)
        assert found.class_iou()[1][:, 0, -1].tolist() == [0.0] * 3


def simulate(per_class: int, tests: int, unit: int = 1) -> np.ndarray:
    """How often intervals of mIoU, FB-IoU and one class hold the truth; `unit` episodes of a query are alike."""
    everything = whole(population(7)[:, 0])
    totals = everything.sum(1).astype(float)
    truth = resample(everything[:, :1].transpose(1, 0, 2, 3), range(CLASSES), range(CLASSES), resamples=1)
    truth = type(truth)(totals[None], truth.samples, truth.units)
    random = np.random.default_rng(8)
    classes = np.repeat(np.arange(CLASSES), per_class * unit)
    queries = np.repeat(np.arange(CLASSES * per_class), unit).tolist()
    inside = np.zeros(3)
    for test in range(tests):
        chosen = np.repeat(random.integers(0, everything.shape[1], (CLASSES, per_class)), unit, axis=1)
        counts = np.concatenate([everything[c, chosen[c]] for c in range(CLASSES)])[None]
        groups = queries if unit > 1 else None
        found = resample(counts, classes, range(CLASSES), seed=test, resamples=400, groups=groups)
        values = [found.miou()[1][:, 0], found.fb_iou()[1][:, 0], found.class_iou()[1][:, 0, 1]]
        true = [truth.miou()[0][0], truth.fb_iou()[0][0], truth.class_iou()[0][0, 1]]
        for kind, (drawn, value) in enumerate(zip(values, true, strict=True)):
            one = interval(value, drawn)
            inside[kind] += one.low <= value <= one.high
    return inside


@pytest.mark.parametrize(("per_class", "unit", "level"), [(60, 1, 0.95), (60, 5, 0.95), (6, 1, 0.91)])
def test_coverage(per_class, unit, level):
    """300 tests each; bounds are the 0.1 % and 99.9 % points of the binomial at the nominal level.

    With six episodes per class the percentile interval of a ratio is a little short, which the docs say: 91 %.
    """
    tests = 300
    inside = simulate(per_class, tests, unit)
    low, high = stats.binom.ppf(0.001, tests, level - 0.015), stats.binom.ppf(0.999, tests, 0.955)
    assert ((inside >= low) & (inside <= high)).all(), inside / tests


def test_alike_episodes_need_their_query_as_the_unit():
    """Five episodes of one query that are all alike are one: taken for five, intervals are too short."""
    counts = whole(population(9, size=40)[:, 0])
    classes = np.repeat(np.arange(CLASSES), 200)
    alike = np.repeat(counts, 5, axis=1).reshape(1, -1, 2, 2)
    queries = np.repeat(np.arange(CLASSES * 40), 5).tolist()
    by_episode, by_query = (
        resample(alike, classes, range(CLASSES), groups=groups).miou()[1].std() for groups in (None, queries)
    )
    assert by_query == pytest.approx(by_episode * 5**0.5, rel=0.1)
    once = resample(counts.reshape(1, -1, 2, 2), np.repeat(np.arange(CLASSES), 40), range(CLASSES)).miou()[1].std()
    assert by_query == pytest.approx(once, rel=1e-12)


def test_a_few_episodes_do_not_make_intervals_narrow():
    """The variance of resamples is that of the sample mean without bias: its mean over tests is the true one."""
    everything = whole(population(10)[:, 0])
    random = np.random.default_rng(11)
    classes = np.repeat(np.arange(CLASSES), 3)
    values, variances = [], []
    for test in range(300):
        counts = np.concatenate([everything[c, random.integers(0, 40_000, 3)] for c in range(CLASSES)])[None]
        found, samples = resample(counts, classes, range(CLASSES), seed=test, resamples=200).miou()
        values.append(found[0])
        variances.append(samples[:, 0].var(ddof=1))
    # 0.67 if n were drawn of n = 3. 0.15: four standard errors of a variance from 300 values.
    assert np.mean(variances) / np.var(values, ddof=1) == pytest.approx(1, abs=0.33)


def test_resamples_keep_the_weight_of_a_class():
    """FB-IoU adds classes up: one with 2 episodes must not count half of what it did when 1 of them is drawn."""
    sizes = (2, 3, 40)
    counts = np.concatenate([whole(population(17)[c, 0, :n]) for c, n in enumerate(sizes)])[None]
    found = resample(counts, np.repeat(np.arange(3), sizes), range(3), resamples=4000)
    assert found.samples.mean(0) == pytest.approx(found.totals, rel=0.05)


@pytest.mark.parametrize("noises", [(0.05, 0.05), (0.02, 0.1)])
def test_the_paired_test_is_wrong_as_often_as_it_says(noises):
    """300 pairs of equally good methods: p below 0.05 in about 5 %, also where one of them is noisier."""
    random = np.random.default_rng(12)
    classes = np.repeat(np.arange(CLASSES), 30)
    found = []
    for test in range(300):
        union = random.integers(200, 3000, len(classes))
        hard = random.beta(2, 2, len(classes)) * 0.6 + 0.2
        pair = [
            whole(
                np.stack([(np.clip(hard + random.normal(0, noise, len(classes)), 0, 1) * union).astype(int), union], -1)
            )
            for noise in noises
        ]
        found.append(p_value(*swapped_differences(np.stack(pair), classes, range(CLASSES), seed=test, swaps=499)))
    rejected = sum(p <= 0.05 for p in found)
    assert stats.binom.ppf(0.001, 300, 0.05) <= rejected <= stats.binom.ppf(0.999, 300, 0.05), rejected / 300
    assert 0.4 < np.mean(found) < 0.6


def test_a_real_difference_is_found():
    counts = whole(population(13, shift=0.03)[:, :, :60].transpose(1, 0, 2, 3).reshape(2, -1, 2))
    classes = np.repeat(np.arange(CLASSES), 60)
    real, swapped = swapped_differences(counts, classes, range(CLASSES))
    assert real > 1
    assert p_value(real, swapped) < 0.01
    assert swapped.mean() == pytest.approx(0, abs=4 * swapped.std() / len(swapped) ** 0.5)
    values, _ = resample(counts, classes, range(CLASSES)).miou()
    assert real == pytest.approx(values[0] - values[1], abs=1e-12)
    back, again = swapped_differences(counts[::-1], classes, range(CLASSES))
    assert back == -real
    assert p_value(back, again) == p_value(real, swapped)


def test_equal_methods_have_p_1():
    counts = whole(population(14, size=20)[:, 0].reshape(1, -1, 2).repeat(2, 0))
    classes = np.repeat(np.arange(CLASSES), 20)
    assert p_value(*swapped_differences(counts, classes, range(CLASSES))) == 1


def test_long_tests_are_drawn_in_blocks(monkeypatch):
    counts = whole(population(15, size=50).transpose(1, 0, 2, 3).reshape(2, -1, 2))
    classes = np.repeat(np.arange(CLASSES), 50)

    def both() -> tuple[list, list]:
        drawn = resample(counts, classes, range(CLASSES), resamples=40).samples
        return drawn.tolist(), swapped_differences(counts, classes, range(CLASSES), swaps=40)[1].tolist()

    at_once = both()
    monkeypatch.setattr("pipeline.scores.bootstrap._CHUNK", 170)
    assert both() == at_once


def test_how_many_episodes_are_needed():
    assert episodes_for(Interval(50, 49, 51), 1000) == 4000
    assert episodes_for(Interval(50, 49.5, 50.5), 1000) == 1000
    assert episodes_for(Interval(50, 50, 50), 1000) is None
    # Ten times the episodes give the interval that was foretold, up to the noise of widths.
    counts = population(16)[:, 0]
    wide, narrow = (
        miou_interval(counts[:, :n].reshape(-1, 2), np.repeat(np.arange(CLASSES), n), range(CLASSES))
        for n in (200, 2000)
    )
    assert episodes_for(wide, 800, narrow.half_width) == pytest.approx(8000, rel=0.2)


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [((1, 3, 2), [0] * 3, "must be"), ((1, 3, 2, 2), [0] * 2, "must be"), ((1, 3, 2, 2), [0, 0, 5], "class 5")],
)
def test_counts_that_do_not_fit(shape, classes, message):
    with pytest.raises(ConfigError, match=message):
        resample(np.ones(shape, np.int64), classes, [0, 1])
    with pytest.raises(ConfigError, match="two methods"):
        swapped_differences(np.ones((1, 3, 2, 2), np.int64), [0] * 3, [0])
