"""What several commands do: open data and stores, choose a device, start workers, print a result."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.groups import on_interrupt
from commands.options import ALLOW_MIXED
from commands.terminal import plain
from hsnet.errors import ConfigError

if TYPE_CHECKING:
    from pipeline.common.runner import Runner
    from pipeline.datasets import Dataset
    from pipeline.features.backbones import Reading
    from pipeline.features.recipe import Recipe
    from pipeline.features.weights import Weights
    from pipeline.loading.source import FeatureSource, StoreSource

log = logging.getLogger(__name__)

WITHOUT_BFLOAT16 = frozenset(("K80", "P4", "P100", "V100", "T4"))
"""NVIDIA's GPUs from before Ampere, as Ray calls them."""


def emit(result: Any, text: str, as_json: bool) -> Any:
    """Print a result on stdout, as JSON for machines or as text for people; returns it as JSON values."""
    values = plain(result)
    click.echo(json.dumps(values, indent=2, allow_nan=False) if as_json else text)
    return values


def open_data(name: str, root: Path | None, splits: Path | None, given: Sequence[str], quiet: bool) -> Dataset:
    """The data set of the options, its notes printed."""
    from pipeline.datasets import open_dataset

    # Absolute, because a worker on another machine has another working directory.
    root, splits = root and root.absolute(), splits and splits.absolute()
    dataset = open_dataset(name, root, splits, **parse_data_options(given))
    for note in () if quiet else dataset.index.notes:
        click.echo(f"Note: {note}", err=True)
    return dataset


def image_size_for(given: int | None, backbone: str, reading: Reading) -> int:
    """The image size that was asked for, or the default of the backbone; says where it is not the published one."""
    from pipeline.features.backbones import PUBLISHED_SIZE, default_image_size

    if given is not None:
        return given
    size, why = default_image_size(backbone, reading)
    if why:
        log.info("Note: image size %d px, the nearest to the published %d that %s can be read at.",
                 size, PUBLISHED_SIZE, backbone)  # fmt: skip
    return size


def parse_data_options(given: Sequence[str]) -> dict[str, Any]:
    """KEY=VALUE texts as keyword arguments; numbers become int or float."""
    parsed: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(f"--data-option '{text}' is not of the form KEY=VALUE")
        parsed[key] = _number(value)
    return parsed


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def pick_device(name: str, address: str | None = None) -> str:
    """'auto' becomes the best there is; a device that is not there is an error. Decides how it calculates, too.

    A cluster's machines may have what this one lacks: with an address, 'auto' is what the cluster has, and said.
    """
    import torch

    from hsnet.numerics import set_numerics

    set_numerics()
    if name == "auto" and address is not None:
        from cluster import nodes
        from cluster.session import session

        with session(address, check=False):
            gpus, machines = nodes.total("GPU"), len(nodes.alive())
        device = "cuda" if gpus else "cpu"
        log.info("The cluster has %d GPUs on %d nodes: --device %s", gpus, machines, device)
        return device
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and address is None:
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(name[5:] or 0) >= count:
            there = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
            build = "" if torch.version.cuda or torch.version.hip else ", a build for CPUs"
            raise ConfigError(
                f"--device {name}: torch {torch.__version__}{build}, sees {count} GPUs here; `hsnet doctor` says why. "
                f"There is: {there}. Nothing was computed."
            )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("--device mps: not available on this machine. Use cpu.")
    return name


def pick_arithmetic(name: str, device: str, address: str | None = None, stored: str | None = None) -> str:
    """'auto' becomes what a run began with (`stored`), or else bfloat16 on a GPU that has it, and is said.

    Raises:
        ConfigError: the run began in bfloat16, and this GPU has none.
    """
    chosen = (stored if name == "auto" else name) or "auto"
    if chosen == "float32" or not device.startswith("cuda"):
        return "float32" if chosen == "auto" else chosen
    lacks = _without_bfloat16(device, address)
    if lacks and stored == chosen == "bfloat16":
        raise ConfigError(
            f"The run began with --arithmetic bfloat16, which {lacks} cannot do. Go on with it on another GPU or with "
            "--device cpu, or begin another run with --arithmetic float32. Nothing was changed."
        )
    if lacks:
        say = log.info if chosen == "auto" else log.warning
        say("Arithmetic: float32, because %s has no bfloat16", lacks)
        return "float32"
    if chosen == "auto":
        log.info("Arithmetic: bfloat16, which this GPU has (--arithmetic float32 for the exact and slower one)")
    return "bfloat16"


def _without_bfloat16(device: str, address: str | None) -> str:
    """The GPU that cannot calculate in bfloat16, "" if none is known; of a cluster by the names that Ray has."""
    import torch

    from hsnet.numerics import has_bfloat16

    if address is None:
        return "" if has_bfloat16(device) else torch.cuda.get_device_name(device)
    from cluster import nodes
    from cluster.session import session

    with session(address, check=False):
        return ", ".join(nodes.accelerators() & WITHOUT_BFLOAT16)


@contextlib.contextmanager
def open_runner(
    workers: int, address: str | None, device: str, gpus: float | None = None, cpus: float = 1
) -> Iterator[Runner]:
    """Where a stage's work is done: in this process, or on Ray; with an address alone, on all of its CPUs or GPUs.

    Args:
        gpus, cpus: that an item takes on Ray; None is one GPU, where the device is one.
    """
    if workers == 0 and address is None:
        from pipeline.common.runner import SerialRunner

        yield SerialRunner()
        return
    require_ray(workers, address, device)
    from cluster.runner import RayRunner
    from cluster.session import places, session

    gpus = (1 if gpus is None else gpus) if device.startswith("cuda") else 0
    with session(address or "local", num_cpus=max(workers, os.cpu_count() or 1), allow_mixed=allow_mixed()):
        yield RayRunner(places(workers, gpus, cpus), gpus=gpus, cpus=cpus)


def allow_mixed() -> bool:
    """Whether the command was given --allow-mixed."""
    return bool(click.get_current_context().meta.get(ALLOW_MIXED, False))


def require_ray(workers: int, address: str | None, device: str) -> None:
    """Refuse what Ray would take without a word and then not get done."""
    cores = os.cpu_count() or 1
    if address is None and workers > max(8, 4 * cores):
        raise ConfigError(f"--workers {workers} is far more than this machine's {cores} cores can carry. Use {cores}.")
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device} cannot be chosen on Ray, which hands out the GPUs. Use cpu or cuda.")


def store_source(path: str | Path, data: str | None = None) -> Callable[[], StoreSource]:
    """Opens a finished store as it is now, also if it grows; to be called once in every process that reads it.

    Args:
        data: digest of a data set that the store may have held before it grew, to be given that one if so.
    """
    from pipeline.loading.source import StoreSource
    from pipeline.store.attributes import read_facts
    from pipeline.store.bucket import location
    from pipeline.store.feature_store import FeatureStore
    from pipeline.store.place import place_of

    absolute = location(path)  # a worker may have another working directory
    place = place_of(absolute)
    place.sync()
    with place.named():
        facts = read_facts(place.root)
    digest = facts.states[facts.current].digest
    if data is not None and facts.find(data) is not None and data != digest:
        digest = data
        click.echo(f"Note: {path} has grown since; this goes on with the images and lists it began with.", err=True)
    return lambda: StoreSource(FeatureStore.open(absolute, index_digest=digest))


def online_source(
    data: Dataset, weights: Weights, recipe: Recipe, device: str, photos: bool = False
) -> Callable[[], FeatureSource]:
    """Runs the backbone of a float32 recipe whenever features are asked for.

    Args:
        photos: gives the photos instead, and the backbone for whoever trains it.
    """
    from pipeline.features.backbones import open_backbone
    from pipeline.loading.source import OnlineSource, PhotoSource

    kind = PhotoSource if photos else OnlineSource

    def make() -> FeatureSource:
        import torch

        # Where there is no GPU this is not a worker but a driver, who asks for what is known without computing.
        there = device if torch.cuda.is_available() or not device.startswith("cuda") else "cpu"
        return kind(data, open_backbone(recipe, weights), recipe, there)

    return make


@contextlib.contextmanager
def stop_on_interrupt(at_once: bool = False) -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C (or a scheduler's SIGTERM) has come. The second Ctrl-C stops at once.

    Args:
        at_once: the first one does: nobody who would ask the function works in this process.
    """
    asked = False

    def ask(signum: int, frame: Any) -> None:
        nonlocal asked
        if asked or at_once:
            raise KeyboardInterrupt
        asked = True
        click.echo("\nStopping after this step; the run is being saved. Ctrl-C again stops at once.", err=True)

    on_interrupt("The run goes on from its last save: give the same command again.")
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
