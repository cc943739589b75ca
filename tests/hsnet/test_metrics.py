"""Counts and scores against the published evaluation."""

import numpy as np
import pytest
import torch

from hsnet.errors import ShapeError
from hsnet.metrics import class_iou, count, foreground_background_iou, mean_iou, sum_by_class

CASES = ["pascal_fold1", "pascal_noignore", "pascal_missing_class", "coco_fold2", "fss_val"]


@pytest.mark.parametrize("case", CASES)
def test_equals_the_published_evaluation(golden, case):
    stored = np.load(golden / "e_evaluation.npz")
    get = lambda name: torch.from_numpy(stored[f"{case}/{name}"])  # noqa: E731
    ignored = bool(get("has_ignore"))
    counts, classes = [], []
    for batch in range(len(get("pred"))):
        truth = get("gt")[batch]
        got = count(get("pred")[batch] == 1, truth == 1, get("ignore")[batch].bool() if ignored else None)
        assert torch.equal(got[:, 0].T.float(), get("batch_inter")[batch])
        assert torch.equal(got[:, 1].T.float(), get("batch_union")[batch])
        counts.append(got)
        classes += get("class_id")[batch].tolist()
    totals = sum_by_class(torch.cat(counts), classes, get("class_ids_interest").tolist())
    # 5e-6 points: the published sums are float32, ours are integers.
    assert mean_iou(totals) == pytest.approx(float(get("miou")), abs=1e-5)
    assert foreground_background_iou(totals) == pytest.approx(float(get("fb_iou")), abs=1e-5)


def test_a_class_without_episode_counts_as_zero():
    hit = count(torch.ones(1, 2, 2), torch.ones(1, 2, 2))
    totals = sum_by_class(hit, [3], [3, 4])
    assert class_iou(totals).tolist() == [100, 0]
    assert mean_iou(totals) == 50


def test_counts_beyond_float32_stay_exact():
    """2^24 + 1 is no float32; the published sums stop counting there."""
    pixel = torch.tensor([[[0, 1], [0, 1]]])
    totals = sum_by_class(torch.cat([pixel * 2**24, pixel]), [0, 0], [0])
    assert int(totals[0, 0, 1]) == 2**24 + 1  # as a Python number: compared with a float32 it would be rounded, too


def test_ignored_pixels_belong_to_neither():
    prediction = torch.tensor([[[1, 1, 0, 0]]])
    truth = torch.tensor([[[1, 0, 1, 0]]])
    ignore = torch.tensor([[[0, 1, 0, 0]]]).bool()
    assert count(prediction, truth).tolist() == [[[1, 1], [3, 3]]]
    assert count(prediction, truth, ignore).tolist() == [[[1, 1], [2, 2]]]


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ShapeError, match=r"\(1, 2, 2\), \(1, 2, 3\)"):
        count(torch.ones(1, 2, 2), torch.ones(1, 2, 3))
