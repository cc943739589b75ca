"""What it takes to bring features to a device: parts `copies`, `files`, `codec` and `prefetch`."""

from __future__ import annotations

import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import shard
from benchmarks.gpu.measuring import Bench, Row, attempt
from benchmarks.gpu.ways import BFLOAT16, PICTURES, OurWay, Scene, Variant, Work
from hsnet.backbone import backbone_spec

FILE_IMAGES = 64
"""Images of the file that is read: 640 MB of ResNet-50's int8."""
NEEDS_CUDA = {"failed": "needs CUDA"}


def shapes(bench: Bench) -> list[tuple[int, int, int, int]]:
    """(L, H, W, C) of every level of an image, finest first."""
    spec = backbone_spec(bench.backbone)
    return [spec.level_shape(level, (bench.options.size, bench.options.size)) for level in range(spec.levels)]


def copies(bench: Bench) -> Iterator[dict[str, Any]]:
    """Host to device: one image's int8 features, and a training batch's, from pageable and from pinned memory."""
    per_image = sum(torch.Size(shape).numel() for shape in shapes(bench))
    batch = 2 * max(bench.options.train_batch)
    for images in (1, batch):
        nbytes = images * per_image
        title = f"host to device, {images} images, {nbytes / 1e6:.1f} MB"
        yield bench.measurement(f"copies{images}", title, _copied(bench, nbytes), bytes=nbytes)


def _copied(bench: Bench, nbytes: int) -> dict[str, Row]:
    pageable = torch.randint(-127, 128, (nbytes,), dtype=torch.int8)
    target = torch.empty(nbytes, dtype=torch.int8, device=bench.device)
    runs: dict[str, Callable[[], object]] = {
        "pageable": lambda: target.copy_(pageable),
        "pageable, new memory on the device": lambda: pageable.to(bench.device, copy=True),
    }
    if bench.cuda:
        pinned, stream = pageable.pin_memory(), torch.cuda.Stream(bench.device)

        def beside() -> None:
            with torch.cuda.stream(stream):
                target.copy_(pinned, non_blocking=True)

        def staged() -> None:
            pinned.copy_(pageable)
            target.copy_(pinned, non_blocking=True)

        runs |= {
            "pinned": lambda: target.copy_(pinned, non_blocking=True),
            "pinned, on a stream of its own": beside,
            "pageable to pinned to device": staged,
        }
    rows = bench.rows(runs, lambda _, seconds: nbytes / seconds / 1e9, "GB/s")
    return rows if bench.cuda else rows | {"pinned": NEEDS_CUDA}


def files(bench: Bench) -> Iterator[dict[str, Any]]:
    """From a store file in the page cache into memory that is there: our own small file, and the project's store."""
    images = min(FILE_IMAGES, bench.options.images)
    with tempfile.TemporaryDirectory(prefix="gpu-bench-", dir=bench.options.scratch) as folder:
        reader = make_file(bench, Path(folder), images)
        batch = [number % images for number in range(2 * max(bench.options.train_batch))]
        out = reader.empty(len(batch))

        def in_threads(threads: int) -> Callable[[], None]:
            def run() -> None:
                with ThreadPoolExecutor(threads) as pool:
                    for done in [pool.submit(reader.read, image, out, row) for row, image in enumerate(batch)]:
                        done.result()

            return run

        runs: dict[str, Callable[[], object]] = {
            "own file, no checksum": lambda: reader.batch(batch, out, checked=False),
            "own file, CRC-32": lambda: reader.batch(batch, out),
            "own file, CRC-32, 2 threads": in_threads(2),
            "own file, CRC-32, 4 threads": in_threads(4),
        }
        if bench.cuda:
            pinned = reader.empty(len(batch), pinned=True)
            runs["own file, CRC-32, into pinned memory"] = lambda: reader.batch(batch, pinned)
            runs["own file, CRC-32, to the device"] = lambda: [
                level.to(bench.device) for level in (reader.batch(batch, out), out)[1]
            ]
        store, reason = attempt(lambda: _project_store(bench, Path(folder), images))
        if store is not None:
            runs["project's store, crc32c"] = lambda: store(batch)
        rows = bench.rows(runs, lambda _, seconds: 1e3 * seconds / len(batch), "ms/image")
        if store is None:
            rows["project's store, crc32c"] = {"failed": f"left out: {reason}"}
        title = f"{len(batch)} images of {reader.nbytes / 1e6:.1f} MB from files in the page cache"
        yield bench.measurement("files", title, rows, bytes_per_image=reader.nbytes, images=images)


def make_file(bench: Bench, folder: Path, images: int) -> shard.Reader:
    """A file of noise in the shapes of the backbone's levels, read once."""
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator) for shape in shapes(bench)]
    path = folder / "features.bin"
    shard.write(path, ([level.roll(image, 0) for level in noise] for image in range(images)))
    reader = shard.Reader(path, shapes(bench))
    reader.batch(range(images), [level.expand(images, *level.shape[1:]) for level in reader.empty(1)])
    return reader


def _project_store(bench: Bench, folder: Path, images: int) -> Callable[[Sequence[int]], object]:
    """The same amount in a feature store. Raises ImportError where zarr is not installed."""
    from benchmarks.store import make_store
    from pipeline.features.recipe import Recipe

    recipe = Recipe.of(bench.backbone, "sha256:" + "0" * 64, bench.options.size, "int8")
    return make_store(folder / "features.zarr", recipe, images).features


def codec(bench: Bench) -> Iterator[dict[str, Any]]:
    """The budgeted codec's decoding on the device, and whether it gives what the host's gives."""
    from pipeline.features.budgeted import fit_layers, unit_vectors  # torch and numpy alone

    options = bench.options
    scene = Scene.make(bench.backbone, options.size, options.object_share, bench.device)
    some, channels = options.codec_images, options.codec_channels
    levels = [level[:some, ..., :channels].float().cpu() for level in scene.features[False]]
    rows = torch.Generator().manual_seed(0)
    samples = [
        [_some(unit_vectors(level[:, layer]), options.codec_positions, rows) for layer in range(level.shape[1])]
        for level in levels
    ]
    positions = [level.shape[2] * level.shape[3] for level in levels]
    whole = sum(level[0].numel() for level in levels)
    budget = min(options.codec_bytes, whole // 4)
    fitted = fit_layers(samples, positions, budget)
    codes = [torch.from_numpy(level) for level in fitted.encode(levels)]
    many = 2 * max(options.train_batch)
    here = [level.repeat(-(-many // some), 1, 1, 1, 1)[:many].to(bench.device) for level in codes]
    moved = fitted.on(bench.device)
    host = fitted.decode(codes)
    diff = max(
        float((mine.cpu() - theirs).abs().max())
        for mine, theirs in zip(moved.decode([level.to(bench.device) for level in codes]), host, strict=True)
    )
    stored = sum(level[0].numel() for level in codes)
    table = bench.rows(
        {
            "decoding a batch on the device": lambda: moved.decode(here),
            "int8 of the same batch to float32": lambda: [level[:many].float() for level in scene.features[False]],
        }
    )
    table["largest difference from the host's decoding"] = {"value": diff, "unit": "(unit vectors)"}
    title = f"budgeted codec, {many} images of {stored / 1e6:.2f} MB"
    yield bench.measurement("codec", title, table, bytes_per_image=stored, uncoded_bytes_per_image=whole)


def _some(vectors: Tensor, count: int, generator: torch.Generator) -> Tensor:
    return vectors[torch.randperm(len(vectors), generator=generator)[:count]]


# ------------------------------------------------------------------------------------------------------ prefetch


class Feeder:
    """Batches from a file to the device: read on a thread, staged in pinned memory, copied on a stream of its own.

    Two staging buffers: one is filled while the other is copied, and none is filled again before its copy is done.
    """

    def __init__(self, reader: shard.Reader, batch: int, device: torch.device, pinned: bool) -> None:
        self.reader, self.device, self.pinned = reader, device, pinned
        self.staging = [reader.empty(batch, pinned) for _ in range(2)]
        self.copied = [torch.cuda.Event() for _ in range(2)] if pinned else []
        self.stream = torch.cuda.Stream(device) if pinned else None
        self.number = 0

    def load(self) -> tuple[list[Tensor], Any]:
        """The next batch and what is to be waited for before it is used."""
        slot, self.number = self.number % 2, self.number + 1
        staging, many = self.staging[slot], len(self.staging[slot][0])
        if self.pinned:
            self.copied[slot].synchronize()
        self.reader.batch([(self.number * many + row) % len(self.reader) for row in range(many)], staging)
        if self.stream is None:
            return [level.to(self.device, copy=True) for level in staging], None
        with torch.cuda.stream(self.stream):
            levels = [level.to(self.device, non_blocking=True) for level in staging]
            self.copied[slot].record(self.stream)
        return levels, self.copied[slot]

    def ahead(self, batches: int) -> Iterator[list[Tensor]]:
        """So many batches, read on a thread while the one before is used."""
        ready: queue.Queue[Any] = queue.Queue(maxsize=1)

        def work() -> None:
            try:
                if self.pinned:
                    torch.cuda.set_device(self.device)  # a new thread is on GPU 0
                for _ in range(batches):
                    ready.put(self.load())
            except Exception as error:  # raised where the batch is wanted
                ready.put(error)

        thread = threading.Thread(target=work, name="bench-read", daemon=True)
        thread.start()
        for _ in range(batches):
            found = ready.get()
            if isinstance(found, Exception):
                raise found
            levels, event = found
            if event is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(event)
                for level in levels:
                    level.record_stream(current)
            yield levels
        thread.join()


def prefetch(bench: Bench) -> Iterator[dict[str, Any]]:
    """Training steps fed from a file: in line, ahead on a thread, ahead through pinned memory; and not fed at all."""
    options = bench.options
    batch, steps = max(options.train_batch), options.steps
    scene = Scene.make(bench.backbone, options.size, options.object_share, bench.device)
    way = OurWay(scene, Work("", "train", batch), Variant("", BFLOAT16))
    rows = way.supports.flatten()

    def step(levels: Sequence[Tensor]) -> None:
        query, support = [level[:batch] for level in levels], [level[batch:] for level in levels]
        with way.mode.on():
            way.learn(lambda: way.forward(query, support, scene.masks[rows]))

    with tempfile.TemporaryDirectory(prefix="gpu-bench-", dir=options.scratch) as folder:
        reader = make_file(bench, Path(folder), min(FILE_IMAGES, options.images))
        pick = [number % PICTURES for number in range(2 * batch)]
        kept = [level[pick] for level in scene.features[True]]
        pageable = Feeder(reader, 2 * batch, bench.device, pinned=False)
        runs: dict[str, Callable[[], object]] = {
            "not fed: one batch in device memory": lambda: [step(kept) for _ in range(steps)],
            "read in line": lambda: [step(pageable.load()[0]) for _ in range(steps)],
            "read ahead, pageable": lambda: [step(levels) for levels in pageable.ahead(steps)],
        }
        if bench.cuda:
            pinned = Feeder(reader, 2 * batch, bench.device, pinned=True)
            runs["read ahead, pinned, stream of its own"] = lambda: [step(levels) for levels in pinned.ahead(steps)]
        found: dict[str, Row] = bench.rows(
            runs, lambda _, seconds: 1e3 * seconds / steps, "ms/step", min(5, options.repeats)
        )
        if not bench.cuda:
            found["read ahead, pinned, stream of its own"] = NEEDS_CUDA
        for row in [one for one in found.values() if "value" in one]:
            row["episodes_per_s"] = 1e3 * batch / row["value"]
        title = f"training from a file, batch {batch}, bfloat16, {reader.nbytes / 1e6:.1f} MB an image"
        yield bench.measurement("prefetch", title, found, batch=batch, bytes_per_image=reader.nbytes)
