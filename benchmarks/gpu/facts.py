"""What a time on a GPU depends on: device, driver, CUDA, cuDNN, clocks, power limit, and torch's own switches."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

UNKNOWN = "unknown"
_ASKED = {
    "driver": "driver_version",
    "clock_mhz": "clocks.sm",
    "clock_largest_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "power_limit_w": "power.limit",
    "power_w": "power.draw",
    "temperature_c": "temperature.gpu",
    "throttled": "clocks_throttle_reasons.active",
    "persistence": "persistence_mode",
}
"""Our name of a fact -> nvidia-smi's."""


def gpu_facts(device: torch.device, program: str = "nvidia-smi") -> dict[str, Any]:
    """Facts of a device and of the libraries that compute on it; empty for a CPU. What nobody says is "unknown"."""
    if device.type != "cuda":
        return {}
    about = torch.cuda.get_device_properties(device)
    uuid = str(getattr(about, "uuid", ""))
    return {
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "cuda": torch.version.cuda or UNKNOWN,
        "cudnn": torch.backends.cudnn.version() or UNKNOWN,
        **asked(program, f"GPU-{uuid}" if uuid and not uuid.startswith("GPU-") else uuid),
    }


def asked(program: str, uuid: str = "", names: tuple[str, ...] = tuple(_ASKED)) -> dict[str, str]:
    """What nvidia-smi says of a GPU, by our names; all "unknown" where it is not there, fails, or means several."""
    which = ["-i", uuid] if uuid else []
    query = [f"--query-gpu={','.join(_ASKED[name] for name in names)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run([program, *query, *which], capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return dict.fromkeys(names, UNKNOWN)
    lines = [[part.strip() for part in line.split(",")] for line in said.splitlines() if line.strip()]
    if len(lines) != 1 or len(lines[0]) != len(names):
        return dict.fromkeys(names, UNKNOWN)
    return dict(zip(names, lines[0], strict=True))


def clocks(device: torch.device, program: str = "nvidia-smi") -> dict[str, str]:
    """What changes under load, asked for beside every measurement; empty for a CPU."""
    if device.type != "cuda":
        return {}
    uuid = str(getattr(torch.cuda.get_device_properties(device), "uuid", ""))
    names = ("clock_mhz", "power_w", "temperature_c", "throttled")
    return asked(program, f"GPU-{uuid}" if uuid and not uuid.startswith("GPU-") else uuid, names)
