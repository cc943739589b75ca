"""One model of a bank for all requests: fitted when it is first asked, and anew when the bank has changed."""

from __future__ import annotations

import dataclasses
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from hsnet.errors import HSNetError, StoreError
from pipeline.annotations.item import Annotation
from pipeline.bank.folder import BANK, ITEM, PHOTOS, Added, Bank
from pipeline.heads.checkpoint import Checkpoint
from pipeline.predict.model import ClassAnswer
from pipeline.predict.prepare import Choices, Prepared, prepare
from pipeline.predict.writing import Outputs
from pipeline.serve.uploads import Upload


class BankBusy(HSNetError):
    """Another process writes the bank."""


class Engine:
    """A bank, and what was fitted to it. One photo is computed at a time, whoever asks.

    Args:
        root: the bank; may still be empty.
        choices: how to answer. Of its classes, or of all if it names none, those that a photo shows are looked for.
        checkpoint: a trained head, among those that answer.
        keep: where features of photos are kept, see `pipeline.bank.kept`; None keeps none.

    Raises:
        DataError, ConfigError: there is no bank, or it is damaged; see `pipeline.bank.folder.Bank`.
    """

    def __init__(
        self,
        root: Path,
        choices: Choices,
        outputs: Outputs = Outputs(),  # noqa: B008
        *,
        checkpoint: Checkpoint | None = None,
        keep: Path | None = None,
    ) -> None:
        Bank(root)
        self.root, self._choices, self._outputs, self._checkpoint, self._keep = root, choices, outputs, checkpoint, keep
        self.classes = choices.classes
        self.lock = threading.RLock()
        """Held while anything is computed."""
        self._writing = threading.Lock()
        self._stamp: object = None
        self._prepared: Prepared | None = None

    @property
    def bank(self) -> Bank:
        """As it is on disk now."""
        return Bank(self.root)

    def stamp(self) -> object:
        """Equal as long as nothing in the bank has changed."""
        found = [(BANK, (self.root / BANK).stat().st_mtime_ns)]
        for path in sorted((self.root / PHOTOS).glob(f"[0-9a-f]*/{ITEM}")):
            try:
                found.append((path.parent.name, path.stat().st_mtime_ns))
            except FileNotFoundError:  # removed meanwhile by another process
                continue
        return tuple(found)

    def prepared(self) -> Prepared | None:
        """Network and heads, fitted to the bank as it is now; None as long as no photo of it shows anything.

        Raises:
            HSNetError: as `pipeline.predict.prepare.prepare`.
        """
        with self.lock:
            stamp = self.stamp()
            if stamp != self._stamp:
                bank = self.bank
                photos = bank.photos()
                names = self.classes or bank.classes
                shown = tuple(name for name in names if any(name in photo.item.masks for photo in photos))
                if shown:
                    choices = dataclasses.replace(self._choices, classes=shown)
                    self._prepared = prepare(
                        choices, bank=bank, checkpoint=self._checkpoint, outputs=self._outputs, keep=self._keep
                    )
                    self._choices = dataclasses.replace(self._choices, weights=self._prepared.work.weights)
                else:
                    self._prepared = None
                self._stamp = stamp
            return self._prepared

    @property
    def version(self) -> str:
        """Names what the model was fitted to: 8 hex digits, another one after every change; "empty" without one."""
        prepared = self.prepared()
        return "empty" if prepared is None else prepared.work.settings[:8]

    def answer(self, photo: Image.Image) -> dict[str, ClassAnswer]:
        """Class -> what was found; nothing as long as the bank shows nothing."""
        with self.lock:
            prepared = self.prepared()
            return {} if prepared is None else prepared.model(photo)

    def annotate(
        self,
        upload: Upload,
        masks: Mapping[str, NDArray[np.bool_]],
        absent: frozenset[str] = frozenset(),
        ignore: NDArray[np.bool_] | None = None,
    ) -> Added:
        """Put what somebody drew into the bank, in place of what it knew of these classes on this photo.

        Raises:
            BankBusy: another process writes the bank. Nothing was changed.
            DataError: a mask marks nothing or has another size than the photo, or a class's name is none.
        """
        with tempfile.TemporaryDirectory(prefix="hsnet-") as folder:
            path = Path(folder) / upload.name
            path.write_bytes(upload.data)
            return self.add(Annotation(path, dict(masks), absent, ignore))

    def add(self, annotation: Annotation) -> Added:
        """The same for a photo in a file."""
        with self._writing:
            try:
                return self.bank.add(annotation, replace_masks=True)
            except StoreError as error:
                raise BankBusy(str(error)) from error
