"""Where the published way spends its time, stage by stage: to compare with the published code itself.

    python -m benchmarks.stages resnet50

One 1-shot episode, then training steps. The times of the published code are its own measurement; if ours were larger,
every ratio in the results would flatter us.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import timing
from benchmarks.published_way import masked
from benchmarks.variants import Job, PublishedWay


def stages(way: PublishedWay) -> dict[str, Callable[[], object]]:
    """The stages of one episode, each from what the one before it left."""
    model, query, support, mask = way.model, way.query, way.support[:, 0], way.mask[:, 0]
    with torch.no_grad():
        query_taps, support_taps = model.features(query), model.features(support)
        masked_taps = masked(support_taps, mask)
        pyramid = model.correlations(query_taps, masked_taps)
    return {
        "backbone, query and support": lambda: (model.features(query), model.features(support)),
        "masking": lambda: masked(support_taps, mask),
        "correlation": lambda: model.correlations(query_taps, masked_taps),
        "learner": lambda: model.learner(pyramid),
        "whole 1-shot episode": way.masks,
    }


def main(backbone: str, size: int, repeats: int) -> None:
    print(f"{backbone}, {size} px, {torch.get_num_threads()} threads: seconds, median of {repeats} (CPU seconds)")
    with tempfile.TemporaryDirectory() as folder:
        way = Job(backbone, "eval1", size, Path(folder)).build("baseline")
        assert isinstance(way, PublishedWay)
        runs = stages(way)
        for number in (1, 2):
            step = Job(backbone, f"train{number}", size, Path(folder)).build("baseline").run
            runs[f"training step, batch {number}"] = torch.enable_grad()(step)
        with torch.no_grad():
            times = timing.alternate(runs, repeats)
    for name, taken in times.items():
        wall, cpu = timing.summary(taken.wall)["median"], timing.summary(taken.cpu)["median"]
        print(f"  {name:<28} {wall:7.3f} ({cpu:.3f})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone")
    parser.add_argument("--size", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    main(**vars(parser.parse_args()))
