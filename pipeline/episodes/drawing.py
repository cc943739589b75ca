"""Manifests drawn by the rules of a protocol."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from hsnet.errors import DataError
from pipeline.datasets.index import DatasetIndex
from pipeline.episodes.manifest import Manifest, of_episodes, require_there
from pipeline.episodes.protocols import DRAWS, Protocol
from pipeline.episodes.published import reference_episodes
from pipeline.episodes.stream import EpisodeStream
from pipeline.episodes.ways import Ways


@dataclass(frozen=True)
class PlannedTest:
    """A manifest and the numbers of shots that are evaluated on it, the largest being the manifest's own."""

    shots: tuple[int, ...]
    seed: int
    manifest: Manifest


def make(
    index: DatasetIndex, fold: int, shots: int, *, seed: int = 0, skipped: Collection[int] = (), **choices: Any
) -> Manifest:
    """Draw episodes: counter-based ("stream"), or the published code's own ("reference").

    Args:
        skipped: images that cannot be used, such as those that could not be read at extraction.
        choices: `episodes`, `role`, `draw`, `balance`, `repeat_supports`, `ways` and `absent`, as in a `Protocol`.

    Raises:
        ConfigError: no such fold, a class with too few images, or "reference" drawing a skipped image.
    """
    return _draw(Protocol(name="made", shots=(shots,), seeds=(seed,), **choices), index, fold, skipped)


def of_protocol(protocol: Protocol, index: DatasetIndex, fold: int, skipped: Collection[int] = ()) -> list[PlannedTest]:
    """All manifests that a protocol asks for: one per seed, and for "reference" one per number of shots."""
    groups = [(k,) for k in protocol.shots] if protocol.draw == "reference" else [protocol.shots]
    return [
        PlannedTest(shots, seed, _draw(replace(protocol, shots=shots, seeds=(seed,)), index, fold, skipped))
        for seed in protocol.seeds
        for shots in groups
    ]


def _draw(rules: Protocol, index: DatasetIndex, fold: int, skipped: Collection[int]) -> Manifest:
    """The episodes of rules with a single seed, with as many supports as the most shots need."""
    (seed,), shots = rules.seeds, max(rules.shots)
    if rules.draw == "reference":
        drawn = reference_episodes(index, fold, shots, rules.episodes, seed, rules.role)
        require_there(index, drawn, skipped)
    else:
        stream = EpisodeStream(
            index,
            fold,
            rules.role,
            shots,
            seed,
            repeat_supports=rules.repeat_supports,
            exclude=frozenset(skipped),
            balance=rules.balance,
        )
        drawn = [stream[number] for number in range(rules.episodes)]
    if rules.several:
        ways = Ways(
            index,
            fold,
            rules.role,
            rules.ways,
            seed,
            shots=shots,
            absent=rules.absent,
            repeat_supports=rules.repeat_supports,
            exclude=frozenset(skipped),
        )
        drawn = [ways(number, episode) for number, episode in enumerate(drawn)]
    origin = {
        "draw": rules.draw,
        "episodes": rules.episodes,
        "seed": seed,
        "balance": rules.balance,
        "repeat_supports": rules.repeat_supports,
        "skipped": sorted(index.images[image] for image in skipped),
        **({"ways": rules.ways, "absent": rules.absent} if rules.several else {}),
    }
    return of_episodes(index, fold, rules.role, drawn, origin)


def redraw(manifest: Manifest, index: DatasetIndex) -> Manifest | None:
    """Draw a manifest again as it says it was made; None if it was not drawn here.

    Raises:
        ConfigError, DataError: what it says cannot be done with this index.
    """
    origin = manifest.made
    if origin.get("draw") not in DRAWS:
        return None
    numbers = {image_id: number for number, image_id in enumerate(index.images)}
    try:
        skipped = [numbers[image] for image in origin["skipped"]]
        choices = {name: origin[name] for name in ("episodes", "seed", "draw", "balance", "repeat_supports")}
        choices |= {name: origin[name] for name in ("ways", "absent") if name in origin}
    except (KeyError, TypeError) as error:
        raise DataError(f"The manifest does not say how it was made: {error}. It cannot be drawn again.") from error
    return make(index, manifest.fold, manifest.shots, role=manifest.role, skipped=skipped, **choices)
