"""Rows and runs in, one HTML page out."""

from __future__ import annotations

import base64
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from hsnet.errors import DataError, HSNetError
from pipeline.common.files import whole
from pipeline.common.text import printable
from pipeline.report import facts, plots, tables
from pipeline.report.gallery import Gallery, make_gallery
from pipeline.report.inputs import Run, read_inputs
from pipeline.report.origins import Origins
from pipeline.report.scores import SetDifference, SetScores, score_set, set_differences
from pipeline.scores.tables import Table

log = logging.getLogger(__name__)

GALLERY = 12
"""Episodes in the gallery."""


@dataclass(frozen=True)
class ReportSummary:
    """What was written."""

    path: Path
    bytes: int
    sets: tuple[str, ...]
    """Labels of the sets of rows."""
    runs: tuple[str, ...]
    episodes_shown: int
    left_out: tuple[str, ...]
    """What is not on the page, and why; the page says so as well."""


def report(
    paths: Sequence[Path],
    out: Path,
    *,
    title: str | None = None,
    gallery: int = GALLERY,
    gallery_shots: int | None = None,
    origins: Origins | None = None,
    unit: str = "episode",
    seed: int = 0,
    device: str = "cpu",
    on_event: Callable[[int, int], None] | None = None,
) -> ReportSummary:
    """Write the page.

    Args:
        paths: rows of `pipeline.evaluate`, run directories of `pipeline.train`, or both. The first rows are those
            that the others are compared with and whose episodes are shown.
        gallery: episodes to show; 0 leaves the gallery out.
        gallery_shots: supports per query in the gallery; None is the smallest number there is.
        origins: where store, checkpoint and photos are, if not where the rows say.
        unit, seed: of the resampling, see `pipeline.analyze.analyze`; the seed also draws the random episodes shown.
        on_event: called with (pictures done, pictures in all).

    A gallery that cannot be made is left out, with its reason on the page, in the log and in the summary.

    Raises:
        DataError: an input is neither rows nor a run, or damaged; or the page cannot be written.
        ConfigError, CheckpointError: as `pipeline.report.inputs.read_inputs`.
    """
    if out.is_dir():
        raise DataError(f"{out} is a folder; give the name of an HTML file. Nothing was written.")
    result_sets, runs = read_inputs(paths)
    sets = [score_set(results, unit=unit, seed=seed) for results in result_sets]
    apart = set_differences(result_sets, unit=unit, seed=seed) if len(result_sets) > 1 else []
    origins, shown, left_out = origins or Origins(), None, []
    if gallery and not result_sets:
        left_out.append("Gallery: no rows of an evaluation were given.")
    elif gallery:
        try:
            shown = make_gallery(
                result_sets[0],
                wanted=gallery,
                shots=gallery_shots,
                origins=origins,
                seed=seed,
                device=device,
                on_event=on_event,
            )
        except HSNetError as error:
            left_out.append(f"Gallery: {error}")
    stores, reasons = facts.store_table(result_sets, origins.store)
    left_out += reasons
    for reason in left_out:
        log.warning("Left out of the report: %s", reason)
    text = render_page(title, sets, apart, runs, shown, stores, left_out, unit)
    _write(out, text)
    return ReportSummary(
        out,
        len(text.encode()),
        tuple(results.label for results in result_sets),
        tuple(run.label for run in runs),
        len(shown.episodes) if shown else 0,
        tuple(left_out),
    )


def render_page(
    title: str | None,
    sets: Sequence[SetScores],
    apart: Sequence[SetDifference],
    runs: Sequence[Run],
    gallery: Gallery | None,
    stores: Table | None,
    left_out: Sequence[str],
    unit: str,
) -> str:
    """The page's HTML. Every name in it is escaped, and its policy forbids all but its own script and pictures."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    result_sets = [scores.results for scores in sets]
    script = _part("page.js")
    environment = Environment(
        loader=PackageLoader("pipeline.report", "page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"printable": printable, "zip": zip}
    environment.globals["cell"] = tables.page_cell
    shown: dict[str, Any] = {
        "title": title or _title(sets, runs),
        "made": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "style": _part("page.css"),
        "script": script,
        # The browser runs this very script and nothing else, loads no address, and sends nothing.
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        "sets": sets,
        "episodes": len({e for results in result_sets for file in results.files for e in _episodes(file)}),
        "files": sum(len(results.files) for results in result_sets),
        "unit": unit,
        "notes": tables.set_notes(sets),
        "results": tables.results_tables(sets),
        "differences": tables.difference_table(apart),
        "policies": tables.policy_table(sets) if sets else None,
        "fusions": tables.fusion_table(sets),
        "seeds": tables.seed_table(sets),
        "supports": tables.support_table(sets),
        "ends": [(scores.results.label, tables.best_and_worst(scores)) for scores in sets],
        "classes": [table for number, scores in enumerate(sets) for table in tables.class_tables(scores, str(number))],
        "sizes": [t for number, scores in enumerate(sets) if (t := tables.size_table(scores, str(number))) is not None],
        "sizes_plot": plots.sizes_plot(sets),
        "runs": facts.run_facts(runs),
        "curves": plots.learning_curves(runs) if runs else None,
        "unvalidated": [run.label for run in runs if not run.validated],
        "gallery": gallery,
        "left_out": list(left_out),
        "cost": tables.cost_table(sets) if sets else None,
        "stores": stores,
        "protocols": facts.protocol_facts(result_sets),
        "digests": facts.digest_facts(result_sets, runs),
        "environments": facts.environments(result_sets),
    }
    return environment.get_template("page.html").render(shown)


def _episodes(file: Any) -> set[tuple[Any, ...]]:
    """What tells episodes apart, whichever head answered them, with however many supports."""
    columns = [file.table[name].to_pylist() for name in ("fold", "seed", "episode", "query", "class_id")]
    return {(file.facts["data"], *values) for values in zip(*columns, strict=True)}


def _title(sets: Sequence[SetScores], runs: Sequence[Run]) -> str:
    data = dict.fromkeys(scores.results.dataset for scores in sets)
    backbones = dict.fromkeys(scores.results.backbone for scores in sets)
    if sets:
        return f"Few-shot segmentation: {', '.join(data)}, {', '.join(backbones)}"
    return f"Training: {', '.join(run.label for run in runs)}"


def _part(name: str) -> str:
    return files("pipeline.report").joinpath("page", name).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    """Whole or not at all. Raises DataError if the place cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as partial:
            partial.write_bytes(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise DataError(f"Cannot write {path}: {error.strerror or error}. Nothing was left there.") from error
