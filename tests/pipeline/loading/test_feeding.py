"""The order of operations of batches on their way to a device, with a device that is slow on purpose.

`Slow` does what it is given when it is waited for and no earlier, in the order of its streams: a copy made from memory
that was used again, or a batch looked at before its copy is there, shows as wrong values.
"""

from __future__ import annotations

import ctypes
import threading
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch

import pipeline.loading.feeding as feeding
import pipeline.store.buffers as buffers_module
from hsnet.errors import DataError
from pipeline.episodes.protocols import resolve
from pipeline.episodes.stream import EpisodeStream
from pipeline.evaluate.plan import EvaluationPlan
from pipeline.evaluate.stage import evaluate
from pipeline.extract.stage import extract
from pipeline.heads.catalogue import made
from pipeline.loading.batch import load_batch, prefetch
from pipeline.loading.feeding import UNFINISHED, Feed, feed
from pipeline.loading.source import RelistedSource, StoreSource, pin
from pipeline.packed import fit_packed
from pipeline.store.buffers import Buffers
from pipeline.store.feature_store import FeatureStore
from pipeline.train import fit

GARBAGE = 77


class Stream:
    """Work in order, done when somebody waits for it."""

    def __init__(self):
        self.work, self.lock = [], threading.RLock()

    def run(self, until=None):
        with self.lock:
            while self.work and (until is None or not until.reached):
                self.work.pop(0)()


class Mark:
    def __init__(self, stream, log, name):
        self.stream, self.log, self.name, self.reached = stream, log, name, False
        stream.work.append(self._reach)

    def _reach(self):
        self.reached = True

    def query(self):
        return self.reached

    def synchronize(self):
        self.log.append(("synchronize", self.name))
        self.stream.run(self)


class Slow:
    """A lane to a device in host memory, two streams of which do nothing by themselves."""

    def __init__(self):
        self.log, self.copies, self.computing = [], Stream(), Stream()
        self.local = threading.local()
        self.staged, self.used = [], []
        self.marks = 0

    def begin(self):
        self.log.append(("begin", threading.current_thread().name))

    @contextmanager
    def copying(self):
        self.local.side = True
        yield
        self.local.side = False

    def stage(self, tensor):
        assert self.local.side
        self.staged.append(tensor.data_ptr())
        return tensor

    def send(self, staged):
        assert self.local.side
        there = torch.full_like(staged, GARBAGE, memory_format=torch.contiguous_format)
        self.log.append(("copy", threading.current_thread().name))
        assert staged.is_contiguous()
        # By address: a device holds no reference to what it copies from.
        move = partial(ctypes.memmove, there.data_ptr(), staged.data_ptr(), staged.nbytes)
        self.copies.work.append(lambda: there is not None and move())
        return there

    def mark(self):
        side = getattr(self.local, "side", False)
        self.marks += 1
        self.log.append(("mark", "copied" if side else "used"))
        return Mark(self.copies if side else self.computing, self.log, "copied" if side else "used")

    def wait_for(self, mark):
        assert not getattr(self.local, "side", False)
        self.log.append(("wait", mark.name))
        mark.stream.run(mark)

    def use(self, tensor):
        assert not getattr(self.local, "side", False)
        self.used.append(tensor)


class Tray:
    """What is read for a batch: two tensors."""

    def __init__(self, tensors, log):
        self.tensors, self.log = tensors, log

    def moved(self, move):
        return Tray([move(tensor) for tensor in self.tensors], self.log)

    def made(self):
        self.log.append(("made", threading.current_thread().name))
        return [tensor.clone() for tensor in self.tensors]


@pytest.fixture
def store(tmp_path_factory, tiny_shapes, squeezenet):
    path = tmp_path_factory.mktemp("feeding") / "s.zarr"
    extract(tiny_shapes, squeezenet, path, image_size=64, precision="int8")
    return StoreSource(FeatureStore.open(path))


@pytest.fixture
def slow(monkeypatch):
    """Every device is a slow one, and page-locked memory is ordinary memory that is used again at once."""
    lanes = []
    monkeypatch.setattr(feeding, "lane_of", lambda device: lanes.append(Slow()) or lanes[-1])
    monkeypatch.setattr(
        feeding, "pin", lambda source: setattr(source.store, "memory", Buffers()) if hasattr(source, "store") else None
    )
    monkeypatch.setattr(buffers_module, "_SMALLEST", 0)
    return lanes


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_the_order_of_operations(depth):
    lane, main = Slow(), threading.current_thread().name

    def read(number, once):
        assert once
        assert lane.local.side, "what a source does on the device while it reads is the copy stream's"
        lane.log.append(("read", threading.current_thread().name))
        return Tray([torch.full((3,), number), torch.full((2,), -number)], lane.log)

    feed = Feed(read, range(6), lane, depth, 1)
    for number, (item, batch) in enumerate(feed):
        assert item == number
        assert [tensor.tolist() for tensor in batch] == [[number] * 3, [-number] * 2]
        lane.log.append(("computed", main))
    kinds = [kind if kind != "mark" else f"mark {name}" for kind, name in lane.log]
    reading = [kind for kind in kinds if kind in ("read", "copy", "mark copied")]
    assert reading == ["read", "copy", "copy", "mark copied"] * 6, "staged, copied, and then the event"
    using = [kind for kind in kinds if kind in ("wait", "made", "computed", "mark used")]
    assert using == ["wait", "made", "computed", "mark used"] * 6, "waited for before its first use"
    assert len(lane.used) == 12
    threads = {name for kind, name in lane.log if kind in ("read", "copy")}
    if depth == 0:
        assert threads == {main}
    else:
        assert kinds[0] == "begin", "before anything is read or locked"
        assert main not in threads
        assert {name for kind, name in lane.log if kind in ("wait", "made") and name != "copied"} == {main}


def test_memory_is_not_read_into_before_the_copy_from_it_is_done(monkeypatch):
    """Copies are done only when the consumer comes to them; four batches are read before that."""
    monkeypatch.setattr(buffers_module, "_SMALLEST", 0)
    memory, lane, held = Buffers(), Slow(), []

    def read(number, once):
        array = memory.empty((64,), np.int64)
        address = array.__array_interface__["data"][0]
        undone = {place for mark, places in held if not mark.reached for place in places}
        assert address not in undone
        array[:] = number
        return Tray([torch.from_numpy(array)], lane.log)

    before = Slow.mark

    def mark(self):
        made = before(self)
        if getattr(self.local, "side", False):
            held.append((made, [self.staged[-1]]))
        return made

    monkeypatch.setattr(Slow, "mark", mark)
    for number, (_, (batch,)) in enumerate(Feed(read, range(30), lane, 4, 2)):
        assert batch.tolist() == [number] * 64
    assert len(set(lane.staged)) <= 8, "and it is used again afterwards"


def test_the_consumer_is_not_far_ahead_of_the_device():
    lane = Slow()
    feed = Feed(lambda number, once: Tray([torch.tensor([number])], lane.log), range(8), lane, 2, 1)
    for number, _ in enumerate(feed):
        unfinished = sum("_reach" in getattr(one, "__name__", "") for one in lane.computing.work)
        assert unfinished == min(number, UNFINISHED)


def test_waiting_for_the_device_is_no_waiting_for_data(monkeypatch):
    clock, lane = [0.0], Slow()
    monkeypatch.setattr(feeding.time, "perf_counter", lambda: clock[0])
    before = Mark.synchronize

    def slowly(self):
        clock[0] += 100
        before(self)

    monkeypatch.setattr(Mark, "synchronize", slowly)

    def read(number, once):
        clock[0] += 1
        return Tray([torch.tensor([number])], lane.log)

    feed = Feed(read, range(6), lane, 0, 1)
    waited = []
    for _ in feed:
        waited.append(feed.waited)
    assert waited == [1.0] * 6
    assert clock[0] >= 300


@pytest.mark.parametrize("lane", [None, Slow])
def test_an_error_comes_at_its_item_and_closing_ends_the_threads(lane):
    lane = lane and lane()

    def read(number, once):
        if number == 2:
            raise DataError("bad 2")
        return Tray([torch.tensor([number])], [])

    feed = Feed(read, range(9), lane, 4, 2)
    assert [next(feed)[0], next(feed)[0]] == [0, 1]
    with pytest.raises(DataError, match="bad 2"):
        next(feed)
    feed = Feed(lambda number, once: Tray([torch.tensor([number])], []), range(99), lane, 4, 2)
    next(feed)
    feed.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]
    with pytest.raises(StopIteration):
        next(feed)
    if lane:
        assert not feed._held
        assert not lane.copies.work, "every copy from memory that is given back was waited for"


def test_batches_of_a_store_that_are_sent_are_those_that_are_not(store, slow):
    stream = EpisodeStream(store.index, 0, "trn", 2, 0)
    groups = [[stream[i], stream[i + 1], stream[i]] for i in range(8)]
    for group, (given, batch) in zip(groups, prefetch(store, iter(groups), 3, (2,), "cuda"), strict=True):
        plain = load_batch(StoreSource(FeatureStore.open(store.store.path)), group, (2,))
        assert given == group
        for name in ("query", "support"):
            for ours, theirs in zip(getattr(batch, name), getattr(plain, name), strict=True):
                assert torch.equal(ours, theirs)
        for name in ("support_mask", "target", "novel", "support_novel"):
            assert torch.equal(getattr(batch, name), getattr(plain, name))
    (lane,) = slow
    rows = sum(len(tensor) for tensor in lane.used if tensor.ndim == 5)
    assert rows == 3 * sum(len({image for one in group for image in one.photos}) for group in groups)
    assert {tensor.dtype for tensor in lane.used if tensor.ndim == 3} == {torch.uint8}


@pytest.mark.parametrize("resident", ["off", "device"])
def test_a_run_is_the_same(store, slow, tiny_config, tmp_path, monkeypatch, resident):
    """Training, validation, several heads in one process, and evaluation, sent and not sent."""
    config = tiny_config(recipe=store.recipe, steps=5, both_directions=True)
    sent = fit(config, store, tmp_path / "sent", resident=resident)
    packs = [config, tiny_config(recipe=store.recipe, steps=5, seed=1)]
    packed = fit_packed(packs, store, [tmp_path / "a", tmp_path / "b"], resident=resident)
    plan = EvaluationPlan(
        method=made("untrained", store), source=store, protocol=resolve(episodes=30, shots=(1, 2)), fold=0
    )
    rows = evaluate(plan).rows
    assert len(slow) >= 4
    assert all(lane.marks for lane in slow)
    monkeypatch.undo()
    plain = StoreSource(FeatureStore.open(store.store.path))
    alone = fit(config, plain, tmp_path / "plain")
    assert (sent.loss, sent.best_miou) == (alone.loss, alone.best_miou)
    assert [one.loss for one in packed] == [alone.loss, fit(packs[1], plain, tmp_path / "other").loss]
    expected = evaluate(EvaluationPlan(method=plan.method, source=plain, protocol=plan.protocol, fold=0)).rows
    assert rows.drop(["seconds"]).equals(expected.drop(["seconds"]))


def test_no_memory_is_locked_without_cuda(store, tiny_config, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("page-locked memory, or a stream, without a CUDA device")

    real = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: refuse() if k.get("pin_memory") else real(*a, **k))
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    monkeypatch.setattr(torch.cuda, "Stream", refuse)
    monkeypatch.setattr(torch.cuda, "set_device", refuse)
    memory = store.store.memory
    for resident in ("off", "device", "host"):
        fit(tiny_config(recipe=store.recipe, steps=2), store, tmp_path / resident, resident=resident)
    assert store.store.memory is memory
    assert not store.pinned
    assert feeding.lane_of("cpu") is None
    assert feeding.lane_of("mps") is None
    assert not torch.cuda.is_initialized()


def test_a_store_is_read_into_page_locked_memory_where_there_is_a_device(store, monkeypatch):
    asked = []
    real = torch.empty

    def empty(*shape, pin_memory=False, **others):
        if pin_memory:
            asked.append(shape)
        return real(*shape, **others)

    monkeypatch.setattr(buffers_module, "_SMALLEST", 0)
    expected = [*store.features([3, 1]), store.labels([3, 1])]
    monkeypatch.setattr(torch, "empty", empty)
    pin(RelistedSource(store, store.index))
    memory = store.store.memory
    for _ in range(3):
        found = [*store.features([3, 1]), store.labels([3, 1])]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        del found
    assert len(asked) == 4, "three levels and the labels, used again"
    pin(store)
    assert store.store.memory is memory, "once"


class Calls:
    """Stands for a stream, an event or a tensor of CUDA, and notes what is asked of it."""

    def __init__(self, log, name):
        self.log, self.name = log, name

    def __getattr__(self, what):
        return lambda *given, **named: self.log.append((self.name, what, *given, *named.items())) or self


def test_the_calls_to_cuda(monkeypatch):
    """What the real lane asks of torch, name by name: this machine may have no GPU to ask."""
    log, main, side = [], Calls([], "main"), Calls([], "side")
    main.log = side.log = log
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: ("inside", stream))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: log.append(("set_device", device)))
    lane = feeding.lane_of("cuda")
    assert lane.device == torch.device("cuda", 3)
    assert log == [("side", "wait_stream", main)]
    log.clear()
    lane.begin()
    assert lane.copying() == ("inside", side)
    assert lane.mark() is main
    lane.wait_for("an event")
    lane.use(Calls(log, "tensor"))
    lane.send(Calls(log, "host"))
    assert log == [
        ("set_device", torch.device("cuda", 3)),
        ("main", "record_event"),
        ("main", "wait_event", "an event"),
        ("tensor", "record_stream", main),
        ("host", "to", torch.device("cuda", 3), ("non_blocking", True)),
    ]

    class Host:
        is_cuda = False

        def __init__(self, pinned):
            self.pinned = pinned

        def is_pinned(self):
            return self.pinned

        def pin_memory(self):
            return "a page-locked copy"

    locked, plain = Host(True), Host(False)
    assert lane.stage(locked) is locked
    assert lane.stage(plain) == "a page-locked copy"
    plain.is_cuda = True
    assert lane.stage(plain) is plain
    assert feeding.lane_of("cuda:1").device == torch.device("cuda", 1)
    for name in ("record_event", "wait_event", "wait_stream"):
        assert callable(getattr(torch.Stream, name, None) or getattr(torch._C._CudaStreamBase, name, None)), name
    assert callable(torch.Tensor.record_stream)


def test_feeding_reads_by_as_many_threads_as_the_source_bears(store, monkeypatch):
    monkeypatch.setattr(feeding, "readers", lambda source: 3 if source is store else 1)
    together = threading.Barrier(3, timeout=10)

    def read(source, number, once):
        assert source is store
        assert not once
        if number < 3:
            together.wait()
        return Tray([torch.tensor([number])], [])

    assert [batch[0].item() for _, batch in feed(store, read, range(7), "cpu", 3)] == list(range(7))
