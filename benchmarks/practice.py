"""The practitioner's job, measured: a few annotated photos of a class, the rest predicted, and what was expected of it.

    python -m benchmarks.practice run S.zarr OUT.jsonl [--photos 5] [--draws 3] [--most 40] [--absent 5]
    python -m benchmarks.practice table OUT.jsonl ...

For every class with enough photos and for several draws: heads are fitted to the annotated photos (and to as many
without the class), `bank check` says what to expect, and all other photos with the class, and as many without, are
answered. Features come from a store, masks at network size, so that no network runs. A line per job and head.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.bank.check import Presence, candidates, check_class, overlap
from pipeline.bank.heads import Example, Trained, fit
from pipeline.bank.reading import Features
from pipeline.bank.tiles import Tile
from pipeline.features.budgeted import TransformCodec
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.loading.source import StoreSource
from pipeline.store.feature_store import FeatureStore


def example(source: StoreSource, image: int, class_id: int, shows: bool) -> Example:
    """A photo of a store with its mask at network size."""
    levels = [level.float() for level in source.features([image])]
    if isinstance(source.codec, TransformCodec):
        levels = source.codec.decode(levels)
    label = source.labels([image])[0]
    size = (label.shape[0], label.shape[1])
    features = Features(size, (Tile(0, 0, *size),), levels)
    ignore = (label == source.index.ignore_label).numpy() if source.index.has_ignore else None
    mask = (label == class_id + 1).numpy()
    return Example(features, mask if shows else None, ignore if ignore is not None and ignore.any() else None)


def jobs_of(source: StoreSource) -> dict[int, list[int]]:
    """Class -> images that show it, whatever list they are in."""
    found: dict[int, set[int]] = {}
    for fold in source.index.folds:
        for role in ("trn", "val", "test"):
            for image, class_id in source.index.split(fold, role).entries:
                found.setdefault(class_id, set()).add(image)
    return {class_id: sorted(images - set(source.skipped)) for class_id, images in sorted(found.items())}


def run(asked: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    source = StoreSource(FeatureStore.open(asked.store))
    trained = None
    if asked.checkpoint:
        trained = Trained.of(load_checkpoint(asked.checkpoint).learner(), source.recipe.image_size)
    with Path(asked.out).open("a") as lines:
        jobs = jobs_of(source)
        for class_id, images in jobs.items():
            others = sorted(set().union(*jobs.values()) - set(images))
            for draw in range(asked.draws if len(images) >= asked.photos + 5 else 0):
                random = np.random.default_rng([class_id, draw])
                chosen = [int(i) for i in random.permutation(images)[: asked.photos + asked.most]]
                without = [i for i in map(int, random.permutation(others)) if class_id not in source.classes_present(i)]
                without = without[: asked.absent + len(chosen) - asked.photos]
                for line in one_job(source, class_id, chosen, without, asked, trained):
                    lines.write(json.dumps({"store": Path(asked.store).stem, "draw": draw, **line}) + "\n")
                lines.flush()


def one_job(
    source: StoreSource, class_id: int, chosen: Sequence[int], without: Sequence[int], asked: Any, trained: Any
) -> list[dict[str, Any]]:
    """What was expected and what came out, for each head."""
    annotated = [example(source, image, class_id, True) for image in chosen[: asked.photos]]
    annotated += [example(source, image, class_id, False) for image in without[: asked.absent]]
    new = [example(source, image, class_id, True) for image in chosen[asked.photos :]]
    empty = [example(source, image, class_id, False) for image in without[asked.absent :]]
    heads = candidates(trained)
    check = check_class(source.index.classes[class_id], [""] * len(annotated), annotated, heads, trained)
    found = []
    for score in check.scores:
        fitted = fit(score.head, annotated, trained)
        started = time.perf_counter()
        answers = [fitted.answer(one.features) for one in new]
        seconds = (time.perf_counter() - started) / len(new)
        both, either = np.array([overlap(fitted, said, one) for said, one in zip(answers, new, strict=True)]).T
        presence = Presence.of(score)
        sure = [presence.score(said.presence) for said in answers] if presence else []
        alarms = [presence.score(fitted.answer(one.features).presence) for one in empty] if presence else []
        found.append(
            {
                "class": check.name,
                "head": score.head,
                "chosen": score is check.best,
                "expected": score.pooled,
                "low": score.low,
                "high": score.high,
                "pooled": float(both.sum() / either.sum()),
                "median": float(np.median(both / either)),
                "photos": len(new),
                "shown": [round(one, 4) for one in sure],
                "absent": [round(one, 4) for one in alarms],
                "seconds": seconds,
            }
        )
    return found


def table(files: Sequence[str]) -> None:
    rows = [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
    print("| Photos | Head | jobs | pooled IoU | median IoU | expected | mean error | inside | ms |")
    print("|---|---|---|---|---|---|---|---|---|")
    for store in dict.fromkeys(row["store"] for row in rows):
        own = [row for row in rows if row["store"] == store]
        for head in [*dict.fromkeys(row["head"] for row in own), "auto"]:
            some = [row for row in own if (row["chosen"] if head == "auto" else row["head"] == head)]
            mean = {key: 100 * np.mean([row[key] for row in some]) for key in ("pooled", "median", "expected")}
            error = 100 * np.mean([abs(row["expected"] - row["pooled"]) for row in some])
            inside = 100 * np.mean([row["low"] <= row["pooled"] <= row["high"] for row in some])
            print(
                f"| {store} | {head} | {len(some)} | {mean['pooled']:.1f} | {mean['median']:.1f} | "
                f"{mean['expected']:.1f} | {error:.1f} | {inside:.0f} % | "
                f"{1000 * np.median([row['seconds'] for row in some]):.0f} |"
            )
    print("\n| Photos | jobs | false alarms at 95 % recall | recall, false alarms as decided |\n|---|---|---|---|")
    for store in dict.fromkeys(row["store"] for row in rows):
        some = [row for row in rows if row["store"] == store and row["chosen"] and row["shown"]]
        if some:
            kept = [np.mean(np.array(row["absent"]) >= np.quantile(row["shown"], 0.05)) for row in some]
            recall = np.mean([np.mean(np.array(row["shown"]) >= 0.5) for row in some])
            alarms = np.mean([np.mean(np.array(row["absent"]) >= 0.5) for row in some])
            print(
                f"| {store} | {len(some)} | {100 * np.mean(kept):.0f} % | {100 * recall:.0f} %, {100 * alarms:.0f} % |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command")
    asked = commands.add_parser("run")
    asked.add_argument("store", type=Path)
    asked.add_argument("out")
    for name, default in (("--photos", 5), ("--draws", 3), ("--most", 40), ("--absent", 5)):
        asked.add_argument(name, type=int, default=default)
    asked.add_argument("--checkpoint", type=Path)
    shown = commands.add_parser("table")
    shown.add_argument("files", nargs="+")
    given = parser.parse_args()
    run(given) if given.command == "run" else table(given.files)


if __name__ == "__main__":
    main()
