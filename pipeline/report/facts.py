"""What stands below the scores: protocol, digests, the store's size, versions and machine."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hsnet.errors import HSNetError
from pipeline.common.machine import environment
from pipeline.common.text import printable, size_text
from pipeline.report.inputs import ResultSet, Run, as_dict
from pipeline.report.origins import open_store
from pipeline.scores.tables import Figure, Table, Value, columns


@dataclass(frozen=True)
class Facts:
    """A list of facts under a heading."""

    title: str
    items: tuple[tuple[str, str], ...]
    codes: bool = False
    """The values are digests."""


def protocol_facts(sets: Sequence[ResultSet]) -> list[Facts]:
    """How each set was scored, with what departs from the protocol's name."""
    lists = []
    for results in sets:
        items = list(results.first.protocol.lines().items())
        folds = ", ".join(map(str, results.folds))
        notes = [str(note) for note in results.first.facts.get("notes") or ()]
        items += [("data set", f"{printable(results.dataset)}, fold{'s' * (len(results.folds) > 1)} {folds}")]
        if results.first.facts.get("ignore"):
            items.append(("ignore label", str(results.first.facts["ignore"])))
        items += [("note", note) for note in notes]
        lists.append(Facts(results.label, tuple(items)))
    return lists


def digest_facts(sets: Sequence[ResultSet], runs: Sequence[Run]) -> list[Facts]:
    """What identifies data, store, heads, episodes and protocol."""
    lists = []
    for results in sets:
        items = [("data", str(results.first.facts["data"])), ("store", results.first.store)]
        for fold, digest in sorted({(file.fold, file.checkpoint) for file in results.files if file.checkpoint}):
            items.append((f"checkpoint, fold {fold}", digest))
        weights = as_dict(results.first.facts.get("recipe")).get("weights")
        if weights:
            items.append((f"weights of {results.backbone}", str(weights)))
        for file in results.files:
            for (shots, seed), digest in sorted(file.manifests.items()):
                items.append((f"episodes, fold {file.fold}, {shots}-shot, seed {seed}", digest))
        items.append(("protocol", results.first.protocol.digest))
        items += [("rows", f"{_file_digest(file.path)}  {printable(file.path.name)}") for file in results.files]
        lists.append(Facts(results.label, tuple(dict.fromkeys(items)), codes=True))
    for run in runs:
        items = [("data", str(run.config.get("data", "not said")))]
        weights = as_dict(run.config.get("recipe")).get("weights")
        items += [("weights", str(weights))] if weights else []
        lists.append(Facts(f"run {run.label}", tuple(items), codes=True))
    return lists


def run_facts(runs: Sequence[Run]) -> Table | None:
    """How the runs were trained, and what came out."""
    if not runs:
        return None
    rows: list[tuple[Value, ...]] = []
    for run in runs:
        recipe = as_dict(run.config.get("recipe"))
        best = run.best
        middle = sorted(run.seconds)[len(run.seconds) // 2] if run.seconds else None
        rows.append(
            (
                run.label,
                f"{recipe.get('backbone', '?')}, {recipe.get('image_size', '?')} px",
                _backbone_rate(run.config),
                *(_whole(run.config.get(name)) for name in ("fold", "batch_size", "seed")),
                run.steps[-1] if run.steps else None,
                Figure(f"{best[1]:.1f}", best[1], f"at step {best[0]:,}") if best else "not validated",
                None if middle is None else Figure(f"{middle:.2f} s", middle),
            )
        )
    heads = (
        "run",
        "features",
        "backbone",
        "held-out fold",
        "batch",
        "seed",
        "steps",
        "best validation mIoU",
        "median step",
    )
    return Table(
        "Training runs",
        columns(*heads, texts=3),
        rows,
        key="runs",
        notes=(
            "Validation mIoU is of the few episodes that a run selects its checkpoint on: a single value without an "
            "interval, not a result.",
        ),
    )


def _backbone_rate(config: Mapping[str, Any]) -> str:
    """ "frozen", or that it was trained too and the greatest learning rate it had."""
    if not config.get("finetune_backbone"):
        return "frozen"
    return f"finetuned, {config.get('backbone_lr') or config.get('learning_rate')}"


def store_table(sets: Sequence[ResultSet], store: str | Path | None = None) -> tuple[Table | None, list[str]]:
    """Bytes per image of every store, against plain float16; and why a store is not in the table.

    Args:
        store: instead of the place that the rows name.
    """
    rows: list[tuple[Value, ...]] = []
    reasons, seen = [], set()
    for results in sets:
        if results.first.store in seen:
            continue
        seen.add(results.first.store)
        try:
            opened = open_store(results.first, store).store
        except HSNetError as error:
            reasons.append(f"Store of {results.label}: {printable(str(error).splitlines()[0])}")
            continue
        info = opened.info()
        recipe: Mapping[str, Any] = info["recipe"]
        plain = _plain_bytes(recipe)
        stored = info["bytes_per_image"]
        rows.append(
            (
                printable(Path(info["path"]).name),
                f"{recipe['backbone']}, {recipe['image_size']} px",
                str(recipe.get("precision")),
                info["images"],
                Figure(size_text(stored), stored) if stored else None,
                Figure(size_text(plain), plain),
                Figure(f"{plain / stored:.1f}×", plain / stored) if stored else None,
                Figure(size_text(info["bytes"]), info["bytes"]),
            )
        )
    if not rows:
        return None, reasons
    head = ("store", "features", "stored as", "images", "bytes per image", "as float16", "smaller by", "in all")
    note = "Bytes per image include its label map and checksums; float16 is what the features alone would take."
    return Table("Compression", columns(*head, texts=3), rows, key="stores", notes=(note,)), reasons


def _plain_bytes(recipe: Mapping[str, Any]) -> int:
    """Bytes of an image's features as float16, without any coding."""
    from pipeline.features.recipe import Recipe

    read = Recipe.from_dict(recipe)
    grids = [shape[1:3] for shape in read.level_shapes()]
    return 2 * sum(math.prod(grid) * sum(widths) for grid, widths in zip(grids, read.layout.channels, strict=True))


def environments(sets: Sequence[ResultSet]) -> list[Facts]:
    """Versions and machine that made the page, and those of the rows where they were others."""
    here = environment()
    lists = [Facts("This page was made with", tuple(here.items()))]
    for results in sets:
        there = as_dict(results.first.facts.get("environment"))
        others = {str(name): printable(str(value)) for name, value in there.items() if value != here.get(str(name))}
        if others:
            lists.append(Facts(f"The rows of {results.label} were made with other", tuple(others.items())))
    return lists


def _file_digest(path: Path) -> str:
    import hashlib

    with path.open("rb") as stream:
        return "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()


def _whole(value: object) -> Figure | None:
    return Figure(str(value), value) if type(value) is int else None
