"""Banks of a few generated photos, read by the packaged network at 64 px: real, and made in a second.

`from tiny_bank import make_bank, photo_file` works in every test module: tests/conftest.py loads this file.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.annotations.item import Annotation
from pipeline.datasets.shapes import Shapes

DATA = Shapes(size=96, trn_per_class=8)
CLASS = 5
NAME = DATA.index.classes[CLASS]


def numbers() -> list[int]:
    """Photos that show the class."""
    return [number for number, image in enumerate(DATA.index.images) if image.startswith(f"trn/{CLASS:02d}_")]


def mask_of(number: int) -> np.ndarray:
    return DATA.label(number) == CLASS + 1


def photo_bytes(number: int, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    DATA.image(number).save(data, kind)
    return data.getvalue()


def photo_file(folder: Path, number: int, name: str | None = None) -> Path:
    path = folder / (name or f"photo-{number}.png")
    path.write_bytes(photo_bytes(number))
    return path


def reading():
    """The packaged SqueezeNet at 64 px."""
    from pipeline.bank.reading import Reading
    from pipeline.features.backbones import new_recipe
    from pipeline.features.weights import load_weights

    return Reading(new_recipe("squeezenet1_1", load_weights("squeezenet1_1"), 64, "float32"))


def make_bank(folder: Path, count: int = 2, absent: int = 0):
    """A bank of photos that show the class, and of photos that do not."""
    from pipeline.bank.folder import Bank

    bank = Bank.create(folder / "tiny.bank", reading())
    photos = folder / "annotated"
    photos.mkdir(exist_ok=True)
    for number in numbers()[:count]:
        bank.add(Annotation(photo_file(photos, number), {NAME: mask_of(number)}))
    others = [n for n in range(len(DATA.index.images)) if not mask_of(n).any()][:absent]
    for number in others:
        bank.add(Annotation(photo_file(photos, number), {}, frozenset({NAME})))
    return bank


def drawn(mask: np.ndarray) -> bytes:
    """A mask as a canvas gives it: a PNG, opaque where there is object."""
    layers = np.zeros((*mask.shape, 4), np.uint8)
    layers[mask] = 255
    data = io.BytesIO()
    Image.fromarray(layers).save(data, "PNG")
    return data.getvalue()


@contextmanager
def running(make_app) -> Iterator[str]:
    """The address of an application behind the real server, on a port of its own.

    Args:
        make_app: called with the port.
    """
    from pipeline.serve.server import listen, make_server

    taken = listen("127.0.0.1", 0)
    port = taken.getsockname()[1]
    server = make_server(make_app(port), taken, 1 << 24)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.task_dispatcher.shutdown(timeout=60)
        # In the server's own thread: its loop ends when nothing is open.
        server.trigger.pull_trigger(lambda: [one.close() for one in list(server._map.values())])
        thread.join(30)
        assert not thread.is_alive()
