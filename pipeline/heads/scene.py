"""Episodes as vectors on one grid: what the heads without a learner work on, one episode at a time.

One at a time, so that an answer does not depend, not by a bit, on what else was in the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hsnet.errors import DataError
from hsnet.similarity import clear_positions, object_shares, positions
from pipeline.heads.segmenters import Answers, margin_answers
from pipeline.loading.batch import EpisodeBatch

if TYPE_CHECKING:
    from pipeline.loading.source import FeatureSource

LABELS_AT_ONCE = 64
"""Label maps read at a time."""


@dataclass(frozen=True)
class Scene:
    """One episode of K supports on the deepest grid of P positions, each a vector of D channels."""

    query: Tensor
    """(P, D), see `hsnet.similarity.positions`."""
    support: Tensor
    """(K, P, D)."""
    shares: Tensor
    """(K, P) in [0, 1]: how much of each support position is object."""
    batch: EpisodeBatch
    """The same episode with the same supports, as it was read."""

    def of(self, supports: slice | list[int]) -> Scene:
        """The scene with some of its supports."""
        shares = self.shares[supports]
        fewer = replace(
            self.batch,
            support=[level[supports] for level in self.batch.support],
            support_mask=self.batch.support_mask[supports],
            shots=len(shares),
        )
        return Scene(self.query, self.support[supports], shares, fewer)


Margin = Callable[[Scene], Tensor]
"""A scene's one answer by all its supports: (P,) or (h, w), object where it is above 0."""


def scenes(batch: EpisodeBatch) -> Iterator[Scene]:
    """The episodes of a batch, one after the other."""
    k = batch.shots
    for number in range(batch.size):
        drawn = slice(number * k, number * k + k)
        one = replace(
            batch,
            query=[level[number : number + 1] for level in batch.query],
            support=[level[drawn] for level in batch.support],
            support_mask=batch.support_mask[drawn],
            target=batch.target[number : number + 1],
            ignore=None if batch.ignore is None else batch.ignore[number : number + 1],
        )
        shares = object_shares(one.support_mask, grid_of(batch))
        yield Scene(positions(one.query, batch.unit)[0], positions(one.support, batch.unit), shares, one)


def grid_of(batch: EpisodeBatch) -> tuple[int, int]:
    """The deepest grid, on which the answers are given."""
    return batch.query[-1].shape[2], batch.query[-1].shape[3]


@torch.no_grad()
def answer_scenes(batch: EpisodeBatch, margin: Margin, joint: Sequence[int], alone: int | None) -> Answers:
    """The answers of a head that has one way to answer any number of supports.

    Args:
        joint, alone: as `Segmenter.answer` takes them.
    """
    wanted = batch.shots if alone is None else alone
    ones: list[Tensor] = []
    together: dict[int, list[Tensor]] = {k: [] for k in joint}
    grid = grid_of(batch)

    def on_grid(scene: Scene) -> Tensor:
        answer = margin(scene)
        return answer.unflatten(0, grid) if answer.ndim == 1 else answer

    for scene in scenes(batch):
        ones.append(torch.stack([on_grid(scene.of(slice(k, k + 1))) for k in range(wanted)]))
        for k, found in together.items():
            found.append(on_grid(scene.of(slice(k))))
    maps = {k: margin_answers(torch.stack(found)[None]).logits[0] for k, found in together.items()}
    return Answers(margin_answers(torch.stack(ones, 1)).logits, maps)


def require_background(source: FeatureSource, supports: Iterable[tuple[int, int]], head: str) -> None:
    """Refuse supports that show nothing but their object, for heads that compare object and background.

    Args:
        supports: (image, class id) of every support.

    Raises:
        DataError: names the photos.
    """
    if lacking := without_background(source, supports):
        grid = source.recipe.level_shapes()[-1][1:3]
        raise DataError(
            f"Head '{head}' compares a support's object with its background, but {len(lacking)} supports show their "
            f"object everywhere on the {grid[0]}x{grid[1]} grid: {', '.join(lacking[:3])}"
            f"{', ...' if len(lacking) > 3 else ''}. Take the photos out of the lists, or choose a head that needs no "
            f"background (`hsnet heads`). Nothing was computed."
        )


def without_background(source: FeatureSource, supports: Iterable[tuple[int, int]]) -> list[str]:
    """Names of the photos, among supports (image, class id), that show their object everywhere on the deepest grid."""
    grid = source.recipe.level_shapes()[-1][1:3]
    pairs = sorted(set(supports))
    lacking: list[str] = []
    for first in range(0, len(pairs), LABELS_AT_ONCE):
        some = pairs[first : first + LABELS_AT_ONCE]
        labels = source.labels([image for image, _ in some])
        values = torch.tensor([class_id + 1 for _, class_id in some], device=labels.device)
        masks = labels == values[:, None, None]
        inside, outside = clear_positions(object_shares(masks, (grid[0], grid[1])))
        alone = inside.any(1) & ~outside.any(1)
        lacking += [source.index.images[image] for (image, _), one in zip(some, alone.tolist(), strict=True) if one]
    return lacking
