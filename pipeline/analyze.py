"""The analyze stage: scores with intervals, spreads and paired tests, from rows alone.

Every figure is made of the rows of `pipeline.scores.rows`; nothing is predicted. A mean never comes without its
interval.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise

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
    require_one_configuration,
    require_same_episodes,
    require_same_rows,
    scored_episodes,
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
    for policy in policies:
        for file in (*files, *against):
            if policy not in file.policies:
                raise DataError(
                    f"{file.path} has no counts at {policy}: it was evaluated without the photos' own masks. Evaluate "
                    f"again with --data-root, or choose another --policy."
                )
    maker = _Maker(unit, seed, frozenset(sections))
    scores = maker.scores(files, policies, fusions)
    differences: list[Difference] = []
    if against or fusion_against:
        differences = maker.differences(files, against or files, policies, fusions, fusion_against)
    return Analysis(
        tuple(files),
        tuple(against),
        unit,
        tuple(scores),
        tuple(maker.scores(against, policies, fusions)) if against else (),
        tuple(differences),
        _notes(files, scores, unit),
    )


class _Maker:
    """Makes scores and differences with one unit, seed and set of sections."""

    def __init__(self, unit: str, seed: int, sections: frozenset[str]) -> None:
        self.unit, self.seed, self.sections = unit, seed, sections

    def scores(self, files: Sequence[Results], policies: Sequence[Policy], fusions: Sequence[str]) -> list[Score]:
        found: list[Score] = []
        folds = sorted({one.fold for one in files})
        for policy in policies:
            for shots, fusion in _cases(files, fusions):
                made = [
                    (own, self._resampled(own))
                    for fold in folds
                    if (own := scored_episodes(files, fold, shots, fusion, policy)) is not None
                ]
                if not made:
                    continue
                size = files[0].image_size
                each = [self._score(policy, shots, fusion, [one], size) for one in made]
                if len(made) > 1:
                    found.append(self._score(policy, shots, fusion, made, size))
                found += each
        return found

    def _resampled(self, own: ScoredEpisodes, counts: NDArray[np.int64] | None = None) -> bootstrap.Resampled:
        return bootstrap.resample(
            own.counts[None] if counts is None else counts,
            own.classes,
            own.class_ids,
            seed=self._key(own.fold),
            groups=self._groups(own),
        )

    def _key(self, fold: int) -> int:
        return self.seed * 10_000 + fold  # folds are drawn apart even where they share a class

    def _groups(self, own: ScoredEpisodes) -> tuple[str, ...] | None:
        return own.queries if self.unit == "query" else None

    def _score(
        self,
        policy: Policy,
        shots: int,
        fusion: str,
        made: Sequence[tuple[ScoredEpisodes, bootstrap.Resampled]],
        image_size: int | None,
    ) -> Score:
        miou = _mean_interval([drawn.miou() for _, drawn in made])
        fb = _mean_interval([drawn.fb_iou() for _, drawn in made])
        cells = [own for own, _ in made]
        episodes = sum(map(len, cells))
        single = len(made) == 1
        sections = self.sections
        return Score(
            policy=policy,
            shots=shots,
            fusion=fusion,
            fold=cells[0].fold if single else None,
            seeds=tuple(sorted({int(s) for own in cells for s in own.seeds})),
            episodes=episodes,
            queries=sum(len(set(zip(own.classes.tolist(), own.queries, strict=True))) for own in cells),
            miou=miou,
            fb_iou=None if np.isnan(fb.value) else fb,
            needed=bootstrap.episodes_for(miou, episodes),
            classes=_class_parts(*made[0]) if single and "class" in sections else (),
            sizes=self._sizes(cells, image_size) if "size" in sections else (),
            support=spread_by_support(cells, shots, self.seed) if "support" in sections else None,
            spread=self._spread(cells[0]) if single and "seed" in sections else None,
        )

    def _sizes(self, cells: Sequence[ScoredEpisodes], image_size: int | None) -> tuple[Part, ...]:
        """mIoU over the classes with two or more episodes whose objects have a size, all folds together."""
        if image_size is None:
            return ()
        shares = [own.object_pixels / image_size**2 for own in cells]
        bins = [("0 px (vanished when squashed)", [share == 0 for share in shares])]
        for low, high in pairwise(SIZE_EDGES):
            inside = [(share > low) & (share <= high) for share in shares]
            bins.append((f"{100 * low:g} to {100 * high:g} %", inside))
        parts = []
        for name, masks in bins:
            taken = [_varying(own, mask) for own, mask in zip(cells, masks, strict=True)]
            episodes, everything = sum(map(len, taken)), sum(int(mask.sum()) for mask in masks)
            if not everything and name.startswith("0 px"):
                continue
            if not episodes:
                parts.append(Part(name, everything, None, 0))
                continue
            values, samples, classes = 0.0, np.zeros(bootstrap.RESAMPLES), 0
            for own in taken:
                drawn = self._resampled(own)
                value, sample = drawn.class_iou()
                values, samples = values + value[0].sum(), samples + sample[:, 0].sum(1)
                classes += len(own.class_ids)
            parts.append(Part(name, episodes, interval(values / classes, samples / classes), classes))
        return tuple(parts)

    def _spread(self, own: ScoredEpisodes) -> Spread | None:
        seeds = sorted({int(seed) for seed in own.seeds})
        if len(seeds) < 2:
            return None
        parts, errors = [], []
        for seed in seeds:
            one = _only(own, own.seeds == seed, own.class_ids)
            values, samples = self._resampled(one).miou()
            parts.append(Part(f"seed {seed}", len(one), interval(values[0], samples[:, 0]), len(own.class_ids)))
            errors.append(samples[:, 0].std())
        found = [part.value.value for part in parts if part.value is not None]
        return Spread(tuple(parts), float(np.std(found, ddof=1)), float(np.mean(errors)))

    def differences(
        self,
        files: Sequence[Results],
        against: Sequence[Results],
        policies: Sequence[Policy],
        fusions: Sequence[str],
        fusion_against: str | None,
    ) -> list[Difference]:
        found: list[Difference] = []
        folds = sorted({one.fold for one in files})
        for policy in policies:
            for shots, fusion in _cases(files, fusions):
                other = fusion_against or (fusion if len(fusions) or shots > 1 else against[0].protocol.fusion)
                if against is files and other == fusion:
                    continue
                pairs = []
                for fold in folds:
                    mine, theirs = (
                        scored_episodes(files, fold, shots, fusion, policy),
                        scored_episodes(against, fold, shots, other, policy),
                    )
                    if mine is not None and theirs is not None:
                        require_same_rows(mine, theirs, f"Fold {fold}, {shots}-shot")
                        pairs.append((mine, theirs))
                made = [self._pair(mine, theirs) for mine, theirs in pairs]
                if not made:
                    continue
                cells = [mine for mine, _ in pairs]
                each = [
                    self._difference(policy, shots, fusion, other, [one], [own])
                    for one, own in zip(made, cells, strict=True)
                ]
                if len(made) > 1:
                    found.append(self._difference(policy, shots, fusion, other, made, cells))
                found += each
        if not found:
            raise DataError(
                f"Nothing can be paired: there are no rows of a number of shots and fusion in both. Fusions are "
                f"{', '.join(files[0].fusions)} and {', '.join(against[0].fusions)}."
            )
        return found

    def _pair(self, mine: ScoredEpisodes, theirs: ScoredEpisodes) -> tuple[bootstrap.Resampled, float, Floats]:
        counts = np.stack([mine.counts, theirs.counts])
        real, swapped = bootstrap.swapped_differences(
            counts, mine.classes, mine.class_ids, seed=self._key(mine.fold), groups=self._groups(mine)
        )
        return self._resampled(mine, counts), real, swapped

    def _difference(
        self,
        policy: Policy,
        shots: int,
        fusion: str,
        other: str,
        made: Sequence[tuple[bootstrap.Resampled, float, Floats]],
        cells: Sequence[ScoredEpisodes],
    ) -> Difference:
        miou = _mean_interval([_apart(*drawn.miou()) for drawn, _, _ in made])
        fb = _mean_interval([_apart(*drawn.fb_iou()) for drawn, _, _ in made])
        episodes = sum(map(len, cells))
        classes: tuple[Part, ...] = ()
        if len(made) == 1 and "class" in self.sections:
            values, samples = made[0][0].class_iou()
            apart = samples[:, 0] - samples[:, 1]
            classes = _parts(cells[0], values[0] - values[1], apart, made[0][0].units, lowest=-100)
        return Difference(
            policy=policy,
            shots=shots,
            fusion=fusion,
            fusion_against=other,
            fold=cells[0].fold if len(made) == 1 else None,
            episodes=episodes,
            miou=miou,
            p=bootstrap.p_value(
                float(np.mean([real for _, real, _ in made])), np.mean([s for _, _, s in made], axis=0)
            ),
            fb_iou=None if np.isnan(fb.value) else fb,
            needed=bootstrap.episodes_for(miou, episodes),
            classes=classes,
        )


def _cases(files: Sequence[Results], fusions: Sequence[str]) -> list[tuple[int, str]]:
    """(shots, fusion) to look at. With one support all fusions answer alike: the protocol's own stands for them."""
    there = {(k, fusion) for one in files for k in one.shots for fusion in one.fusions}
    known = sorted({fusion for _, fusion in there})
    odd = set(fusions) - set(known)
    if odd:
        raise ConfigError(f"No rows of fusion '{min(odd)}': {files[0].path} has {', '.join(known)}.")
    own = files[0].protocol.fusion
    order = sorted(known, key=lambda name: (name != own, name))
    shots = sorted({k for k, _ in there})
    return [
        (k, fusion)
        for k in shots
        for fusion in order
        if (k, fusion) in there and (fusion in fusions if fusions else k > 1 or fusion == own)
    ]


def _apart(values: Floats, samples: Floats) -> tuple[Floats, Floats]:
    """The first method minus the second, as one method."""
    return values[:1] - values[1:2], samples[:, :1] - samples[:, 1:2]


def _mean_interval(made: Sequence[tuple[Floats, Floats]]) -> Interval:
    """The mean over folds, each drawn by itself."""
    value = float(np.mean([values[0] for values, _ in made]))
    samples = np.mean([samples[:, 0] for _, samples in made], axis=0)
    return interval(value, samples) if np.isfinite(value) else Interval(value, value, value)


def _only(own: ScoredEpisodes, mask: NDArray[np.bool_], class_ids: tuple[int, ...] = ()) -> ScoredEpisodes:
    """Some of the episodes, with the classes they have or those given."""
    places = np.flatnonzero(mask)
    classes = own.classes[places]
    return ScoredEpisodes(
        own.fold,
        class_ids or tuple(sorted({int(c) for c in classes})),
        own.names,
        classes,
        own.seeds[places],
        own.numbers[places],
        tuple(own.queries[place] for place in places),
        tuple(own.supports[place] for place in places),
        own.object_pixels[places],
        own.counts[places],
    )


def _varying(own: ScoredEpisodes, mask: NDArray[np.bool_]) -> ScoredEpisodes:
    """Some of the episodes, without those that are alone in their class: nothing tells how far they could be off."""
    counts = Counter(own.classes[mask].tolist())
    return _only(own, mask & np.array([counts[c] > 1 for c in own.classes.tolist()], dtype=bool))


def _class_parts(own: ScoredEpisodes, drawn: bootstrap.Resampled) -> tuple[Part, ...]:
    values, samples = drawn.class_iou()
    return _parts(own, values[0], samples[:, 0], drawn.units, lowest=0)


def _parts(
    own: ScoredEpisodes, values: Floats, samples: Floats, units: NDArray[np.int64], lowest: float
) -> tuple[Part, ...]:
    """One part per class; (C,), (R, C) and (C,). A class with a single unit could be anything from `lowest` to 100."""
    parts = []
    for place, class_id in enumerate(own.class_ids):
        value: Interval | None = interval(values[place], samples[:, place])
        if units[place] < 2:
            value = Interval(float(values[place]), lowest, 100.0) if units[place] else None
        parts.append(Part(own.names[class_id], int((own.classes == class_id).sum()), value))
    return tuple(parts)


def _notes(files: Sequence[Results], scores: Sequence[Score], unit: str) -> tuple[str, ...]:
    notes = [str(note) for one in files[:1] for note in one.facts.get("notes") or ()]
    head = scores[0]
    names = {c: name for one in files for c, name in one.classes.items()}
    tested = {c for one in files for c in one.table["class_id"].unique().to_pylist()}
    empty = sorted(set(names) - tested)
    if empty:
        shown = ", ".join(f"'{names[c]}'" for c in empty[:5])
        more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
        notes.append(f"No episode of {shown}{more}: a class without one counts as IoU 0.")
    counts = Counter((one.fold, c) for one in files for c in _one_case(one))
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


def _one_case(one: Results) -> list[int]:
    """Class ids of the episodes of one number of shots and fusion."""
    table = one.table.select(["shots", "fusion", "class_id"]).to_pydict()
    case = table["shots"][0], table["fusion"][0]
    return [c for k, f, c in zip(*table.values(), strict=True) if (k, f) == case]
