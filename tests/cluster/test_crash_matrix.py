"""Extraction on Ray, and everything that can die, fill up or go missing while it works or afterwards.

Each fault is a real one where that is possible: SIGKILL, a limit or a full file system of the kernel, permissions,
deleted and cut files. Afterwards the same command is run again, and then: the bytes are those of an undisturbed run,
and no file of a shard that was complete was touched, nor any of its photos read (`finish`).
"""

import ctypes
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import fakes
import pytest
from fakes import fingerprints, first_time, plain_user

from cluster.runner import RayRunner
from hsnet.errors import DataError, StoreError
from pipeline.common.lock import OWNER
from pipeline.extract.stage import ExtractSummary, extract
from pipeline.features.weights import Weights, load_weights
from pipeline.store.feature_store import FeatureStore
from pipeline.store.markers import marker_file, shard_file
from pipeline.store.restore import needs_restoring, restore_metadata

SIZE = 64
SHARD = 4
COUNT = 18  # five shards, the last one short
FAULT = 9  # the photo at which most faults happen
SHARD_OF_FAULT = FAULT // SHARD
ARRAYS = ("level0", "level1", "level2", "label")
Photos = partial(fakes.Photos, range(COUNT))


def harmed(fault: Callable[[], object], log: Path | None = None) -> fakes.Photos:
    """Photos that do something when the photo of the fault is read."""

    def seen(photo):
        fault()
        return photo

    return Photos(changes={FAULT: seen}, log=log)


def slow() -> fakes.Photos:
    """Slow enough for somebody to come between."""

    def wait(photo):
        time.sleep(0.2)
        return photo

    return Photos(changes=dict.fromkeys(range(COUNT), wait))


def fill_disk() -> None:
    """The disk of this process is full, once."""
    real = os.fsync

    def full(descriptor: int) -> None:
        os.fsync = real  # worker processes live on
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = full


def if_first(died: Path, fault: Callable[..., None], *arguments: object) -> None:
    """Do it unless a process did it before."""
    if first_time(died):
        fault(*arguments)


MOMENTS = (
    "before its write",
    "in its first array",
    "between its arrays",
    "before its marker",
    "in its marker",
    "after its marker",
)


def arm(moment: str) -> None:
    """This process kills itself at a moment of writing the shard of the fault."""
    if moment == MOMENTS[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    place, renamed = {
        "in its first array": ("level0", False),  # written beside its place, but not yet renamed
        "between its arrays": ("level1", True),
        "before its marker": ("label", True),
        "in its marker": ("_done", False),
        "after its marker": ("_done", True),
    }[moment]
    replace = os.replace

    def dying(source, target) -> None:
        parts = Path(target).parts
        hit = place in parts and {str(SHARD_OF_FAULT), f"{SHARD_OF_FAULT:06d}.json"} & set(parts)
        if not hit or renamed:
            replace(source, target)
        if hit:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = dying


@cache
def weights() -> Weights:
    """Read once: a user without rights may not be allowed to read the checkout."""
    return load_weights("squeezenet1_1")


def run(photos: fakes.Photos, path: Path | str, runner=None, **options) -> ExtractSummary:
    return extract(
        photos, weights(), path, image_size=SIZE, precision="int8", runner=runner, shard_images=SHARD, **options
    )


def missing_shards(path: Path) -> set[int]:
    """Shards that are not whole, each looked at."""
    store = FeatureStore.open(path, require_complete=False)
    store.check_markers()
    return set(store.missing_shards())


def complete_files(path: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file of the shards that are complete."""
    numbers = set(range(5)) - missing_shards(path)
    files = [shard_file(path, name, number) for name in ARRAYS for number in numbers]
    files += [marker_file(path, number) for number in numbers]
    return {str(file): (file.stat().st_ino, file.stat().st_mtime_ns) for file in files}


def finish(path: Path, quiet: Path, missing: set[int]) -> None:
    """Run again: only what is missing is made, and all bytes are right."""
    assert missing_shards(path) == missing
    before = complete_files(path)
    photos = Photos()
    summary = run(photos, path)
    assert (summary.written_shards, summary.reused_shards) == (len(missing), 5 - len(missing))
    assert sorted(photos.read) == [i for i in range(COUNT) if i // SHARD in missing]
    assert before.items() <= complete_files(path).items(), "a complete shard was touched"
    assert fingerprints(path) == fingerprints(quiet)


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> Path:
    """The store of an undisturbed run in this process."""
    path = tmp_path_factory.mktemp("quiet") / "s.zarr"
    run(Photos(), path)
    return path


@pytest.fixture
def whole(quiet, tmp_path) -> Path:
    """A complete store to do harm to."""
    return Path(shutil.copytree(quiet, tmp_path / "s.zarr"))


# -- nothing happens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_bytes_for_any_number_of_workers(ray_runner, quiet, tmp_path, workers):
    events = []
    summary = run(Photos(), tmp_path / "s.zarr", RayRunner(workers), on_event=events.append)
    assert fingerprints(tmp_path / "s.zarr") == fingerprints(quiet)
    assert (summary.written_shards, summary.images) == (5, COUNT)
    assert sorted(event.shard for event in events[1:]) == [0, 1, 2, 3, 4]


def test_a_relative_path_means_the_same_to_every_worker(ray_runner, quiet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run(Photos(), "s.zarr", ray_runner)
    assert fingerprints(tmp_path / "s.zarr") == fingerprints(quiet)


# -- a photo ---------------------------------------------------------------------------------------------------


def test_an_unreadable_photo_is_named_and_mended_later(ray_runner, quiet, tmp_path):
    with pytest.raises(DataError, match=r"'photos/9\.jpg'.*/data/photos/9\.jpg is truncated") as caught:
        run(Photos(broken=[FAULT]), tmp_path / "s.zarr", ray_runner)
    assert type(caught.value) is DataError
    run(Photos(), tmp_path / "s.zarr", ray_runner)
    assert fingerprints(tmp_path / "s.zarr") == fingerprints(quiet)


def test_an_unreadable_photo_is_left_out_alike_here_and_there(ray_runner, tmp_path):
    here = run(Photos(broken=[FAULT]), tmp_path / "here.zarr", on_error="skip")
    there = run(Photos(broken=[FAULT]), tmp_path / "there.zarr", ray_runner, on_error="skip")
    assert here.skipped == there.skipped == ("photos/9.jpg",)
    assert fingerprints(tmp_path / "here.zarr") == fingerprints(tmp_path / "there.zarr")


# -- a worker --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["between its arrays", "after its marker"])  # all six: below
def test_a_worker_killed_at_any_moment_of_a_shard_costs_nothing_but_time(ray_runner, quiet, tmp_path, moment):
    """Ray repeats its work in the same run: no second command is needed."""
    log, died = tmp_path / "log", tmp_path / "died"
    summary = run(harmed(partial(if_first, died, arm, moment), log), tmp_path / "s.zarr", ray_runner)
    assert died.exists()
    assert summary.written_shards == 5
    assert fingerprints(tmp_path / "s.zarr") == fingerprints(quiet)
    times = Counter(map(int, log.read_text().split()))
    once = {0, 1} | ({SHARD_OF_FAULT} if moment == "after its marker" else set())
    assert {times[i] for i in range(COUNT) if i // SHARD in once} == {1}
    assert times[FAULT] == (1 if moment == "after its marker" else 2)


def test_a_disk_that_is_full_for_a_worker(ray_runner, quiet, tmp_path):
    path = tmp_path / "s.zarr"
    with pytest.raises(StoreError, match=r"No space left on device.*Free some space") as caught:
        run(harmed(partial(if_first, tmp_path / "died", fill_disk)), path, ray_runner)
    assert type(caught.value) is StoreError
    left = missing_shards(path)
    assert left
    finish(path, quiet, left)


# -- the whole program -----------------------------------------------------------------------------------------

LOAD = f"""
import sys
sys.path += {[str(Path(module).parent) for module in (fakes.__file__, __file__)]!r}
import fakes, test_crash_matrix as crash
"""

PROGRAMS = """
import json, os, traceback
for line in sys.stdin:
    scene, *arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        try:
            getattr(crash, scene)(*arguments)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def program() -> Iterator:
    """Plays a scene, a function of this module, in a process of its own; its exit code. Torch is loaded once."""
    server = subprocess.Popen(
        [sys.executable, "-c", LOAD + PROGRAMS],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def play(scene, *arguments) -> int:
        server.stdin.write(json.dumps([scene.__name__, *map(str, arguments)]) + "\n")
        server.stdin.flush()
        return int(server.stdout.readline())

    yield play
    server.communicate()


def dies(moment: str, path: str) -> None:
    run(harmed(lambda: arm(moment)), path)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_program_killed_at_any_moment_of_a_shard_is_finished_by_running_again(program, quiet, tmp_path, moment):
    path = tmp_path / "s.zarr"
    assert program(dies, moment, path) == -signal.SIGKILL
    assert bool(list(path.rglob("*.partial"))) == (moment in ("in its first array", "in its marker"))
    missing = missing_shards(path)
    # Dying while photos are read, it may not have written the shard before.
    assert (SHARD_OF_FAULT in missing) == (moment != "after its marker")
    assert moment == MOMENTS[0] or missing == set(range(3 if moment == "after its marker" else 2, 5))
    finish(path, quiet, missing)


ON_RAY = """
from ray import cloudpickle
from cluster.session import session
for module in (fakes, crash):
    cloudpickle.register_pickle_by_value(module)
with session("local", num_cpus=2, num_gpus=0, object_store_bytes=100 << 20):
    crash.run(crash.slow(), sys.argv[1], crash.RayRunner(2))
"""


def start_on_ray(path: Path) -> subprocess.Popen:
    """An extraction with a Ray of its own, that has made a shard."""
    driver = subprocess.Popen(
        [sys.executable, "-c", LOAD + ON_RAY, str(path)],
        cwd=Path(__file__).parents[2],
        # How long Ray looks for a node that is gone before it ends the program: a minute else.
        env={**os.environ, "RAY_gcs_rpc_server_reconnect_timeout_s": "2"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 180  # Ray starts in 5 s, and in over a minute where other work keeps the machine busy
    while not list(path.glob("_done/*.json")):
        assert driver.poll() is None, "the driver ended before it was harmed"
        if time.monotonic() > deadline:
            driver.kill()
            driver.wait()
            pytest.fail("no shard after three minutes")
        time.sleep(0.05)
    return driver


def descendants(process: int) -> list[int]:
    """Processes that a process started, and theirs."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                parents[int(entry)] = int(Path("/proc", entry, "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it ended
    found, new = [], [process]
    while new := [child for child, parent in parents.items() if parent in new]:
        found += new
    return found


@pytest.mark.ray
def test_a_killed_driver_on_ray_is_finished_by_running_again(quiet, tmp_path):
    path = tmp_path / "s.zarr"
    driver = start_on_ray(path)
    try:
        with pytest.raises(StoreError, match=rf"process {driver.pid} on .*Nothing was changed"):
            run(Photos(), path)  # a second one while the first works
    finally:
        driver.kill()
        driver.wait()
    # Its workers follow it within seconds; until then one may still commit the shard it has in hand.
    left = missing_shards(path)
    assert left
    summary = run(Photos(), path)
    assert summary.written_shards <= len(left)
    assert fingerprints(path) == fingerprints(quiet)


@pytest.mark.ray
def test_a_killed_ray_node_ends_the_program_which_is_finished_by_running_again(quiet, tmp_path):
    """Raylet, head and workers all at once, as when a machine is reset; the program itself lives on."""
    path = tmp_path / "s.zarr"
    driver = start_on_ray(path)
    try:
        node = descendants(driver.pid)
        names = {Path("/proc", str(process), "comm").read_text().strip() for process in node}
        assert {"raylet", "gcs_server"} <= names
        for process in node:
            os.kill(process, signal.SIGKILL)
        assert driver.wait(timeout=60) != 0
    finally:
        driver.kill()
        driver.wait()
    left = missing_shards(path)
    assert left
    finish(path, quiet, left)


# -- the disk --------------------------------------------------------------------------------------------------


def cut_off(path: str) -> None:
    """The kernel refuses a file in the middle, with part of it written."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    with pytest.raises(StoreError, match=r"Shard \d of .*File too large.*run the same `hsnet extract` again"):
        run(harmed(limit), path)


def test_a_file_that_may_not_grow(program, quiet, tmp_path):
    path = tmp_path / "s.zarr"
    assert program(cut_off, path) == 0
    assert not list(path.rglob("*.partial"))
    missing = missing_shards(path)
    assert SHARD_OF_FAULT in missing
    finish(path, quiet, missing)


NEW_USER, NEW_MOUNTS, NO_RIGHTS = 0x10000000, 0x00020000, 77


def fills_up(mount: str, quiet: str) -> None:
    """A file system of 8 MB that something else fills while shard 2 is made."""
    libc, user, group = ctypes.CDLL(None), os.geteuid(), os.getegid()
    try:
        if libc.unshare(NEW_USER | NEW_MOUNTS):
            os._exit(NO_RIGHTS)
        for name, text in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path("/proc/self", name).write_text(text)
    except OSError:
        os._exit(NO_RIGHTS)
    if libc.mount(b"none", mount.encode(), b"tmpfs", 0, b"size=8m"):
        os._exit(NO_RIGHTS)
    path, ballast = Path(mount, "s.zarr"), Path(mount, "ballast")

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(4096))

    with pytest.raises(StoreError, match=r"Shard \d of .*No space left on device.*Free some space"):
        run(harmed(fill), path)
    left = missing_shards(path)
    assert SHARD_OF_FAULT in left
    before = fingerprints(path)
    with pytest.raises(StoreError, match=r"needs [\d,]+ bytes more .* are free there"):
        run(Photos(), path)
    assert fingerprints(path) == before
    ballast.unlink()
    finish(path, Path(quiet), left)


def test_a_disk_that_fills_up(program, quiet, tmp_path):
    if (code := program(fills_up, tmp_path, quiet)) == NO_RIGHTS:
        pytest.skip("this machine lets nobody mount a small file system of his own")
    assert code == 0


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """For a user without rights: the parents of tmp_path are closed to others."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)
        allow(Path(folder), 0o755)


def allow(path: Path, mode: int) -> None:
    for folder in (path, *path.rglob("*")):
        if folder.is_dir():
            folder.chmod(mode)


def test_a_folder_that_becomes_read_only(quiet, open_folder):
    path = open_folder / "s.zarr"
    text = r"Shard \d of .*Permission denied.*run the same `hsnet extract` again"
    with plain_user(), pytest.raises(StoreError, match=text):
        run(harmed(lambda: allow(path, 0o555)), path)
    before = fingerprints(path)
    with plain_user(), pytest.raises(StoreError, match="Permission denied"):
        run(Photos(), path)
    after = fingerprints(path)
    before.pop(OWNER), after.pop(OWNER)  # it could not be deleted either; the lock is not its existence
    assert after == before
    allow(path, 0o755)
    left = missing_shards(path)
    assert SHARD_OF_FAULT in left
    finish(path, quiet, left)


# -- afterwards ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("harm", "missing"),
    [
        (lambda path: shard_file(path, "level1", 3).unlink(), {3}),
        (lambda path: os.truncate(shard_file(path, "label", 3), 10), {3}),
        (lambda path: marker_file(path, 3).unlink(), {3}),
        (lambda path: os.truncate(marker_file(path, 3), 50), {3}),
        (lambda path: [shard_file(path, name, 4).unlink() for name in ARRAYS] + [marker_file(path, 4).unlink()], {4}),
        (lambda path: shutil.rmtree(path / "level2" / "c" / "1"), {1}),
        (lambda path: shutil.rmtree(path / "_done"), {0, 1, 2, 3, 4}),
    ],
    ids=["array file", "cut array file", "marker", "cut marker", "whole shard", "folder", "all markers"],
)
def test_what_is_deleted_is_made_again_and_nothing_else(whole, quiet, harm, missing):
    harm(whole)
    finish(whole, quiet, missing)


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: os.truncate(path / "zarr.json", 300),
        lambda path: (path / "zarr.json").write_text(""),
        lambda path: (path / "zarr.json").unlink(),
        lambda path: os.truncate(path / "level1" / "zarr.json", 100),
        lambda path: os.truncate(path / "index" / "c" / "0", 40),
        lambda path: [shutil.rmtree(path / "index"), (path / "label" / "zarr.json").unlink()],
    ],
    ids=["cut", "empty", "deleted", "of an array", "index", "several"],
)
def test_attributes_that_are_cut_are_refused_and_restored_without_extracting_again(whole, quiet, harm):
    harm(whole)
    before = fingerprints(whole)
    with pytest.raises(StoreError, match=re.escape(str(whole))):
        run(Photos(), whole)
    assert fingerprints(whole) == before
    assert needs_restoring(whole)
    recipe = FeatureStore.open(quiet).recipe
    for other in (Photos(), replace(recipe, image_size=96), replace(recipe, precision="float32")):
        if isinstance(other, fakes.Photos):
            other.index = replace(other.index, images=tuple(f"x/{i}.jpg" for i in range(COUNT)))
        wrong = (recipe, other.index) if isinstance(other, fakes.Photos) else (other, Photos().index)
        with pytest.raises(StoreError, match="Nothing was changed"):
            restore_metadata(whole, *wrong)
    assert fingerprints(whole) == before
    assert restore_metadata(whole, recipe, Photos().index)
    assert needs_restoring(whole) is None
    finish(whole, quiet, set())
