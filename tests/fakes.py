"""What the tests of many rooms need: photos that are made up, the state of a folder, a user without
rights, commands run in this process.

`from fakes import Photos` works in every test module: tests/conftest.py loads this file by its path.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from PIL import Image

import cli
from hsnet.errors import DataError
from pipeline.datasets.index import DatasetIndex, Split


def in_threads(work: Callable[[int], object], count: int = 4) -> None:
    """Call a function with 0, 1, ... at the same time, and wait for all. It keeps what went wrong itself."""
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


CLASSES = {0: "cat", 1: "dog"}


class Photos:
    """Random photos of many sizes, in memory. A photo depends on its number alone, whatever others there are.

    Args:
        numbers: of the photos, in the order of the data set.
        lists: how many classes the lists deal the photos out to.
        broken: these cannot be read.
        changes: number -> a function of the photo, whose result is seen instead. It may also raise, kill, or do harm.
        masks: the same for label maps.
        log: a file that gets the number of every photo that is read, by whichever process.

    Attributes:
        read: numbers of the photos that were read in this process.
    """

    def __init__(
        self,
        numbers: Iterable[int] = range(21),
        *,
        classes: Mapping[int, str] = CLASSES,
        lists: int = 2,
        name: str = "folder",
        has_ignore: bool = False,
        broken: Iterable[int] = (),
        changes: Mapping[int, Callable[[Image.Image], Image.Image]] | None = None,
        masks: Mapping[int, Callable[[np.ndarray], np.ndarray]] | None = None,
        log: Path | None = None,
    ) -> None:
        self.numbers, self.broken, self.log = list(numbers), set(broken), log
        self.changes, self.masks = dict(changes or {}), dict(masks or {})
        self.read: list[int] = []
        names = tuple(f"photos/{number}.jpg" for number in self.numbers)
        entries = Split(tuple((i, number % lists) for i, number in enumerate(self.numbers)))
        splits = {0: {"trn": entries, "val": entries, "test": entries}}
        self.index = DatasetIndex(name, dict(classes), names, splits, has_ignore=has_ignore)

    def image(self, i: int) -> Image.Image:
        number = self.numbers[i]
        self.read.append(number)
        if self.log is not None:
            with self.log.open("a") as file:
                file.write(f"{number}\n")
        if number in self.broken:
            raise DataError(f"/data/{self.index.images[i]} is truncated.")
        pixels = np.random.default_rng(number).integers(0, 256, (*_size(number), 3), np.uint8)
        return self.changes.get(number, _same)(Image.fromarray(pixels))

    def label(self, i: int) -> np.ndarray:
        number = self.numbers[i]
        label = np.zeros(_size(number), self.index.label_dtype)
        label[10:40, 10 + number : 30 + number] = number % 2 + 1
        if self.index.has_ignore:
            label[:5, :5] = 255
        return self.masks.get(number, _same)(label)


def _size(number: int) -> tuple[int, int]:
    return 50 + number, 90 - number


def _same(seen: Any) -> Any:
    return seen


def fingerprints(path: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file below a folder."""
    files = [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def first_time(marker: Path) -> bool:
    """Whether no process was here before."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@contextmanager
def plain_user() -> Iterator[None]:
    """Root may write anywhere; give that right up inside the block."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def invoke(*arguments: object) -> Result:
    """Run a command in this process; stdout and stderr apart. An unforeseen exception is raised here."""
    result = CliRunner().invoke(cli.main, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def printed(*arguments: object, code: int = 0) -> str:
    """Standard output of a command that ends with `code`; with an error's code, standard error too."""
    result = invoke(*arguments)
    assert result.exit_code == code, result.output
    return result.stdout if code in (0, 3) else result.output


def machine(*arguments: object) -> Any:
    """The JSON that a command prints; anything else on stdout would not parse."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def predict_with(checkpoint: Any, weights: Any, supports: Any, queries: Any, out: Path, **how: Any) -> Any:
    """A checkpoint's own head on photos: `pipeline.predict.prepare` and `pipeline.predict.stage` in one call.

    Args:
        how: fusion, tau, overlay, and what `pipeline.predict.stage.predict` takes.
    """
    from pipeline.predict.prepare import Choices, prepare
    from pipeline.predict.stage import predict
    from pipeline.predict.writing import Outputs

    choices = Choices(head="hsnet", weights=weights, fusion=how.pop("fusion", None), tau=how.pop("tau", 0.5))
    outputs = Outputs(overlay=how.pop("overlay", True))
    prepared = prepare(choices, supports=supports, checkpoint=checkpoint, outputs=outputs)
    return predict(prepared.work, queries, out, supports=prepared.supports, **how)
