"""What is expected of photos to come: leave-one-out by the letter, intervals that cover, presence, advice."""

import numpy as np
import pytest

from pipeline.annotations.item import Annotation
from pipeline.bank import check
from pipeline.bank.advice import check_bank
from pipeline.bank.check import HeadScore, Presence, check_class, overlap, pooled_interval
from pipeline.bank.folder import Bank
from pipeline.bank.heads import CONTRAST, TUNE, Example, fit


@pytest.fixture(scope="module")
def examples(reader, drawn):
    return [Example(reader.read(photo), mask) for photo, mask in drawn["class 0"][:4]]


def test_leave_one_out_by_the_letter(examples, reader, drawn):
    absent = Example(reader.read(drawn["class 1"][0][0]), None)
    every = [*examples[:3], absent]
    names = ["a", "b", "c", "without"]
    found = check_class("cup", names, every, (CONTRAST, TUNE))
    assert found.photos == ("a", "b", "c")
    assert found.absent == 1
    for score in found.scores:
        parts = []
        for left in range(3):
            # the photo without the class is dealt to the first group, as the photo "a" is
            kept = [one for n, one in enumerate(every) if n != left and not (n == 3 and left == 0)]
            fitted = fit(score.head, kept)
            coarse = fitted.answer(every[left].features)
            parts.append(overlap(fitted, coarse, every[left]))
            assert score.shown[left] == pytest.approx(coarse.presence, abs=1e-3)
        both, either = np.array(parts).T
        assert score.pooled == pytest.approx(both.sum() / either.sum(), abs=1e-6)
        assert score.ious == pytest.approx(both / either, abs=1e-6)
        assert len(score.absent) == 1
    assert found.scores[0].pooled >= found.scores[1].pooled
    assert 0 < found.best.pooled < 1


def test_the_answer_is_scored_against_the_mask(examples):
    """IoU at a reduced size, by hand at the photo's own, which is small enough to be left as it is."""
    fitted = fit(CONTRAST, examples[1:])
    coarse = fitted.answer(examples[0].features)
    said, truth = fitted.mask(coarse, examples[0].mask.shape), examples[0].mask
    both, either = overlap(fitted, coarse, examples[0])
    assert both / either == pytest.approx((said & truth).sum() / (said | truth).sum())
    ignore = np.zeros_like(truth)
    ignore[:, :48] = True
    both, either = overlap(fitted, coarse, Example(examples[0].features, truth, ignore))
    assert both / either == pytest.approx((said & truth)[:, 48:].sum() / (said | truth)[:, 48:].sum())


def test_one_photo_cannot_be_checked(examples):
    assert check_class("cup", ["a"], examples[:1], (TUNE,)).scores == ()


def test_many_photos_are_left_out_in_groups(examples, monkeypatch):
    monkeypatch.setattr(check, "FOLDS", 2)
    fits = []
    real = check.fit
    monkeypatch.setattr(check, "fit", lambda *given: fits.append(1) or real(*given))
    found = check_class("cup", list("abcd"), examples, (CONTRAST,))
    assert len(fits) == 2
    assert len(found.best.ious) == 4


def test_intervals_cover_the_pooled_iou_of_new_photos():
    """Photos drawn from one population: the interval holds the pooled IoU of thirty others nearly as often as said."""
    random = np.random.default_rng(0)
    inside = {4: 0, 8: 0}
    for count in inside:
        for _ in range(400):
            union = random.uniform(0.1, 0.4, count + check.NEW_PHOTOS)
            both = union * random.beta(5, 3, len(union))
            _, low, high = pooled_interval(both[:count], union[:count])
            inside[count] += low <= both[count:].sum() / union[count:].sum() <= high
    assert all(hits >= 376 for hits in inside.values()), inside
    # As many photos as tell the spread by themselves: neither wider nor narrower than it says.
    union = random.uniform(0.1, 0.4, (400, 400 + check.NEW_PHOTOS))
    both = union * random.beta(5, 3, union.shape)
    hits = 0
    for one, of in zip(both, union, strict=True):
        _, low, high = pooled_interval(one[:400], of[:400])
        hits += low <= one[400:].sum() / of[400:].sum() <= high
    assert 364 <= hits <= 396
    assert pooled_interval(np.array([0.1]), np.array([0.2])) == (0.5, 0.0, 1.0)
    assert pooled_interval(np.zeros(3), np.zeros(3)) == (0.0, 0.0, 1.0)


def score(shown, absent):
    return HeadScore(TUNE, (0.5,) * len(shown), 0.5, 0.0, 1.0, tuple(shown), tuple(absent))


def test_presence_tells_photos_apart_where_something_does():
    presence = Presence.of(score([2.0, 3.0, 2.5], [-2.0, -1.0]))
    assert presence.middle == pytest.approx(0.5)
    assert presence.score(2.5) > 0.95
    assert presence.score(-2.0) < 0.05
    assert presence.score(presence.middle) == pytest.approx(0.5)
    assert Presence.of(score([2.0, 3.0], [])) is None, "nothing is known of photos without the class"
    assert Presence.of(score([1.0, 1.2], [2.0, 3.0])) is None, "it says nothing"
    close = Presence.of(score([1.0, 1.0], [0.0]))
    assert close.slope == pytest.approx(100), "three photos are not believed to be all alike"


def test_what_hurts_and_what_would_help_is_said(tmp_path, reader, drawn):
    """A wrong mask is the photo without which the others do better; the photo that is found worst is named."""
    bank = Bank.create(tmp_path / "b.bank", reader.reading)
    for number, (photo, mask) in enumerate(drawn["class 0"][:4]):
        path = tmp_path / f"{number}.png"
        photo.save(path)
        wrong = np.zeros_like(mask)
        wrong[:20, :20] = True
        bank.add(Annotation(path, {"cup": wrong & ~mask if number == 3 else mask}))
    photo, mask = drawn["class 1"][0]
    photo.save(tmp_path / "lid.png")
    bank.add(Annotation(tmp_path / "lid.png", {"lid": mask}))
    steps = []
    found = check_bank(bank, tiles=[48], on_event=lambda *event: steps.append(event[2]))
    assert list(found.checks) == ["squeezenet1_1 at 64 px", "squeezenet1_1 at 64 px, tiles of 48 px"]
    cup, lid = found.checks["squeezenet1_1 at 64 px"]
    assert cup.hurts == ("3.png",)
    assert lid.scores == ()
    text = "\n".join(found.advice)
    assert "The others do better without 3.png" in text
    worst = min(zip(cup.best.ious, cup.photos, strict=True))[1]
    assert f"{worst} is not found by the others" in text
    assert "lid: one annotated photo, of which nothing can be left out" in text
    assert "cup: tune" in steps
