"""Memory of the process that evaluates, against episodes: `python -m benchmarks.evaluation_memory 20000 100000`.

Features and answers are made up and tiny, so that the rows, the episodes and the scores are all there is to hold. Each
number of episodes is run in a process of its own; the slope between them is bytes per episode.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import hsnet.backbone  # noqa: F401  # with torchvision, as in a real evaluation
from pipeline.datasets.shapes import Shapes
from pipeline.episodes.protocols import resolve
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.evaluate.stage import evaluate_to
from pipeline.features.recipe import Recipe
from pipeline.heads.catalogue import Method
from pipeline.heads.segmenters import Answers

SIDE = 8


class MadeUp:
    """Features and label maps of 8 by 8 pixels."""

    def __init__(self) -> None:
        self.index = Shapes(size=64, trn_per_class=3, val_per_class=40).index
        self.recipe = Recipe.of("squeezenet1_1", "sha256:" + "0" * 64, 64, "float32")
        self.skipped: tuple[int, ...] = ()
        self.codec = None

    def classes_present(self, image: int) -> tuple[int, ...]:
        """Not asked for."""
        return ()

    def features(self, images: list[int]) -> list[torch.Tensor]:
        """One level of one number."""
        return [torch.zeros(len(images), 1, 1, 1, 1)]

    def labels(self, images: list[int]) -> torch.Tensor:
        """Class numbers that change from pixel to pixel."""
        pixels = torch.arange(SIDE * SIDE).reshape(SIDE, SIDE)
        return torch.stack([(pixels + image) % 5 for image in images]).int()


class Everywhere:
    """Object in every pixel."""

    def answer(self, batch: object, joint: tuple[int, ...] = (), *rest: object) -> Answers:
        """Logits (K, B, 2, 1, 1)."""
        logits = torch.zeros(batch.shots, len(batch.target), 2, 1, 1)  # type: ignore[attr-defined]
        logits[:, :, 1] = 1
        return Answers(logits, {})


def one(episodes: int, out: Path | None) -> dict[str, float]:
    """Evaluate in this process; its largest resident size, bytes."""
    plan = EvaluationPlan(
        method=Method(Everywhere, {"name": "everywhere"}),  # type: ignore[arg-type]
        source=MadeUp(),  # type: ignore[arg-type]
        fold=0,
        protocol=resolve(shots=(1,), episodes=episodes),
    )
    started = time.monotonic()
    evaluate_to(plan, out)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"episodes": episodes, "peak_bytes": peak, "seconds": time.monotonic() - started}


def main() -> None:
    """Print a line per number of episodes, and bytes per episode between the first and the last."""
    if sys.argv[1] == "--one":
        print(json.dumps(one(int(sys.argv[2]), Path(sys.argv[3]) if sys.argv[3] else None)))
        return
    for kept in (True, False):
        found = []
        for episodes in sys.argv[1:]:
            with tempfile.TemporaryDirectory() as folder:
                out = str(Path(folder, "rows.parquet")) if kept else ""
                command = [sys.executable, "-m", "benchmarks.evaluation_memory", "--one", episodes, out]
                found.append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
            print({"rows": "in a file" if kept else "not kept", **found[-1]}, flush=True)
        if len(found) > 1:
            more = found[-1]["episodes"] - found[0]["episodes"]
            print(f"{(found[-1]['peak_bytes'] - found[0]['peak_bytes']) / more:.0f} bytes per episode")


if __name__ == "__main__":
    main()
