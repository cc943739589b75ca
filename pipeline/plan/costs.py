"""What a data set will take: bytes of its store, seconds of every stage, what fits into memory, and whether it pays.

Bytes follow from the shapes. Seconds are measured: a few of the data set's own photos go through what extraction,
training and evaluation do, on the device that is asked about.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from hsnet.errors import ConfigError, DataError
from hsnet.fused import FusedHSNet
from hsnet.loss import episode_losses
from hsnet.model import HSNet
from pipeline.common.runner import one_torch_thread
from pipeline.datasets import Dataset
from pipeline.datasets.images import resize_label
from pipeline.features.backbones import Reading, new_recipe, open_backbone
from pipeline.features.budgeted import TransformCodec, fit_layers, unit_vectors
from pipeline.features.fitting import nominal_recipe
from pipeline.features.forward import PhotoNetwork
from pipeline.features.precision import encode
from pipeline.features.recipe import Recipe
from pipeline.features.weights import Weights
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.loading.batch import EpisodeBatch
from pipeline.loading.resident import SHARE, free_on
from pipeline.store.arrays import image_nbytes

STEP_EPISODES = 20
"""Episodes of the training step that is told; `_TRAINED_AT_ONCE` of them are measured."""
_TRAINED_AT_ONCE = 2
RUN_STEPS = 10_000
"""Steps of the training run that a store is weighed against."""


@dataclass(frozen=True)
class BreakEven:
    """A store against the backbone on the fly, each on one worker, no features kept in memory."""

    fly_seconds: float
    """Per photo that an episode needs: read it and run the backbone."""
    stored_seconds: float
    """Per photo that an episode needs: read its features."""
    uses: float | None
    """Photos needed by episodes until extraction has paid; None: it never does."""
    runs: float | None
    """The same in training runs of `RUN_STEPS` steps of `STEP_EPISODES` one-shot episodes, two photos each."""
    seconds: float | None
    """The same in time of training on the fly."""


@dataclass(frozen=True)
class Costs:
    """What a store takes to make, hold and use. Seconds are of this machine as busy as it was."""

    images: int
    bytes_per_image: int
    """Upper bound: label maps count as if they did not compress."""
    bytes: int
    disk_free: int
    memory_free: int
    """That may be filled, of this machine."""
    device_free: int | None
    """The same of the GPU asked about, beside what training takes; None on a CPU."""
    measured_images: int
    seconds_per_image: dict[str, float]
    """Parts of extraction on one worker: read (decode and resize), backbone, encode, write."""
    workers: int
    extract_seconds: float
    """Extraction by so many workers, if each has a core or a GPU of its own."""
    train_seconds_per_step: float
    """A step of `STEP_EPISODES` one-shot episodes, features in memory."""
    evaluate_seconds_per_episode: float
    """One-shot, on one worker, features in memory."""
    load_seconds_per_image: float
    """Reading a photo's features back from that disk, which was asked to forget them first; from memory it is less."""

    @property
    def break_even(self) -> BreakEven:
        """When extracting once has cost less than running the backbone whenever a photo is needed."""
        seconds = self.seconds_per_image
        fly, stored = seconds["read"] + seconds["backbone"], self.load_seconds_per_image
        per_step = 2 * STEP_EPISODES
        uses = self.images * sum(seconds.values()) / (fly - stored) if fly > stored else None
        return BreakEven(
            fly_seconds=fly,
            stored_seconds=stored,
            uses=uses,
            runs=None if uses is None else uses / (per_step * RUN_STEPS),
            seconds=None if uses is None else uses / per_step * (self.train_seconds_per_step + per_step * fly),
        )

    @property
    def fits(self) -> dict[str, bool]:
        """Whether the whole store fits: disk, memory and device."""
        rooms = {"disk": self.disk_free, "memory": self.memory_free}
        if self.device_free is not None:
            rooms["device"] = self.device_free
        return {place: self.bytes <= room for place, room in rooms.items()}


def measure_costs(
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
    reading: Reading = Reading(),  # noqa: B008  (frozen)
) -> Costs:
    """Measure `sample` photos of the data set and say what all of them will take.

    Args:
        precision: of the store.
        bytes_per_image: instead of it, the budgeted codec, fitted here to the photos measured: good enough to time it.
        folder: where the store would lie; for free space and the rate of writing. Nothing stays there.
        workers: of extraction and evaluation; 0 is this process.
        reading: layers and arithmetic of a network of timm's.

    Raises:
        ConfigError: no photo of the sample can be read, the image size does not suit the backbone, or the budget
            cannot work.
    """
    recipe = new_recipe(weights.backbone, weights, image_size, precision, reading)
    recipe.require_trainable()
    index = dataset.index
    nbytes = image_nbytes(nominal_recipe(recipe, bytes_per_image) if bytes_per_image is not None else recipe, index)
    network = PhotoNetwork(open_backbone(recipe, weights), image_size, device)
    with one_torch_thread():
        calibration = _Calibration(recipe, bytes_per_image)
        seconds = calibration.extract(dataset, network, folder, device, sample)
        evaluate = _seconds(calibration.evaluation(), device)
    train = _seconds(calibration.training(), device) * STEP_EPISODES / _TRAINED_AT_ONCE
    images = len(index.images)
    alone = sum(seconds.values())
    return Costs(
        images=images,
        bytes_per_image=nbytes,
        bytes=images * nbytes,
        disk_free=shutil.disk_usage(folder).free,
        memory_free=int(SHARE * free_on("cpu")),
        device_free=int(SHARE * free_on(device)) if device.startswith("cuda") else None,
        measured_images=len(calibration.masks),
        seconds_per_image=seconds,
        workers=workers,
        extract_seconds=images * alone / max(1, workers),
        train_seconds_per_step=train,
        evaluate_seconds_per_episode=evaluate,
        load_seconds_per_image=calibration.load_seconds,
    )


class _Calibration:
    """A few photos: timed through extraction, and kept as it stores them to time an evaluation and a training step."""

    def __init__(self, recipe: Recipe, bytes_per_image: int | None) -> None:
        self.recipe, self.budget = recipe, bytes_per_image
        self.codec: TransformCodec | None = None
        self.levels: list[Tensor] = []
        """Levels as they are stored, of the photos that could be read."""
        self.masks: Tensor
        self.load_seconds = 0.0
        """Reading a photo's levels back from the disk."""

    def extract(
        self, dataset: Dataset, network: PhotoNetwork, folder: Path, device: str, sample: int
    ) -> dict[str, float]:
        """Seconds per photo of each part."""
        count, side = len(dataset.index.images), (network.image_size, network.image_size)
        chosen = sorted({count * number // sample for number in range(sample)})
        clock = {"read": 0.0, "backbone": 0.0, "encode": 0.0, "write": 0.0}
        encoded: list[list[Tensor]] = []
        masks = []
        with tempfile.TemporaryFile(dir=folder) as file:
            for turn, image in enumerate([chosen[0], *chosen]):  # the first one twice: once to warm up
                start = time.perf_counter()
                try:
                    pixels = network.pixels(dataset.image(image))
                    label = resize_label(dataset.label(image), side)
                except (DataError, OSError):
                    continue
                read = time.perf_counter()
                features = network.levels([pixels])
                _wait(device)
                computed = time.perf_counter()
                if self.budget is not None and self.codec is None:
                    self.codec = _fit(features, self.budget)
                    computed = time.perf_counter()
                codes = self.codec.encode(features) if self.codec else encode(features, self.recipe.precision)
                coded = time.perf_counter()
                for level in codes:
                    file.write(level.data)
                file.flush()
                os.fsync(file.fileno())
                written = time.perf_counter()
                if turn == 0:
                    continue
                spent = (read - start, computed - read, coded - computed, written - coded)
                clock = {name: value + more for (name, value), more in zip(clock.items(), spent, strict=True)}
                encoded.append([torch.from_numpy(level).to(device) for level in codes])
                masks.append(torch.from_numpy((label != 0) & (label != dataset.index.ignore_label)).to(device))
            if masks:
                self.load_seconds = _read_back(file) / (len(masks) + 1)
        if not masks:
            raise ConfigError(
                f"None of {len(chosen)} sample photos of {dataset.index.name} can be read: nothing to time."
            )
        self.levels = [torch.cat(level) for level in zip(*encoded, strict=True)]
        self.masks = torch.stack(masks)
        return {name: value / len(masks) for name, value in clock.items()}

    def evaluation(self) -> Callable[[], object]:
        segmenter = LearnedSegmenter(self._head())

        def run() -> object:
            batch = self._batch([0], [-1])
            return segmenter.answer(batch).count(batch)

        return run

    def training(self) -> Callable[[], object]:
        learner = FusedHSNet(self._head())
        optimiser = torch.optim.Adam(learner.parameters())
        queries = [number % len(self.masks) for number in range(_TRAINED_AT_ONCE)]

        def run() -> object:
            optimiser.zero_grad(set_to_none=True)
            batch = self._batch(queries, queries[::-1])
            logits = learner(batch.query, batch.support, batch.support_mask, batch.unit)
            episode_losses(logits, batch.target).mean().backward()
            return optimiser.step()

        return run

    def _batch(self, queries: list[int], supports: list[int]) -> EpisodeBatch:
        """One-shot episodes of these photos, decoded."""
        query, support = ([level[photos] for level in self.levels] for photos in (queries, supports))
        masks, unit = self.masks, self.codec is not None
        return EpisodeBatch(query, support, masks[supports], masks[queries], None, 1, unit, self.codec).to(masks.device)

    def _head(self) -> HSNet:
        return HSNet(**self.recipe.learner_arguments()).to(self.masks.device)


def _read_back(file: IO[bytes]) -> float:
    """Seconds to read a file that was synced, once the system has been asked to drop it from memory."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    start = time.perf_counter()
    file.seek(0)
    while file.read(1 << 20):
        pass
    return time.perf_counter() - start


def _fit(features: list[Tensor], nbytes: int) -> TransformCodec:
    samples = [[unit_vectors(layer.flatten(0, 1)).half().cpu() for layer in level[0]] for level in features]
    return fit_layers(samples, [level.shape[2] * level.shape[3] for level in features], nbytes)


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
