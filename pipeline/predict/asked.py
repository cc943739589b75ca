"""How a folder of predictions was made: OUT/predict.json, so that `hsnet review` predicts as `hsnet predict` did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from hsnet.errors import DataError, HSNetError
from pipeline.common.fields import from_json
from pipeline.common.files import read_json, replace_json
from pipeline.predict.prepare import Choices

ASKED = "predict.json"
_FORMAT = 1


@dataclass(frozen=True)
class Asked:
    """The options of a call of `hsnet predict` that decide its masks; paths are absolute."""

    head: str
    tau: float
    refine: bool
    overlapping: bool
    least_score: float
    backbone: str | None = None
    weights: str | None = None
    image_size: int | None = None
    tile: int | None = None
    fusion: str | None = None
    bank: str | None = None
    """None: photos and masks were given one by one."""
    checkpoint: str | None = None
    keep_features: str | None = None

    @classmethod
    def of(
        cls, choices: Choices, bank: Path | None = None, checkpoint: Path | None = None, keep: Path | None = None
    ) -> Self:
        """What a call asks for. Its weights must be a file, or none."""
        names = ("head", "tau", "refine", "overlapping", "least_score", "backbone", "image_size", "tile", "fusion")
        assert choices.weights is None or isinstance(choices.weights, str | Path)
        return cls(
            **{name: getattr(choices, name) for name in names},
            weights=_weights(choices.weights),
            bank=_absolute(bank),
            checkpoint=_absolute(checkpoint),
            keep_features=_absolute(keep),
        )

    def choices(self, weights: str | None = None, device: str = "cpu") -> Choices:
        """The same for a call on this device, with another file of weights if one is named."""
        told: dict[str, Any] = asdict(self)
        for name in ("bank", "checkpoint", "keep_features"):
            del told[name]
        return Choices(**{**told, "weights": weights or self.weights}, device=device)

    def write(self, out_dir: Path) -> None:
        """Keep it in a folder of predictions. Raises DataError: the disk refused; what was there is as it was."""
        try:
            replace_json(out_dir / ASKED, {"format": _FORMAT, **asdict(self)})
        except OSError as error:
            raise DataError(f"Cannot write {out_dir / ASKED}: {error}.") from error

    @classmethod
    def read(cls, out_dir: Path) -> Self | None:
        """What a folder was asked for; None if it does not say.

        Raises:
            DataError: the file is damaged, or of a later version.
        """
        path = out_dir / ASKED
        if not path.exists():
            return None
        try:
            said: Mapping[str, Any] = read_json(path)
            if said.get("format") != _FORMAT:
                raise DataError(f"its format is {said.get('format')!r}, known is {_FORMAT}")
            return from_json(cls, {name: value for name, value in said.items() if name != "format"}, ASKED)
        except HSNetError as error:
            raise DataError(
                f"{path} is damaged, or of a later version: {error} Run `hsnet predict` again, or move it away: masks "
                "are then predicted with the bank's own settings."
            ) from error


def _absolute(path: Path | None) -> str | None:
    return None if path is None else str(path.absolute())


def _weights(given: str | Path | None) -> str | None:
    """A file's absolute path; names that are no files ("random:1") as they are."""
    if given is None:
        return None
    return str(Path(given).absolute()) if Path(given).exists() else str(given)
