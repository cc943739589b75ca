"""A function for CVAT's automatic annotation, to be handed to its command line:

    cvat-cli task auto-annotate 137 --function-module pipeline.serve.cvat -p bank=str:BANK

It runs here, beside the bank; CVAT's server needs nothing of it. The task's labels must be named like the bank's
classes (`--allow-unmatched-labels` leaves the others out). Interface: cvat_sdk.auto_annotation.DetectionFunction.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from hsnet.errors import ConfigError, DataError
from pipeline.annotations.found import Found, Instance, objects_of
from pipeline.annotations.outline import joined, polygons
from pipeline.annotations.runs import row_runs
from pipeline.predict.prepare import Choices
from pipeline.serve.engine import Engine
from pipeline.serve.results import found_of
from pipeline.serve.xanylabeling import FINENESS, simplified


class Function:
    """What CVAT asks: labels once, then shapes of one photo after the other.

    Raises:
        ConfigError: cvat-sdk is not installed.
        DataError: there is no bank, or no photo of it shows anything.
    """

    def __init__(self, bank: str, choices: Choices) -> None:
        try:
            import cvat_sdk.auto_annotation as cvat
        except ImportError as error:
            raise ConfigError("This needs CVAT's SDK: pip install cvat-sdk cvat-cli.") from error
        self._cvat = cvat
        self._engine = Engine(Path(bank), choices)
        prepared = self._engine.prepared()
        if prepared is None:
            raise DataError(f"{bank} holds no annotated photo yet: `hsnet bank add` adds some.")
        self._numbers = {name: number for number, name in enumerate(prepared.model.answering.names)}
        self.spec = cvat.DetectionFunctionSpec(
            labels=[cvat.label_spec(name, number) for name, number in self._numbers.items()]
        )

    def detect(self, context: Any, image: Image.Image) -> list[Any]:
        """Masks of a photo, one for each object; polygons where they are asked for."""
        photo = image.convert("RGB")
        found = found_of(self._engine.answer(photo), Path(context.frame_name), (photo.height, photo.width))
        least = context.conf_threshold or 0.0
        return [
            shape
            for name, one in found.classes.items()
            if name in self._numbers
            for instance in objects_of(one)
            if (instance.score or 0.0) >= least
            for shape in self._shapes(self._numbers[name], instance, found, context.conv_mask_to_poly)
        ]

    def _shapes(self, label: int, instance: Instance, found: Found, as_polygons: bool) -> list[Any]:
        left, top, width, height = instance.box
        if not as_polygons:
            # Run lengths row by row inside the box, background first, then the box's first and last pixels.
            points = [*row_runs(instance.mask).tolist(), left, top, left + width - 1, top + height - 1]
            return [self._cvat.mask(label, points)]
        rings = [simplified(joined(rings), FINENESS) for rings in polygons(instance.mask, left, top)]
        # Outlines run along the outer sides of pixels: they may touch the photo's edge, never leave it.
        edge = np.array([found.width, found.height])
        return [self._cvat.polygon(label, np.clip(ring, 0, edge).ravel().tolist()) for ring in rings]


def create(bank: str, head: str = "auto", weights: str | None = None, device: str = "cpu") -> Function:
    """What cvat-cli calls with its -p parameters.

    Args:
        bank: the bank's folder.
        head, weights, device: as the options of `hsnet predict`.
    """
    return Function(bank, Choices(head=head, weights=weights, device=device))
