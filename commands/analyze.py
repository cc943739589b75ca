"""`hsnet analyze`: scores with intervals, and paired tests, from the rows of evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from commands.analysis_tables import POLICY_NAMES, as_values, csv_text, markdown_text, plain_text
from commands.options import ANY_PATH, Whole, common_options, options
from commands.steps import emit
from commands.terminal import fact_lines, set_up_logging
from commands.way_tables import EXPLAINED, background_text, ways_text
from pipeline.common.text import printable
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
    from pipeline.scores.way_rows import holds_ways

    if any(map(holds_ways, (*rows, *against))):
        if as_csv or as_markdown or chosen["fusion_against"] or {"size", "support", "seed", "all"} & set(by):
            raise click.UsageError(
                "Rows of N-way episodes have no --csv, --markdown, --against-fusion, nor --by size, support, seed or "
                "all. Leave them out, or take --json."
            )
        which = POLICIES if "all" in policies else [POLICY_NAMES[name] for name in policies]
        kept = {"fusions": chosen["fusions"], "unit": chosen["unit"], "seed": chosen["seed"]}
        return _analyze_ways(rows, against, as_json, policies=which, **kept)
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


def _analyze_ways(rows: tuple[Path, ...], against: tuple[Path, ...], as_json: bool, **chosen: Any) -> Any:
    """The same for rows of N-way episodes."""
    from pipeline.scores.way_rows import read_way_results
    from pipeline.scores.way_scores import compare_ways, score_ways

    files, others = [read_way_results(path) for path in rows], [read_way_results(path) for path in against]
    scores = score_ways(files, **chosen)
    differences = compare_ways(files, others, **chosen) if others else []
    first = files[0]
    facts = {
        "scored": f"{first.ways}-way episodes of {printable(first.facts['dataset'])}, '{first.facts['role']}'",
        "background": "; ".join(dict.fromkeys(background_text(file.facts["background"]) for file in files)),
    }
    parts = [fact_lines(facts), ways_text(scores)]
    if differences:
        parts.append(f"Minus {', '.join(printable(str(path)) for path in against)}\n{ways_text(differences)}")
    values = {"ways": first.ways, "scores": scores, "differences": differences, "unit": chosen["unit"]}
    return emit(values, "\n\n".join([*parts, EXPLAINED]), as_json)
