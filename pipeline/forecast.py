"""What a data set will take, told beforehand: bytes, seconds per stage, and what fits into memory.

Bytes follow from the shapes. Seconds come from a short calibration: a few of the data set's own photos go through what
extraction, training and evaluation do, on the device that is asked about.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from hsnet.backbone import FrozenBackbone, backbone_spec
from hsnet.errors import ConfigError, DataError
from hsnet.fused import FusedHSNet
from hsnet.loss import episode_losses
from hsnet.model import HSNet, predict_mask, resize_logits
from pipeline.codec import encode
from pipeline.datasets import Dataset
from pipeline.datasets.images import network_image, resize_label
from pipeline.recipe import Recipe
from pipeline.resident import SHARE, free_on
from pipeline.runner import one_torch_thread
from pipeline.store import image_nbytes
from pipeline.weights import Weights

BATCH = 20
"""Episodes of a training step that is spoken of."""
_TRAINED_AT_ONCE = 2


@dataclass(frozen=True)
class Forecast:
    """What a store takes to make, hold and use. Seconds are of this machine as busy as it was."""

    images: int
    bytes_per_image: int
    """At most: label maps count as if they did not compress."""
    bytes: int
    disk_free: int
    memory_free: int
    """That may be filled, of this machine."""
    device_free: int | None
    """The same of the GPU asked about, beside what training takes; None on a CPU."""
    measured_images: int
    seconds_per_image: dict[str, float]
    """Of extraction on one worker: read (decode and resize), backbone, encode, write."""
    workers: int
    extract_seconds: float
    """With so many workers, if each has a core or a GPU of its own."""
    train_seconds_per_step: float
    """A step of `BATCH` one-shot episodes, features in memory."""
    evaluate_seconds_per_episode: float
    """One-shot, on one worker, features in memory."""

    @property
    def fits(self) -> dict[str, bool]:
        """Where the whole store fits: disk, memory and device."""
        rooms = {"disk": self.disk_free, "memory": self.memory_free}
        if self.device_free is not None:
            rooms["device"] = self.device_free
        return {place: self.bytes <= room for place, room in rooms.items()}


def forecast(
    dataset: Dataset,
    weights: Weights,
    image_size: int,
    precision: str,
    bytes_per_image: int | None = None,
    *,
    folder: Path = Path(),
    workers: int = 0,
    device: str = "cpu",
    sample: int = 4,
) -> Forecast:
    """Measure `sample` photos of the data set and say what all of them will take.

    Args:
        precision: of the store; with `bytes_per_image` the budgeted codec, whose encoding is timed as int8's.
        folder: where the store would lie; for free space and the rate of writing. Nothing stays there.
        workers: of extraction and evaluation; 0 is this process.

    Raises:
        ConfigError: no photo of the sample can be read, or the image size does not suit the backbone.
    """
    recipe = Recipe.of(weights.backbone, weights.sha256, image_size, precision)
    recipe.require_trainable()
    index = dataset.index
    exact = image_nbytes(recipe, index)
    if bytes_per_image is not None:
        features = (
            sum(layers * rows * columns * channels for layers, rows, columns, channels in recipe.level_shapes())
            * recipe.dtype.itemsize
        )
        exact = exact - features + bytes_per_image
    backbone = FrozenBackbone(weights.backbone, weights.state_dict).to(device)
    with one_torch_thread():
        seconds, levels, masks = _extract(dataset, backbone, recipe, folder, device, sample)
        evaluate = _seconds(_evaluation(recipe, levels, masks, image_size), device)
    train = _seconds(_training(recipe, levels, masks, device), device) * BATCH / _TRAINED_AT_ONCE
    images = len(index.images)
    alone = sum(seconds.values())
    return Forecast(
        images=images,
        bytes_per_image=exact,
        bytes=images * exact,
        disk_free=shutil.disk_usage(folder).free,
        memory_free=int(SHARE * free_on("cpu")),
        device_free=int(SHARE * free_on(device)) if device.startswith("cuda") else None,
        measured_images=len(masks),
        seconds_per_image=seconds,
        workers=workers,
        extract_seconds=images * alone / max(1, workers),
        train_seconds_per_step=train,
        evaluate_seconds_per_episode=evaluate,
    )


def _extract(
    dataset: Dataset, backbone: FrozenBackbone, recipe: Recipe, folder: Path, device: str, sample: int
) -> tuple[dict[str, float], list[Tensor], Tensor]:
    """Seconds per image of each part, and the features and masks of the photos that could be read."""
    count, size = len(dataset.index.images), recipe.image_size
    chosen = sorted({count * place // sample for place in range(sample)})
    clock = {"read": 0.0, "backbone": 0.0, "encode": 0.0, "write": 0.0}
    encoded: list[list[Tensor]] = []
    masks = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for turn, image in enumerate([chosen[0], *chosen]):  # the first one twice: once to warm up
            start = time.perf_counter()
            try:
                photo = torch.from_numpy(network_image(dataset.image(image), size))
                label = resize_label(dataset.label(image), (size, size))
            except (DataError, OSError):
                continue
            read = time.perf_counter()
            features = backbone(photo[None].to(device))
            _wait(device)
            computed = time.perf_counter()
            codes = encode(features, recipe.precision)
            coded = time.perf_counter()
            for level in codes:
                file.write(level.data)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter()
            if turn == 0:
                continue
            for name, spent in zip(
                clock, (read - start, computed - read, coded - computed, written - coded), strict=True
            ):
                clock[name] += spent
            encoded.append([torch.from_numpy(level).to(device) for level in codes])
            masks.append(torch.from_numpy((label != 0) & (label != dataset.index.ignore_label)).to(device))
    if not masks:
        raise ConfigError(f"None of {len(chosen)} sample photos of {dataset.index.name} can be read: nothing to time.")
    levels = [torch.cat(level) for level in zip(*encoded, strict=True)]
    return {name: spent / len(masks) for name, spent in clock.items()}, levels, torch.stack(masks)


def _evaluation(recipe: Recipe, levels: list[Tensor], masks: Tensor, size: int) -> Callable[[], object]:
    learner = FusedHSNet(_learner(recipe, masks.device))
    query, support = [level[:1] for level in levels], [level[-1:] for level in levels]

    @torch.no_grad()
    def run() -> object:
        return predict_mask(resize_logits(learner(query, support, masks[-1:]), (size, size)))

    return run


def _training(recipe: Recipe, levels: list[Tensor], masks: Tensor, device: str) -> Callable[[], object]:
    learner = FusedHSNet(_learner(recipe, device))
    optimiser = torch.optim.Adam(learner.parameters())
    rows = torch.arange(_TRAINED_AT_ONCE) % len(masks)
    query, support = [level[rows] for level in levels], [level[rows.flip(0)] for level in levels]

    def run() -> object:
        optimiser.zero_grad(set_to_none=True)
        episode_losses(learner(query, support, masks[rows.flip(0)]), masks[rows]).mean().backward()
        return optimiser.step()

    return run


def _learner(recipe: Recipe, device: str | torch.device) -> HSNet:
    return HSNet(tuple(reversed(backbone_spec(recipe.backbone).layers))).to(device)


def _seconds(run: Callable[[], object], device: str) -> float:
    run()
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
