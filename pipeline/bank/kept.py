"""Features of query photos kept on disk, so that another class or a corrected bank costs no pass of the network.

One file per photo, as the network's levels in int8: directions only, which is all that heads for photos look at (see
`pipeline.features.precision`). A photo is known by its name, size and time of change, a reading by its digest, so
photos and readings of all kinds may share a folder. Files are whole or not there; damaged ones are made again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError

from hsnet.errors import StoreError
from pipeline.bank.reading import Features, Reader, load_levels, save_levels
from pipeline.features.precision import encode

log = logging.getLogger(__name__)


def kept_features(folder: Path, reader: Reader, path: Path, photo: Image.Image) -> Features:
    """Features of a photo by the codes that are kept of it, made now if there are none.

    Args:
        folder: of all kept features; made if missing.
        path: the photo's file, which names the codes.
        photo: its pixels, RGB.

    Raises:
        StoreError: the folder cannot be written, or the network gave no finite features.
    """
    place = kept_file(folder, reader, path)
    size = (photo.height, photo.width)
    tiles = reader.reading.plan(size)
    shapes = [(len(tiles), *shape) for shape in reader.reading.recipe.level_shapes()]
    codes = _read(place)
    if codes is None or [tuple(level.shape) for level in codes] != shapes:
        codes = [torch.from_numpy(level) for level in encode(reader.read(photo).levels, "int8", [path.name])]
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            save_levels(place, codes)
        except OSError as error:
            raise StoreError(f"Features of {path.name} cannot be kept in {folder}: {error}.") from error
    device = reader.network.device
    return Features(size, tiles, [level.to(device).float() for level in codes])


def kept_file(folder: Path, reader: Reader, path: Path) -> Path:
    """Where the codes of a photo are, or will be."""
    facts = path.stat()
    text = f"{reader.reading.digest} {facts.st_size} {facts.st_mtime_ns} {os.fsencode(path.name)!r}"
    key = hashlib.sha256(text.encode()).hexdigest()[:32]
    return folder / key[:2] / f"{key}.safetensors"


def _read(place: Path) -> list[torch.Tensor] | None:
    """The codes; None if there are none that can be read."""
    try:
        return load_levels(place)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        log.warning("%s is damaged (%s): made again", place, error)
        return None
