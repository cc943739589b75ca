"""Held-out classes in training photos: how many photos show them, and what the user is told."""

import pytest

from hsnet.errors import ConfigError
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.episodes.scenes import novel_photos
from pipeline.episodes.stream import EpisodeStream

NAMES = {0: "car", 1: "tree", 2: "road", 3: "sky"}
SHOWN = [(0, 1), (0, 1, 2), (2, 3), (0, 2), (1, 2, 3), (0, 1)]
"""Classes in the mask of each photo."""


@pytest.fixture
def index():
    """Car and sky are held out; photos of streets, nearly all with a car."""
    entries = tuple((image, c) for image, classes in enumerate(SHOWN) for c in classes if c in (1, 2))
    return DatasetIndex(
        "folder", NAMES, tuple("abcdef"), {0: {"trn": Split(entries), "test": Split(((0, 0), (1, 0)), (0, 3))}}
    )


def test_training_photos_that_show_a_held_out_class_are_counted(index):
    found = novel_photos(index, 0, SHOWN.__getitem__)
    assert (found.looked_at, found.listed, found.shown) == (6, 6, 6)
    assert found.per_class == {"car": 4, "sky": 2}
    assert novel_photos(index, 0, SHOWN.__getitem__, skipped=[2]).listed == 5
    few = novel_photos(index, 0, SHOWN.__getitem__, most=2)
    assert (few.looked_at, few.listed) == (2, 6)
    none = novel_photos(index, 0, lambda image: (1, 2))
    assert (none.shown, none.share, none.text("background")) == (0, 0.0, "")


def test_what_a_user_is_told(index):
    found = novel_photos(index, 0, SHOWN.__getitem__)
    told = found.text("background")
    assert told.startswith("6 of 6 training photos (100 %) show a class that this fold holds out (car 4, sky 2); its")
    assert "may not find these classes later: --novel-pixels ignore" in told
    assert found.text("ignore").endswith("its pixels are left out of the loss.")
    seldom = novel_photos(index, 0, lambda image: (0,) if image == 3 else (1,))
    assert "(17 %)" in seldom.text("background")
    assert "may not find" not in seldom.text("background")
    assert "1 of 2 training photos looked at, of 6" in novel_photos(
        index, 0, lambda image: (0,) if image == 3 else (1,), most=2
    ).text("background")


def test_dropping_them_all_says_why_nothing_is_left(index):
    with pytest.raises(ConfigError) as caught:
        EpisodeStream(index, 0, "trn", 1, 0, drop_novel=SHOWN.__getitem__)
    assert "no image is left" in str(caught.value)
    assert "6 of the 6 photos listed were left out because they show a class that fold 0 holds out (car, sky)" in str(
        caught.value
    )
    assert "--novel-pixels ignore" in str(caught.value)
    with pytest.raises(ConfigError, match=r"'tree' has 1 of 4 listed\. 4 of the 6 photos listed") as caught:
        EpisodeStream(index, 0, "trn", 1, 0, drop_novel=lambda image: (0,) if image in (0, 1, 2, 5) else (1,))
    assert "fewer shots" not in str(caught.value)
