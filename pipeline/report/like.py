"""Ours in the form of one of the paper's tables: its lines, ours beside them, what differs, and what is missing.

Made of rows and of the runs beside them; nothing is predicted. A line of ours stands below the paper's line of the
same choices of the learner and, where a table has several, of the same backbone and data. What else differs is
said.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from hsnet.errors import ConfigError, DataError, HSNetError
from pipeline.analyze import analyze
from pipeline.common.text import did_you_mean, printable
from pipeline.episodes.protocols import PROTOCOLS as RULES
from pipeline.episodes.protocols import Protocol
from pipeline.report.inputs import ResultSet, as_dict, method_name, result_sets
from pipeline.report.published import (
    BATCH,
    PAPER,
    PROTOCOLS,
    SOURCE,
    STEPS,
    TITLES,
    Line,
    PaperTable,
    Published,
    papers_data,
)
from pipeline.scores.analysis import Score
from pipeline.scores.bootstrap import Interval
from pipeline.scores.rows import Results, read_results
from pipeline.scores.tables import Table, Value, columns

_PUBLISHED_SIZE = 400


@dataclass(frozen=True)
class Ours:
    """One configuration of ours: its rows of all folds, and the head that gave them."""

    sets: tuple[ResultSet, ...]
    """One; of heads tested on other data one per fold, as each fold has classes of its own."""
    label: str
    learner: Mapping[str, Any] | None
    """Arguments of `hsnet.model.HSNet`; None where the head was not trained, or its checkpoint is not at hand."""
    config: Mapping[str, Any]
    """Of its training run; empty where that is not known."""
    scores: tuple[Score, ...]

    @property
    def first(self) -> Results:
        return self.sets[0].first

    @property
    def backbone(self) -> str:
        return self.sets[0].backbone

    @property
    def folds(self) -> set[int]:
        return {fold for results in self.sets for fold in results.folds}

    @property
    def shots(self) -> set[int]:
        return {shots for results in self.sets for shots in results.shots}

    def score(self, shots: int, fold: int) -> Score | None:
        """The score of a fold, by the protocol's own policy and fusion."""
        return next((score for score in self.scores if (score.shots, score.fold) == (shots, fold)), None)

    def mean(self, shots: int) -> tuple[Interval | None, Interval | None]:
        """mIoU and FB-IoU over all its folds."""
        of_shots = [score for score in self.scores if score.shots == shots]
        whole = [score for score in of_shots if score.fold is None]
        found = whole or of_shots
        fb = [score.fb_iou for score in found if score.fb_iou is not None]
        return _mean([score.miou for score in found]), _mean(fb) if len(fb) == len(found) else None


@dataclass(frozen=True)
class Like:
    """A table of the paper, made again."""

    name: str
    title: str
    tables: tuple[Table, ...]
    """One per number of shots."""
    differences: Mapping[str, tuple[str, ...]]
    """Line of ours -> what is not as in the paper."""
    missing: tuple[str, ...]
    """Cells of the paper's table that ours lacks."""
    notes: tuple[str, ...]


def like(name: str, paths: Sequence[Path]) -> Like:
    """Put rows into the form of a table of the paper.

    Args:
        name: a key of `pipeline.report.published.PAPER`.
        paths: rows files, or folders of them such as a sweep's.

    Raises:
        ConfigError: no such table.
        DataError: a path that is not there, a folder without rows, or rows that cannot be read.
    """
    if name not in PAPER:
        raise ConfigError(
            f"No table or figure '{name}' of the paper can be made again: choose of {', '.join(PAPER)}"
            f"{did_you_mean(name, PAPER)}"
        )
    paper = PAPER[name]
    every = _ours(_read(paths), paper)
    beside = {id(line): [one for one in every if _matches(one, line, paper)] for line in paper.lines}
    matched = {id(one) for some in beside.values() for one in some}
    rest = [one for one in every if id(one) not in matched]
    rest, left_out = [one for one in rest if _has_place(one)], [one for one in rest if not _has_place(one)]
    differences = {one.label: tuple(_differences(one, line, paper)) for line in paper.lines for one in beside[id(line)]}
    missing = [gap for line in paper.lines for gap in _gaps(line, beside[id(line)], paper)]
    tables = tuple(_table(paper, shots, beside, rest) for shots in paper.shots)
    notes = [f"The paper's numbers: {SOURCE.split(', Tables')[0]}. It gives no intervals.", *paper.notes]
    if not every:
        notes.append("None of the rows has a number of shots of this table.")
    if rest:
        labels = ", ".join(one.label for one in rest)
        notes.append(f"Not in the paper's table, below its lines: {labels}.")
    if left_out:
        notes.append(f"Left out, of other choices of the learner: {', '.join(one.label for one in left_out)}.")
    return Like(name, paper.title, tables, _once(differences), tuple(missing), tuple(notes))


def _once(differences: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """What holds for every line is said once."""
    every = list(differences.values())
    shared = [text for text in every[0] if all(text in other for other in every)] if len(every) > 1 else []
    apart = {label: tuple(text for text in texts if text not in shared) for label, texts in differences.items()}
    return ({"any line": tuple(shared)} if shared else {}) | {label: texts for label, texts in apart.items() if texts}


def _read(paths: Sequence[Path]) -> list[Results]:
    """Rows of all files, and of the folders' files."""
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"{path} does not exist. Give the folder of a sweep, or rows of `hsnet evaluate --out`.")
        found = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        if not found:
            raise DataError(
                f"{path} holds no rows (*.parquet). Give the --out of a finished `hsnet sweep`, or rows files."
            )
        files += found
    return [read_results(file) for file in dict.fromkeys(files)]


def _ours(files: Sequence[Results], paper: PaperTable) -> list[Ours]:
    """Configurations of one method, learner and training each, with their scores."""
    groups: dict[str, list[tuple[Results, Mapping[str, Any] | None, Mapping[str, Any]]]] = {}
    for file in files:
        moved = _trained_on(file) not in ("", file.facts["data"])
        if moved != bool(paper.trained_on):
            continue  # rows on a sweep's own data lie beside those on other data
        if papers_data(file) not in (None, *(line.data for line in paper.lines)) and not moved:
            continue  # another table's
        if not set(file.shots) & set(paper.shots):
            continue
        learner, config = _head(file)
        method = as_dict(file.facts.get("method"))
        own = {k: v for k, v in config.items() if k not in ("fold", "data", "skipped")}
        key = [method.get("name"), file.store, learner, own, method.get("seed")]
        groups.setdefault(json.dumps(key, sort_keys=True, default=str), []).append((file, learner, config))
    found: list[Ours] = []
    for same in groups.values():
        learner, config = same[0][1:]
        sets = result_sets([file for file, *_ in same])
        for together in [sets] if paper.trained_on else [[results] for results in sets]:
            scores: list[Score] = []
            for results in together:
                scores += analyze(results.files, fusions=(results.first.protocol.fusion,), sections=()).scores
            found.append(Ours(tuple(together), "", learner, config, tuple(scores)))
    return _labelled(found)


def _mean(intervals: Sequence[Interval]) -> Interval | None:
    """The mean over folds of different classes: independent, so their half widths add as squares."""
    if len(intervals) < 2:
        return next(iter(intervals), None)
    value = sum(one.value for one in intervals) / len(intervals)
    low, high = (
        sum((one.value - end(one)) ** 2 for one in intervals) ** 0.5 / len(intervals)
        for end in (lambda one: one.low, lambda one: one.high)
    )
    return replace(intervals[0], value=value, low=value - low, high=value + high)


def _labelled(found: Sequence[Ours]) -> list[Ours]:
    """Each with a name that no other has."""
    names = [_configuration(one.first) if one.learner is not None else "" for one in found]
    plain = [f"ours, {method_name(one.first)}" for one in found]
    labels = []
    for number, one in enumerate(found):
        label = plain[number]
        if plain.count(label) > 1 or one.learner is not None:
            label += f" ({names[number] or _configuration(one.first)})"
        labels.append(printable(label))
    return [replace(one, label=label) for one, label in zip(found, labels, strict=True)]


def _configuration(file: Results) -> str:
    """Name of the sweep's configuration, or of the file."""
    return re.sub(r"-fold\d+(?=-on-|$)", "", file.path.stem)


def _is_trained(file: Results) -> bool:
    return as_dict(file.facts.get("method")).get("name") in ("hsnet", "hsnet+bg", "trained")


def _trained_on(file: Results) -> str:
    """Digest of the data that the head was trained on; "" if that is not said."""
    return str(as_dict(as_dict(file.facts.get("method")).get("trained_on")).get("data", ""))


def _head(file: Results) -> tuple[Mapping[str, Any] | None, Mapping[str, Any]]:
    """Arguments of the learner and configuration of its run, from the checkpoint beside the rows or where they say."""
    from pipeline.heads.checkpoint import load_checkpoint

    if not _is_trained(file):
        return None, {}
    beside = [file.path.with_suffix(""), file.path.with_name(file.path.stem.partition("-on-")[0])]
    said = as_dict(file.facts.get("paths")).get("checkpoint")
    for place in [*beside, *([Path(said)] if isinstance(said, str) else [])]:
        with suppress(HSNetError, OSError):
            checkpoint = load_checkpoint(place)
            if checkpoint.digest == file.checkpoint:
                config = checkpoint.info.config
                return dict(checkpoint.info.learner), {} if config is None else config.to_dict()
    return None, {}


def _matches(ours: Ours, line: Line, paper: PaperTable) -> bool:
    """Whether ours belongs beside a line of the paper's."""
    from pipeline.features.recipe import Recipe
    from pipeline.heads.learner import learner_arguments

    if not _is_trained(ours.first):
        return False
    if len({other.backbone for other in paper.lines}) > 1 and ours.backbone != line.backbone:
        return False
    if len({other.data for other in paper.lines}) > 1 and papers_data(ours.first) != line.data:
        return False
    if ours.learner is None:  # an imported head, or one that is not at hand: the published learner, as far as is known
        return not line.choices
    try:
        recipe = Recipe.from_dict(ours.first.facts["recipe"])
        wanted = {**recipe.learner_arguments(), **learner_arguments(recipe, **line.choices)}
    except ConfigError:
        return False  # these features have no such layers, levels or depth
    return _plain(wanted) == _plain(ours.learner)


def _has_place(ours: Ours) -> bool:
    """Whether what the paper's table has no line for is worth one: other backbones and heads, not other ablations."""
    from pipeline.features.recipe import Recipe

    if ours.learner is None:
        return True
    usual = Recipe.from_dict(ours.first.facts["recipe"]).learner_arguments()
    return _plain({k: v for k, v in ours.learner.items() if k != "background"}) == _plain(usual)


def _plain(values: object) -> object:
    return json.loads(json.dumps(values))


def _table(paper: PaperTable, shots: int, beside: Mapping[int, Sequence[Ours]], rest: Sequence[Ours]) -> Table:
    """One number of shots: the paper's lines, ours below each, and what the paper has no line for."""
    known = [line.scores[shots] for line in paper.lines if shots in line.scores]
    every = [*(one for some in beside.values() for one in some), *rest]
    folds = sorted({*(fold for line in known for fold in range(len(line.folds)))} | _folds(every))
    if len(folds) == 1:
        folds = []
    heads = [*(f"fold {fold}" for fold in folds), "mean" if folds else "mIoU", "FB-IoU"]
    rows: list[tuple[Value, ...]] = []
    marks = {}
    for line in paper.lines:
        marks[len(rows)] = "paper"
        rows.append((f"{line.label}, the paper's", line.backbone, *_paper_cells(line.scores.get(shots), folds)))
        rows[-1] += tuple(line.more.get(name) for name in paper.more)
        rows += [_our_cells(one, shots, folds, paper) for one in beside[id(line)]]
        if not beside[id(line)]:
            rows.append(("ours", None, *(None for _ in rows[-1][2:])))
    rows += [_our_cells(one, shots, folds, paper) for one in rest]
    return Table(
        f"{paper.title}, {shots}-shot, percent",
        columns("", "backbone", *heads, *paper.more, texts=2),
        rows,
        key=f"shots-{shots}",
        marks=marks,
    )


def _folds(ours: Sequence[Ours]) -> set[int]:
    return {fold for one in ours for fold in one.folds}


def _paper_cells(line: Published | None, folds: Sequence[int]) -> tuple[Value, ...]:
    if line is None:
        return (None,) * (len(folds) + 2)
    of_folds = [line.folds[fold] if fold < len(line.folds) else None for fold in folds]
    return (*map(_percent, of_folds), _percent(line.mean), _percent(line.fb_iou))


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{value:.1f}"


def _our_cells(one: Ours, shots: int, folds: Sequence[int], paper: PaperTable) -> tuple[Value, ...]:
    of_folds = [one.score(shots, fold) for fold in folds]
    # A mean over some of the folds must not stand beside one over all of them.
    miou, fb_iou = one.mean(shots) if set(folds) <= one.folds else (None, None)
    more = (_parameters(one) if name == "parameters" else None for name in paper.more)
    cells = [None if score is None else score.miou for score in of_folds]
    return (one.label, one.backbone, *cells, miou, fb_iou, *more)


def _parameters(one: Ours) -> str | None:
    """Learnable parameters, as the paper writes them."""
    import torch

    from hsnet.model import HSNet

    if one.learner is None:
        return None
    with torch.device("meta"):
        return f"{sum(weights.numel() for weights in HSNet(**one.learner).parameters()) / 1e6:.1f} M"


def _differences(ours: Ours, line: Line, paper: PaperTable) -> list[str]:
    """What is not as in the paper, each with both values."""
    file = ours.first
    found = []
    if papers_data(file) != line.data and not (paper.trained_on and file.facts["dataset"] == line.data):
        name = f"{printable(str(file.facts['dataset']))}, {len(file.classes)} classes"
        found.append(f"data: {name} in fold {file.fold}, not those of {TITLES[line.data]}")
    if ours.backbone != line.backbone:
        found.append(f"backbone: {printable(ours.backbone)}, not {line.backbone}")
    if file.image_size != _PUBLISHED_SIZE:
        found.append(f"image size: {file.image_size} px, not {_PUBLISHED_SIZE}")
    recipe = as_dict(file.facts.get("recipe"))
    if (precision := recipe.get("precision", "float32")) != "float32":
        found.append(f"features: stored as {precision}, not computed in float32")
    found.append(
        f"backbone weights: {str(recipe.get('weights', 'unknown'))[:15]}; the paper's are torchvision's IMAGENET1K_V1"
    )
    rules = RULES[PROTOCOLS[line.data]][0]
    for item in fields(Protocol):
        mine, theirs = getattr(file.protocol, item.name), getattr(rules, item.name)
        if item.name not in ("name", "shots", "image_size") and mine != theirs:
            found.append(f"protocol's {item.name}: {_text(mine)}, not {_text(theirs)}")
    found += _training_differences(ours.config, paper.trained_on or line.data)
    if ours.learner is None:
        found.append("learner: its checkpoint is not at hand; taken for the published one")
    return found


def _training_differences(config: Mapping[str, Any], data: str) -> list[str]:
    from pipeline.heads.config import RunConfig

    if not config:
        return ["training: not known (its run is not at hand, or the head was imported)"]
    usual = {item.name: item.default for item in fields(RunConfig)} | {"batch_size": BATCH[data], "select_on": "test"}
    steps = STEPS.get(data)
    found = [f"steps: {config['steps']:,}, {f'not about {steps:,}' if steps else 'the paper does not say its own'}"]
    for name, theirs in usual.items():
        decided = name in ("fold", "recipe", "data", "skipped", "steps", "learner", "seed")
        validation = name in ("validate_every", "validate_episodes")
        if not decided and not validation and config.get(name) != theirs:
            found.append(f"{name}: {_text(config.get(name))}, not {_text(theirs)}")
    return found


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _gaps(line: Line, ours: Sequence[Ours], paper: PaperTable) -> list[str]:
    """What the paper's line has and ours lacks."""
    what = f"{line.label}, {line.backbone}" + (f", {TITLES[line.data]}" if paper.title.startswith("Table A") else "")
    if not ours:
        return [f"{what}: no rows"]
    folds = {0} if line.data == "fss" else {0, 1, 2, 3}
    gaps = []
    for one in ours:
        if lacking := sorted(folds - set(one.folds)) if papers_data(one.first) else []:
            gaps.append(f"{what}: folds {', '.join(map(str, lacking))} of {one.label}")
        if few := [str(shots) for shots in paper.shots if shots not in one.shots]:
            gaps.append(f"{what}: {', '.join(few)}-shot of {one.label}")
    return gaps
