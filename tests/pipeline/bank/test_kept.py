"""Features of query photos kept on disk: the network runs once per photo and reading, answers hardly change."""

import os

import numpy as np
import pytest

from pipeline.bank.heads import CONTRAST, Example, fit
from pipeline.bank.kept import kept_features, kept_file
from pipeline.bank.reading import Reader


@pytest.fixture
def photo(tmp_path, drawn):
    path = tmp_path / "photo.png"
    drawn["class 0"][4][0].save(path)
    return path, drawn["class 0"][4][0]


def test_the_network_runs_once(tmp_path, reader, tiled, photo, monkeypatch):
    seen = []
    original = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, image: seen.append(self) or original(self, image))
    first = kept_features(tmp_path / "kept", reader, *photo)
    again = kept_features(tmp_path / "kept", reader, *photo)
    assert len(seen) == 1
    assert all(np.array_equal(a, b) for a, b in zip(first.levels, again.levels, strict=True))
    kept_features(tmp_path / "kept", tiled, *photo)
    assert len(seen) == 2, "another reading is another file"
    os.utime(photo[0], (1, 1))
    kept_features(tmp_path / "kept", reader, *photo)
    assert len(seen) == 3, "a photo that changed is read again"
    kept_file(tmp_path / "kept", reader, photo[0]).write_bytes(b"no levels")
    kept_features(tmp_path / "kept", reader, *photo)
    assert len(seen) == 4
    assert len([path for path in (tmp_path / "kept").rglob("*") if path.is_file()]) == 3


def test_answers_hardly_change(tmp_path, reader, photo, drawn):
    fitted = fit(CONTRAST, [Example(reader.read(one), mask) for one, mask in drawn["class 0"][:3]])
    fresh = fitted.answer(reader.read(photo[1])).maps
    kept = fitted.answer(kept_features(tmp_path / "kept", reader, *photo)).maps
    assert np.abs(fresh - kept).max() < 0.1 * np.abs(fresh).max()
    assert ((fresh > 0) == (kept > 0)).mean() > 0.97
