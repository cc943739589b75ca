"""Start or join Ray for the length of a block, quietly, and leave the process as it was."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster import nodes
from cluster.probe import trouble
from cluster.watch import head_watched
from hsnet.errors import ClusterError

log = logging.getLogger(__name__)

OBJECT_STORE_BYTES = 256 << 20
"""Only small things pass through Ray's object store: backbone weights at most (ResNet-101: 170 MB)."""

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("hsnet", "pipeline", "cluster")

PASSED_ON = ("GLOO_", "NCCL_")
"""Beginnings of variables that workers of a cluster get from the driver: which network interface a group talks over."""

_TOKEN = secrets.token_hex(32)  # one per process: Ray reads it once


@contextmanager
def session(
    address: str = "local",
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    timeout_s: float = 10.0,
    allow_mixed: bool = False,
    check: bool = True,
) -> Iterator[None]:
    """Use Ray inside the block.

    Args:
        address: "local" starts a Ray of its own in this machine and stops it afterwards, whatever RAY_ADDRESS says;
            "auto" joins the cluster named by RAY_ADDRESS or started on this machine; "host:port" joins that one.
        num_cpus, num_gpus: of a local Ray; None counts what is there. CPUs are a number of tasks at a time, so more
            than the machine has is allowed.
        object_store_bytes: shared memory of a local Ray, at least 75 MB.
        timeout_s: how long to wait for an answer from `address`.
        allow_mixed: go on with a cluster whose machines have other versions than this one; they are named.
        check: compare versions at all. Without it nothing is sent to the machines before there is work.

    Raises:
        ClusterError: nothing (or something that is not Ray) answers there, Ray did not start, or machines of the
            cluster miss a package or differ from this one (`cluster.nodes.require_alike`).

    Inside the block nothing of Ray reaches standard output: it is sent to standard error, as is whatever is printed
    meanwhile. Print results after the block. If Ray is running in this process already, it is used and left running.

    A local Ray listens on all of the machine's addresses, so unless RAY_AUTH_MODE is set it is protected by a token
    that only this process and its workers know. Workers of a cluster that is joined get this code and the variables
    of `PASSED_ON` from here. Only a machine of the cluster can join it.
    """
    with _stdout_to_stderr():
        ray = _import_ray()
        if ray.is_initialized():
            yield
            return
        local, head = address == "local", None
        environment = _local_environment() if local else {}
        with _environment(environment):
            if local:
                # Ray read RAY_AUTH_MODE when it was imported, which may have been before it was set here.
                with contextlib.suppress(AttributeError):  # private, so it may go
                    ray._raylet.Config.initialize("")
            options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
            if local:
                log.info("Starting Ray on this machine")
                options |= {
                    "num_cpus": num_cpus,
                    "num_gpus": num_gpus,
                    "object_store_memory": object_store_bytes,
                    "include_dashboard": False,
                }
            else:
                head = _probe(address, timeout_s)
                passed = {name: value for name, value in os.environ.items() if name.startswith(PASSED_ON)}
                options["runtime_env"] = {
                    "py_modules": [str(PROJECT / package) for package in PACKAGES],
                    **({"env_vars": passed} if passed else {}),
                }
            # Ray takes SIGTERM for itself, but stopping well is the caller's business.
            main = threading.current_thread() is threading.main_thread()
            terminate = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(address=address, **options)
                if main:
                    signal.signal(signal.SIGTERM, terminate)
            except (Exception, SystemExit) as error:  # a core worker that cannot connect ends in SystemExit
                with contextlib.suppress(Exception):
                    ray.shutdown()
                raise ClusterError(_cannot(address, f"{type(error).__name__}: {error}")) from error
            try:
                if check and not local:
                    nodes.require_alike(nodes.look(idle_too=False), nodes.versions(), allow_mixed)
                with head_watched(*head) if head else contextlib.nullcontext():
                    yield
            finally:
                ray.shutdown()


def places(workers: int, gpus: float, cpus: float = 1) -> int:
    """Items that the Ray in use is to work on at a time: `workers`, or for 0 as many as it has shares of GPUs or CPUs.

    Args:
        gpus, cpus: that each takes.

    Raises:
        ClusterError: there is no GPU for one of them, or no machine with so many CPUs. Ray itself would wait for more
            machines without a word.
    """
    most = max((float(node["Resources"].get("CPU", 0)) for node in nodes.alive()), default=0.0)
    if cpus > most:
        raise ClusterError(f"{cpus:g} CPUs for each item are more than any machine has ({most:g}). Ask for fewer.")
    there = nodes.total("GPU")
    if max(workers, 1) * gpus > there:
        raise ClusterError(
            f"{workers or 1} workers need {gpus:g} GPUs each, Ray has {there}. Use fewer --workers, or --device cpu."
        )
    return workers or max(1, int(there / gpus) if gpus else int(nodes.total("CPU") / cpus))


def _import_ray() -> Any:
    # Read when ray is imported or started. Set for good: they change what Ray tells others, not what it computes.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Under `uv run` Ray would rebuild an environment for every worker; ours are the driver's.
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # Otherwise Ray warns on every start that it will stop hiding GPUs from tasks that asked for none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Otherwise a task that always needs more memory than there is would be begun again for ever.
    os.environ.setdefault("RAY_task_oom_retries", "3")
    import ray

    return ray


def _local_environment() -> dict[str, str]:
    # Inherited by the workers: they find this code from any working directory, installed or not.
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {"PYTHONPATH": os.pathsep.join(paths)}
    if "RAY_AUTH_MODE" not in os.environ:
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": _TOKEN}
    return environment


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send both Python's and the process's standard output to standard error.

    Ray prints node and worker failures to standard output, from threads and from C++.
    """
    sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # no standard output at all
        yield
        return
    os.dup2(2, 1)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def _probe(address: str, timeout_s: float) -> tuple[str, int]:
    """Ask for an answer first: Ray itself waits two minutes for one, and then ends the process. Host and port."""
    target = address if address != "auto" else _address_of_auto()
    if target is None:
        # Ray itself would look for any running process, also one that belongs to another command.
        raise ClusterError(_cannot("auto", "RAY_ADDRESS is not set, and no `ray start` left its address here"))
    host, separator, port = target.rpartition(":")
    if not (separator and host and port.isdecimal() and 0 < int(port) < 65536) or "//" in target:
        raise ClusterError(f"'{target}' is not an address of a Ray cluster. Give local, auto or HOST:PORT.")
    if reason := trouble(host.strip("[]"), int(port), timeout_s):
        raise ClusterError(_cannot(target, reason))
    return host.strip("[]"), int(port)


def _address_of_auto() -> str | None:
    if os.environ.get("RAY_ADDRESS"):
        return os.environ["RAY_ADDRESS"]
    try:
        text = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster").read_text().strip()
    except OSError:
        return None
    return text or None


def _cannot(address: str, reason: str) -> str:
    if address == "local":
        return f"Ray could not be started on this machine: {reason.rstrip('.')}. `--workers 0` works without it."
    return (
        f"No Ray cluster could be reached at {address}: {reason.rstrip('.')}. Start one with `ray start --head` and "
        f"give its HOST:PORT (default port 6379), or leave the address out to use this machine."
    )
