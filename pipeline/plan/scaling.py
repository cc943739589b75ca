"""What the stages would take on other machines: every stage by what each resource needs, the slowest of which binds.

A stage keeps all resources busy at once (photos are read while others are computed), so its time is the largest of
theirs: T = max over resources of work / rate. Work per photo, step and episode is measured here (`costs`); the rates of
the machines asked about are given, or estimates that are marked as such. Derived in docs/scaling.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from hsnet.errors import ConfigError
from pipeline.plan.costs import RUN_STEPS, STEP_EPISODES, Costs

GPU_SPEEDUP = 50.0
"""Estimate, not measured: how much faster than one core a GPU runs the networks."""

DRIVER_SECONDS_PER_EPISODE = 3.5e-4
"""At most: drawing, reading, counting and writing in one process, answers being free. See docs/scaling.md."""


@dataclass(frozen=True)
class Site:
    """Machines that are asked about."""

    nodes: int
    gpus: int
    """In all nodes together; 0 lets the cores do all work."""
    cores: int
    """Per node."""
    bandwidth: float
    """Bytes per second between the store and all nodes together."""


@dataclass(frozen=True)
class Need:
    """What a stage needs of each resource, seconds."""

    needs: Mapping[str, float]
    """compute (cores doing all), or GPU and CPU; store (bandwidth); driver (the one process that leads)."""
    fits: bool = True
    """Whether the disk that was asked about holds what the stage writes."""

    @property
    def bound(self) -> str:
        """The resource that the others wait for."""
        return max(self.needs, key=lambda name: self.needs[name])

    @property
    def seconds(self) -> float:
        return self.needs[self.bound]


def scaling(
    costs: Costs,
    site: Site,
    *,
    speedup: float = GPU_SPEEDUP,
    images: int | None = None,
    steps: int = RUN_STEPS,
    runs: int = 12,
    episodes: int = 1_000_000,
) -> dict[str, Need]:
    """Seconds of extraction, of one training run, of a sweep and of an evaluation, one-shot, by resource.

    Args:
        costs: measured here.
        speedup: of a GPU against the device that `costs` were measured on; 1 if that was such a GPU.
        images: of the data set; None is as many as it has.
        steps: of a training run, of `STEP_EPISODES` episodes.
        runs: of the sweep; each has one GPU, or one core, to itself, which is the cheapest way to many runs.
        episodes: of the evaluation.

    Raises:
        ConfigError: a number that cannot be.
    """
    if min(site.nodes, site.cores) < 1 or site.gpus < 0 or site.bandwidth <= 0 or speedup <= 0:
        raise ConfigError(f"A plan needs at least one node and core, and a bandwidth and speed above 0, got {site}.")
    if min(images or 1, steps, runs, episodes) < 1:
        raise ConfigError("A plan needs at least one image, step, run and episode.")
    photos = costs.images if images is None else images
    each, cores = costs.seconds_per_image, site.nodes * site.cores
    networks, workers = ("GPU", site.gpus) if site.gpus else ("compute", cores)
    fast = speedup if site.gpus else 1.0
    nbytes = costs.bytes_per_image

    around = each["read"] + each["encode"]
    if site.gpus:
        extract = {"GPU": photos * each["backbone"] / fast / workers, "CPU": photos * around / cores}
    else:
        extract = {"compute": photos * (around + each["backbone"]) / cores}
    step = costs.train_seconds_per_step / fast
    read_by_run = steps * 2 * STEP_EPISODES * nbytes
    # What fits into the nodes' memory is read from the store once per node.
    in_memory = photos * nbytes <= costs.memory_free
    once = photos * nbytes * min(site.nodes, runs)
    return {
        "extract": Need(
            {**extract, "store": photos * nbytes / site.bandwidth}, fits=photos * nbytes <= costs.disk_free
        ),
        "train": Need(
            {
                networks: steps * step,
                "store": (min(read_by_run, photos * nbytes) if in_memory else read_by_run) / site.bandwidth,
            }
        ),
        "sweep": Need(
            {
                networks: math.ceil(runs / workers) * steps * step,
                "store": (min(runs * read_by_run, once) if in_memory else runs * read_by_run) / site.bandwidth,
            }
        ),
        "evaluate": Need(
            {
                networks: episodes * costs.evaluate_seconds_per_episode / fast / workers,
                "store": (min(2 * episodes, photos * site.nodes) if in_memory else 2 * episodes)
                * nbytes
                / site.bandwidth,
                "driver": episodes * DRIVER_SECONDS_PER_EPISODE,
            }
        ),
    }
