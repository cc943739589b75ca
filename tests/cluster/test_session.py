"""Ray starts where it is told, says nothing on standard output, and leaves the process as it was."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from cluster.session import session
from hsnet.errors import ClusterError

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.ray

LOCAL = """
import json, os, sys, time
sys.path.insert(0, sys.argv[1])
environment = dict(os.environ)
from cluster.session import session
from cluster.runner import RayRunner

def make():
    from hsnet.errors import HSNetError  # from this project, wherever the driver stands
    return lambda item: os.environ["RAY_AUTH_MODE"]

with session("local", num_cpus=2, num_gpus=0, object_store_bytes=100 << 20):
    print("noise")
    os.write(1, b"noise\\n")
    os.system("echo noise")
    results = list(RayRunner(2).map(make, [1, 2]))
changed = {k for k in {*os.environ, *environment} if os.environ.get(k) != environment.get(k)}
print(json.dumps({"results": sorted(results), "changed": sorted(k for k in changed if "USAGE" not in k)}))
"""


def run(program: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    keep = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RAY_AUTH_MODE")}
    return subprocess.run(
        [sys.executable, "-c", program, str(ROOT)],
        cwd=cwd,
        env={**keep, "HOME": str(cwd), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_local_session_is_quiet_protected_and_works_from_any_folder(tmp_path):
    """RAY_ADDRESS is not followed: a stray cluster on a shared machine must not get the work."""
    done = run(LOCAL, tmp_path, RAY_ADDRESS="127.0.0.1:1")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # nothing else came out
    assert result["results"] == [[1, "token"], [2, "token"]]
    assert not set(result["changed"]) & {"PYTHONPATH", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}
    assert done.stderr.count("noise") == 3
    assert not (tmp_path / ".ray" / "auth_token").exists()


JOIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from ray.cluster_utils import Cluster
import ray
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "object_store_memory": 100 << 20})
from cluster.session import session
from cluster.runner import RayRunner

def make():
    import hsnet.errors
    return lambda item: hsnet.errors.__file__

for attempt in range(2):  # leaving the session leaves the cluster running
    with session(cluster.address):
        results = list(RayRunner(2).map(make, [1]))
    assert not ray.is_initialized()
print(json.dumps(results[0][1]))
cluster.shutdown()
"""


def test_joining_a_cluster_brings_this_code_along_and_leaves_it_running(tmp_path):
    done = run(JOIN, tmp_path, RAY_AUTH_MODE="disabled")
    assert done.returncode == 0, done.stderr
    place = json.loads(done.stdout.splitlines()[-1])
    assert place.endswith("errors.py")
    assert not place.startswith(str(ROOT))


def test_a_session_inside_a_session_uses_it_and_leaves_it(local_ray):
    with session("local"):
        assert ray.is_initialized()
    assert ray.is_initialized()


@pytest.fixture
def no_ray(monkeypatch):
    """As if this process had not started Ray; nothing may start it."""

    def start(**options):
        raise AssertionError("ray.init was called")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", start)


@pytest.fixture
def silent_server():
    """Takes connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def attempt(address: str, timeout_s: float = 1.0) -> str:
    start = time.monotonic()
    with pytest.raises(ClusterError) as caught, session(address, timeout_s=timeout_s):
        pass
    assert time.monotonic() - start < timeout_s + 30
    return str(caught.value)


def test_nothing_listens_there(no_ray, silent_server):
    host, port = silent_server.getsockname()
    silent_server.close()
    message = attempt(f"{host}:{port}")
    assert f"No Ray cluster could be reached at {host}:{port}" in message
    assert "refused" in message
    assert "ray start --head" in message


def test_what_listens_there_never_answers(no_ray, silent_server):
    host, port = silent_server.getsockname()
    assert "timed out" in attempt(f"{host}:{port}", timeout_s=0.3)


def test_what_listens_there_is_not_ray(no_ray, silent_server):
    def answer():
        connection, _ = silent_server.accept()
        with connection:
            connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    host, port = silent_server.getsockname()
    assert "is not Ray" in attempt(f"{host}:{port}")
    thread.join()


def test_auto_means_ray_address(no_ray, silent_server, monkeypatch):
    host, port = silent_server.getsockname()
    silent_server.close()
    monkeypatch.setenv("RAY_ADDRESS", f"{host}:{port}")
    assert f"at {host}:{port}" in attempt("auto")


def test_auto_without_any_cluster(no_ray, monkeypatch, tmp_path):
    """Ray would search for running processes and find the private Ray of another command."""
    monkeypatch.setattr(ray, "init", lambda **options: pytest.fail("joined something"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert "RAY_ADDRESS is not set" in attempt("auto")


@pytest.mark.parametrize("address", ["somewhere", "host:", ":6379", "host:port", "host:99999", "ray://host:10001"])
def test_what_is_no_address(no_ray, address):
    assert "local, auto or HOST:PORT" in attempt(address)


def test_a_core_that_ends_the_process_is_an_error_instead(no_ray, monkeypatch):
    def end(**options):
        raise SystemExit(15)

    monkeypatch.setattr(ray, "init", end)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    assert "Ray could not be started on this machine: SystemExit" in attempt("local")


def test_output_is_given_back_after_an_error(no_ray, capfd):
    with pytest.raises(ClusterError), session("nowhere"):
        pass
    print("result", flush=True)
    os.write(1, b"raw\n")
    assert capfd.readouterr().out == "result\nraw\n"


def test_sigterm_stays_with_the_caller(no_ray, monkeypatch):
    """Ray takes it when it starts; `hsnet train` saves the run on it."""

    def take_it(**options):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    monkeypatch.setattr(ray, "init", take_it)
    monkeypatch.setattr(ray, "shutdown", lambda: None)

    def mine(number, frame):
        raise AssertionError("not called")

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with session("local"):
            assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
