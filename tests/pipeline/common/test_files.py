"""What is written is there whole or not at all: every writer of the product is killed between write and rename."""

import ast
import errno
import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import nn

from hsnet.errors import DataError
from pipeline.annotations.streams import WholeFile
from pipeline.bank.folder import Item
from pipeline.common.files import PARTIAL, whole, whole_folder, write_table
from pipeline.datasets.index import DatasetIndex, Split
from pipeline.episodes import drawing, manifest_file
from pipeline.evaluate.parts import Part
from pipeline.features.recipe import Recipe
from pipeline.heads.config import RunConfig
from pipeline.heads.run_dir import Position, RunDir
from pipeline.store.attributes import read_facts, write_facts
from pipeline.store.feature_store import FeatureStore

ROOT = Path(__file__).parents[3]
INDEX = DatasetIndex(
    "folder",
    {0: "cat", 1: "dog"},
    tuple(f"{i}.jpg" for i in range(12)),
    {0: {role: Split(tuple((i, i % 2) for i in range(12))) for role in ("trn", "val", "test")}},
)
RECIPE = Recipe.of("squeezenet1_1", "sha256:" + "0" * 64, 64, "int8")
CONFIG = RunConfig(recipe=RECIPE, data=INDEX.digest, fold=0, steps=9)


def run_dir(path: Path) -> RunDir:
    return RunDir(path.parent, CONFIG)


def save_run(path: Path, version: int) -> None:
    model = nn.Linear(200, 200)
    nn.init.constant_(model.weight, version)
    nn.init.constant_(model.bias, version)
    optimiser = SimpleNamespace(state=dict.fromkeys(model.parameters()))
    run_dir(path).save(model, optimiser, Position(version))


def store(path: Path) -> FeatureStore:
    return FeatureStore.create(path, RECIPE, INDEX, shard_images=4)


def fill(path: Path, version: int) -> FeatureStore:
    own = store(path)
    levels = [np.full((4, *shape), version, np.int8) for shape in RECIPE.stored_shapes()]
    with own.writing():
        for number in range(own.shards):
            own.write_shard(number, levels, np.zeros((4, 64, 64), np.uint8), [(8, version)] * 4, [(0, 1)] * 4)
    return own


def change_facts(path: Path, version: int) -> None:
    own = store(path.parent)
    if version > 1:
        write_facts(own.root, read_facts(own.root))


def whole_file(path: Path, version: int) -> None:
    file = WholeFile(path)
    file.write(text(version))
    file.close()


def text(version: int) -> str:
    return f"{version}" * 100_000


def part(version: int) -> Part:
    return Part("sha256:" + "0" * 64, 0, 1, pa.table({"shots": [1], "fusion": ["vote"], "x": [version]}))


WRITERS = {
    # Every function that calls `whole` or `whole_folder`, with arguments to write a version of something.
    "pipeline.annotations.masks_out:_save": lambda write, path, version: write(Image.new("L", (64, 64), version), path),
    "pipeline.annotations.streams:__init__": lambda write, path, version: whole_file(path, version),
    "pipeline.bank.folder:_new_folder": lambda write, path, version: write(
        path, lambda folder: (folder / "x").write_text(text(version))
    ),
    "pipeline.bank.folder:_write": lambda write, path, version: write(
        path.parent, {path.name: text(version).encode()}, Item("a.jpg", "photo.jpg", 1, 1)
    ),
    "pipeline.bank.reading:save_levels": lambda write, path, version: write(path, [torch.full((99, 99), version)]),
    "pipeline.common.files:replace_text": lambda write, path, version: write(path, text(version)),
    "pipeline.common.files:write_table": lambda write, path, version: write(path, pa.table({"x": [version]})),
    "pipeline.evaluate.parts:write_part": lambda write, path, version: write(path, part(version)),
    "pipeline.evaluate.parts:write_rows": lambda write, path, version: write(
        path, iter([part(version).place]), part(version).place.schema
    ),
    "pipeline.features.convert:_write": lambda write, path, version: write(path, text(version).encode()),
    "pipeline.heads.checkpoint:write_tensors": lambda write, path, version: write(
        path, {"x": torch.full((9999,), version)}, {}
    ),
    "pipeline.predict.writing:_save": lambda write, path, version: write(Image.new("L", (64, 64), version), path),
    "pipeline.prepare:_write_mask": lambda write, path, version: write(path, np.full((64, 64), version, np.uint8)),
    "pipeline.report.stage:_write": lambda write, path, version: write(path, text(version)),
    "pipeline.store.skeleton:write_vector": lambda write, path, version: write(
        path.parent, path.name, np.arange(9 + version), "numbers"
    ),
    "pipeline.store.summary:write_summary": lambda write, path, version: write(path, np.full(9999, version, np.uint8)),
    "pipeline.store.export:export_sample": lambda write, path, version: write(fill(path.parent / "s.zarr", 1), path),
    "pipeline.store.skeleton:build_skeleton": lambda write, path, version: write(path, RECIPE, INDEX, 4, None),
    "pipeline.store.shard_file:write_shard_file": lambda write, path, version: write(
        path, np.full((2, 64, 64), version, np.uint8), 4, None
    ),
}
THINGS = {
    # Of the product, each the file of its name.
    "config.json": lambda path, version: run_dir(path),
    "resume.safetensors": save_run,
    "last.safetensors": save_run,
    "manifest.parquet": lambda path, version: manifest_file.write(path, drawing.make(INDEX, 0, version)),
    "_done/000002.json": lambda path, version: fill(path.parents[1], version),
    "zarr.json": change_facts,
}
OVER_NOTHING = ("_new_folder", "write_vector", "export_sample", "build_skeleton", "_done/000002.json")
"""Nothing is there before them: folders, and a marker, which goes before its shard is written anew."""
OVER_OLDER = ("zarr.json",)
"""Only what is there is changed."""
CASES = [
    (name, there)
    for name in (*WRITERS, *THINGS)
    for there in ("nothing", "an older one")
    if not name.endswith(OVER_NOTHING if there == "an older one" else OVER_OLDER)
]


def write(name: str, folder: Path, version: int) -> Path:
    """Write a version of something; its path."""
    path = folder / (name if name in THINGS else "written.png")
    folder.mkdir(exist_ok=True)
    if name in THINGS:
        THINGS[name](path, version)
    else:
        module, _, function = name.partition(":")
        WRITERS[name](getattr(importlib.import_module(module), function), path, version)
    return path


def files(folder: Path) -> dict[str, bytes]:
    """All that counts in a folder."""
    found = [(str(path.relative_to(folder)), path) for path in folder.rglob("*") if path.is_file()]
    return {name: path.read_bytes() for name, path in found if PARTIAL not in name}


def in_a_process(action) -> int:
    """Do something in a fork of this process, which has no threads; its exit status."""
    child = os.fork()
    if not child:
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying(target: Path) -> None:
    """Kill this process when it is about to give a file or a folder its name."""
    replace = os.replace

    def killed(source, path) -> None:
        if Path(path) == target:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, path)

    os.replace = killed


def play(folder: Path) -> None:
    """Kill every writer, of each a process of its own; prints the exit status of each."""
    statuses = {}
    for number, (name, there) in enumerate(CASES):
        own = folder / str(number)
        path = own / (name if name in THINGS else "written.png")
        if there == "an older one":
            assert in_a_process(lambda name=name, own=own: write(name, own, 1)) == 0

        def killed(name: str = name, own: Path = own, path: Path = path) -> None:
            dying(path)
            write(name, own, 2)

        statuses[number] = in_a_process(killed)
    print(json.dumps(statuses))


@pytest.fixture(scope="module")
def killed(tmp_path_factory) -> tuple[Path, dict[str, int]]:
    """Folder in which every writer was killed; exit statuses."""
    folder = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, __file__, folder], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    return folder, json.loads(done.stdout)


@pytest.mark.parametrize("case", CASES, ids=" over ".join)
def test_a_writer_killed_before_the_rename_leaves_what_was_there_and_the_next_one_clears_up(killed, case, tmp_path):
    name, there = case
    folder, statuses = killed
    number = str(CASES.index(case))
    assert statuses[number] == -signal.SIGKILL
    path = folder / number / (name if name in THINGS else "written.png")
    assert path.with_name(f".{path.name}{PARTIAL}").exists(), "it was killed before it had written"
    write(name, tmp_path / "old", 1)
    write(name, tmp_path / "new", 2)
    relative = path.relative_to(folder / number)
    assert path.exists() == (there != "nothing")
    if there != "nothing":
        assert path.read_bytes() == (tmp_path / "old" / relative).read_bytes()
    write(name, folder / number, 2)
    assert not list((folder / number).rglob(f"*{PARTIAL}"))
    assert files(folder / number) == files(tmp_path / "new")


def functions_that_call(names: set[str]) -> Iterator[str]:
    """module:function for every function of the product in which one of some names is called."""
    for file in sorted(
        path for room in ("hsnet", "pipeline", "cluster", "commands") for path in (ROOT / room).rglob("*.py")
    ):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef):
                calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
                if names & {ast.unparse(call) for call in calls}:
                    yield f"{'.'.join(file.relative_to(ROOT).with_suffix('').parts)}:{function.name}"


def test_every_writer_of_the_product_is_killed_here():
    assert set(functions_that_call({"whole", "whole_folder"})) == set(WRITERS)


def test_nothing_else_is_written_under_another_name():
    others = {name.partition(":")[0] for name in functions_that_call({"os.replace", "os.rename"})}
    # The cache of a bucket sweeps its own folder; restored metadata was made whole before it is moved; a bank's photo
    # that is removed is first moved out of sight.
    assert others <= {
        "pipeline.bank.folder",
        "pipeline.common.files",
        "pipeline.store.mirror",
        "pipeline.store.mirror_metadata",
        "pipeline.store.restore",
    }


@pytest.mark.parametrize("there", [False, True])
def test_a_writer_that_fails_leaves_what_was_there_and_nothing_else(tmp_path, there):
    path = tmp_path / "a.txt"
    if there:
        path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole(path) as partial:
        partial.write_text(str(1 / 0))
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "b") as partial:
        partial.mkdir(mode=1 // 0)
    assert files(tmp_path) == ({"a.txt": b"old"} if there else {})
    assert len(list(tmp_path.iterdir())) == there


def no_locks(descriptor, how):
    raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))


@pytest.mark.parametrize("locks", [True, False])
def test_two_living_writers_do_not_meet_also_where_the_file_system_has_no_locks(tmp_path, monkeypatch, locks):
    if not locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    path = tmp_path / "a.txt"
    with whole(path) as first, whole(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first", "the last rename counts"
    with whole_folder(tmp_path / "b") as first:
        with whole_folder(tmp_path / "b") as second:
            second.mkdir()
            (second / "c").touch()
        first.mkdir()
        (first / "d").touch()
        (tmp_path / "b" / "c").unlink()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"a.txt", "b", "b/d"}


@pytest.mark.parametrize("writer", [whole, whole_folder])
def test_contents_are_on_disk_before_the_name_and_the_name_before_it_ends(tmp_path, monkeypatch, writer):
    path = tmp_path / "a"
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda it: (events.append(os.readlink(f"/proc/self/fd/{it}")), fsync(it)))
    monkeypatch.setattr(os, "replace", lambda *names: (events.append("renamed"), replace(*names)))
    with writer(path) as partial:
        if writer is whole_folder:
            partial.mkdir()
        file = partial / "file" if writer is whole_folder else partial
        file.write_text("text")
    inside = [str(file), str(partial)] if writer is whole_folder else [str(partial)]
    assert events == [*inside, "renamed", str(tmp_path)]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("precious")
    (tmp_path / f".a.parquet{PARTIAL}").symlink_to(precious)
    with pytest.raises(DataError, match=r"Cannot write .*a\.parquet"):
        write_table(tmp_path / "a.parquet", pa.table({"x": [1]}))
    assert precious.read_text() == "precious"


def test_what_killed_writers_left_is_cleared_and_a_living_writer_is_not(tmp_path):
    from pipeline.common.files import clear_partials, whole

    (tmp_path / ".last.safetensors.partial").write_bytes(b"cut off")
    (tmp_path / "kept.txt").touch()
    with whole(tmp_path / "best.txt") as partial:
        partial.write_text("half")
        clear_partials(tmp_path)
        assert partial.exists()
        assert sorted(path.name for path in tmp_path.iterdir()) == sorted([partial.name, "kept.txt"])
    assert (tmp_path / "best.txt").read_text() == "half"


if __name__ == "__main__":
    play(Path(sys.argv[1]))
