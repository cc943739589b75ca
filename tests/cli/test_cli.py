"""The command line as a user meets it: help, messages, what goes to stdout and what to stderr, exit codes."""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import pytest
from fakes import invoke

import cli
from commands import options, steps, terminal
from hsnet.errors import ConfigError
from pipeline.common.text import printable, size_text, time_text

ROOT = Path(cli.__file__).parent


def failure(*args: str | Path) -> str:
    """Run a command that must fail by a user's mistake; its message."""
    result = invoke(*args)
    assert result.exit_code == 1, result.stdout + result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert result.stderr.count("Error: ") == 1
    return result.stderr[result.stderr.index("Error: ") :]


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by its full name, groups' commands included."""
    for name, command in cli.main.commands.items():
        yield name, command
        if isinstance(command, click.Group):
            for sub, inner in command.commands.items():
                yield f"{name} {sub}", inner


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_command_has_help_that_ends_in_an_example(name: str) -> None:
    command = dict(commands())[name]
    text = inspect.cleandoc(command.help or "").rstrip()
    assert "\b\nExample:\n" in text
    example = text.split("\b\nExample:\n")[1].splitlines()
    assert all(line.startswith("  hsnet ") for line in example)
    if not isinstance(command, click.Group):
        assert f"hsnet {name}" in example[-1]
    shown = invoke(*name.split(), "--help")
    assert shown.exit_code == 0
    assert shown.stdout.startswith(f"Usage: main {name}")


@pytest.mark.parametrize("name", [name for name, _ in commands()])
def test_every_option_explains_itself(name: str) -> None:
    for parameter in dict(commands())[name].params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_examples_use_options_that_exist() -> None:
    for name, command in commands():
        known = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
        if isinstance(command, click.Group):
            continue
        example = (command.help or "").split("Example:\n")[1]
        assert set(re.findall(r"--[a-z-]+", example)) <= known, name


def test_help_lists_commands_under_headings_in_pipeline_order() -> None:
    shown = invoke("--help").stdout
    positions = [shown.index(f"\n{heading}:\n") for heading in cli.SECTIONS]
    assert positions == sorted(positions)
    listed = [command.name for commands in cli.SECTIONS.values() for command in commands]
    assert sorted(listed) == sorted(cli.main.commands), "every command stands under exactly one heading"
    assert shown.index("\n  extract ") < shown.index("\n  train ") < shown.index("\n  evaluate ")
    assert "\n  store info " in shown
    assert "\n  checkpoint import " in shown


def test_choices_equal_the_tables_they_are_copied_from() -> None:
    from hsnet.backbone import BACKBONES
    from pipeline.datasets import DATASETS
    from pipeline.features.recipe import DTYPES
    from pipeline.heads.catalogue import HEADS

    assert tuple(BACKBONES) == options.BACKBONES
    assert tuple(DATASETS) == options.DATASETS
    assert sorted(DTYPES) == sorted(options.PRECISIONS)
    assert tuple(name for name, head in HEADS.items() if head.segmenter) == options.HEADS


def test_help_needs_nothing_heavy() -> None:
    """torch alone takes two seconds to import; help must be there at once."""
    code = (
        "import sys, cli\n"
        "try: cli.main(['train', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'torchvision', 'ray', 'zarr', 'numpy', 'PIL', 'pyarrow', 'rich'} & set(sys.modules)\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_is_quick() -> None:
    best = math.inf
    for _ in range(3):
        started = time.monotonic()
        subprocess.run([sys.executable, "cli.py", "--help"], cwd=ROOT, capture_output=True, check=True)
        best = min(best, time.monotonic() - started)
    assert best < 1, f"{best:.2f} s; 0.1 s where nothing else runs"


def test_version() -> None:
    assert invoke("--version").stdout.startswith("hsnet ")


def test_wrong_usage_is_exit_code_2() -> None:
    assert invoke("extract", "nonsense").exit_code == 2
    assert invoke("train", "--run-dir", "r").exit_code == 2
    assert invoke("train", "--run-dir", "r", "--store", "s", "--steps", "5", "--epochs", "1").exit_code == 2
    assert invoke("evaluate", "--store", "s").exit_code == 2
    assert invoke("evaluate", "--store", "s", "--head", "cosine", "--shots", "0").exit_code == 2
    assert invoke("evaluate", "--store", "s", "--head", "cosine", "--episodes", "some").exit_code == 2
    assert invoke("extract", "shapes", "--backbone", "vgg16", "--store", "s", "--device", "tpu").exit_code == 2


def test_user_mistakes_are_one_message(tmp_path: Path) -> None:
    store = tmp_path / "none.zarr"
    assert "none.zarr" in failure("store", "info", store)
    assert "none.zarr" in failure("train", "--store", store, "--run-dir", tmp_path / "r")
    assert "none.zarr" in failure("evaluate", "--head", "untrained", "--store", store)
    assert "No checkpoint" in failure("checkpoint", "info", tmp_path / "none")
    extract = ("extract", "pascal", "--backbone", "squeezenet1_1", "--store", store)
    assert "needs its folder" in failure(*extract)
    assert "gone" in failure(*extract, "--data-root", tmp_path / "gone")
    shapes = ("extract", "shapes", "--backbone", "squeezenet1_1", "--store", store)
    assert "no option 'colour'" in failure(*shapes, "--data-option", "colour=red")
    assert "KEY=VALUE" in failure(*shapes, "--data-option", "colour")
    assert "no.pth does not exist" in failure(*shapes, "--weights", "no.pth")
    assert not list(tmp_path.iterdir()), "nothing is left behind by a mistake"


def raising(error: BaseException) -> Callable[..., Any]:
    def stage(*_: Any, **__: Any) -> Any:
        raise error

    return stage


def test_foreseen_troubles_of_disks_are_messages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pipeline import doctor

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "x"))
    monkeypatch.setattr(doctor, "examine", raising(full))
    assert re.search(r"No space left.*x\. Make room and run the same command again", failure("doctor"))
    monkeypatch.setattr(doctor, "examine", raising(PermissionError(errno.EACCES, "Permission denied", "/y")))
    assert "/y" in failure("doctor")


def test_a_bug_is_not_dressed_up_as_a_users_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline import doctor

    monkeypatch.setattr(doctor, "examine", raising(ValueError("ours")))
    with pytest.raises(ValueError, match="ours"):
        invoke("doctor")


def test_ctrl_c_is_one_line_and_130(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from pipeline.features import weights

    monkeypatch.setattr(weights, "load_weights", raising(KeyboardInterrupt()))
    done = invoke("extract", "shapes", "--backbone", "squeezenet1_1", "--store", tmp_path / "s.zarr")
    assert done.exit_code == 130
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("Interrupted. Finished shards are kept")


@pytest.mark.parametrize("at_once", [False, True])
def test_ctrl_c_is_asked_for_or_obeyed_at_once(at_once: bool) -> None:
    """Where somebody in this process asks, the first one waits for an answer; the second stops in any case."""
    before = signal.getsignal(signal.SIGINT)
    with click.Context(cli.main), steps.stop_on_interrupt(at_once=at_once) as stop:
        assert not stop()
        if not at_once:
            signal.raise_signal(signal.SIGINT)
            assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before


def test_doctor_speaks_to_people_and_to_machines(tmp_path: Path) -> None:
    shown = invoke("doctor", "--path", tmp_path)
    assert "torch" in shown.stdout
    assert shown.exit_code in (0, 1)
    machine = json.loads(invoke("doctor", "--json").stdout)
    assert machine["status"] in ("ok", "warn", "fail")
    assert {"name", "status", "detail", "todo"} == set(machine["findings"][0])


def test_plain_makes_json_of_anything() -> None:
    values = {1: math.nan, "a": (Path("x/y"), np.float32(1.5), np.arange(2)), "b": {"c": math.inf}}
    assert json.loads(json.dumps(terminal.plain(values), allow_nan=False)) == {
        "1": None, "a": ["x/y", 1.5, [0, 1]], "b": {"c": None},
    }  # fmt: skip


def test_hostile_names_are_shown_harmless() -> None:
    """A file name may hold terminal commands, or bytes that are no text: printing must neither act nor fail."""
    assert printable("a\x1b[2Jb\n.jpg") == r"a\x1b[2Jb\n.jpg"
    assert printable(os.fsdecode(b"\xff.jpg")) == r"\xff.jpg"
    assert printable("grün.jpg") == "grün.jpg"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.7, "1:00"), (75, "1:15"), (3723, "1:02:03")]
)
def test_time_text(seconds: float, text: str) -> None:
    assert time_text(seconds) == text


@pytest.mark.parametrize(("nbytes", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 KB"), (2.5e12, "2.50 TB")])
def test_size_text(nbytes: float, text: str) -> None:
    assert size_text(nbytes) == text


def test_progress_is_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing on stdout; not one line per update; the last state is always shown; the rate counts new work only."""
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with terminal.Progress("extract", "images") as progress:
        progress.update(50, 100)  # there already
        for done in range(51, 91):
            now += 0.5
            progress.update(done, 100)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 4
    assert lines[0] == "extract: 60/100 images, 2.0 images/s, 20 left".replace("20 left", "0:20 left")
    assert lines[-1].startswith("extract: 90/100 images, 2.0 images/s")


def test_slow_progress_is_told_in_seconds(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    with terminal.Progress("train", "steps") as progress:
        progress.update(0, 10)
        now += 16
        progress.update(5, 10)
    assert capsys.readouterr().err.splitlines()[0] == "train: 5/10 steps, 3.2 s per step, 0:16 left"


def test_quiet_progress_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with terminal.Progress("extract", "images", quiet=True) as progress:
        progress.say("hello")
        progress.update(1, 1)
    assert capsys.readouterr() == ("", "")


def test_data_options() -> None:
    given = ["size=96", "seed=-1", "min_object_share=0.01", "layout=fss"]
    assert steps.parse_data_options(given) == {"size": 96, "seed": -1, "min_object_share": 0.01, "layout": "fss"}
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        steps.parse_data_options(["=3"])


def test_a_gpu_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert steps.pick_device("auto") == "cpu"
    with pytest.raises(ConfigError, match=r"sees 0 GPUs here; `hsnet doctor`.*There is: cpu\. Nothing was"):
        steps.pick_device("cuda:1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert steps.pick_device("cuda:1") == "cuda:1"
    with pytest.raises(ConfigError, match=r"sees 2 GPUs here.*There is: cpu, cuda:0, cuda:1\."):
        steps.pick_device("cuda:2")


def test_a_gpu_that_is_full_is_told_by_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages say more; this is for what none of them foresaw."""
    import torch

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation")

    monkeypatch.setattr("pipeline.doctor.examine", full)
    message = failure("doctor")
    assert message.startswith("Error: The GPU ran out of memory (CUDA out of memory. Tried to allocate 2.00 GiB.)")
    assert "--device cpu" in message
    assert "See documentation" not in message


def fake_gpu(monkeypatch: pytest.MonkeyPatch, bfloat16: bool) -> None:
    monkeypatch.setattr("hsnet.numerics.has_bfloat16", lambda device: bfloat16)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Fake 2080")


def test_arithmetic_is_bfloat16_on_a_gpu_that_has_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert steps.pick_arithmetic("auto", "cpu") == "float32"
    assert steps.pick_arithmetic("bfloat16", "cpu") == "bfloat16"
    assert not caplog.messages
    fake_gpu(monkeypatch, bfloat16=True)
    assert steps.pick_arithmetic("auto", "cuda:1") == "bfloat16"
    assert "Arithmetic: bfloat16, which this GPU has (--arithmetic float32 for" in caplog.text
    assert steps.pick_arithmetic("float32", "cuda") == "float32"
    # A run keeps its own, on any device; what is asked for by name is left to the run to refuse.
    for device in ("cuda", "cpu"):
        assert steps.pick_arithmetic("auto", device, stored="float32") == "float32"
        assert steps.pick_arithmetic("auto", device, stored="bfloat16") == "bfloat16"
        assert steps.pick_arithmetic("float32", device, stored="bfloat16") == "float32"


def test_a_gpu_without_bfloat16_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    fake_gpu(monkeypatch, bfloat16=False)
    for name in ("auto", "bfloat16"):
        caplog.clear()
        assert steps.pick_arithmetic(name, "cuda") == "float32"
        assert caplog.messages == ["Arithmetic: float32, because Fake 2080 has no bfloat16"]
    assert caplog.records[0].levelname == "WARNING", "asked for by name"
    with pytest.raises(ConfigError, match=r"began with --arithmetic bfloat16, which Fake 2080 cannot.*Nothing was"):
        steps.pick_arithmetic("auto", "cuda", stored="bfloat16")


def test_the_gpus_of_a_cluster_are_known_by_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster import nodes

    monkeypatch.setattr("cluster.session.session", lambda address, check: contextlib.nullcontext())
    for kinds, chosen in ((["A100", "L4"], "bfloat16"), (["A100", "T4"], "float32"), ([], "bfloat16")):
        there = [{"Alive": True, "Resources": {"GPU": 1, f"accelerator_type:{kind}": 1}} for kind in kinds]
        monkeypatch.setattr(nodes, "alive", lambda there=there: there)
        assert steps.pick_arithmetic("auto", "cuda", "head:6379") == chosen
