"""The machines of the Ray in use: what each has, which versions run there, what it sees of the disk."""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from hsnet.errors import ClusterError

log = logging.getLogger(__name__)

COMPARED = ("torch", "torchvision", "numpy", "zarr", "Pillow")
"""Packages whose version decides bits of what is computed or stored; beside Python itself."""

NEEDED = (*COMPARED, "numcodecs", "google-crc32c", "obstore", "pyarrow", "safetensors", "scipy", "tensorboardX")
"""Packages without which a worker cannot do every kind of work."""

LOOK_SECONDS = 60.0
"""How long a node has to answer; its first process must be started, and this code unpacked there."""

ABSENT = "not installed"


@dataclass(frozen=True)
class NodeFacts:
    """A node of the cluster. Bytes are integers; None is what cannot be known."""

    node: str
    """Ray's id."""
    host: str
    address: str
    cpus: float
    gpus: float
    versions: Mapping[str, str] = field(default_factory=dict)
    """Package -> version, or `ABSENT`."""
    memory_free: int | None = None
    memory: int | None = None
    disk_free: int | None = None
    """Of the folder for temporary files."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Path that was asked for -> what is there: "folder", "file", "nothing", "no right to read"."""
    silent: bool = False
    """It did not answer in time."""

    @property
    def name(self) -> str:
        """For messages: nodes of one machine have one host."""
        return f"{self.host} ({self.address}, node {self.node[:8]})"


def here(paths: Sequence[str] = ()) -> dict[str, Any]:
    """What this process can say of its machine, as keyword arguments of `NodeFacts`."""
    from pipeline.common.machine import memory

    free, every = memory() or (None, None)
    return {
        "host": socket.gethostname(),
        "versions": versions(),
        "memory_free": free,
        "memory": every,
        "disk_free": shutil.disk_usage("/tmp" if os.path.isdir("/tmp") else "/").free,
        "paths": {path: _seen(Path(path)) for path in paths},
    }


def versions() -> dict[str, str]:
    """Python's and every needed package's. Nothing is imported, so that a package that is missing breaks nothing."""
    found = {"Python": platform.python_version()}
    for name in NEEDED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ABSENT
    return found


def alive() -> list[dict[str, Any]]:
    """Ray's own entries of the nodes that live."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def total(kind: str) -> int:
    """CPUs or GPUs of all nodes."""
    return int(sum(node["Resources"].get(kind, 0) for node in alive()))


def accelerators() -> set[str]:
    """Kinds of GPUs in the cluster, as far as Ray could name them, such as "A100" and "T4"."""
    prefix = "accelerator_type:"
    return {kind.removeprefix(prefix) for node in alive() for kind in node["Resources"] if kind.startswith(prefix)}


def places(each: Mapping[str, float]) -> int:
    """Workers that the living machines have room for, if nobody else uses them; `each` takes so much of a resource."""
    return sum(
        int(min(node["Resources"].get(kind, 0) // share for kind, share in each.items() if share)) for node in alive()
    )


def look(paths: Sequence[str] = (), seconds: float = LOOK_SECONDS, idle_too: bool = True) -> list[NodeFacts]:
    """Ask every node, all at a time; one tiny task runs on each.

    Args:
        paths: looked for there.
        seconds: how long to wait for answers. A node that lives and says nothing comes back as `silent`.
        idle_too: ask nodes without CPUs, too, where no work is done.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(num_cpus=0, max_retries=1)(here)
    nodes = [node for node in alive() if idle_too or node["Resources"].get("CPU", 0) > 0]
    asked = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[task.options(scheduling_strategy=there).remote(list(paths))] = node
    answers: dict[str, dict[str, Any]] = {}
    waiting, deadline, told = list(asked), time.monotonic() + seconds, False
    while waiting and time.monotonic() < deadline:
        done, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=min(10.0, seconds))
        for reference in done:
            try:
                answers[asked[reference]["NodeID"]] = ray.get(reference)
            except (ray.exceptions.RayTaskError, ray.exceptions.RuntimeEnvSetupError) as error:
                last = (str(error).strip().splitlines() or [type(error).__name__])[-1]
                raise ClusterError(
                    f"A worker on {asked[reference]['NodeManagerHostname']} cannot be used: {last} "
                    "Install the same packages there as here. Nothing was started."
                ) from error
            except ray.exceptions.RayError:
                continue  # the node died meanwhile; work will go elsewhere
        if waiting and not told:
            told = True
            log.info("Waiting for an answer of %s", ", ".join(asked[one]["NodeManagerHostname"] for one in waiting))
    for reference in waiting:
        ray.cancel(reference, force=True)
    lives = {node["NodeID"] for node in alive()}
    facts = []
    for node in nodes:
        number = node["NodeID"]
        if number not in answers and number not in lives:
            continue
        facts.append(
            NodeFacts(
                node=number,
                address=node["NodeManagerAddress"],
                cpus=node["Resources"].get("CPU", 0),
                gpus=node["Resources"].get("GPU", 0),
                silent=number not in answers,
                **answers.get(number, {"host": node["NodeManagerHostname"]}),
            )
        )
    return facts


def require_alike(facts: Iterable[NodeFacts], mine: Mapping[str, str], allow_mixed: bool = False) -> None:
    """Refuse a cluster whose machines would compute or store other bits than this one.

    Args:
        mine: versions of the driver.
        allow_mixed: say it instead, and go on.

    Raises:
        ClusterError: a needed package is missing on a node (whatever is allowed), versions differ, or a node is silent.
    """
    facts = list(facts)
    if silent := [one.name for one in facts if one.silent]:
        raise ClusterError(
            f"No worker could be started on {', '.join(silent)} within {LOOK_SECONDS:g} s. Look at Ray's logs there "
            "(/tmp/ray/session_latest/logs), or take the machine out of the cluster. Nothing was started."
        )
    missing = [
        f"{one.name}: {', '.join(absent)}"
        for one in facts
        if (absent := [name for name in NEEDED if one.versions[name] == ABSENT and mine[name] != ABSENT])
    ]
    if missing:
        raise ClusterError(
            "Packages that the work needs are missing on machines of the cluster:\n  "
            + "\n  ".join(missing)
            + "\nInstall the same packages there as here (constraints.txt has the versions). Nothing was started."
        )
    differing = [
        f"{one.name}: {name} {one.versions[name]}, here {mine[name]}"
        for one in facts
        for name in ("Python", *COMPARED)
        if _plain(one.versions[name]) != _plain(mine[name])
    ]
    if not differing:
        return
    text = "Machines of the cluster have other versions than this one:\n  " + "\n  ".join(differing)
    if not allow_mixed:
        raise ClusterError(
            f"{text}\nThe same photos or episodes may give other last bits there. Install the same versions, or go on "
            "with --allow-mixed. Nothing was started."
        )
    log.warning("%s", text)


def compared(node: NodeFacts, mine: Mapping[str, str]) -> list[tuple[Literal["ok", "warn", "fail"], str, str]]:
    """(status, detail, what to do) of a node's versions beside this machine's."""
    told: list[tuple[Literal["ok", "warn", "fail"], str, str]] = []
    absent = [name for name in NEEDED if node.versions[name] == ABSENT and mine[name] != ABSENT]
    differing = [
        f"{name} {node.versions[name]}, here {mine[name]}"
        for name in ("Python", *COMPARED)
        if name not in absent and _plain(node.versions[name]) != _plain(mine[name])
    ]
    if absent:
        told.append(("fail", f"not installed: {', '.join(absent)}", "install the same packages there as here"))
    if differing:
        told.append(("warn", "; ".join(differing), "install the same versions, or work with --allow-mixed"))
    if not told:
        same = ", ".join(f"{name} {node.versions[name]}" for name in ("Python", *COMPARED))
        told.append(("ok", f"the versions of this machine: {same}", ""))
    return told


def describe(node: NodeFacts) -> str:
    """One line: what a node has."""
    memory = "memory unknown" if node.memory is None else f"memory {_gib(node.memory_free)} of {_gib(node.memory)} free"
    disk = "" if node.disk_free is None else f", disk {_gib(node.disk_free)} free"
    return f"{node.cpus:g} CPUs, {node.gpus:g} GPUs, {memory}{disk}"


def _gib(count: int | None) -> str:
    return f"{(count or 0) / 2**30:.1f} GiB"


def _plain(version: str) -> str:
    """Without what a build adds for its kind of device: 2.13.0+cpu and 2.13.0+cu130 are one version."""
    return version.partition("+")[0]


def _seen(path: Path) -> str:
    try:
        if path.is_dir():
            return "folder" if os.access(path, os.W_OK) else "folder, not writable"
        if path.exists():
            return "file" if os.access(path, os.R_OK) else "no right to read"
    except OSError:
        return "no right to read"
    return "nothing"
