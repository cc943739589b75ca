"""What works on this machine and what will not: one line per thing that a run depends on.

Nothing is changed, started or downloaded: every check looks, at most in a temporary folder that is removed.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from hsnet.errors import WeightsError
from pipeline.common.machine import DISTRIBUTION, cores, memory

OUR_NAMES = ("cli", "cluster", "commands", "hsnet", "pipeline")

GIB = 2**30
# Measured: an idle local Ray takes 0.5 GiB, a worker with torch 0.2 GiB, a training step at 400 px a few GiB.
MEMORY_WANTED = 4 * GIB
# int8 features of ResNet-50 at 400 px are 10 MB an image: a thousand images.
DISK_WANTED = 10 * GIB
# Ray refuses object stores below 75 MiB; ours asks for little because features never pass through it.
SHM_WANTED = 128 * 2**20

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    `status`: "ok"; "warn" = something is slower or not available; "fail" = the main job will not run.
    `todo` says what to do about it, "" when nothing.
    """

    name: str
    status: Status
    detail: str
    todo: str = ""


def _judged(name: str, good: bool, detail: str, todo: str) -> Finding:
    return Finding(name, "ok", detail) if good else Finding(name, "warn", detail, todo)


def examine(folder: Path = Path()) -> list[Finding]:
    """Run every check. A check that itself breaks is reported as failed and does not stop the others.

    Args:
        folder: where stores and runs will be written; its free disk space is looked at.
    """
    checks: tuple[tuple[str, Callable[[], Iterable[Finding]]], ...] = (
        ("python", _python),
        ("packages", _packages),
        ("import names", _names),
        ("devices", _devices),
        ("threads", _threads),
        ("memory", _memory),
        ("disk", lambda: _disk(folder)),
        ("shared memory", _shared_memory),
        ("store", _store),
        ("weights", _weights),
        ("cluster", _cluster),
    )
    findings: list[Finding] = []
    for name, check in checks:
        try:
            findings.extend(check())
        except Exception as error:  # a report that stops at the first trouble is of no use to the troubled
            findings.append(Finding(name, "fail", f"{type(error).__name__}: {error}"))
    return findings


def worst(findings: Iterable[Finding]) -> Status:
    """The most serious status among the findings ("ok" for none)."""
    order: tuple[Status, ...] = ("ok", "warn", "fail")
    return max((finding.status for finding in findings), key=order.index, default="ok")


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    yield Finding("python", "ok", f"{version} at {sys.executable}, {platform.platform()}")


def _packages() -> Iterator[Finding]:
    """Every dependency: there, of a version that will do, and torch and torchvision importable together."""
    for wanted in _requirements():
        package, todo = wanted.name, f"pip install '{wanted}'"
        module = _IMPORT_NAMES.get(package, package.replace("-", "_"))
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(package, "fail", "not installed", todo)
            continue
        if not wanted.specifier.contains(version, prereleases=True):
            yield Finding(package, "fail", f"{version}, but {wanted.specifier} is needed", todo)
            continue
        try:
            if module == "torchvision":
                from hsnet.torchvision_ops import ensure_importable  # which needs torch

                ensure_importable()
            importlib.import_module(module)
        except Exception as error:
            yield Finding(package, "fail", f"{version}, but importing {module} fails: {error}", "reinstall it")
        else:
            yield Finding(package, "ok", version)


_IMPORT_NAMES = {"Jinja2": "jinja2", "Pillow": "PIL", "PyYAML": "yaml"}


def _requirements() -> list[Requirement]:
    """Every dependency, from the one place that declares them.

    That is the installed package's metadata, or pyproject.toml when run from a bare checkout.
    """
    try:
        declared = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))
        declared = project["project"]["dependencies"]
    wanted = map(Requirement, declared)
    return [need for need in wanted if need.marker is None or need.marker.evaluate({"extra": ""})]


def _names() -> Iterator[Finding]:
    """Our import names are generic; another package that installs one of them overwrites our files silently."""
    root = Path(__file__).resolve().parent.parent
    owners = importlib.metadata.packages_distributions()
    installed = False
    trouble = False
    for name in OUR_NAMES:
        others = sorted({owner for owner in owners.get(name, ()) if owner != DISTRIBUTION})
        installed |= DISTRIBUTION in owners.get(name, ())
        if others:
            trouble = True
            todo = f"pip uninstall {' '.join(others)}, then install {DISTRIBUTION} again"
            yield Finding("import names", "fail", f"'{name}' is also installed by {', '.join(others)}", todo)
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin is None or root not in origin.parents:
            trouble = True
            todo = f"run it with an environment in which only {DISTRIBUTION} provides '{name}'"
            yield Finding("import names", "fail", f"'{name}' is imported from {origin}, not from {root}", todo)
    if not trouble:
        how = "installed" if installed else "run from the source folder"
        yield Finding("import names", "ok", f"{', '.join(OUR_NAMES)} are ours ({how}: {root})")


def _devices() -> Iterator[Finding]:
    import torch

    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            detail = f"{properties.name}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
            yield _judged(f"cuda:{index}", free > 2 * GIB, detail, "another process holds its memory")
    else:
        why = f"torch {torch.__version__} sees no GPU" if torch.version.cuda else "torch is a CPU build"
        yield Finding("gpu", "warn", why, "everything works on the CPU; training at 400 px takes days there")
    yield Finding("cpu", "ok", f"{cores():g} cores usable, {platform.machine()}")


def _threads() -> Iterator[Finding]:
    import torch

    threads, usable = torch.get_num_threads(), cores()
    detail = f"torch uses {threads}, OMP_NUM_THREADS={os.environ.get('OMP_NUM_THREADS', 'not set')}"
    fits = threads <= usable
    detail += "" if fits else f", for {usable:g} cores"
    yield _judged("threads", fits, detail, f"set OMP_NUM_THREADS={int(usable) or 1}")


def _memory() -> Iterator[Finding]:
    readable = memory()
    if readable is None:
        yield Finding("memory", "warn", "cannot be read on this system")
        return
    available, total = readable
    detail = f"{available / GIB:.1f} of {total / GIB:.1f} GiB available"
    todo = "use fewer --workers, a smaller --batch-size with --micro-batch, or a smaller --image-size"
    yield _judged("memory", available >= MEMORY_WANTED, detail, todo)


def _disk(folder: Path) -> Iterator[Finding]:
    for name, path in (("disk", folder), ("temporary files", Path(tempfile.gettempdir()))):
        existing = next((p for p in (path.resolve(), *path.resolve().parents) if p.exists()), Path("/"))
        free = shutil.disk_usage(existing).free
        detail = f"{free / GIB:.1f} GiB free at {existing}"
        if not os.access(existing, os.W_OK):
            yield Finding(name, "fail", f"{existing} is not writable", "run from a folder that you may write to")
        else:
            todo = "a ResNet-50 store at 400 px takes 10 MB an image (int8)"
            yield _judged(name, free >= DISK_WANTED, detail, todo)


def _shared_memory() -> Iterator[Finding]:
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Finding("shared memory", "ok", "no /dev/shm on this system; Ray uses temporary files")
        return
    free = shutil.disk_usage(shm).free
    detail = f"{free / GIB:.2f} GiB free at /dev/shm"
    todo = "in a container: docker run --shm-size=1g; or use --workers 0, which needs no Ray"
    yield _judged("shared memory", free >= SHM_WANTED, detail, todo)


def _store() -> Iterator[Finding]:
    """A small sharded zarr array, written and read back with its checksums."""
    import numpy as np
    import zarr
    from zarr.codecs import BytesCodec, Crc32cCodec, ShardingCodec

    values = np.arange(64, dtype=np.int8).reshape(4, 4, 4)
    with tempfile.TemporaryDirectory(prefix="hsnet-doctor-") as folder:
        array = zarr.create_array(
            store=f"{folder}/probe.zarr",
            shape=values.shape,
            dtype=values.dtype,
            chunks=(2, 4, 4),
            serializer=ShardingCodec(chunk_shape=(1, 4, 4), codecs=[BytesCodec(), Crc32cCodec()]),
            compressors=None,
            filters=None,
        )
        array[:] = values
        same = bool((np.asarray(zarr.open_array(f"{folder}/probe.zarr", mode="r")[:]) == values).all())
    if same:
        yield Finding("store", "ok", "a sharded zarr array was written and read back")
    else:
        yield Finding("store", "fail", "a zarr array came back with other values", "reinstall zarr and numcodecs")


def _weights() -> Iterator[Finding]:
    """Which backbones can be used without a network."""
    import torch

    from hsnet.backbone import BACKBONES
    from pipeline.features import weights

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    for name in BACKBONES:
        if name in weights.PACKAGED:
            try:
                loaded = weights.load_weights(name)
                yield Finding(f"weights {name}", "ok", f"{loaded.origin}, {loaded.sha256[:15]}")
            except WeightsError as error:
                yield Finding(f"weights {name}", "fail", str(error), f"install {DISTRIBUTION} again")
            continue
        from hsnet.torchvision_ops import ensure_importable

        ensure_importable()
        from torchvision.models import get_model_weights

        file = cache / Path(get_model_weights(name)[weights.PUBLISHED].url).name
        if file.is_file():
            yield Finding(f"weights {name}", "ok", f"downloaded: {file}")
        else:
            todo = f"downloaded on first use; offline: put {file.name} into {cache}, or give --weights FILE"
            yield Finding(f"weights {name}", "warn", "not on this machine", todo)
    from pipeline.features.timm_registry import INSTALL, available

    if available():
        yield Finding("timm", "ok", f"{importlib.metadata.version('timm')}: backbones timm:NAME can be used")
    else:
        yield Finding("timm", "warn", "not installed: no backbones timm:NAME", INSTALL)


def _cluster() -> Iterator[Finding]:
    """Ray can be imported with Ray Train. It is not started: that takes seconds and processes."""
    importlib.import_module("ray.train.torch")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        detail = f"RAY_ADDRESS={address} is set and not used"
        yield Finding("cluster", "warn", detail, f"pass --address {address} to work on that cluster")
    else:
        yield Finding("cluster", "ok", "Ray and Ray Train can be imported; --workers N starts a local one")
