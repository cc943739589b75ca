"""Notes on when not to trust: what brings each about, and what does not."""

from __future__ import annotations

import numpy as np
import pytest

from hsnet.errors import ShapeError
from pipeline.predict import trust
from pipeline.predict.trust import Agreement, Alike, Seen, Sureness, Votes, Watch, notes_on_supports, sureness

NAMES = ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]


def blob(top: int, left: int, side: int = 30, size: tuple[int, int] = (90, 120)) -> np.ndarray:
    mask = np.zeros(size, bool)
    mask[top : top + side, left : left + side] = True
    return mask


def test_masks_at_one_spot_are_noticed_and_others_are_not():
    generator = np.random.default_rng(0)
    same, different = Alike(), Alike()
    for number in range(40):
        top, left = generator.integers(0, 3, 2)
        same.add(f"{number}", blob(30 + top, 40 + left))
        top, left = generator.integers(0, 60, 2)
        different.add(f"{number}", blob(top, left, size=(90 + number, 120)))
    (note,) = same.notes()
    assert note.kind == "alike"
    assert "40 photos have a mean IoU of 0.8" in note.text
    assert not list(different.notes())


def test_likeness_is_the_mean_iou_of_pairs():
    alike = Alike()
    masks = [blob(0, 32 * shift, 64, (64, 256)) for shift in range(5)]  # on whole cells of the grid
    for number, mask in enumerate(masks):
        alike.add(str(number), mask)
    pairs = [(masks[i] & masks[j]).sum() / (masks[i] | masks[j]).sum() for i in range(5) for j in range(i)]
    assert alike.likeness() == pytest.approx(np.mean(pairs), abs=1e-6)


def test_a_sample_of_bounded_size_that_depends_on_no_order(monkeypatch):
    monkeypatch.setattr(trust, "KEPT_MASKS", 10)
    masks = {f"photo {number}": blob(number % 50, number % 80) for number in range(200)}
    forth, back = Alike(), Alike()
    for name in masks:
        forth.add(name, masks[name])
    for name in reversed(masks):
        back.add(name, masks[name])
        back.add(name, masks[name])  # a photo counts once
    assert forth.masks == back.masks == 10
    assert forth.likeness() == pytest.approx(back.likeness())


def test_few_masks_and_masks_of_nothing_say_nothing():
    alike = Alike()
    for number in range(4):
        alike.add(str(number), blob(10, 10))
    for number in range(20):
        alike.add(f"empty {number}", np.zeros((50, 50), bool))
    assert alike.likeness() is None
    assert not list(alike.notes())


def test_an_object_of_one_pixel_in_a_large_photo_is_no_empty_mask():
    alike = Alike()
    for number in range(6):
        mask = np.zeros((1200, 1500), bool)
        mask[7, 9] = True
        alike.add(str(number), mask)
    assert alike.likeness() == pytest.approx(1)


def test_a_vote_of_one_support():
    votes = Votes()
    for _ in range(3):
        each = np.stack([np.zeros((20, 20), bool)] * 5)
        each[3, 5:15, 5:15] = True
        each[:, 5:7, 5:10] = True
        votes.add(each, each.any(0))
    assert votes.share == pytest.approx(90 / 100)
    (note,) = votes.notes(NAMES)
    assert note.kind == "single"
    assert "90% of the marked pixels" in note.text
    assert "d.jpg (100%)" in note.text


def test_votes_of_several_and_runs_of_one_support_bring_no_note():
    votes = Votes()
    votes.add(np.stack([blob(10, 10)] * 5), blob(10, 10))
    assert votes.share == 0
    assert not list(votes.notes(NAMES))
    one = Votes()
    one.add(blob(10, 10)[None], blob(10, 10))
    assert one.share == 0
    assert not list(one.notes(NAMES[:1]))
    with pytest.raises(ShapeError, match="after 5 supports"):
        votes.add(blob(10, 10)[None], blob(10, 10))


def test_supports_that_disagree_all_or_one():
    agreeing, odd, all_odd = Agreement(), Agreement(), Agreement()
    for number in range(4):
        agreeing.add(np.stack([blob(10 + k, 10 + number) for k in range(5)]))
        odd.add(np.stack([blob(10 + 40 * (k == 2), 10 + number) for k in range(5)]))
        all_odd.add(np.stack([blob(10, 5 + 22 * k, 20) for k in range(5)]))
    assert not list(agreeing.notes(NAMES))
    (note,) = odd.notes(NAMES)
    assert note.kind == "support"
    assert "c.jpg" in note.text
    (note,) = all_odd.notes(NAMES)
    assert note.kind == "disagree"
    assert "0.00" in note.text


def test_agreement_is_the_mean_over_pairs_and_leaves_out_what_marks_nothing():
    agreement = Agreement()
    masks = np.stack([blob(10, 10), blob(10, 25), blob(10, 40)])
    agreement.add(masks)
    agreement.add(np.zeros((3, 90, 120), bool))
    third = 15 / 45
    assert agreement.of_supports() == pytest.approx([third / 2, third, third / 2])
    assert agreement.mean() == pytest.approx(4 * third / 6)
    assert Agreement().mean() is None
    nothing = Agreement()
    nothing.add(np.zeros((3, 9, 9), bool))
    assert nothing.mean() is None
    assert not list(nothing.notes(NAMES))
    with pytest.raises(ShapeError, match="got 2 after 3"):
        agreement.add(masks[:2])


def test_sureness():
    assert sureness(np.where(blob(30, 40), 0.98, 0.02)) == 1
    assert sureness(np.where(blob(30, 40, 30), 0.55, 0.02)) == 0
    half = np.where(blob(30, 40, 30), 0.6, 0.02)
    half[30:60, 40:55] = 0.9
    assert sureness(half) == pytest.approx(0.5)
    assert sureness(np.full((9, 9), 0.05)) == 1
    assert sureness(np.full((9, 9), 0.47)) == 0


def test_a_run_that_is_unsure():
    run, sure = Sureness(), Sureness()
    for value in (0.1, 0.2, 0.3):
        run.add(value)
        sure.add(1 - value)
    (note,) = run.notes()
    assert "mean IoU of 0.20" in note.text
    assert "3 photos" in note.text
    assert not list(sure.notes())
    assert not list(Sureness().notes())


def test_objects_that_shrink_to_nothing():
    tiny = np.zeros((2000, 2000), bool)
    tiny[1, 1] = True
    masks = [blob(100, 100, 40, (2000, 2000)), tiny, blob(0, 0, 900, (2000, 2000))]
    (note,) = notes_on_supports(NAMES[:3], masks, 224)
    assert note.kind == "small"
    assert "2 of 3 supports keep fewer than 50 pixels of it: b.jpg (0), a.jpg (" in note.text
    assert "1 keep none" in note.text
    assert "--tile" in note.remedy
    assert notes_on_supports(NAMES[:1], masks[2:], 224) == []
    assert notes_on_supports(NAMES[:1], [np.zeros((50, 50), bool)], 224) == []  # a negative


def test_a_watch_hears_of_one_support_that_carries_the_vote():
    watch = Watch(NAMES[:3])
    for number in range(6):
        votes = np.zeros((3, 32, 32), bool)
        votes[1, 4 * number : 4 * number + 8, 4:12] = True
        watch.add(f"{number}", Seen.of(votes[1].repeat(4, 0).repeat(4, 1), votes), 0.1)
    kinds = [note.kind for note in watch.notes()]
    assert kinds == ["single", "disagree", "unsure"]
    assert NAMES[1] in watch.notes()[0].text
    quiet = Watch(NAMES[:3])
    for number in range(6):
        quiet.add(f"{number}", Seen.of(blob(10 * number, 12 * number), None), 0.9)
    assert quiet.notes() == []
