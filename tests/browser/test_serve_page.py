"""The pages of `hsnet serve` and `hsnet review` in a real browser: look, draw, keep, download."""

from __future__ import annotations

import base64
import os
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_bank import DATA, NAME, make_bank, mask_of, numbers, photo_file, running

from pipeline.bank.folder import Bank
from pipeline.predict.prepare import Choices, prepare
from pipeline.predict.stage import predict
from pipeline.review.app import create_app as review_app
from pipeline.review.folder import Reviewed
from pipeline.review.loop import Loop
from pipeline.serve.app import create_app
from pipeline.serve.engine import Engine
from pipeline.serve.guard import Access

CHOICES = Choices(head="contrast")


class Address:
    """For `Browser.open`, which opens files."""

    def __init__(self, address: str) -> None:
        self.address = address

    def absolute(self) -> Address:
        return self

    def as_uri(self) -> str:
        return self.address


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    bank = make_bank(folder)
    photos = folder / "photos"
    photos.mkdir()
    queries = [photo_file(photos, number, f"photo <b>{number}.png") for number in numbers()[2:5]]
    predict(prepare(CHOICES, bank=bank).work, queries, folder / "out", supports={NAME: ()})
    return folder


def until(browser, script, *arguments):
    """What a script returns, once it is neither null nor false."""
    deadline = time.monotonic() + 60
    while True:
        found = browser.run(script, *arguments)
        if found:
            return found
        assert time.monotonic() < deadline, browser.run("return document.body.innerText")
        time.sleep(0.1)


def shot(browser, name):
    """A picture of the page, where HSNET_SCREENSHOTS says."""
    if os.environ.get("HSNET_SCREENSHOTS"):
        (Path(os.environ["HSNET_SCREENSHOTS"]) / f"{name}.png").write_bytes(browser.screenshot())


def give(browser, data: bytes, name: str):
    """Choose a file, as a person would."""
    browser.run(
        """
        const bytes = Uint8Array.from(atob(arguments[0]), letter => letter.charCodeAt(0));
        const files = new DataTransfer();
        files.items.add(new File([bytes], arguments[1]));
        const input = document.getElementById('photo');
        input.files = files.files;
        input.dispatchEvent(new Event('change'))""",
        base64.b64encode(data).decode(),
        name,
    )


def drag(browser, *places, kind="mouse"):
    """Press at the first of the places of the photo (0 to 1 each), go to the others, release."""
    points = browser.run(
        """
        const box = document.getElementById('canvas').getBoundingClientRect(), view = editor.view;
        return arguments[0].map(([x, y]) => [Math.round(box.left + view.x + x * editor.width * view.scale),
                                             Math.round(box.top + view.y + y * editor.height * view.scale)])""",
        [list(place) for place in places],
    )
    moves = [{"type": "pointerMove", "x": x, "y": y, "duration": 30} for x, y in points]
    actions = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
    pointer = {"type": "pointer", "id": kind, "parameters": {"pointerType": kind}, "actions": actions}
    browser._ask("POST", f"{browser.session}/actions", {"actions": [pointer]})


def layer(browser, number=0):
    """Pixels of a class as the page has them: (h, w) bool."""
    text = browser.run("return editor.layers[arguments[0]].canvas.toDataURL('image/png').split(',')[1]", number)
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).getchannel("A")) >= 128


@pytest.fixture
def served(browser, folder):
    engine = Engine(folder / "tiny.bank", CHOICES)
    with running(lambda port: create_app(engine, Access(port=port))) as address:
        browser.open(Address(address))
        until(browser, "return document.getElementById('bank').textContent.includes('annotated')")
        yield browser
        browser._ask("POST", f"{browser.session}/url", {"url": "about:blank"})


def test_upload_draw_keep_and_download(served, folder):
    browser, number = served, numbers()[3]
    data = photo_file(folder, number, "upload.png").read_bytes()
    shot(browser, "serve-empty")
    give(browser, data, "cup <i>1.png")
    until(browser, "return document.body.dataset.shown")
    mask = layer(browser)
    assert mask.any()
    engine = Engine(folder / "tiny.bank", CHOICES)
    np.testing.assert_array_equal(mask, engine.answer(DATA.image(number))[NAME].mask)
    assert "cup _i_1.png" in browser.run("return document.getElementById('name').textContent")

    kinds = browser.run("return [...document.querySelectorAll('[data-kind]')].map(one => one.dataset.kind)")
    assert {"masks", "coco", "labelstudio", "overlay"} <= set(kinds)
    fetched = browser.later("""
        const done = arguments[0];
        Promise.all([...document.querySelectorAll('[data-kind]')].map(link => fetch(link.href)
            .then(answer => answer.arrayBuffer().then(data => [answer.status, data.byteLength])))).then(done)""")
    assert all(status == 200 and size > 0 for status, size in fetched)

    browser.run("editor.setSize(12)")
    drag(browser, (0.1, 0.9), (0.5, 0.9), (0.9, 0.9))
    drawn = layer(browser)
    assert drawn[86, 15:80].all()
    assert (drawn & ~mask).sum() > 100
    assert not (mask & ~drawn).any()
    browser.press("#canvas", "e")
    drag(browser, (0.4, 0.9), (0.6, 0.9))
    erased = layer(browser)
    assert not erased[86, 40:56].any()
    browser.press("#canvas", "p")
    for place in ((0.05, 0.05), (0.25, 0.05), (0.25, 0.25)):
        drag(browser, place)
    browser.press("#canvas", "\ue007")
    with_corner = layer(browser)
    assert with_corner[8, 20]
    assert with_corner[22, 6] == erased[22, 6], "outside of the triangle"
    shot(browser, "serve")
    browser.click("#undo")
    np.testing.assert_array_equal(layer(browser), erased)
    browser.click("#undo")
    np.testing.assert_array_equal(layer(browser), drawn)
    browser.click("#redo")
    np.testing.assert_array_equal(layer(browser), erased)

    browser.click("#annotate")
    kept = until(browser, "return document.body.dataset.kept")
    photo = Bank(folder / "tiny.bank").find(kept)
    np.testing.assert_array_equal(photo.mask(NAME), erased)
    assert photo.path.read_bytes() == data
    assert "3 annotated photos" in browser.run("return document.getElementById('bank').textContent")
    assert browser.logs("browser") == [], "nothing was forbidden by the page's own policy"
    addresses = {url.split("/")[2] for url in browser.requested() if url.startswith("http")}
    assert len(addresses) == 1, "nothing from elsewhere"


def test_what_is_no_photo_is_told(served):
    give(served, b"no photo at all", "none.png")
    text = until(
        served, "return !document.getElementById('message').hidden && document.getElementById('message').innerText"
    )
    assert "cannot be read as an image" in text
    assert served.run("return document.getElementById('message').classList.contains('wrong')")
    served.logs("browser")


def test_review_accept_correct_by_touch_and_predict_again(browser, folder):
    loop = Loop(Reviewed(folder / "out"), Engine(folder / "tiny.bank", CHOICES))
    loop.start()
    try:
        with running(lambda port: review_app(loop, Access(port=port))) as address:
            browser.open(Address(address))
            until(browser, "return document.body.dataset.doing === 'idle'")
            order = browser.run(
                "return [...document.querySelectorAll('#photos button')].map(one => +one.dataset.number)"
            )
            sureness = [loop.reviewed.photos[number].prediction.sureness for number in order]
            assert len(order) == 3
            assert sureness == sorted(sureness), "least sure first"
            first = order[0]
            assert int(browser.run("return document.body.dataset.open")) == first
            np.testing.assert_array_equal(layer(browser), loop.reviewed.masks(loop.reviewed.photos[first])[NAME])
            shot(browser, "review")
            heights = browser.run(
                """
                const list = document.getElementById('photos'), many = [];
                for (let n = 0; n < 60; n++) many.push(list.appendChild(list.firstElementChild.cloneNode(true)));
                const found = [document.querySelector('.stage').clientHeight, innerHeight];
                many.forEach(one => one.remove());
                return found;
                """
            )
            assert heights[0] < heights[1], "many photos scroll in their own column"
            browser.devtools(
                "Emulation.setDeviceMetricsOverride", width=390, height=600, deviceScaleFactor=1, mobile=False
            )
            browser.open(Address(address))
            until(browser, "return document.body.dataset.open")
            assert browser.run("return [scrollY, document.documentElement.scrollWidth <= innerWidth]") == [0, True]
            browser.devtools("Emulation.clearDeviceMetricsOverride")

            browser.press("#canvas", "a")
            second = int(
                until(
                    browser,
                    "return document.body.dataset.open !== arguments[0] && document.body.dataset.open",
                    str(first),
                )
            )
            assert loop.reviewed.photos[first].decision == "accepted"
            accepted = loop.reviewed.photos[first].task.mask.read_bytes()

            browser.run("editor.setTool('brush'); editor.setSize(16)")
            drag(browser, (0.1, 0.1), (0.9, 0.1), kind="touch")
            drawn = layer(browser)
            assert drawn[9, 10:85].all()
            browser.click("#annotate")
            kept = until(browser, "return document.body.dataset.kept")
            np.testing.assert_array_equal(Bank(folder / "tiny.bank").find(kept).mask(NAME), drawn)
            deadline = time.monotonic() + 60
            while loop.reviewed.photos[second].drawn is not None or loop.status.doing != "idle":
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert loop.status.error == ""
            np.testing.assert_array_equal(loop.reviewed.masks(loop.reviewed.photos[second])[NAME], drawn)
            assert loop.reviewed.photos[first].task.mask.read_bytes() == accepted
            decisions = sorted(str(photo.decision) for photo in loop.reviewed.photos)
            assert decisions == ["None", "accepted", "corrected"]
            until(browser, "return document.getElementById('summary').textContent.includes('1 corrected')")
            browser.run("const one = document.getElementById('filter'); one.value = 'all'")
            browser.run("document.getElementById('filter').dispatchEvent(new Event('change'))")
            shot(browser, "review-after")
            assert browser.logs("browser") == []
            browser._ask("POST", f"{browser.session}/url", {"url": "about:blank"})
    finally:
        loop.stop()
    assert mask_of(numbers()[0]).any()
