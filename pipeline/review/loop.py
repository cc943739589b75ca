"""What goes on behind the page: photos are read once, and predicted again whenever the bank has learnt something."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hsnet.errors import ConfigError, HSNetError
from pipeline.annotations.item import Annotation
from pipeline.bank.folder import Added
from pipeline.bank.reading import Features
from pipeline.datasets.images import read_photo
from pipeline.predict.model import ClassAnswer
from pipeline.predict.prepare import Prepared
from pipeline.review.folder import Photo, Reviewed
from pipeline.serve.engine import Engine

log = logging.getLogger(__name__)

MEMORY = 2 << 30
"""Bytes of features that are kept for the session, as float16; photos beyond are read anew."""


@dataclass(frozen=True)
class Status:
    """What is being done."""

    doing: str = "idle"
    """idle, reading (features of photos), fitting, or predicting."""
    done: int = 0
    of: int = 0
    error: str = ""
    changes: int = 0
    """Grows whenever something that a page shows is another."""


class Loop:
    """Corrections into the bank, and the photos they touch predicted again.

    Predicted again are photos that nobody has accepted or corrected; one that was rejected is then to be looked at
    anew. Features of photos are read once, in the background.

    Args:
        reviewed: the folder.
        engine: the bank's; its classes become those of the folder. None: nothing can be corrected.

    Raises:
        ConfigError: the folder has classes that the bank has not.
    """

    def __init__(self, reviewed: Reviewed, engine: Engine | None, memory: int = MEMORY) -> None:
        self.reviewed, self.engine, self._memory = reviewed, engine, memory
        self.status = Status()
        self._features: dict[int, Features] = {}
        self._centres: dict[int | str, Tensor] = {}
        self._stale = False
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        if engine is not None:
            known = engine.bank.classes
            missing = [name for name in reviewed.classes if name not in known]
            if missing:
                raise ConfigError(
                    f"{reviewed.root} has the class '{missing[0]}', which is not in {engine.root} "
                    f"({', '.join(known) or 'no class'}). Give the bank that it was predicted with."
                )
            engine.classes = reviewed.classes

    def start(self) -> None:
        """Begin to read photos in the background."""
        if self.engine is not None:
            self._thread = threading.Thread(target=self._run, name="review", daemon=True)
            self._thread.start()
            self._wake.set()

    def stop(self) -> None:
        """Come to an end after the photo in work."""
        self._stop.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def decide(self, photo: Photo, decision: str | None) -> None:
        """See `Reviewed.decide`."""
        self.reviewed.decide(photo, decision)
        self._tell()

    def correct(
        self, photo: Photo, masks: Mapping[str, NDArray[np.bool_]], absent: frozenset[str] = frozenset()
    ) -> Added:
        """What somebody drew goes into the bank and into the folder's masks; the others are then predicted again.

        Raises:
            ConfigError: there is no bank.
            BankBusy, DataError: as `Engine.add`. Nothing was changed.
        """
        if self.engine is None:
            raise ConfigError("Nothing can be corrected without a bank: start `hsnet review` with --bank.")
        before = self.reviewed.masks(photo)
        added = self.engine.add(Annotation(photo.path, dict(masks), absent))
        size = next(iter(before.values())).shape
        photo.drawn = {**before, **{name: np.zeros(size, bool) for name in absent if name in before}, **masks}
        self.engine.classes = tuple(dict.fromkeys((*self.engine.classes, *masks)))
        self.reviewed.decide(photo, "corrected")
        self._stale = True
        self._tell()
        self._wake.set()
        return added

    def next(self) -> int | None:
        """The photo that teaches most, among those that nobody has decided on: unsure, and unlike what is known.

        Its place is (1 - sureness) times the distance (1 - cosine of mean features) to the nearest photo of the bank
        or with a decision; by sureness alone as long as features are not read.
        """
        open_ = [n for n, photo in enumerate(self.reviewed.photos) if photo.decision is None]
        if not open_:
            return None
        centres = dict(self._centres)
        decided = {n for n, photo in enumerate(self.reviewed.photos) if photo.decision is not None}
        known = [centre for key, centre in centres.items() if isinstance(key, str) or key in decided]

        def gain(number: int) -> float:
            doubt = 1 - self.reviewed.photos[number].prediction.sureness
            if number not in centres or not known:
                return doubt
            return doubt * (1 - max(float(centres[number] @ one) for one in known))

        return max(open_, key=gain)

    def _tell(self, **values: Any) -> None:
        self.status = Status(**{**vars(self.status), "changes": self.status.changes + 1, **values})

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            if self._stop.is_set():
                return
            try:
                self._tell(error="")
                self._round()
            except HSNetError as error:
                log.warning("%s", error)
                self._tell(error=str(error))
            except Exception as error:
                log.exception("review")
                self._tell(error=f"An error that nobody foresaw: {type(error).__name__}. The log has more.")
            self._tell(doing="idle", done=0, of=0)

    def _round(self) -> None:
        assert self.engine is not None
        while not self._stop.is_set():
            again, self._stale = self._stale, False
            self._tell(doing="fitting", done=0, of=0)
            prepared = self.engine.prepared()
            if prepared is None:
                return
            self._know(prepared)
            if not again:
                self._over_photos("reading", range(len(self.reviewed.photos)), prepared, write=False)
            else:
                for photo in self.reviewed.photos:
                    if photo.drawn is not None:
                        self._write_drawn(photo, prepared)
                open_ = [n for n, one in enumerate(self.reviewed.photos) if one.decision in (None, "rejected")]
                self._over_photos("predicting", open_, prepared, write=True)
                self.reviewed.save()
            if not self._stale:
                return

    def _over_photos(self, doing: str, numbers: Any, prepared: Prepared, write: bool) -> None:
        order = sorted(numbers, key=lambda n: self.reviewed.photos[n].prediction.sureness)
        for count, number in enumerate(order):
            if self._stop.is_set() or self._stale:
                return
            self._tell(doing=doing, done=count, of=len(order))
            photo = self.reviewed.photos[number]
            try:
                self._one(number, photo, prepared, write)
            except HSNetError as error:  # gone, or broken meanwhile: the others go on
                log.warning("%s", error)
                self._tell(error=str(error))

    def _one(self, number: int, photo: Photo, prepared: Prepared, write: bool) -> None:
        assert self.engine is not None
        picture = read_photo(photo.path) if write or number not in self._features else None
        features = self._features.get(number)
        with self.engine.lock:
            if features is None:
                assert picture is not None
                features = prepared.work.features(prepared.model.reader, photo.path, picture)
                self._keep(number, features)
            if not write:
                return
            answers = prepared.model.answer(_as(features, torch.float32))
        assert picture is not None
        if photo.decision in ("accepted", "corrected"):  # decided while it was computed
            return
        self.reviewed.renew(photo, prepared.work.write(photo.task, picture, answers))
        if photo.decision == "rejected":
            self.reviewed.decide(photo, None)

    def _write_drawn(self, photo: Photo, prepared: Prepared) -> None:
        assert photo.drawn is not None
        picture = read_photo(photo.path)
        size = (picture.height, picture.width)
        found = {}
        for name in prepared.work.answering.names:
            mask = photo.drawn.get(name, np.zeros(size, bool))
            found[name] = ClassAnswer(mask, mask.astype(np.float32), float(mask.any()))
        self.reviewed.renew(photo, prepared.work.write_found(photo.task, picture, found))
        photo.drawn = None

    def _keep(self, number: int, features: Features) -> None:
        self._centres[number] = _centre(features)
        kept = _as(features, torch.float16)
        held = sum(_bytes(one) for one in self._features.values())
        if held + _bytes(kept) <= self._memory:
            self._features[number] = kept

    def _know(self, prepared: Prepared) -> None:
        """Where the bank's photos lie."""
        assert self.engine is not None
        with self.engine.lock:
            for photo in self.engine.bank.photos():
                if photo.id not in self._centres:
                    self._centres[photo.id] = _centre(photo.features(prepared.model.reader))


def _centre(features: Features) -> Tensor:
    centre = features.vectors().float().mean((0, 1)).cpu()
    return centre / centre.norm().clamp_min(1e-9)


def _as(features: Features, kind: torch.dtype) -> Features:
    return Features(features.size, features.tiles, [level.to(kind) for level in features.levels])


def _bytes(features: Features) -> int:
    return sum(level.nbytes for level in features.levels)
