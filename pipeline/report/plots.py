"""Plots as SVG for a page: matplotlib draws them, and their colours become those of the page, light or dark."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.common.text import printable
from pipeline.report.inputs import Run
from pipeline.report.scores import SetScores

# Stand-ins that matplotlib can write; the page has both of its modes' colours under these names.
_NAMES = {"#010101": "ink", "#020202": "line", "#030303": "muted"}
INK, LINE, MUTED = _NAMES
SERIES = tuple(f"#0{n}0{n}f{n}" for n in range(1, 8))
_NAMES |= {colour: f"series-{n}" for n, colour in enumerate(SERIES, 1)}
DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
MARKERS = "osD^vPX"
LONGEST = 40
"""Letters of a name in a legend."""


def learning_curves(runs: Sequence[Run]) -> str:
    """Training loss and validation mIoU of runs, side by side; one panel if none was validated."""
    panels = [False, True] if any(run.validated for run in runs) else [False]
    with _style():
        figure = _figure(4.7 * len(panels), 3.2)
        axes = figure.subplots(1, len(panels), squeeze=False)
        for validation, axis in zip(panels, axes[0], strict=True):
            for number, run in enumerate(runs):
                colour, dash = SERIES[number % len(SERIES)], DASHES[number % len(DASHES)]
                if validation:
                    axis.plot(
                        run.validated, run.miou, color=colour, linestyle=dash, marker=MARKERS[number % len(MARKERS)],
                        markersize=4, label=_name(run.label),
                    )  # fmt: skip
                    if run.best:
                        axis.plot(*run.best, "o", markersize=10, markerfacecolor="none", markeredgecolor=colour)
                elif run.losses:
                    steps, smooth = smoothed(run.steps, run.losses)
                    axis.plot(run.steps, run.losses, color=colour, alpha=0.18, linewidth=0.6)
                    axis.plot(steps, smooth, color=colour, linestyle=dash, label=_name(run.label))
            axis.set_xlabel("step")
            axis.set_title("validation mIoU, percent" if validation else "training loss", loc="left")
            axis.set_ylim(bottom=0)
        if not any(run.losses for run in runs):
            axes[0][0].text(0.5, 0.5, "no step was written down", ha="center", transform=axes[0][0].transAxes)
        else:
            losses = np.concatenate([run.losses for run in runs if run.losses])
            axes[0][0].set_ylim(0, 1.15 * float(np.quantile(losses, 0.99)) or 1.0)
        if len(runs) > 1:
            axes[0][-1].legend(loc="best")
        return _svg(figure, "plot-curves", "Learning curves: " + ", ".join(run.label for run in runs))


def sizes_plot(sets: Sequence[SetScores]) -> str | None:
    """mIoU by object size, with intervals, of every set at its smallest number of shots; None without sizes."""
    drawn = []
    for scores in sets:
        totals = scores.totals(scores.headline)
        if totals and totals[0].sizes:
            drawn.append((scores.results.label, totals[0]))
    if not drawn:
        return None
    there = {part.name for _, score in drawn for part in score.sizes if part.value}
    longest = max((score.sizes for _, score in drawn), key=len)  # all sizes, with that of vanished objects if any
    names = [part.name for part in longest if part.name in there]
    with _style():
        figure = _figure(9.2, 3.2)
        axis = figure.subplots()
        for number, (label, score) in enumerate(drawn):
            parts = [part for part in score.sizes if part.value is not None]
            shift = (number - (len(drawn) - 1) / 2) * min(0.18, 0.7 / len(drawn))
            x = [names.index(part.name) + shift for part in parts]
            values = [part.value for part in parts if part.value is not None]
            ends = [[v.value - v.low for v in values], [v.high - v.value for v in values]]
            axis.errorbar(
                x, [v.value for v in values], yerr=np.maximum(ends, 0), fmt=MARKERS[number % len(MARKERS)],
                color=SERIES[number % len(SERIES)], capsize=3, markersize=5,
                label=f"{_name(label)}, {score.shots}-shot",
            )  # fmt: skip
        axis.set_xticks(range(len(names)), names)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.set_ylim(0, 100)
        axis.set_xlabel("share of the photo that the object covers")
        axis.set_title("mIoU, percent", loc="left")
        if len(drawn) > 1:
            axis.legend(loc="best")
        return _svg(figure, "plot-sizes", "mIoU by object size: " + ", ".join(label for label, _ in drawn))


def smoothed(steps: Sequence[int], values: Sequence[float]) -> tuple[list[float], list[float]]:
    """Running mean over about a fiftieth of the steps: (middle of the window, mean)."""
    width = max(1, len(values) // 50)
    sums = np.cumsum([0.0, *values])
    means = (sums[width:] - sums[:-width]) / width
    middles = (np.asarray(steps[: len(means)], float) + np.asarray(steps[width - 1 :], float)) / 2
    step = max(1, len(means) // 400)  # more points than pixels only make the page larger
    return middles[::step].tolist(), means[::step].tolist()


def _figure(width: float, height: float) -> Any:
    """A figure of that many inches, of no window system."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height))


def _style() -> Any:
    """matplotlib with the page's looks, until the context is left."""
    import matplotlib

    return matplotlib.rc_context(
        {
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "hsnet",
            "font.family": "sans-serif",
            "font.size": 10,
            "text.color": INK,
            "axes.edgecolor": MUTED,
            "axes.labelcolor": INK,
            "axes.titlesize": 11,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": LINE,
            "grid.linewidth": 0.8,
            "axes.axisbelow": True,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "xtick.labelcolor": INK,
            "ytick.labelcolor": INK,
            "lines.linewidth": 1.8,
            "figure.facecolor": "none",
            "axes.facecolor": "none",
            "legend.frameon": False,
            "path.simplify_threshold": 0.5,
        }
    )


def _name(text: str) -> str:
    """A name in a plot: one line, no mathematics, not too long."""
    text = " ".join(printable(text).split())
    text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 + 1 :]}"
    return text.replace("$", r"\$").removeprefix("_")  # a label with an underscore in front is not shown


def _svg(figure: Any, key: str, title: str) -> str:
    """The figure as an <svg> element whose ids are its own and whose colours are the page's."""
    from markupsafe import escape

    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the browser's fonts write the text, not matplotlib's
        figure.tight_layout(w_pad=2.5)
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{key}-\1"', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{key}-", text)
    for colour, name in _NAMES.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1))
    opening = re.match(r"<svg[^>]*>", text)
    assert opening is not None
    label = f'<title id="{key}-title">{escape(title)}</title>'
    head = opening.group(0)[:-1] + f' role="img" aria-labelledby="{key}-title">'
    return head + label + text[opening.end() :]
