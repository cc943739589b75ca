"""Everything the page says in figures, made by `pipeline.analyze` from the rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hsnet.errors import HSNetError
from pipeline.analyze import SECTIONS, analyze
from pipeline.episodes.protocols import POLICIES, Policy
from pipeline.report.inputs import ResultSet
from pipeline.scores.analysis import Difference, Score


@dataclass(frozen=True)
class SetScores:
    """The scores of one set of results."""

    results: ResultSet
    headline: tuple[Score, ...]
    """By the protocol's own policy and fusion, per number of shots; of every fold, and their mean if there are several.
    With classes, sizes, supports and seeds."""
    everything: tuple[Score, ...]
    """Every policy and fusion of the rows, without those parts."""
    fusions: tuple[Difference, ...]
    """Every other way to combine supports minus the protocol's own, on the same episodes."""
    policies: tuple[Policy, ...]
    """Those that all files of the set have counts of."""
    notes: tuple[str, ...]

    def totals(self, scores: Sequence[Score]) -> list[Score]:
        """One score per policy, fusion and number of shots: the mean over folds where there are several."""
        several = len(self.results.folds) > 1
        wanted = []
        for score in scores:
            rivals = [s for s in scores if (s.policy, s.shots, s.fusion) == (score.policy, score.shots, score.fusion)]
            if score.fold is None or not several or len(rivals) == 1:
                wanted.append(score)
        return wanted

    def total(self, policy: Policy, shots: int, fusion: str) -> Score | None:
        """The score of one policy, number of shots and fusion; None if it was not scored."""
        wanted = [s for s in self.everything if (s.policy, s.shots, s.fusion) == (policy, shots, fusion)]
        return next(iter(self.totals(wanted)), None)


@dataclass(frozen=True)
class SetDifference:
    """The first set of the page minus another one on the same episodes."""

    first: ResultSet
    other: ResultSet
    differences: tuple[Difference, ...]
    """Empty if they cannot be paired."""
    reason: str = ""
    """Why not."""


def score_set(results: ResultSet, *, unit: str = "episode", seed: int = 0) -> SetScores:
    """All scores of a set. Raises DataError or ConfigError as `pipeline.analyze.analyze`."""
    usual = results.first.protocol.fusion
    policies = tuple(p for p in POLICIES if all(p in file.policies for file in results.files))
    head = analyze(results.files, fusions=(usual,), sections=SECTIONS, unit=unit, seed=seed)
    everything = analyze(results.files, policies=policies, sections=(), unit=unit, seed=seed)
    others = [name for name in dict.fromkeys(s.fusion for s in everything.scores) if name != usual]
    fusions = [
        difference
        for name in others
        for difference in analyze(
            results.files, fusions=(name,), fusion_against=usual, sections=(), unit=unit, seed=seed
        ).differences
        if difference.shots > 1  # with one support all ways answer alike
    ]
    return SetScores(results, head.scores, everything.scores, tuple(fusions), policies, head.notes)


def set_differences(sets: Sequence[ResultSet], *, unit: str = "episode", seed: int = 0) -> list[SetDifference]:
    """The first set minus every other of its data set, paired where the episodes are the same."""
    first, apart = sets[0], []
    for other in sets[1:]:
        if first.first.facts["data"] != other.first.facts["data"]:
            continue
        try:
            analysis = analyze(
                first.files,
                other.files,
                fusions=(first.first.protocol.fusion,),
                fusion_against=other.first.protocol.fusion,
                sections=(),
                unit=unit,
                seed=seed,
            )
            apart.append(SetDifference(first, other, analysis.differences))
        except HSNetError as error:
            apart.append(SetDifference(first, other, (), _one_line(error)))
    return apart


def _one_line(error: HSNetError) -> str:
    """The first line of a message, as a sentence."""
    return str(error).splitlines()[0].rstrip(":.") + "."
