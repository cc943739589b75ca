"""What the notes of `pipeline.predict.trust` are worth: each job's figures beside the IoU that came out.

    python -m benchmarks.trust --data NAME=KIND:ROOT[:SPLITS] ... --backbone NAME:SIZE[:WEIGHTS] ...

Per job a row: how alike the masks of different photos are (and their truths), how far single supports agree, the mean
sureness, the mean IoU. Below, rank correlations with the IoU: over photos, within a job (mean) and over jobs.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.photo_jobs import Answered, answers, draw_jobs, new_reader, open_named
from benchmarks.refine import bilinear, iou
from pipeline.predict.trust import Agreement, Alike, sureness


@dataclass(frozen=True)
class Row:
    """One job."""

    name: str
    alike: float
    truth_alike: float
    agreement: float
    sureness: tuple[float, ...]
    """One per photo."""
    iou: tuple[float, ...]

    def cells(self) -> str:
        values = (self.alike, self.truth_alike, self.agreement, np.mean(self.sureness), np.mean(self.iou))
        return f"| {self.name} | " + " | ".join(f"{value:.2f}" for value in values) + " |"


def measured(name: str, answered: Sequence[Answered]) -> Row:
    """A job's queries, all answered."""
    masks, truths, agreement = Alike(), Alike(), Agreement()
    sure, right = [], []
    for one in answered:
        said = bilinear(one.margin, one.photo) > 0
        masks.add(str(one.query), said)
        truths.add(str(one.query), one.truth)
        agreement.add(one.ones > 0)
        sure.append(sureness(1 / (1 + np.exp(-one.margin))))
        right.append(iou(said, one.truth))
    known = [
        float("nan") if value is None else value for value in (masks.likeness(), truths.likeness(), agreement.mean())
    ]
    return Row(name, known[0], known[1], known[2], tuple(sure), tuple(right))


def correlations(rows: Sequence[Row]) -> dict[str, float]:
    """Spearman's rank correlations with the IoU."""
    whole = [row for row in rows if len(set(row.sureness)) > 1 and len(set(row.iou)) > 1]
    jobs = [float(np.mean(row.iou)) for row in rows]
    return {
        "sureness, photos": rank([v for row in rows for v in row.sureness], [v for row in rows for v in row.iou]),
        "sureness, photos of one job": float(np.mean([rank(row.sureness, row.iou) for row in whole])),
        "sureness, jobs": rank([float(np.mean(row.sureness)) for row in rows], jobs),
        "agreement, jobs": rank([row.agreement for row in rows], jobs),
        "alike, jobs": rank([row.alike for row in rows], jobs),
    }


def rank(one: Sequence[float], other: Sequence[float]) -> float:
    return float(spearmanr(one, other, nan_policy="omit").statistic)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", required=True, help="NAME=KIND:ROOT[:SPLITS]; may be repeated")
    parser.add_argument("--backbone", action="append", required=True, help="NAME:SIZE[:WEIGHTS]; may be repeated")
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--queries", type=int, default=20)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for text in options.backbone:
        name, reader = new_reader(text)
        for data in options.data:
            called, dataset = open_named(data)
            for job in draw_jobs(called, dataset, options.classes, 5, options.queries):
                rows.append(measured(f"{name}, {called}, {job.class_name}", list(answers(job, dataset, reader))))
    print("| Job | masks alike | truths alike | supports agree | sureness | IoU |\n|---|---|---|---|---|---|")
    print("\n".join(row.cells() for row in rows))
    for what, value in correlations(rows).items():
        print(f"{what}: {value:.2f}")


if __name__ == "__main__":
    main()
