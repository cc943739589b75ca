"""The analyze stage: scores with intervals, spreads and paired tests, from rows alone.

Every figure is made of the rows of `pipeline.scores.rows`; nothing is predicted. A mean never comes without its
interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError, DataError
from pipeline.episodes.protocols import Policy
from pipeline.scores import bootstrap
from pipeline.scores.analysis import Analysis, Difference, Score, Spread
from pipeline.scores.bootstrap import Interval, Part, interval
from pipeline.scores.rows import (
    Results,
    ScoredEpisodes,
    cases_of,
    paired_fusion,
    require_counts,
    require_one_configuration,
    require_same_episodes,
    require_same_rows,
    scored_episodes,
    together_and_apart,
)
from pipeline.scores.support_spread import spread_by_support

SECTIONS = ("class", "size", "support", "seed")
UNITS = ("episode", "query")
SIZE_EDGES = (0.0, 0.01, 0.05, 0.15, 0.35, 1.0)
"""Bins of the object's share of the squashed query photo; fixed, so that tables of different data can be compared."""

Floats = NDArray[np.float64]


def analyze(
    files: Sequence[Results],
    against: Sequence[Results] = (),
    *,
    policies: Sequence[Policy] = (),
    fusions: Sequence[str] = (),
    fusion_against: str | None = None,
    sections: Collection[str] = ("class",),
    unit: str = "episode",
    seed: int = 0,
) -> Analysis:
    """Scores of one configuration with intervals, and its paired differences from another.

    Args:
        files: rows of one configuration, read by `pipeline.scores.rows.read_results`: one file, or several folds,
            seeds and numbers of shots of it.
        against: rows of another one on the same episodes.
        policies: which pixels; empty: the protocol's own.
        fusions: ways to combine supports; empty: the protocol's own for one shot, all there are for more.
        fusion_against: compare with this way to combine supports, of `against`, or of the same rows.
        sections: of SECTIONS.
        unit: what is drawn again: "episode" (other episodes of these photos) or "query" (other photos too).
        seed: of the resampling.

    Raises:
        DataError: files do not belong together, or the policy's counts are not there.
        ConfigError: an unknown section, unit, policy or fusion.
    """
    if not files:
        raise ConfigError("There are no rows to analyze.")
    odd = set(sections) - set(SECTIONS)
    if odd or unit not in UNITS:
        raise ConfigError(f"Sections are {', '.join(SECTIONS)}; units are {', '.join(UNITS)}: not {odd or unit}.")
    require_one_configuration(files)
    if against:
        require_one_configuration(against)
        require_same_episodes(files, against)
    policies = list(policies) or [files[0].protocol.policy]
    require_counts((*files, *against), policies)
    scorer = _Scorer(unit, seed, frozenset(sections))
    scores = scorer.scores(files, policies, fusions)
    differences: list[Difference] = []
    if against or fusion_against:
        differences = scorer.differences(files, against or files, policies, fusions, fusion_against)
    return Analysis(
        tuple(files),
        tuple(against),
        unit,
        tuple(scores),
        tuple(scorer.scores(against, policies, fusions)) if against else (),
        tuple(differences),
        _notes(files, scores, unit),
    )


class _Scorer:
    """Makes scores and differences with one unit, seed and set of sections."""

    def __init__(self, unit: str, seed: int, sections: frozenset[str]) -> None:
        self.unit, self.seed, self.sections = unit, seed, sections

    def scores(self, files: Sequence[Results], policies: Sequence[Policy], fusions: Sequence[str]) -> list[Score]:
        """Per policy, number of shots and fusion: the mean over several folds, then every fold."""
        scores: list[Score] = []
        for policy in policies:
            for shots, fusion in cases_of(files, fusions):
                folds = [
                    (episodes, self._resampled(episodes))
                    for fold in _folds(files)
                    if (episodes := scored_episodes(files, fold, shots, fusion, policy)) is not None
                ]
                for some in together_and_apart(folds):
                    scores.append(self._score(policy, shots, fusion, some, files[0].image_size))
        return scores

    def _resampled(self, episodes: ScoredEpisodes, counts: NDArray[np.int64] | None = None) -> bootstrap.Resampled:
        return bootstrap.resample(
            episodes.counts[None] if counts is None else counts,
            episodes.classes,
            episodes.class_ids,
            seed=self._key(episodes.fold),
            groups=self._groups(episodes),
        )

    def _key(self, fold: int) -> int:
        return self.seed * 10_000 + fold  # folds are drawn apart even where they share a class

    def _groups(self, episodes: ScoredEpisodes) -> tuple[str, ...] | None:
        return episodes.queries if self.unit == "query" else None

    def _score(
        self,
        policy: Policy,
        shots: int,
        fusion: str,
        folds: Sequence[tuple[ScoredEpisodes, bootstrap.Resampled]],
        image_size: int | None,
    ) -> Score:
        miou = _mean_interval([drawn.miou() for _, drawn in folds])
        fb = _mean_interval([drawn.fb_iou() for _, drawn in folds])
        each = [episodes for episodes, _ in folds]
        count = sum(map(len, each))
        single = len(folds) == 1
        sections = self.sections
        return Score(
            policy=policy,
            shots=shots,
            fusion=fusion,
            fold=each[0].fold if single else None,
            seeds=tuple(sorted({int(seed) for episodes in each for seed in episodes.seeds})),
            episodes=count,
            queries=sum(len(set(zip(some.classes.tolist(), some.queries, strict=True))) for some in each),
            miou=miou,
            fb_iou=None if np.isnan(fb.value) else fb,
            needed=bootstrap.episodes_for(miou, count),
            classes=_class_parts(*folds[0]) if single and "class" in sections else (),
            sizes=self._sizes(each, image_size) if "size" in sections else (),
            support=spread_by_support(each, shots, self.seed) if "support" in sections else None,
            spread=self._spread(each[0]) if single and "seed" in sections else None,
        )

    def _sizes(self, folds: Sequence[ScoredEpisodes], image_size: int | None) -> tuple[Part, ...]:
        """mIoU over the classes with two or more episodes whose objects have a size, all folds together."""
        if image_size is None:
            return ()
        shares = [episodes.object_pixels / image_size**2 for episodes in folds]
        bins = [("0 px (no object, or vanished when squashed)", [share == 0 for share in shares])]
        for low, high in pairwise(SIZE_EDGES):
            inside = [(share > low) & (share <= high) for share in shares]
            bins.append((f"{100 * low:g} to {100 * high:g} %", inside))
        parts = []
        for name, masks in bins:
            varying = [_varying(episodes, mask) for episodes, mask in zip(folds, masks, strict=True)]
            count, everything = sum(map(len, varying)), sum(int(mask.sum()) for mask in masks)
            if not everything and name.startswith("0 px"):
                continue
            if not count:
                parts.append(Part(name, everything, None, 0))
                continue
            value, samples, classes = 0.0, np.zeros(bootstrap.RESAMPLES), 0
            for episodes in varying:
                iou, drawn = self._resampled(episodes).class_iou()
                value, samples = value + iou[0].sum(), samples + drawn[:, 0].sum(1)
                classes += len(episodes.class_ids)
            parts.append(Part(name, count, interval(value / classes, samples / classes), classes))
        return tuple(parts)

    def _spread(self, episodes: ScoredEpisodes) -> Spread | None:
        seeds = sorted({int(seed) for seed in episodes.seeds})
        if len(seeds) < 2:
            return None
        parts, mious, errors = [], [], []
        for seed in seeds:
            of_seed = _only(episodes, episodes.seeds == seed, episodes.class_ids)
            (miou,), samples = self._resampled(of_seed).miou()
            parts.append(Part(f"seed {seed}", len(of_seed), interval(miou, samples[:, 0]), len(episodes.class_ids)))
            mious.append(miou)
            errors.append(samples[:, 0].std())
        return Spread(tuple(parts), float(np.std(mious, ddof=1)), float(np.mean(errors)))

    def differences(
        self,
        files: Sequence[Results],
        against: Sequence[Results],
        policies: Sequence[Policy],
        fusions: Sequence[str],
        fusion_against: str | None,
    ) -> list[Difference]:
        """As `scores`, of `files` minus `against`."""
        differences: list[Difference] = []
        for policy in policies:
            for shots, fusion in cases_of(files, fusions):
                other = fusion_against or paired_fusion(files, against, (shots, fusion), fusions)
                if against is files and other == fusion:
                    continue
                folds = []
                for fold in _folds(files):
                    first = scored_episodes(files, fold, shots, fusion, policy)
                    second = scored_episodes(against, fold, shots, other, policy)
                    if first is not None and second is not None:
                        require_same_rows(first, second, f"Fold {fold}, {shots}-shot")
                        folds.append(self._pair(first, second))
                for some in together_and_apart(folds):
                    differences.append(self._difference(policy, shots, fusion, other, some))
        if not differences:
            raise DataError(
                f"Nothing can be paired: there are no rows of a number of shots and fusion in both. Fusions are "
                f"{', '.join(files[0].fusions)} and {', '.join(against[0].fusions)}."
            )
        return differences

    def _pair(self, first: ScoredEpisodes, second: ScoredEpisodes) -> _Pair:
        counts = np.stack([first.counts, second.counts])
        real, swapped = bootstrap.swapped_differences(
            counts, first.classes, first.class_ids, seed=self._key(first.fold), groups=self._groups(first)
        )
        return _Pair(first, self._resampled(first, counts), real, swapped)

    def _difference(self, policy: Policy, shots: int, fusion: str, other: str, folds: Sequence[_Pair]) -> Difference:
        miou = _mean_interval([_first_minus_second(*pair.drawn.miou()) for pair in folds])
        fb = _mean_interval([_first_minus_second(*pair.drawn.fb_iou()) for pair in folds])
        count = sum(len(pair.episodes) for pair in folds)
        single = folds[0] if len(folds) == 1 else None
        classes: tuple[Part, ...] = ()
        if single and "class" in self.sections:
            values, samples = single.drawn.class_iou()
            apart = samples[:, 0] - samples[:, 1]
            classes = _parts(single.episodes, values[0] - values[1], apart, single.drawn.units, lowest=-100)
        real = float(np.mean([pair.real for pair in folds]))
        return Difference(
            policy=policy,
            shots=shots,
            fusion=fusion,
            fusion_against=other,
            fold=single.episodes.fold if single else None,
            episodes=count,
            miou=miou,
            p=bootstrap.p_value(real, np.mean([pair.swapped for pair in folds], axis=0)),
            fb_iou=None if np.isnan(fb.value) else fb,
            needed=bootstrap.episodes_for(miou, count),
            classes=classes,
        )


class _Pair(NamedTuple):
    """Two methods on the episodes of one fold."""

    episodes: ScoredEpisodes
    """Episodes of the first; the second has the same."""
    drawn: bootstrap.Resampled
    """Both."""
    real: float
    """Difference of mIoU, points."""
    swapped: Floats
    """What it is when the two are swapped at random."""


def _folds(files: Sequence[Results]) -> list[int]:
    return sorted({file.fold for file in files})


def _first_minus_second(values: Floats, samples: Floats) -> tuple[Floats, Floats]:
    """The difference of two methods, as one method."""
    return values[:1] - values[1:2], samples[:, :1] - samples[:, 1:2]


def _mean_interval(folds: Sequence[tuple[Floats, Floats]]) -> Interval:
    """The mean over folds, each drawn by itself."""
    value = float(np.mean([values[0] for values, _ in folds]))
    samples = np.mean([samples[:, 0] for _, samples in folds], axis=0)
    return interval(value, samples) if np.isfinite(value) else Interval(value, value, value)


def _only(episodes: ScoredEpisodes, mask: NDArray[np.bool_], class_ids: tuple[int, ...] = ()) -> ScoredEpisodes:
    """Some of the episodes, with the classes they have or those given."""
    kept = np.flatnonzero(mask)
    classes = episodes.classes[kept]
    return ScoredEpisodes(
        episodes.fold,
        class_ids or tuple(sorted({int(c) for c in classes})),
        episodes.names,
        classes,
        episodes.seeds[kept],
        episodes.numbers[kept],
        tuple(episodes.queries[number] for number in kept),
        tuple(episodes.supports[number] for number in kept),
        episodes.object_pixels[kept],
        episodes.counts[kept],
    )


def _varying(episodes: ScoredEpisodes, mask: NDArray[np.bool_]) -> ScoredEpisodes:
    """Some of the episodes, without those that are alone in their class: nothing tells how far they could be off."""
    counts = Counter(episodes.classes[mask].tolist())
    return _only(episodes, mask & np.array([counts[c] > 1 for c in episodes.classes.tolist()], dtype=bool))


def _class_parts(episodes: ScoredEpisodes, drawn: bootstrap.Resampled) -> tuple[Part, ...]:
    values, samples = drawn.class_iou()
    return _parts(episodes, values[0], samples[:, 0], drawn.units, lowest=0)


def _parts(
    episodes: ScoredEpisodes, values: Floats, samples: Floats, units: NDArray[np.int64], lowest: float
) -> tuple[Part, ...]:
    """One part per class; (C,), (R, C) and (C,). A class with a single unit could be anything from `lowest` to 100."""
    parts = []
    for column, class_id in enumerate(episodes.class_ids):
        value: Interval | None = interval(values[column], samples[:, column])
        if units[column] < 2:
            value = Interval(float(values[column]), lowest, 100.0) if units[column] else None
        parts.append(Part(episodes.names[class_id], int((episodes.classes == class_id).sum()), value))
    return tuple(parts)


def _notes(files: Sequence[Results], scores: Sequence[Score], unit: str) -> tuple[str, ...]:
    notes = [str(note) for file in files[:1] for note in file.facts.get("notes") or ()]
    head = scores[0]
    names = {c: name for file in files for c, name in file.classes.items()}
    tested = {c for file in files for c in file.table["class_id"].unique().to_pylist()}
    empty = sorted(set(names) - tested)
    if empty:
        shown = ", ".join(f"'{names[c]}'" for c in empty[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        notes.append(f"No episode of {shown}{more}: a class without one counts as IoU 0.")
    counts = Counter((file.fold, c) for file in files for c in _classes_of_one_case(file))
    if 0 < min(counts.values()) < 10:
        notes.append(
            f"A class has only {min(counts.values())} episodes. With fewer than 10, intervals hold the truth in about "
            f"92 % of cases, not in 95; a class with a single one adds nothing to that of the mean."
        )
    if unit == "episode" and head.queries < 0.6 * head.episodes:
        notes.append(
            f"{head.episodes:,} episodes have {head.queries:,} different queries: the intervals are about other "
            f"episodes of these photos. --resample query makes them about other photos, too."
        )
    return tuple(notes)


def _classes_of_one_case(file: Results) -> list[int]:
    """Class ids of the episodes of one number of shots and fusion."""
    table = file.table.select(["shots", "fusion", "class_id"]).to_pydict()
    case = table["shots"][0], table["fusion"][0]
    return [c for k, f, c in zip(*table.values(), strict=True) if (k, f) == case]
