"""Fit the budgeted codec on a sample of photos, once, before extraction.

The sample is drawn from the training split, all folds together, and no label is looked at: one store serves every
fold, and what a fold holds out must not shape its features. Labels decide neither which directions are kept nor which
photos are drawn; a fold's novel classes do show in the photos, as they do in the published training lists.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from hsnet.errors import ConfigError, DataError
from pipeline.common.philox import philox
from pipeline.common.runner import one_torch_thread
from pipeline.datasets import Dataset
from pipeline.datasets.index import DatasetIndex
from pipeline.features.backbones import open_backbone
from pipeline.features.budgeted import TransformCodec, fit_layers, unit_vectors
from pipeline.features.forward import PhotoNetwork
from pipeline.features.precision import check_levels
from pipeline.features.recipe import CODED, UNKNOWN, Coding, Recipe
from pipeline.features.weights import Weights

POSITIONS = 16384
"""Feature vectors of each layer that are fitted on, at most: 470 MB in all for ResNet-50, 1.0 GB for ResNet-101."""

IMAGES = (128, 512)
"""Photos they come from: the first number, or as many as small grids need, up to the second."""

SEED = 0


@dataclass(frozen=True)
class Fitting:
    """The codec is about to be fitted on so many photos."""

    images: int


def sample_images(index: DatasetIndex, seed: int = SEED) -> list[int]:
    """Photos of the training split, every fold's, in the order in which a sample takes them."""
    listed = sorted({image for fold in index.folds for image, _ in index.split(fold, "trn").entries})
    order = np.argsort(philox(index.digest, "codec sample", seed).random_raw(len(listed)), kind="stable")
    return [listed[number] for number in order]


def sample_size(recipe: Recipe, index: DatasetIndex) -> int:
    """Number of photos that the codec of a data set is fitted on."""
    coarsest = min(shape[1] * shape[2] for shape in recipe.level_shapes())
    wanted = min(max(IMAGES[0], -(-POSITIONS // coarsest)), IMAGES[1])
    return min(wanted, len(sample_images(index)))


def fit_codec(
    dataset: Dataset, weights: Weights, recipe: Recipe, bytes_per_image: int, device: str = "cpu", skip: bool = False
) -> tuple[TransformCodec, Recipe]:
    """Run the backbone on a sample and fit the codec.

    Args:
        recipe: of the store in another precision; its network and image size are used.
        bytes_per_image: budget of an image's features. Label maps come on top.
        device: where the backbone runs.
        skip: leave out photos that cannot be read.

    Returns:
        The codec, and the recipe of features coded by it.

    Raises:
        ConfigError: the budget cannot work, or there is no training photo.
        DataError: a photo cannot be read.
    """
    count = sample_size(recipe, dataset.index)
    with one_torch_thread():  # the same sample gives the same fit on any number of cores
        samples, images = _sample(dataset, weights, recipe, count, device, skip)
        codec = fit_layers(samples, [shape[1] * shape[2] for shape in recipe.level_shapes()], bytes_per_image)
    coding = Coding(
        bytes_per_image=bytes_per_image,
        images=images,
        positions=max(len(level[0]) for level in samples),
        seed=SEED,
        fit=codec.digest,
        level_bytes=codec.level_bytes,
    )
    return codec, replace(recipe, precision=CODED, coding=coding)


def nominal_recipe(recipe: Recipe, bytes_per_image: int) -> Recipe:
    """A recipe that takes as many bytes as the fitted one will, before anything is fitted. Raises ConfigError."""
    shapes = recipe.level_shapes()
    layers = [count for count, *_ in shapes]
    least = sum(count * rows * columns for count, rows, columns, _ in shapes)
    values = sum(count * rows * columns * channels for count, rows, columns, channels in shapes)
    if not least <= bytes_per_image < values:
        raise ConfigError(
            f"{bytes_per_image:,} bytes per image cannot work for {recipe.backbone} at {recipe.image_size} px: one "
            f"byte per position and layer takes {least:,}, and int8 (--precision int8) takes {values:,}."
        )
    share = bytes_per_image / values
    level_bytes = tuple(max(n, int(n * shape[3] * share)) for n, shape in zip(layers, shapes, strict=True))
    coding = Coding(
        bytes_per_image=bytes_per_image, images=0, positions=0, seed=SEED, fit=UNKNOWN, level_bytes=level_bytes
    )
    return replace(recipe, precision=CODED, coding=coding)


def _sample(
    dataset: Dataset, weights: Weights, recipe: Recipe, count: int, device: str, skip: bool
) -> tuple[list[list[Tensor]], int]:
    """Per level and layer (n, C) unit vectors in float16, and the number of photos they come from."""
    network = PhotoNetwork(open_backbone(recipe, weights), recipe.image_size, device)
    kept: list[list[list[Tensor]]] = []
    for image, pixels in islice(_photos(dataset, network, skip), count):
        levels = network.levels([pixels])
        for _ in check_levels(levels, [dataset.index.images[image]]):
            pass
        kept.append([_some(level[0], (dataset.index.digest, image, k), count) for k, level in enumerate(levels)])
    if not kept:
        raise ConfigError(f"{dataset.index.name} lists no training photo that could be read: no codec can be fitted.")
    return [[torch.cat(layer) for layer in zip(*level, strict=True)] for level in zip(*kept, strict=True)], len(kept)


def _photos(dataset: Dataset, network: PhotoNetwork, skip: bool) -> Iterator[tuple[int, np.ndarray]]:
    for image in sample_images(dataset.index):
        try:
            yield image, network.pixels(dataset.image(image))
        except (DataError, OSError) as error:
            if not skip:
                name = dataset.index.images[image]
                raise DataError(
                    f"Image '{name}' of {dataset.index.name} cannot be used: {str(error).rstrip('.')}. Mend or remove "
                    f"it, or leave such images out with `--on-error skip`. Nothing was written."
                ) from error


def _some(level: Tensor, key: Sequence[object], images: int) -> list[Tensor]:
    """(L, H, W, C) of one photo -> L of (n, C): its share of the sample, the same positions in every layer."""
    wanted = -(-POSITIONS // images)
    flat = level.flatten(1, 2)
    if wanted < flat.shape[1]:
        draws = philox(*key, "codec positions", SEED).random_raw(flat.shape[1])
        chosen = torch.from_numpy(np.sort(np.argsort(draws, kind="stable")[:wanted]))
        flat = flat.index_select(1, chosen.to(flat.device))
    # float16 keeps a direction to 5e-4 of its coordinates, and twice as many vectors in memory.
    return [unit_vectors(layer).half().cpu() for layer in flat]
