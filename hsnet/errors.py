"""Every error a user can cause, drawn as a tree.

    HSNetError
    ├── ConfigError           an option or a combination of options cannot work
    │   └── ImageSizeError        a backbone cannot be read at an image size; says which are near and work
    ├── DataError             a data set, image, mask or split file is not as it should be
    ├── ShapeError            tensors that do not fit each other
    ├── WeightsError          backbone weights missing, corrupt or of another network
    ├── CheckpointError       a checkpoint cannot be read
    │   └── CheckpointMismatch    ... or was trained on other features
    ├── StoreError            a feature store cannot be read or written
    │   ├── StoreMismatch         ... holds features of another recipe
    │   └── StoreIncomplete       ... is only partly extracted
    ├── DeviceMemoryError     a GPU, or this machine, had too little memory
    └── ClusterError          Ray could not be reached or lost the work

The command line catches `HSNetError`, prints it without a traceback and exits with 1. Anything else that
escapes is a bug of ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence


class HSNetError(Exception):
    """Base of all errors that a user can cause and mend."""

    def __reduce__(self) -> tuple[object, ...]:
        # Python would call the class with the message alone, which fails for those that carry more: an error of a
        # worker process could not reach the process that reports it.
        return _rebuild, (type(self), self.args, vars(self))


def _rebuild(cls: type[HSNetError], args: tuple[object, ...], attributes: Mapping[str, object]) -> HSNetError:
    error = cls.__new__(cls, *args)
    vars(error).update(attributes)
    return error


class ConfigError(HSNetError):
    """An option or a combination of options cannot work."""


class ImageSizeError(ConfigError):
    """A backbone cannot be read at an image size."""

    def __init__(self, message: str, nearest: Sequence[int] = ()) -> None:
        super().__init__(message)
        self.nearest = tuple(nearest)
        """Sizes that work, pixels; none if none is known."""


class DataError(HSNetError):
    """A data set, image, mask or split file is not as it should be."""


class ShapeError(HSNetError):
    """Tensors do not fit each other."""


class WeightsError(HSNetError):
    """Backbone weights are missing, corrupt or belong to another network."""


class CheckpointError(HSNetError):
    """A checkpoint cannot be read or written."""


class CheckpointMismatch(CheckpointError):
    """A checkpoint was trained on other features than those offered.

    `differences` maps a field to (value in the checkpoint, value offered), so that callers need not parse text.
    """

    def __init__(self, message: str, differences: Mapping[str, tuple[object, object]]) -> None:
        super().__init__(message)
        self.differences = dict(differences)


class StoreError(HSNetError):
    """A feature store cannot be read or written."""


class StoreMismatch(StoreError):
    """A store holds features of another recipe or data set.

    `differences` maps a field to (stored value, wanted value).
    """

    def __init__(self, message: str, differences: Mapping[str, tuple[object, object]]) -> None:
        super().__init__(message)
        self.differences = dict(differences)


class StoreIncomplete(StoreError):
    """A store is only partly extracted; `missing` lists the shard numbers that are not there."""

    def __init__(self, message: str, missing: Sequence[int]) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


class DeviceMemoryError(HSNetError):
    """A GPU, or this machine, had too little memory for what was asked; says what takes less."""


class ClusterError(HSNetError):
    """Ray could not be started or reached, or lost the work."""
