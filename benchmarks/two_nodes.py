"""Ray clusters of several nodes on one machine, for tests and for `benchmarks.faults`.

Every node is a real raylet with worker processes of its own. They run in a thin virtual environment that has the
installed packages of this one, but does not find this project: neither its installation nor its folder, whatever is
said on a search path. So what a worker imports of the project was sent to it, as to another machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

_HIDE = """
import os, sys
class Nothing:
    def find_spec(self, name, target=None):
        return None
    def invalidate_caches(self):
        pass
def hide(path):
    there = os.path.realpath(path) + os.sep
    if there.startswith({root!r} + os.sep) and not there.startswith({packages!r}):  # packages may lie in the checkout
        return Nothing()
    raise ImportError
sys.path_hooks.insert(0, hide)
sys.path_importer_cache.clear()
"""

_HOST = """
import json, sys
from ray.cluster_utils import Cluster
cluster, nodes = Cluster(), []
for line in sys.stdin:
    asked = json.loads(line)
    if "add" in asked:
        node = cluster.add_node(**asked["add"])
        nodes.append(node)
        said = {"address": cluster.address, "id": node.node_id,
                "pids": [process.process.pid for every in node.all_processes.values() for process in every]}
    else:
        node = nodes[asked["remove"]]
        cluster.remove_node(node, allow_graceful=False)
        said = {}
    print("said", json.dumps(said), flush=True)
cluster.shutdown()
"""

QUICK_DEATH = {
    "RAY_health_check_initial_delay_ms": "500",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "4",
}
"""A lost node is noticed in some ten seconds, also where another program holds the cores."""


def processes() -> Iterator[tuple[int, int, str]]:
    """(pid, pid of the parent, command line) of every process of this machine. Linux only."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError, ValueError, IndexError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                yield int(folder.name), parent, (folder / "cmdline").read_text().replace("\0", " ").strip()


def below(pid: int) -> dict[int, str]:
    """Processes that descend from one, with what they are called."""
    table = list(processes())
    found = {pid: ""}
    while new := {child: name for child, parent, name in table if parent in found and child not in found}:
        found |= new
    del found[pid]
    return found


class Nodes:
    """A Ray cluster on this machine. The first node is its head, where drivers of this machine connect.

    Args:
        cpus: CPUs of each node; any number may be said.
        environment: variables of all its processes.

    Attributes:
        address: HOST:PORT for `--address`.
        environment: what a driver's process needs to be given beside its own environment.
    """

    def __init__(self, cpus: Sequence[int] = (2, 2), environment: dict[str, str] | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="hn", dir="/tmp"))  # short: Ray makes sockets in it
        (self.folder / "t" / "ray").mkdir(parents=True)
        self.environment = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": str(self.folder / "t")}
        python = _thin_environment(self.folder / "v")
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_ADDRESS")}
        set_for_nodes = {
            "OMP_NUM_THREADS": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }
        self._log = (self.folder / "log").open("w")
        self._host = subprocess.Popen(
            [str(python), "-c", _HOST],
            cwd=self.folder,
            env={**kept, **set_for_nodes, **QUICK_DEATH, **self.environment, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            start_new_session=True,
        )
        self.address = ""
        self._pids: list[list[int]] = []
        self.ids: list[str] = []
        try:
            for count in cpus:
                self.add(count)
        except BaseException:
            self.close()
            raise

    def add(self, cpus: int, **resources: int) -> int:
        """Start one more node; returns its number."""
        said: Any = self._ask({"add": {"num_cpus": cpus, "object_store_memory": 100 << 20, **resources}})
        self.address = said["address"]
        self._pids.append(said["pids"])
        self.ids.append(said["id"])
        return len(self._pids) - 1

    def workers(self, node: int) -> dict[int, str]:
        """Worker processes of a node, with the title that Ray gives them, such as `ray::fit`."""
        found: dict[int, str] = {}
        for pid in self._pids[node]:
            found |= {child: name for child, name in below(pid).items() if name.startswith("ray::")}
        return {child: name for child, name in found.items() if not name.endswith("Agent")}

    def kill(self, node: int) -> None:
        """SIGKILL every process of a node at once, as when its machine loses power."""
        pids = [child for pid in self._pids[node] for child in (*below(pid), pid)]
        for number in (signal.SIGSTOP, signal.SIGKILL):  # stopped first, so that none hears of another's end
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
        self._pids[node] = []
        if node:
            self._ask({"remove": node})

    def close(self) -> None:
        """End all of it, gently where it can be."""
        if self._host.stdin:
            with contextlib.suppress(OSError):
                self._host.stdin.close()
        left = {**below(self._host.pid)}
        try:
            self._host.wait(20)
        except subprocess.TimeoutExpired:
            self._host.kill()
            self._host.wait()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self._host.stdout:
            self._host.stdout.close()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, what: dict[str, object]) -> dict[str, object]:
        assert self._host.stdin is not None
        assert self._host.stdout is not None
        self._host.stdin.write(json.dumps(what) + "\n")
        self._host.stdin.flush()
        for line in self._host.stdout:
            if line.startswith("said "):
                return json.loads(line[5:])
        raise RuntimeError(f"The nodes ended: {(self.folder / 'log').read_text()[-2000:]}")


def _thin_environment(folder: Path) -> Path:
    """A virtual environment with the packages of this one and without this project; returns its interpreter."""
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    packages = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    # A line of a .pth file that names a folder adds it, without reading the .pth files there: an editable
    # installation of the project is not followed.
    here = dict.fromkeys(path for path in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")) if path)
    kept = tuple(os.path.realpath(path) + os.sep for path in here)
    (packages / "hide_project.py").write_text(_HIDE.format(root=str(ROOT), packages=kept))
    (packages / "of_another.pth").write_text("\n".join(["import hide_project", *here]) + "\n")
    return folder / "bin" / "python"


def driver(nodes: Nodes, *words: object, **more: Any) -> subprocess.Popen[str]:
    """`hsnet WORDS --address ...` as a process of its own, in the folder of the project."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT, **more}
    extra = options.pop("env", {})
    command = [sys.executable, "cli.py", *map(str, words), "--address", nodes.address]
    return subprocess.Popen(command, env={**environment, **nodes.environment, **extra}, **options)


def until(met: Callable[[], object], seconds: float, what: str, step: float = 0.05) -> float:
    """Wait for something to become true; seconds it took."""
    began = time.monotonic()
    while not met():
        if time.monotonic() - began > seconds:
            raise TimeoutError(f"{what} was waited for {seconds:g} s")
        time.sleep(step)
    return time.monotonic() - began
