"""`hsnet analyze`: scores with intervals, and paired tests, from the rows of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.analysis_tables import POLICY_NAMES, as_values, csv_text, markdown_text, plain_text
from commands.options import ANY_PATH, Whole, common_options, options
from commands.steps import emit
from commands.terminal import set_up_logging
from pipeline.episodes.protocols import FUSIONS, POLICIES

PARTS = ("class", "size", "support", "seed")


@click.command(short_help="Scores with 95 % intervals and paired tests, from rows.")
@click.argument("rows", type=ANY_PATH, metavar="ROWS.parquet...", nargs=-1, required=True)
@click.option(
    "--against", type=ANY_PATH, metavar="ROWS.parquet", multiple=True, help="Compare with these. May be repeated."
)
@click.option(
    "--policy",
    "policies",
    type=click.Choice((*POLICY_NAMES, "all")),
    multiple=True,
    help="Which pixels count: -all also those with the ignore label. May be repeated. [default: the protocol's]",
)
@click.option(
    "--fusion",
    "fusions",
    type=click.Choice(FUSIONS),
    multiple=True,
    help="Ways to combine supports. May be repeated. [default: all there are]",
)
@click.option(
    "--against-fusion",
    "fusion_against",
    type=click.Choice(FUSIONS),
    help="Compare with this way, of the same rows or --against.",
)
@click.option(
    "--by",
    type=click.Choice(("total", *PARTS, "all")),
    multiple=True,
    help="Tables to show. May be repeated. [default: class and seed]",
)
@click.option(
    "--resample",
    "unit",
    type=click.Choice(("episode", "query")),
    default="episode",
    show_default=True,
    help="What intervals are about: other episodes of these photos, or other query photos, too.",
)
@click.option("--seed", type=Whole(0), default=0, show_default=True, help="Of the resampling.")
@options(
    click.option("--csv", "as_csv", is_flag=True, help="Print all figures as CSV, one a line."),
    click.option("--markdown", "as_markdown", is_flag=True, help="Print the tables as Markdown."),
)
@common_options
def analyze(
    rows: tuple[Path, ...],
    against: tuple[Path, ...],
    policies: tuple[str, ...],
    by: tuple[str, ...],
    as_csv: bool,
    as_markdown: bool,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> Any:
    """Make scores of the ROWS that `hsnet evaluate --out` wrote: mIoU and FB-IoU with 95 % intervals, and how many
    episodes would make them plus and minus half a point.

    Several files are folds, seeds or numbers of shots of one configuration; anything else is refused. With --against,
    the difference on the same episodes, its interval and its p value.

    \b
    Example:
      hsnet analyze rows.parquet --by class --by size
      hsnet analyze new-fold?.parquet --against old-fold0.parquet --against old-fold1.parquet
    """
    if as_csv + as_markdown + as_json > 1:
        raise click.UsageError("Choose one of --json, --csv and --markdown.")
    set_up_logging(quiet)
    from pipeline.analyze import analyze as stage
    from pipeline.scores.rows import read_results

    sections = PARTS if "all" in by else tuple(name for name in (by or ("class", "seed")) if name != "total")
    analysis = stage(
        [read_results(path) for path in rows],
        [read_results(path) for path in against],
        policies=POLICIES if "all" in policies else [POLICY_NAMES[name] for name in policies],
        sections=sections,
        **chosen,
    )
    if as_csv:
        click.echo(csv_text(analysis), nl=False)
        return None
    text = markdown_text(analysis) if as_markdown else plain_text(analysis)
    return emit(as_values(analysis), text, as_json)
