"""Small objects read in tiles: what `bank check` expected of whole photos and of tiles, and what came out.

    python -m benchmarks.tiles --data NAME=KIND:ROOT[:SPLITS] ... --backbone NAME:SIZE[:WEIGHTS]

KIND is a reader (pascal, fss, folder). Per class a row: five annotated photos, head `tune`, the others predicted, IoU
pooled over them at the photos' own size and not refined. Classes whose objects cover more than `--largest` of a photo
on the median are left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.photo_jobs import Job, draw_jobs, new_reader, open_named
from pipeline.bank.check import check_class
from pipeline.bank.heads import TUNE, Example, TuneFit
from pipeline.bank.reading import Reader
from pipeline.datasets import Dataset


@dataclass(frozen=True)
class Outcome:
    """Of one job read in one way."""

    expected: float
    """Pooled IoU of the annotated photos, each left out, 0 to 1."""
    pooled: float
    seconds: float
    """Of a query: network and head."""


def example(job: Job, dataset: Dataset, image: int, reader: Reader) -> Example:
    label = dataset.label(image)
    ignore = label == dataset.index.ignore_label if dataset.index.has_ignore else None
    return Example(reader.read(dataset.image(image)), label == job.class_id + 1, ignore)


def outcome(job: Job, dataset: Dataset, reader: Reader) -> Outcome:
    """Fit, expect, predict."""
    supports = [example(job, dataset, image, reader) for image in job.supports]
    check = check_class(job.class_name, [str(image) for image in job.supports], supports, [TUNE])
    fitted, sums, seconds = TuneFit.of(supports), np.zeros(2), []
    for image in job.queries:
        started = time.perf_counter()
        query = example(job, dataset, image, reader)
        assert query.mask is not None
        said = fitted.mask(fitted.answer(query.features), query.mask.shape)
        seconds.append(time.perf_counter() - started)
        known = ~query.ignore if query.ignore is not None else np.ones_like(said)
        sums += (said & query.mask & known).sum(), ((said | query.mask) & known).sum()
    return Outcome(check.scores[0].pooled, float(sums[0] / sums[1]), float(np.median(seconds)))


def share_of(job: Job, dataset: Dataset) -> float:
    """Median share of an annotated photo that the class covers."""
    return float(np.median([(dataset.label(image) == job.class_id + 1).mean() for image in job.supports]))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, help="NAME=KIND:ROOT[:SPLITS]; may be repeated")
    parser.add_argument("--backbone", required=True, help="NAME:SIZE[:WEIGHTS]")
    parser.add_argument("--tile", type=int, default=128, help="side of a tile, pixels of the photo")
    parser.add_argument("--largest", type=float, default=0.03, help="median share of a photo that a class covers")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--queries", type=int, default=15)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    readers = [new_reader(options.backbone, tile)[1] for tile in (None, options.tile)]
    print(
        "| Class | share | whole: expected, came out | tiles: expected, came out | s a photo |\n|---|---|---|---|---|"
    )
    found = []
    for data in options.data:
        called, dataset = open_named(data)
        for job in draw_jobs(called, dataset, options.classes, 5, options.queries, least_share=0):
            share = share_of(job, dataset)
            if share > options.largest:
                continue
            whole, tiles = (outcome(job, dataset, reader) for reader in readers)
            found.append((whole, tiles))
            cells = " | ".join(f"{100 * one.expected:.0f}, {100 * one.pooled:.0f}" for one in (whole, tiles))
            seconds = f"{whole.seconds:.2f}, {tiles.seconds:.2f}"
            print(f"| {called}, {job.class_name} | {100 * share:.1f} % | {cells} | {seconds} |", flush=True)
    if found:
        gains = [tiles.pooled - whole.pooled for whole, tiles in found]
        right = sum((tiles.expected > whole.expected) == (tiles.pooled > whole.pooled) for whole, tiles in found)
        mean, median = 100 * np.mean(gains), 100 * np.median(gains)
        better = f"better for {sum(gain > 0 for gain in gains)} of {len(found)}"
        print(f"\nTiles: {mean:+.1f} points (median {median:+.1f}), {better}; the check chose right {right} times.")


if __name__ == "__main__":
    main()
