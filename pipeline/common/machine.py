"""This machine: versions to be kept with results, and the cores and memory that a process may use here."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "hsnet-pipeline"
PACKAGES = ("torch", "torchvision", "numpy", "zarr", "numcodecs", "pyarrow", "pillow", "ray", "matplotlib", "Jinja2")

PROC, GROUPS = Path("/proc"), Path("/sys/fs/cgroup")


def environment() -> dict[str, str]:
    """Name -> version or description, of the program, the packages that it calculates with, and this machine.

    Of its GPUs too, and how they calculate (`hsnet.numerics.facts`), in a process that has loaded torch.
    """
    facts = {"Python": f"{platform.python_version()} ({sys.implementation.name})"}
    for name in (DISTRIBUTION, *PACKAGES):
        try:
            facts[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            facts[name] = "not installed"
    facts["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    facts["processor"] = f"{_processor()}, {os.cpu_count()} cores"
    if "torch" in sys.modules:  # it takes seconds to load, and who has not done so has calculated nothing
        from hsnet import numerics

        facts |= numerics.facts()
    return facts


def _processor() -> str:
    for line in _lines(PROC / "cpuinfo"):  # of Linux
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def cores() -> float:
    """Cores this process may use: the scheduler's affinity, and the quotas of its container."""
    count: float = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for group in _control_groups("cpu"):
        quota = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        if len(quota) == 2 and quota[0].isdecimal():  # otherwise "max" or -1
            count = min(count, round(int(quota[0]) / int(quota[1]), 2))
    return count


def memory() -> tuple[int, int] | None:
    """(free, all) bytes that processes may take: the machine's, or a container's where that is less.

    What the kernel keeps of files counts as free, in a container as on the machine. None where it cannot be read.
    """
    machine = _figures(PROC / "meminfo")
    if "MemAvailable:" not in machine or "MemTotal:" not in machine:  # not Linux
        return None
    free, total = 1024 * machine["MemAvailable:"], 1024 * machine["MemTotal:"]
    for group in _control_groups("memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        used = _words(group / "memory.current") or _words(group / "memory.usage_in_bytes")
        if limit and used and limit[0] != "max":
            kept = _figures(group / "memory.stat")
            taken = int(used[0]) - kept.get("active_file", 0) - kept.get("inactive_file", 0)
            free, total = min(free, int(limit[0]) - taken), min(total, int(limit[0]))
    return max(0, free), total


def _control_groups(controller: str) -> list[Path]:
    """Folders of the control group that this process is in, and of those around it: a limit of any of them holds.

    Version 2 has one tree, version 1 a tree for each controller. A container often sees its own group as the root.
    """
    folders = []
    for number, controllers, path in (line.split(":", 2) for line in _lines(PROC / "self" / "cgroup")):
        if number == "0" or controller in controllers.split(","):
            root = GROUPS if number == "0" else GROUPS / controller
            inner = Path(path.lstrip("/"))
            folders += [root / inner, *(root / outer for outer in inner.parents)]
    return folders


def _lines(path: Path) -> list[str]:
    """Lines of a file of the kernel; none if it is not there."""
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _figures(path: Path) -> dict[str, int]:
    """The first two words of each line: name -> number."""
    words = (line.split() for line in _lines(path))
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}
