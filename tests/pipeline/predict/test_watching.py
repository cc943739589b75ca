"""A folder that is watched: photos as they come, whole ones only, each once until it changes."""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.datasets.queries import Queries
from pipeline.predict.watching import new_tasks


def folder_of(path: Path) -> Queries:
    queries = Queries()
    queries.add(path, sorted(one.name for one in path.iterdir()))
    return queries


def looks(path: Path, *changes) -> list[list[str]]:
    """Names of the photos given between one look and the next; before each look after the first, a change is made."""
    found: list[list[str]] = [[]]
    left = list(changes)

    def photos() -> Queries:
        found.append([])
        return folder_of(path)

    def stopped() -> bool:
        return len(found) > len(changes) + 2

    def listed() -> Queries:
        if len(found) > 1 and left:
            left.pop(0)()
        return photos()

    for task in new_tasks(listed, path / "out", True, stopped, seconds=0.0):
        found[-1].append(task.name)
    return found[1:]


def test_photos_are_given_once_and_when_they_are_whole(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"photo")

    def write(name: str, data: bytes):
        return lambda: (tmp_path / name).write_bytes(data)

    def touch():
        os.utime(tmp_path / "a.jpg", (5, 5))

    found = looks(tmp_path, lambda: None, write("b.jpg", b"half"), write("b.jpg", b"whole it is"), lambda: None, touch)
    assert found[0] == [], "seen for the first time"
    assert found[1] == ["a"]
    assert found[2] == found[3] == [], "b.jpg is still being written"
    assert found[4] == ["b"]
    assert found[5] == [], "a.jpg has just changed"


def test_a_photo_that_gets_another_name_is_given_again(tmp_path: Path) -> None:
    (tmp_path / "dog.png").write_bytes(b"first")

    def another():
        (tmp_path / "dog.jpg").write_bytes(b"before it by name")

    found = looks(tmp_path, lambda: None, another, lambda: None, lambda: None)
    assert found[1] == ["dog"]
    assert found[2] == ["dog-2"], "the name that the first had is now the other's"
    assert found[3] == ["dog"]
    assert found[4] == []


def test_a_photo_that_goes_is_no_trouble(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"photo")
    listing = folder_of(tmp_path)
    (tmp_path / "a.jpg").unlink()
    rounds = iter([False, False, True])
    assert list(new_tasks(lambda: listing, tmp_path / "out", True, lambda: next(rounds, True), 0.0)) == []
