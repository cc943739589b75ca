"""Versions and machine, to be kept with results."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "hsnet-pipeline"
PACKAGES = ("torch", "torchvision", "numpy", "zarr", "numcodecs", "pyarrow", "pillow", "ray", "matplotlib", "Jinja2")


def environment() -> dict[str, str]:
    """Name -> version or description, of the program, the packages that it calculates with, and this machine."""
    found = {"Python": f"{platform.python_version()} ({sys.implementation.name})"}
    for name in (DISTRIBUTION, *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    found["processor"] = f"{_processor()}, {os.cpu_count()} cores"
    return found


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        return platform.processor() or "unknown processor"
    return platform.processor() or "unknown processor"
