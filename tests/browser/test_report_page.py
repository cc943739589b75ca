"""The report page in a real browser, from a file, without a network."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.report.origins import Origins
from pipeline.report.stage import report
from pipeline.scores.rows import METADATA

ROOT = Path(__file__).resolve().parents[2]
NAMES = '<script>document.title = "taken"</script>', '"><img src=x onerror=\'document.title="taken"\'>', "b" * 400
ENTER = "\ue007"
SPACE = " "
TAB = "\ue004"


@pytest.fixture(scope="module")
def page(tiny_report, tmp_path_factory):
    """With gallery, curves, pairs, and names that would do harm if they were not text."""
    folder = tmp_path_factory.mktemp("page")
    files = []
    for path in (tiny_report.rows, tiny_report.untrained):
        table = pq.read_table(path)
        facts = json.loads(table.schema.metadata[METADATA])
        facts["classes"] = dict(zip(facts["classes"], [*NAMES, *list(facts["classes"].values())[3:]], strict=True))
        facts["notes"] = [NAMES[0]]
        names = [facts["classes"][str(c)] for c in table["class_id"].to_pylist()]
        place = table.column_names.index("class_name")
        table = table.set_column(place, table.schema.field("class_name"), pa.array(names, pa.string()))
        files.append(folder / path.name)
        pq.write_table(table.replace_schema_metadata({METADATA: json.dumps(facts)}), files[-1])
    options = (("size", 64), ("trn_per_class", 2), ("val_per_class", 5))
    out = folder / "page <b>.html"
    made = report([*files, tiny_report.run], out, gallery=8, title=NAMES[0], origins=Origins(data_options=options))
    assert made.episodes_shown == 8
    assert made.left_out == ()
    return out


@pytest.fixture
def opened(browser, page):
    browser.open(page)
    return browser


def column(browser, table, number):
    script = (
        "return [...document.getElementById(arguments[0]).tBodies[0].rows].map(r => r.cells[arguments[1]].innerText)"
    )
    return browser.run(script, table, number)


def test_it_opens_without_a_word_and_without_a_network(opened):
    assert opened.logs("browser") == []
    addresses = [url for url in opened.requested() if not url.startswith("data:")]
    assert len(addresses) == 1
    assert addresses[0].startswith("file://")
    assert opened.run("return document.title") == NAMES[0], "no name became a script"
    assert opened.run("return document.scripts.length") == 1


def test_every_picture_is_there(opened):
    pictures = opened.later("""
        const done = arguments[0];
        Promise.all([...document.images].map(image => image.decode().then(
            () => [image.naturalWidth, image.alt], error => [0, String(error)]))).then(done)""")
    assert len(pictures) == 8 * 5
    assert all(width > 0 and alt for width, alt in pictures)
    drawn = opened.run("return [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect().height)")
    assert len(drawn) == 2
    assert min(drawn) > 100


def test_the_policy_holds(opened):
    """What a name could bring in is not run, though it is put into the page by hand."""
    opened.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    opened.run("const s = document.createElement('script'); s.text = 'document.title = 2'; document.body.append(s)")
    assert opened.run("return document.title") == NAMES[0]
    opened.logs("browser")


def numbers(texts):
    return [float(text.split()[0].replace("−", "-")) for text in texts if text[:1].isdigit() or text[:1] in "−+"]


def test_tables_sort_by_click(opened):
    before = column(opened, "classes-0-0", 1)
    assert len(numbers(before)) > 3
    heading = "#classes-0-0 thead th:nth-child(2)"
    opened.click(f"{heading} button")
    falling = column(opened, "classes-0-0", 1)
    assert sorted(falling) == sorted(before)
    assert numbers(falling) == sorted(numbers(before), reverse=True)
    assert opened.run("return document.querySelector(arguments[0]).ariaSort", heading) == "descending"
    opened.click(f"{heading} button")
    rising = column(opened, "classes-0-0", 1)
    assert numbers(rising) == sorted(numbers(before))


def test_what_has_no_value_stays_last(browser, rows_by_hand, tmp_path):
    table = rows_by_hand.made(classes=(0, 1, 2))
    facts = json.loads(table.schema.metadata[METADATA])
    facts["classes"] = {"7": "none here", **facts["classes"]}
    table = table.replace_schema_metadata({METADATA: json.dumps(facts)})
    report([rows_by_hand.write(tmp_path / "r.parquet", table)], tmp_path / "p.html", gallery=0)
    browser.open(tmp_path / "p.html")
    assert sorted(column(browser, "classes-0-0", 1))[-1] == "no episode"
    for _ in range(3):
        browser.click("#classes-0-0 thead th:nth-child(2) button")
        found = column(browser, "classes-0-0", 1)
        assert found[-1] == "no episode"
        assert len(numbers(found)) == 3
    browser.click("#classes-0-0 thead th:nth-child(4) button")
    assert column(browser, "classes-0-0", 3) == ["20", "20", "20", "0"]


def test_tables_sort_by_keyboard(opened):
    button = "#classes-0-0 thead th:nth-child(1) button"
    opened.press(button, ENTER)
    names = column(opened, "classes-0-0", 0)
    assert names == opened.run(
        "return arguments[0].toSorted((a, b) => a.localeCompare(b, 'en', {numeric: true}))", names
    )
    opened.press(button, SPACE)
    assert column(opened, "classes-0-0", 0) == names[::-1]
    opened.press(button, TAB)
    focused = "return document.activeElement.closest('th')?.cellIndex"
    assert opened.run(focused) == 1, "Tab leads to the next heading"
    states = opened.run("return [...document.querySelectorAll('#classes-0-0 thead th')].map(h => h.ariaSort)")
    assert states[0] == "descending"
    assert set(states[1:]) == {"none"}


def test_every_table_sorts_by_every_column(opened):
    counts = opened.run("""
        const rows = () => [...document.querySelectorAll('tbody')].map(b => b.rows.length);
        const before = rows();
        for (const button of document.querySelectorAll('thead button')) { button.click(); button.click(); }
        return [before, rows(), document.querySelectorAll('thead button').length]""")
    assert counts[0] == counts[1]
    assert counts[2] > 30
    assert opened.logs("browser") == []


@pytest.mark.parametrize("width", [1200, 360])
def test_no_sideways_scrolling_of_the_page(opened, width):
    opened.devtools("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
    try:
        wide, inner = opened.run("return [document.scrollingElement.scrollWidth, innerWidth]")
    finally:
        opened.devtools("Emulation.clearDeviceMetricsOverride")
    assert inner == width
    assert wide <= width


def contrast(browser):
    """Least contrast of text with what is behind it, over all texts of the page."""
    return browser.run("""
        const light = text => {
          const part = text.match(/[\\d.]+/g).map(Number).slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
          return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
        };
        const behind = e => {
          for (; e; e = e.parentElement) {
            const colour = getComputedStyle(e).backgroundColor;
            if (!colour.startsWith('rgba(0, 0, 0, 0')) return colour;
          }
          return 'rgb(255, 255, 255)';
        };
        let least = 21, where = '';
        for (const e of document.querySelectorAll('body *')) {
          if (e.closest('svg') && e.tagName !== 'text') continue;
          if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim())) continue;
          if (['SCRIPT', 'TITLE', 'title', 'STYLE'].includes(e.tagName)) continue;
          const style = getComputedStyle(e);
          const [a, b] = [light(e.closest('svg') ? style.fill : style.color), light(behind(e))].sort((x, y) => y - x);
          if ((a + 0.05) / (b + 0.05) < least) { least = (a + 0.05) / (b + 0.05); where = e.outerHTML.slice(0, 200); }
        }
        return [least, where]""")


@pytest.mark.parametrize("features", [("light", ""), ("dark", ""), ("light", "print")])
def test_text_can_be_read_in_every_mode(opened, features):
    scheme, media = features
    values = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.devtools("Emulation.setEmulatedMedia", media=media, features=values)
    try:
        paper = opened.run("return getComputedStyle(document.body).backgroundColor")
        least, where = contrast(opened)
    finally:
        opened.devtools("Emulation.setEmulatedMedia", media="", features=[])
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    assert least >= 4.5, where


def test_folded_parts_open_on_paper(opened):
    closed = "return document.querySelectorAll('details:not([open])').length"
    assert opened.run(closed) > 0
    opened.run("dispatchEvent(new Event('beforeprint'))")
    assert opened.run(closed) == 0
    opened.run("dispatchEvent(new Event('afterprint'))")
    assert opened.run(closed) > 0


def test_the_example_page(browser):
    """The one kept in docs/: small, whole, and silent."""
    example = ROOT / "docs" / "example-report" / "report.html"
    assert example.stat().st_size < 1_500_000
    browser.open(example)
    assert browser.logs("browser") == []
    widths = browser.run("return [...document.images].map(image => image.naturalWidth)")
    assert len(widths) == 12 * 5
    assert min(widths) > 0
    assert not browser.run("return document.querySelector('.warning')"), "nothing was left out"
