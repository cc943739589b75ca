"""`hsnet report`: one page of tables, plots and pictures, from rows and runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.analysis_tables import markdown_table, plain_table
from commands.options import (
    ANY_PATH,
    STORE,
    Whole,
    common_options,
    data_option,
    data_root_option,
    device_option,
    options,
    splits_option,
)
from commands.steps import emit, parse_data_options, pick_device
from commands.terminal import Progress, fact_lines, set_up_logging
from pipeline.common.text import printable, size_text
from pipeline.report.published import PAPER


@click.command(short_help="One page of tables, plots and pictures.")
@click.argument("runs", type=ANY_PATH, metavar="RUNS...", nargs=-1, required=True)
@click.option("--out", type=ANY_PATH, metavar="PAGE.html", help="The page to write.")
@click.option(
    "--like",
    "name",
    metavar="NAME",
    help="Instead of a page, print RUNS (the folder of a sweep, or rows) in the form of a table or figure of the "
    f"paper, with its numbers beside ours: {', '.join(PAPER)}.",
)
@click.option("--markdown", "as_markdown", is_flag=True, help="With --like: print the tables as Markdown.")
@click.option("--title", metavar="TEXT", help="Heading of the page. [default: data sets and backbones]")
@click.option(
    "--gallery", type=Whole(0), metavar="N", default=12, show_default=True, help="Episodes to show; 0 shows none."
)
@click.option("--gallery-shots", type=Whole(), metavar="K", help="Supports per query shown. [default: the fewest]")
@click.option("--store", type=STORE, metavar="S.zarr", help="Where the store is, if not where the rows say.")
@click.option("--checkpoint", type=ANY_PATH, metavar="C", help="Where the checkpoint is, if not where the rows say.")
@options(data_root_option, splits_option, data_option)
@click.option(
    "--resample",
    "unit",
    type=click.Choice(("episode", "query")),
    default="episode",
    show_default=True,
    help="What intervals are about: other episodes of these photos, or other query photos, too.",
)
@click.option("--seed", type=Whole(0), default=0, show_default=True, help="Of the resampling and the random episodes.")
@options(device_option)
@common_options
def report(
    runs: tuple[Path, ...],
    out: Path | None,
    name: str | None,
    as_markdown: bool,
    gallery: int,
    store: str | Path | None,
    checkpoint: Path | None,
    data_root: Path | None,
    splits: Path | None,
    data_options: tuple[str, ...],
    device: str,
    as_json: bool,
    quiet: bool,
    **shown: Any,
) -> Any:
    """Make one page that opens in any browser without a network: results with intervals beside the paper's numbers,
    learning curves, scores by class and object size, pictures of episodes, cost, protocol and digests.

    RUNS are rows of `hsnet evaluate --out` and run directories of `hsnet train`. The first rows are those the others
    are compared with; a dozen of their episodes are predicted again and shown.

    \b
    Example:
      hsnet report rows.parquet runs/voc-0 --out report.html
      hsnet report new.parquet old.parquet --out report.html --store voc.zarr --checkpoint runs/voc-0
      hsnet report sweeps/table1 --like table1
    """
    set_up_logging(quiet)
    if name is not None:
        if out is not None:
            raise click.UsageError("--like prints a table and writes no page: leave out --out, or --like.")
        if as_markdown and as_json:
            raise click.UsageError("Choose one of --json and --markdown.")
        return _print_like(name, runs, as_markdown, as_json)
    if out is None:
        raise click.UsageError("Give --out PAGE.html for a page, or --like NAME for a table in the paper's form.")
    if as_markdown:
        raise click.UsageError("--markdown is for --like; a page is HTML.")
    from pipeline.report.origins import Origins
    from pipeline.report.stage import report as stage

    with Progress("report", "pictures", quiet) as progress:
        summary = stage(
            runs,
            out,
            gallery=gallery,
            origins=Origins(store, checkpoint, data_root, splits, tuple(parse_data_options(data_options).items())),
            device=pick_device(device) if gallery else "cpu",
            on_event=progress.update,
            **shown,
        )
    lines = {
        "page": f"{printable(summary.path)} ({size_text(summary.bytes)})",
        "results": printable("; ".join(summary.sets)) or "none",
        "runs": printable("; ".join(summary.runs)) or "none",
        "gallery": f"{summary.episodes_shown} episodes",
    }
    if summary.left_out:
        lines["left out"] = printable("; ".join(reason.splitlines()[0] for reason in summary.left_out))
    return emit(summary, fact_lines(lines), as_json)


def _print_like(name: str, runs: tuple[Path, ...], as_markdown: bool, as_json: bool) -> Any:
    """The paper's table with ours beside it."""
    from pipeline.report.like import like

    made = like(name, runs)
    mark = "- " if as_markdown else "  "
    parts = list(map(markdown_table if as_markdown else plain_table, made.tables))
    for label, differences in made.differences.items():
        parts.append("\n".join([f"Not as in the paper, {printable(label)}:", *(f"{mark}{one}" for one in differences)]))
    if made.missing:
        parts.append("\n".join(["Missing:", *(f"{mark}{printable(gap)}" for gap in made.missing)]))
    parts += [f"Note: {printable(note)}" for note in made.notes]
    return emit(made, "\n\n".join(parts), as_json)
