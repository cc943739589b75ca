"""Compare heads and backbones on the same episodes: a Markdown table, and a plot of score over cost.

    python -m benchmarks.heads table NAME=ROWS.parquet[,ROWS.parquet...] ... [--against NAME]
    python -m benchmarks.heads draw OUT.svg TITLE: NAME=ROWS.parquet ... [TITLE: NAME=ROWS.parquet ...]

Several files of a name are the folds of one head. Rows are those of `hsnet evaluate --out`; a head is scored by its own
way to combine supports. Differences are paired, episode by episode (`hsnet analyze --against`). Milliseconds are the
median of an episode's seconds in the rows, all numbers of shots in one pass, on the machine that evaluated.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.analyze import analyze
from pipeline.scores.analysis import Difference, Score
from pipeline.scores.bootstrap import Interval
from pipeline.scores.rows import Results, read_results
from pipeline.scores.tables import interval_text

Files = Sequence[Results]


def named(text: str) -> tuple[str, Files]:
    """ "tune=a.parquet,b.parquet" -> its name and its rows."""
    name, _, paths = text.rpartition("=")
    return name, [read_results(Path(path)) for path in paths.split(",")]


def own_scores(files: Files) -> list[Score]:
    """One score per number of shots, by the head's own fusion; the mean where there are several folds."""
    scores = analyze(files, fusions=[files[0].protocol.fusion], sections=()).scores
    return [score for score in scores if len(files) == 1 or score.fold is None]


def milliseconds(files: Files) -> float:
    """Median over the episodes, with all their supports."""
    return 1000 * float(np.median(np.concatenate([file.table["seconds"].to_numpy() for file in files])))


def print_table(heads: Mapping[str, Files], against: str | None) -> None:
    shots = [score.shots for score in own_scores(next(iter(heads.values())))]
    head = ["Head", *(f"{k}-shot" for k in shots), *(f"minus {against}, {k}-shot" for k in shots if against), "ms"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for name, files in heads.items():
        cells = [name, *(interval_text(score.miou) for score in own_scores(files))]
        if against is not None:
            cells += ["" for _ in shots] if name == against else [_told(one) for one in paired(files, heads[against])]
        print("| " + " | ".join([*cells, f"{milliseconds(files):.0f}"]) + " |")


def paired(files: Files, against: Files) -> list[Difference]:
    """A head minus another, each by its own fusion, one per number of shots."""
    own = files[0].protocol.fusion
    found = analyze(files, against=against, sections=()).differences
    return [one for one in found if one.fusion == own and (len(files) == 1 or one.fold is None)]


def _told(difference: Difference) -> str:
    return f"{interval_text(difference.miou, sign=True)}, p {difference.p:.2g}"


def draw(target: Path, panels: Mapping[str, Mapping[str, Files]]) -> None:
    """One panel per title: mIoU over milliseconds, a line from the fewest to the most shots of each head."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "hsnet", "font.family": "sans-serif"}):
        figure = Figure(figsize=(5.2 * len(panels), 4.2), layout="constrained")
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for place, (title, heads) in zip(axes, panels.items(), strict=True):
            for number, (name, files) in enumerate(heads.items()):
                scores, cost = own_scores(files), milliseconds(files)
                colour = f"C{number}"
                values = [score.miou.value for score in scores]
                place.plot([cost] * len(values), values, "-", color=colour, linewidth=1)
                for score, marker in zip(scores, "os^v", strict=False):
                    place.errorbar([cost], [score.miou.value], _bar(score.miou), color=colour, marker=marker, capsize=2)
                place.annotate(name, (cost, max(values)), (5, 4), textcoords="offset points", color=colour, fontsize=9)
            shots = ", ".join(f"{score.shots}-shot {form}" for score, form in zip(scores, ("●", "■"), strict=False))
            place.set(xscale="log", xlabel="ms per episode, one core", ylabel="mIoU", title=f"{title} ({shots})")
            place.grid(alpha=0.3)
            place.margins(x=0.3)
        figure.savefig(target, metadata={"Date": None})


def _bar(value: Interval) -> list[list[float]]:
    return [[value.value - value.low], [value.high - value.value]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("table")
    first.add_argument("heads", nargs="+")
    first.add_argument("--against")
    second = commands.add_parser("draw")
    second.add_argument("target", type=Path)
    second.add_argument("heads", nargs="+")
    options = parser.parse_args()
    if options.command == "table":
        print_table(dict(map(named, options.heads)), options.against)
        return
    panels: dict[str, dict[str, Files]] = {}
    for word in options.heads:
        if word.endswith(":"):
            panels[word[:-1]] = {}
        else:
            name, files = named(word)
            next(reversed(panels.values()))[name] = files
    draw(options.target, panels)


if __name__ == "__main__":
    main()
