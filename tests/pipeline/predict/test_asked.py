"""What a folder of predictions was asked for, kept beside them."""

from __future__ import annotations

import json

import pytest

from hsnet.errors import DataError
from pipeline.predict.asked import ASKED, Asked
from pipeline.predict.prepare import Choices

CHOICES = Choices(head="tune", image_size=128, tile=96, tau=0.3, overlapping=True, refine=False, least_score=0.0)


def test_the_choices_come_back(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").touch()
    choices = Choices(**{**vars(CHOICES), "weights": "w.pth"})
    Asked.of(choices, tmp_path / "b.bank", keep=tmp_path / "kept").write(tmp_path)
    back = Asked.read(tmp_path)
    assert back is not None
    assert back.choices() == Choices(**{**vars(CHOICES), "weights": str(tmp_path / "w.pth")})
    assert back.choices("other", "cuda") == Choices(**{**vars(CHOICES), "weights": "other", "device": "cuda"})
    assert (back.bank, back.checkpoint) == (str(tmp_path / "b.bank"), None)
    assert back.keep_features == str(tmp_path / "kept")


def test_weights_that_are_no_file_keep_their_name():
    assert Asked.of(Choices(weights="random:1")).weights == "random:1"


def test_a_folder_that_does_not_say(tmp_path):
    assert Asked.read(tmp_path) is None


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"tau": "much"}, {"colour": "red"}, None], ids=["later", "type", "unknown", "cut"]
)
def test_a_damaged_file_is_named(change, tmp_path):
    Asked.of(CHOICES).write(tmp_path)
    whole = json.loads((tmp_path / ASKED).read_text())
    (tmp_path / ASKED).write_text("{" if change is None else json.dumps(whole | change))
    with pytest.raises(DataError, match=r"predict\.json is damaged, or of a later version"):
        Asked.read(tmp_path)
