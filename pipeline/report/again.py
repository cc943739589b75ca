"""Predictions made again, exactly as the evaluation made them, and their counts compared with those of the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hsnet.errors import DataError
from hsnet.fusion import foreground, fuse
from hsnet.metrics import count
from hsnet.model import resize_logits
from pipeline.common.runner import one_torch_thread
from pipeline.episodes.stream import Episode
from pipeline.loading.batch import load_batch
from pipeline.report.origins import Origins, open_segmenter, open_store
from pipeline.scores.rows import Results, ScoredEpisodes


@dataclass(frozen=True)
class Prediction:
    """One episode at network size."""

    episode: Episode
    """By the store's numbers."""
    support_masks: NDArray[np.bool_]
    """(K, H, W)."""
    truth: NDArray[np.bool_]
    """(H, W), as the rest."""
    mask: NDArray[np.bool_]
    """What was predicted."""
    ignore: NDArray[np.bool_] | None
    equal: bool
    """Whether it has exactly the counts of the row."""


class Repeater:
    """Makes predictions of one file's episodes again.

    Raises:
        HSNetError: store or head are not there, or not those of the rows.
    """

    def __init__(self, file: Results, origins: Origins, device: str) -> None:
        self.file, self.device = file, device
        self.source = open_store(file, origins.store)
        self._numbers = {name: number for number, name in enumerate(self.source.index.images)}
        self._segmenter = open_segmenter(file, self.source, origins.checkpoint, device)

    def predict(self, episodes: ScoredEpisodes, number: int) -> Prediction:
        """The prediction of episode `number`. Raises DataError if the store lacks a photo of it."""
        episode = self._episode(episodes, number)
        with one_torch_thread(), torch.inference_mode():  # as in an evaluation, so that sums come out alike
            batch = load_batch(self.source, [episode]).to(self.device)
            mask = self._mask(batch, len(episode.supports), batch.target.shape[1])
        ignore = batch.ignore if self.file.protocol.ignore else None
        equal = True  # counts of the original size are not the mask's; both come from the same logits
        if self.file.protocol.resolution == "network":
            equal = bool((count(mask, batch.target, ignore)[0].cpu().numpy() == episodes.counts[number]).all())
        return Prediction(
            episode,
            batch.support_mask.cpu().numpy(),
            batch.target[0].cpu().numpy(),
            mask[0].cpu().numpy(),
            None if ignore is None else ignore[0].cpu().numpy(),
            equal,
        )

    def _episode(self, episodes: ScoredEpisodes, number: int) -> Episode:
        names = (episodes.queries[number], *episodes.supports[number])
        lost = [name for name in names if name not in self._numbers]
        if lost:
            raise DataError(f"The store has no image '{lost[0]}', which an episode shows: it is not that of the rows.")
        query, *supports = (self._numbers[name] for name in names)
        return Episode(query, tuple(supports), int(episodes.classes[number]))

    def _mask(self, batch: Any, shots: int, side: int) -> Any:
        """(1, side, side) bool."""
        rules = self.file.protocol
        joint = (shots,) if rules.fusion == "joint" and shots > 1 else ()
        answers = self._segmenter.answer(batch, joint, 1 if joint else None)
        if joint:
            return foreground(resize_logits(answers.joint[shots], (side, side)), rules.tau, rules.strict)
        fusion = "vote" if rules.fusion == "joint" else rules.fusion
        return fuse(answers.logits, (side, side), fusion, rules.tau, rules.strict, rules.normalise)
