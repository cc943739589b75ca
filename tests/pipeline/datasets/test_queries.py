"""Photos to segment: found in files and folders, each once, with what else lies there told in a line."""

from __future__ import annotations

from pathlib import Path

import pytest

from hsnet.errors import DataError
from pipeline.datasets import queries as module
from pipeline.datasets.queries import left_out_text, list_queries, names_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "in"
    for name in ("b.jpg", "a.png", "monday/b.jpg", "monday/late/c.jpg", "tuesday/b.jpg", "notes.txt", ".DS_Store"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def test_the_same_photo_is_done_once(folder, caplog):
    photo = folder / "b.jpg"
    found = list_queries([photo, photo, folder / "monday" / ".." / "b.jpg", folder])
    assert [path.name for path in found] == ["b.jpg", "a.png"]
    assert "3 photos were given more than once: done once" in caplog.text
    caplog.clear()
    (folder / "link.jpg").symlink_to(photo)
    assert len(list_queries([photo, folder / "link.jpg"])) == 2, "another name is another photo"
    assert caplog.text == ""


def test_subfolders_keep_their_names(folder, tmp_path, caplog):
    caplog.set_level("INFO", logger="pipeline")
    assert [path.name for path in list_queries([folder])] == ["a.png", "b.jpg"]
    assert "left out 1 file that is no photo here: 1 .txt; 2 subfolders not searched (--recursive does)" in caplog.text
    found = list_queries([folder], recursive=True)
    assert [str(path.relative_to(folder)) for path in found] == [
        "a.png", "b.jpg", "monday/b.jpg", "monday/late/c.jpg", "tuesday/b.jpg",
    ]  # fmt: skip
    assert list(names_of(found)) == ["a", "b", "monday-b", "monday-late-c", "tuesday-b"]
    assert {path.relative_to(folder).as_posix() for path in found.folders} == {
        ".", "monday", "monday/late", "tuesday",
    }  # fmt: skip
    assert list(found[1:3]) == [folder / "b.jpg", folder / "monday/b.jpg"]
    written = list_queries([folder], recursive=True, leave_out=folder / "monday")
    assert [path.name for path in written] == ["a.png", "b.jpg", "b.jpg"], "what is written there is no query"
    (folder / "monday" / "up").symlink_to(folder)
    assert len(list_queries([folder], recursive=True)) == 5, "links to folders are not followed"
    assert [path.name for path in list_queries([folder / "monday", folder], recursive=True)].count("c.jpg") == 1


def test_what_is_left_out_is_counted_by_suffix(folder, monkeypatch, caplog):
    caplog.set_level("INFO", logger="pipeline")
    monkeypatch.setattr(module, "PHOTO_SUFFIXES", (".jpg", ".png"))
    monkeypatch.setattr(module, "has_heic", False)
    for name in ("1.HEIC", "2.heic", "x.pdf", "README", "Thumbs.db"):
        (folder / name).touch()
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    assert len(list_queries([folder])) == 2
    (note,) = [record.getMessage() for record in caplog.records]
    assert note.startswith(
        f"Note: {folder}: left out 6 files that are no photos here: 2 .heic, 1 .pdf, 1 .txt, 1 broken"
    )
    assert "pip install 'hsnet-pipeline[heic]'" in note
    assert left_out_text({}) == ""
    assert left_out_text({f".{letter}": 1 for letter in "abcdefgh"}).endswith("1 .f, ...")


def test_a_folder_of_other_files_says_what_is_there(folder, tmp_path):
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "1.pdf").touch()
    with pytest.raises(DataError, match=r"holds no photo.*left out 1 file that is no photo here: 1 \.pdf"):
        list_queries([tmp_path / "scans"])


def test_a_watched_folder_may_be_empty_and_is_not_told_of(tmp_path, caplog):
    caplog.set_level("INFO", logger="pipeline")
    for name in ("a.jpg", "a.png", "notes.txt"):
        (tmp_path / name).touch()
    assert [path.name for path in list_queries([tmp_path], watched=True)] == ["a.jpg"]
    (tmp_path / "none").mkdir()
    assert len(list_queries([tmp_path / "none"], watched=True)) == 0
    assert caplog.text == ""
    with pytest.raises(DataError, match="does not exist"):
        list_queries([tmp_path / "gone"], watched=True)
