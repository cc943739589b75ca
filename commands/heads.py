"""`hsnet heads`: what can answer an episode."""

from __future__ import annotations

from typing import Any

import click

from commands.options import json_option, options
from commands.steps import emit
from commands.terminal import table


@click.command(short_help="What can answer an episode: heads by name.")
@options(json_option)
def heads(as_json: bool) -> Any:
    """List the heads: what each answers with, what it needs first, and its own way to combine several supports.

    A head that needs nothing knows no class: it needs no fold, and may be tested on every class. Costs and scores are
    in docs/heads.md. Use one with `hsnet evaluate --head NAME`.

    \b
    Example:
      hsnet heads
    """
    from pipeline.heads.catalogue import HEADS

    listed = ("summary", "source", "needs", "fusion", "joint", "background")
    told = [{"name": name, **{key: getattr(head, key) for key in listed}} for name, head in HEADS.items()]
    rows = [
        [one["name"], one["needs"], one["fusion"] or "the protocol's", "yes" if one["joint"] else "no", one["summary"]]
        for one in told
    ]
    sources = [f"{one['name']}: {one['source']}" for one in told]
    text = table(rows, ["head", "needs", "fusion", "joint answer", "answers with"], left=5)
    return emit(told, "\n".join([text, "", "Sources", *sources]), as_json)
