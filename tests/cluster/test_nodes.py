"""Machines of a cluster that do not fit this one are named before any work, and servers that are not Ray are told."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import ray

from cluster import nodes, probe, session, watch
from cluster.nodes import ABSENT, NodeFacts, require_alike
from hsnet.errors import ClusterError

GREETING = b"\0\0\0\4\0\0\0\0\0"  # an empty SETTINGS frame of HTTP/2


def node(**changes: str) -> NodeFacts:
    return NodeFacts("a" * 40, "beta", "10.0.0.2", 8, 1, {**nodes.versions(), **changes})


def test_machines_that_are_alike_pass() -> None:
    require_alike([node(), node()], nodes.versions())


def test_another_version_is_named_with_both_and_can_be_allowed(caplog: pytest.LogCaptureFixture) -> None:
    mine = nodes.versions()
    with pytest.raises(ClusterError) as caught:
        require_alike([node(), node(numpy="1.0.0", Python="3.9.1")], mine)
    message = str(caught.value)
    assert f"numpy 1.0.0, here {mine['numpy']}" in message
    assert f"Python 3.9.1, here {mine['Python']}" in message
    assert "beta (10.0.0.2, node aaaaaaaa)" in message
    assert "--allow-mixed" in message
    assert "zarr" not in message
    require_alike([node(numpy="1.0.0")], mine, allow_mixed=True)
    assert "numpy 1.0.0" in caplog.text


def test_builds_for_other_devices_are_one_version() -> None:
    mine = nodes.versions()
    require_alike([node(torch=mine["torch"].partition("+")[0] + "+cu999")], mine)


def test_a_missing_package_is_named_whatever_is_allowed() -> None:
    with pytest.raises(ClusterError, match=r"missing on machines of the cluster:\n  beta.*: zarr, obstore\n"):
        require_alike([node(zarr=ABSENT, obstore=ABSENT)], nodes.versions(), allow_mixed=True)


def test_what_is_missing_here_too_is_not_missed() -> None:
    require_alike([node(obstore=ABSENT)], {**nodes.versions(), "obstore": ABSENT})


def test_a_machine_without_an_answer_is_an_error() -> None:
    silent = NodeFacts("b" * 40, "gamma", "10.0.0.3", 8, 0, silent=True)
    with pytest.raises(ClusterError, match=r"No worker could be started on gamma \(10\.0\.0\.3"):
        require_alike([silent], nodes.versions())


def test_what_a_machine_sees_of_paths(tmp_path) -> None:
    (tmp_path / "file").touch()
    seen = nodes.here([str(tmp_path), str(tmp_path / "file"), str(tmp_path / "none")])["paths"]
    assert list(seen.values()) == ["folder", "file", "nothing"]


@pytest.mark.usefixtures("local_ray")
def test_every_node_answers() -> None:
    (one,) = nodes.look()
    assert (one.cpus, one.gpus, one.silent) == (3, 0, False)
    assert one.versions == nodes.versions()
    assert nodes.compared(one, nodes.versions())[0][0] == "ok"
    assert nodes.compared(node(zarr=ABSENT, numpy="1"), nodes.versions())[0][0] == "fail"


@pytest.mark.usefixtures("local_ray")
def test_gpus_that_are_not_there_are_not_waited_for() -> None:
    assert session.places(0, 0) == 3
    assert session.places(7, 0) == 7
    for workers in (0, 2):
        with pytest.raises(ClusterError, match="need 1 GPUs each, Ray has 0"):
            session.places(workers, 1)


@contextlib.contextmanager
def server(*answers: bytes, ends: bool = False) -> Iterator[int]:
    """Takes one connection, says this, and then keeps still or ends it; yields its port."""
    done = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            connection, _ = listening.accept()
            # One that has heard enough may be gone before all is said.
            with connection, contextlib.suppress(OSError):
                for answer in answers:
                    connection.sendall(answer)
                if ends:
                    connection.shutdown(socket.SHUT_WR)
                done.wait(10)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listening.getsockname()[1]
        done.set()
        thread.join()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("answers", "ends", "said"),
    [
        ([GREETING], False, "did not answer in 0.4 s as Ray does"),
        ([GREETING], True, "ended the conversation"),
        ([GREETING, b"\0\0\1\1\5\0\0\0\1\x88"], False, "refused a call without a token"),
        ([GREETING, b"\0\0\x08\7\0\0\0\0\0" + bytes(8)], False, "it is not Ray, or its token is needed"),
        ([b"HTTP/1.1 400 Bad Request\r\n\r\n"], True, "is not Ray"),
        ([b"\0"], True, "is not Ray"),
    ],
    ids=["greets and keeps still", "greets and ends", "no such method", "goes away", "of the web", "one byte"],
)
def test_a_server_that_is_not_ray(answers, ends, said, monkeypatch) -> None:
    """The first of these passed for Ray, which then waited for nine minutes."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    began = time.monotonic()
    with server(*answers, ends=ends) as port:
        assert said in str(probe.trouble("127.0.0.1", port, 0.4))
    assert time.monotonic() - began < 30


@pytest.mark.ray
def test_a_server_that_never_stops_greeting_is_not_waited_for() -> None:
    began = time.monotonic()
    with server(*[GREETING] * 10) as port:
        assert "did not answer" in str(probe.trouble("127.0.0.1", port, 0.4))
    assert time.monotonic() - began < 30


def test_the_token_goes_along_where_ray_would_send_it(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "x" * 300)
    assert probe._token() == "x" * 300
    assert probe._text("x" * 300) == b"\x7f\xad\x01" + b"x" * 300  # 300 = 127 + 45 + 1 * 128
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text("of a file\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert probe._token() == "of a file"
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert probe._token() == ""


def test_the_network_interface_of_groups_is_passed_on_and_nothing_else(monkeypatch) -> None:
    given = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: given.update(options))
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(session, "_probe", lambda *_: ("host", 6379))
    for name in [name for name in os.environ if name.startswith(session.PASSED_ON)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    with session.session("host:6379", check=False):
        pass
    assert given["runtime_env"]["env_vars"] == {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "ib0"}


@pytest.mark.ray
def test_a_head_that_is_lost_is_told_and_ends_the_command(caplog) -> None:
    caplog.set_level("WARNING")
    ended: list[str] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    began = time.monotonic()
    with watch.head_watched("127.0.0.1", port, every_s=0.05, patience=0.3, end=ended.append):
        while not ended and time.monotonic() - began < 10:
            time.sleep(0.05)
    assert time.monotonic() - began > 0.3
    assert caplog.text.count("head does not answer") == 1
    assert f"The head of the cluster at 127.0.0.1:{port} was lost" in ended[0]
    assert "the same command goes on" in ended[0]
