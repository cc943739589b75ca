"""A tiny store with a head and rows for report pages, and a reader of pages. Run by path, see tests/conftest.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from click.testing import CliRunner

import cli

SHAPES = ("shapes", "--data-option", "size=64", "--data-option", "trn_per_class=2", "--data-option", "val_per_class=5")


def hsnet(*args, code=0):
    """Run a command in this process; (stdout, stderr)."""
    result = CliRunner().invoke(cli.main, [str(arg) for arg in args])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.stdout + result.stderr
    return result.stdout, result.stderr


@dataclass(frozen=True)
class Tiny:
    """Paths of a store, a run of two steps, and rows of its head and of an untrained one on the same episodes."""

    store: Path
    run: Path
    rows: Path
    untrained: Path


def tiny(folder):
    """Make it, in seconds."""
    made = Tiny(folder / "s.zarr", folder / "run", folder / "rows.parquet", folder / "untrained.parquet")
    hsnet("extract", *SHAPES, "--backbone", "squeezenet1_1", "--image-size", "64", "--store", made.store, "-q")
    training = ("--steps", "2", "--batch-size", "2", "--validate-every", "1", "--validate-episodes", "4")
    hsnet("train", "--store", made.store, "--fold", "0", *training, "--run-dir", made.run, "-q")
    scored = ("--store", made.store, "--shots", "1,2", "--episodes", "16", *SHAPES[1:], "-q")
    hsnet("evaluate", "--checkpoint", made.run, *scored, "--fusion", "logits", "--out", made.rows)
    hsnet("evaluate", "--head", "untrained", *scored, "--out", made.untrained)
    return made


@dataclass
class Page:
    """What stands in a page."""

    tables: dict = field(default_factory=dict)
    """Id -> rows of cell texts, the head first; lines of a cell are separated by a blank."""
    images: list = field(default_factory=list)
    """Attributes of every <img>."""
    ids: list = field(default_factory=list)
    scripts: list = field(default_factory=list)
    text: str = ""
    tags: list = field(default_factory=list)

    def column(self, table, name, where=lambda row: True):
        """Cells of a column, top down."""
        head, *rows = self.tables[table]
        return [row[head.index(name)] for row in rows if where(dict(zip(head, row, strict=True)))]


class _Reader(HTMLParser):
    VOID = frozenset({"meta", "link", "img", "br", "path", "use"})

    def __init__(self):
        super().__init__()
        self.page, self.table, self.open = Page(), None, []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.page.tags.append((tag, attributes))
        if "id" in attributes:
            self.page.ids.append(attributes["id"])
        if tag == "img":
            self.page.images.append(attributes)
        if tag == "table":
            self.table = self.page.tables[attributes["id"]] = []
        if tag == "tr":
            self.table.append([])
        if tag in ("td", "th"):
            self.table[-1].append("")
        if tag in ("small", "b", "div") and self.table and self.table[-1]:
            self.table[-1][-1] += " "
        if tag == "script":
            self.page.scripts.append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open.pop() == tag, f"</{tag}> closes another element"
        if tag == "table":
            self.table = None
        elif tag in ("td", "th"):
            self.table[-1][-1] = " ".join(self.table[-1][-1].split())

    def handle_data(self, data):
        data = data.replace("\u2011", "-")  # headings do not break at a hyphen
        if "script" in self.open:
            self.page.scripts[-1] += data
            return
        if "style" not in self.open:
            self.page.text += data
        if self.table and self.table[-1] and ("td" in self.open or "th" in self.open):
            self.table[-1][-1] += data


def read(path):
    """Read a page; fails where elements are not properly nested."""
    reader = _Reader()
    reader.feed(Path(path).read_text(encoding="utf-8"))
    reader.close()
    assert not reader.open
    return reader.page
