"""Import torchvision where its compiled operators do not load (a CUDA build of torchvision beside a CPU torch).

torchvision declares fake kernels for `torchvision::nms` and `torchvision::qnms` while it is imported, and that
fails with `operator torchvision::nms does not exist` when its shared library could not be loaded. No network of
ours uses either operator, so declaring their signatures is enough to import the models. Where the library loads,
nothing is declared.
"""

from __future__ import annotations

import importlib
import sys

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: torch.library.Library | None = None  # kept: the operators vanish with the object


def ensure_importable() -> None:
    """Make `import torchvision` work in this process, whatever build it is. Safe to call again."""
    global _library
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        if "torchvision::" not in str(error) or _library is not None:
            raise
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]  # a half-imported package would be returned by the next import
        _library = torch.library.Library("torchvision", "DEF")
        for schema in _SCHEMAS:
            _library.define(schema)
        importlib.import_module("torchvision")
