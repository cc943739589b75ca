"""The rows of an evaluation: one per episode, number of shots and fusion, as Parquet; read back and checked.

Counts are whole numbers of pixels, once per `pipeline.episodes.protocols.Policy`; every score, interval and test is
made of them later (`pipeline.analyze`).

Files of one set may be different folds, seeds and numbers of shots of one configuration; anything else is an error
that names both values. Two sets are paired only on the same episodes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hsnet.errors import ConfigError, DataError
from pipeline.common.files import read_table
from pipeline.episodes.protocols import POLICIES, Policy, Protocol

if TYPE_CHECKING:
    import pyarrow as pa

Fold = TypeVar("Fold")

COUNTS = ("intersection_background", "intersection", "union_background", "union")
"""Columns of an episode's counts, pixels, in the order of `hsnet.metrics.count`; each again with every suffix."""

METADATA = b"hsnet"
"""Key of the table's metadata under which the facts of the evaluation are, as JSON."""


def count_columns(policy: Policy) -> tuple[str, ...]:
    """The four columns of a policy's counts."""
    return tuple(f"{name}{policy.suffix}" for name in COUNTS)


def schema() -> pa.Schema:
    """Columns and types. Those of the original size are null where its masks were not at hand."""
    import pyarrow as pa

    digest = pa.dictionary(pa.int32(), pa.string())
    return pa.schema(
        [
            ("episode", pa.int32()),
            ("fold", pa.int16()),
            ("seed", pa.int64()),
            ("shots", pa.int16()),
            ("fusion", pa.string()),
            ("class_id", pa.int32()),
            ("class_name", pa.string()),
            ("query", pa.string()),
            ("supports", pa.list_(pa.string())),
            *((name, pa.int64()) for policy in POLICIES for name in count_columns(policy)),
            ("object_pixels", pa.int64()),
            ("seconds", pa.float32()),
            ("manifest", digest),
            ("store", digest),
            ("checkpoint", digest),
        ]
    )


_FACTS: dict[str, type] = {"data": str, "dataset": str, "fold": int, "role": str, "classes": dict, "protocol": dict}
_OF_A_FOLD = ("checkpoint", "step", "trained_on", "classes", "threshold", "object_share", "seed")
"""Facts of a method that differ between the folds of one configuration."""


@dataclass(frozen=True)
class Results:
    """One file of rows."""

    path: Path
    facts: Mapping[str, Any]
    """What was evaluated and how, as `pipeline.evaluate` wrote it."""
    protocol: Protocol
    classes: Mapping[int, str]
    """Classes of the fold -> names."""
    table: pa.Table

    @property
    def fold(self) -> int:
        return int(self.facts["fold"])

    @property
    def shots(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.table["shots"].to_pylist())))

    @property
    def fusions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.table["fusion"].to_pylist()))

    @property
    def policies(self) -> tuple[Policy, ...]:
        """Those whose counts are there."""
        return tuple(p for p in POLICIES if not self.table[count_columns(p)[0]].null_count)

    @property
    def checkpoint(self) -> str:
        return str(self.table["checkpoint"][0].as_py())

    @property
    def store(self) -> str:
        return str(self.table["store"][0].as_py())

    @property
    def manifests(self) -> dict[tuple[int, int], str]:
        """(shots, seed) -> digest of the episodes."""
        names = ("shots", "seed", "manifest")
        shots, seeds, digests = (self.table[name].to_pylist() for name in names)
        return dict(zip(zip(shots, seeds, strict=True), digests, strict=True))

    @property
    def image_size(self) -> int | None:
        """Side of the network's input, pixels."""
        size = (self.facts.get("recipe") or {}).get("image_size")
        return size if isinstance(size, int) else None


@dataclass(frozen=True)
class ScoredEpisodes:
    """The episodes of one fold, number of shots and fusion, all seeds, ordered by seed and number."""

    fold: int
    class_ids: tuple[int, ...]
    """Classes that are tested, with or without an episode."""
    names: Mapping[int, str]
    """Class id -> name."""
    classes: NDArray[np.int64]
    """(n,) class ids."""
    seeds: NDArray[np.int64]
    numbers: NDArray[np.int64]
    """(n,) number of the episode within its seed."""
    queries: tuple[str, ...]
    supports: tuple[tuple[str, ...], ...]
    object_pixels: NDArray[np.int64]
    counts: NDArray[np.int64]
    """(n, 2, 2) of one policy, as `hsnet.metrics.count`."""

    def __len__(self) -> int:
        return len(self.classes)

    @property
    def iou(self) -> NDArray[np.float64]:
        """(n,) IoU of each episode's object, percent."""
        return np.asarray(100 * self.counts[:, 0, 1] / np.maximum(self.counts[:, 1, 1], 1))


def read_results(path: Path) -> Results:
    """Read the rows of one evaluation.

    Raises:
        DataError: not there, not Parquet, cut off, not rows of an evaluation, written by an earlier version, or with
            values that cannot be.
    """
    import pyarrow as pa

    table = read_table(path)
    facts = facts_in(path, table)
    if isinstance(facts, dict) and "ways" in facts:
        raise DataError(
            f"{path} holds rows of {facts['ways']}-way episodes: `hsnet analyze` takes them together with others of "
            f"their kind; tables and pages of 1-way scores do not. Nothing was computed."
        )
    wanted = schema()
    missing = [name for name in wanted.names if name not in table.column_names]
    if missing:
        raise DataError(
            f"{path} lacks the columns {', '.join(missing[:6])}{' and more' if len(missing) > 6 else ''}: an earlier "
            f"version wrote it, or something else. Evaluate again."
        )
    lacking = [n for n, kind in _FACTS.items() if not isinstance(facts, dict) or type(facts.get(n)) is not kind]
    if lacking:
        raise DataError(f"{path} does not say its {', '.join(lacking)}. Evaluate again.")
    try:
        protocol = Protocol.from_dict(facts["protocol"])
        classes = {int(class_id): str(name) for class_id, name in facts["classes"].items()}
        table = table.select(wanted.names).cast(wanted)
    except (ConfigError, ValueError, pa.ArrowException) as error:
        raise DataError(f"{path}: {error}. Another version wrote it, or it was changed; evaluate again.") from error
    results = Results(path, facts, protocol, classes, table)
    _check(results)
    return results


def facts_in(path: Path, table: pa.Table) -> Any:
    """The facts of the evaluation that rows come with. Raises DataError if there are none."""
    try:
        return json.loads((table.schema.metadata or {})[METADATA])
    except (KeyError, ValueError, RecursionError) as error:
        raise DataError(f"{path} holds no rows of an evaluation: `hsnet evaluate --out` writes them.") from error


def _check(results: Results) -> None:
    path, table = results.path, results.table
    require_whole(results, table["class_id"].to_pylist())
    for policy in results.policies:
        counts = episode_counts(table, policy)
        wrong = np.flatnonzero((counts < 0).any((1, 2)) | (counts[:, 0] > counts[:, 1]).any(1))
        if len(wrong):
            raise DataError(
                f"{path}, row {wrong[0]} (query {table['query'][int(wrong[0])]}): an intersection that is negative or "
                f"larger than its union."
            )


def require_whole(results: Results, class_ids: Iterable[int]) -> None:
    """Refuse rows that lack something, say a thing twice, or are not all of one evaluation.

    Args:
        class_ids: of all episodes.

    Raises:
        DataError: says what is wrong.
    """
    path, table = results.path, results.table
    if not len(table):
        raise DataError(f"{path} holds no episode.")
    for name in table.column_names:
        nulls = table[name].null_count
        if nulls and not ("_original" in name and nulls == len(table)):
            raise DataError(f"{path}: column '{name}' is empty in {nulls} of {len(table)} rows. Evaluate again.")
    for name in ("store", "checkpoint"):
        if len(table[name].unique()) > 1:
            raise DataError(f"{path} mixes rows of {len(table[name].unique())} values of '{name}'.")
    if set(table["fold"].to_pylist()) != {results.fold} or set(class_ids) - set(results.classes):
        raise DataError(f"{path} says fold {results.fold} with its classes, but has rows of another fold or class.")
    keys = list(zip(*(table[name].to_pylist() for name in ("shots", "fusion", "seed", "episode")), strict=True))
    if len(set(keys)) < len(keys):
        raise DataError(f"{path} has two rows of one episode. Evaluate again.")
    groups: dict[tuple[int, int], dict[str, set[int]]] = {}
    for shots, fusion, seed, episode in keys:
        groups.setdefault((shots, seed), {}).setdefault(fusion, set()).add(episode)
    if any(len({frozenset(episodes) for episodes in group.values()}) > 1 for group in groups.values()):
        raise DataError(f"{path}: not every way to combine supports has rows of all episodes. Evaluate again.")
    names = ("shots", "seed", "manifest")
    if len(set(zip(*(table[name].to_pylist() for name in names), strict=True))) > len(results.manifests):
        raise DataError(f"{path} mixes rows of several manifests under one seed.")


def episode_counts(table: pa.Table, policy: Policy) -> NDArray[np.int64]:
    """(n, 2, 2) of one policy, as `hsnet.metrics.count`, from rows."""
    columns = [table[name].to_numpy() for name in count_columns(policy)]
    return np.stack(columns, axis=1).astype(np.int64).reshape(-1, 2, 2)


def require_one_configuration(files: Sequence[Results]) -> None:
    """Refuse files whose scores must not be put together.

    Raises:
        DataError: another data set, store, method, protocol or recipe, another checkpoint for the same fold, or the
            same episodes twice. Names the files and both values.
    """
    first = files[0]
    for other in files[1:]:
        for name, (mine, theirs) in differences(first, other).items():
            raise DataError(
                f"{first.path} and {other.path} are not of one configuration:\n  {name}   {mine}\n"
                f"{' ' * (len(name) + 2)}   {theirs}\n"
                f"Analyze them apart, or compare them with --against. Nothing was computed."
            )
    heads: dict[int, Results] = {}
    seen: dict[tuple[int, int, int | str], Results] = {}
    for file in files:
        other = heads.setdefault(file.fold, file)
        if (other.checkpoint, _method(other, ())) != (file.checkpoint, _method(file, ())):
            raise DataError(
                f"{other.path} and {file.path} are both of fold {file.fold}, but of different heads:\n"
                f"  {other.checkpoint or _method(other, ())}\n  {file.checkpoint or _method(file, ())}\n"
                f"Compare them with --against. Nothing was computed."
            )
        for (shots, seed), digest in file.manifests.items():
            same = f"{shots}-shot rows of fold {file.fold}, seed {seed}"
            other = seen.setdefault((file.fold, shots, digest), file)
            if other is not file:
                raise DataError(
                    f"{other.path} and {file.path} both hold {same}: the same episodes, manifest {digest}, would count "
                    f"twice. Give one of them. Nothing was computed."
                )
            other = seen.setdefault((file.fold, shots, seed), file)
            if other is not file:
                raise DataError(
                    f"{other.path} and {file.path} both hold {same}, but of different manifests:\n"
                    f"  {other.manifests[shots, seed]}\n  {digest}\nAnalyze them apart. Nothing was computed."
                )


def differences(first: Results, second: Results) -> dict[str, tuple[object, object]]:
    """What keeps two files from being one configuration: name -> both values. Seeds, shots and folds do not."""
    pairs: dict[str, tuple[object, object]] = {}
    for name in ("data", "dataset", "role", "recipe"):
        pairs[name] = first.facts.get(name), second.facts.get(name)
    pairs["store"] = first.store, second.store
    pairs["method"] = _method(first, _OF_A_FOLD), _method(second, _OF_A_FOLD)
    mine, theirs = first.protocol.to_dict(), second.protocol.to_dict()
    for name in mine | theirs:
        if name not in ("seeds", "shots", "digest", "name"):
            pairs[f"protocol's {name}"] = mine.get(name), theirs.get(name)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _method(results: Results, without: Sequence[str]) -> dict[str, Any]:
    method = results.facts.get("method")
    if not isinstance(method, dict):
        return {}
    # Rows of before there were two trained heads say "trained".
    named = {**method, "name": "hsnet"} if method.get("name") == "trained" else method
    return {k: v for k, v in named.items() if k not in without}


def scored_episodes(
    files: Sequence[Results], fold: int, shots: int, fusion: str, policy: Policy
) -> ScoredEpisodes | None:
    """The episodes of all files of a fold, or None if there are none."""
    table = rows_of_case(files, fold, shots, fusion)
    if table is None or table[count_columns(policy)[0]].null_count:
        return None
    classes = next(file.classes for file in files if file.fold == fold)
    return ScoredEpisodes(
        fold,
        tuple(sorted(classes)),
        classes,
        table["class_id"].to_numpy().astype(np.int64),
        table["seed"].to_numpy(),
        table["episode"].to_numpy().astype(np.int64),
        tuple(table["query"].to_pylist()),
        tuple(map(tuple, table["supports"].to_pylist())),
        table["object_pixels"].to_numpy(),
        episode_counts(table, policy),
    )


def rows_of_case(files: Sequence[Results], fold: int, shots: int, fusion: str) -> pa.Table | None:
    """The rows of all files of a fold, by seed and episode, or None if there are none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = []
    for file in files:
        if file.fold == fold:
            wanted = pc.and_(pc.equal(file.table["shots"], shots), pc.equal(file.table["fusion"], fusion))
            parts.append(file.table.filter(wanted))
    table = pa.concat_tables(parts) if parts else None
    return table.sort_by([("seed", "ascending"), ("episode", "ascending")]) if table else None


def require_counts(files: Iterable[Results], policies: Sequence[Policy]) -> None:
    """Refuse files without the counts of a policy. Raises DataError."""
    for policy in policies:
        for file in files:
            if policy not in file.policies:
                raise DataError(
                    f"{file.path} has no counts at {policy}: it was evaluated without the photos' own masks. Evaluate "
                    f"again with --data-root, or choose another --policy."
                )


def cases_of(files: Sequence[Results], fusions: Sequence[str]) -> list[tuple[int, str]]:
    """(shots, fusion) to look at. With one support all fusions answer alike: the protocol's own stands for them.

    Args:
        fusions: empty: the protocol's own for one shot, all there are for more.

    Raises:
        ConfigError: a fusion without rows.
    """
    there = {(k, fusion) for file in files for k in file.shots for fusion in file.fusions}
    known = sorted({fusion for _, fusion in there})
    odd = set(fusions) - set(known)
    if odd:
        raise ConfigError(f"No rows of fusion '{min(odd)}': {files[0].path} has {', '.join(known)}.")
    usual = files[0].protocol.fusion
    order = sorted(known, key=lambda name: (name != usual, name))
    shots = sorted({k for k, _ in there})
    return [
        (k, fusion)
        for k in shots
        for fusion in order
        if (k, fusion) in there and (fusion in fusions if fusions else k > 1 or fusion == usual)
    ]


def paired_fusion(
    files: Sequence[Results], against: Sequence[Results], case: tuple[int, str], fusions: Sequence[str]
) -> str:
    """The fusion of `against` that a case of `cases_of(files, fusions)` is paired with.

    A headline is paired with the headline: heads have their own ways to combine supports.
    """
    shots, fusion = case
    own = not fusions and (shots == 1 or fusion == files[0].protocol.fusion)
    return against[0].protocol.fusion if own else fusion


def together_and_apart(folds: list[Fold]) -> list[list[Fold]]:
    """All folds, if there are several, and each by itself."""
    return ([folds] if len(folds) > 1 else []) + [[fold] for fold in folds]


def require_same_episodes(files: Sequence[Results], against: Sequence[Results]) -> None:
    """Refuse to pair sets that were not scored on the same episodes.

    Raises:
        DataError: another fold, seed or manifest (names both digests), or, though the digests agree, other episodes.
    """
    mine, theirs = _by_key(files), _by_key(against)
    shared = mine.keys() & theirs.keys()
    for key in sorted(mine.keys() | theirs.keys()):
        fold, shots, seed = key
        where = f"fold {fold}, {shots}-shot, seed {seed}"
        if shots not in {k[1] for k in mine} & {k[1] for k in theirs}:
            continue  # one of them was also tested with another number of shots
        if key not in shared:
            there, lacking = (files, against) if key in mine else (against, files)
            digest = (mine if key in mine else theirs)[key].manifests[shots, seed]
            others = ", ".join(
                f"{file.manifests.get((shots, s), '?')} (fold {file.fold}, seed {s})"
                for file in lacking
                for k, s in file.manifests
                if k == shots
            )
            raise DataError(
                f"A paired test needs the same episodes. {there[0].path} has {where}: manifest {digest}\n"
                f"{lacking[0].path} has: {others}. Nothing was computed."
            )
        first, second = mine[key], theirs[key]
        digests = first.manifests[shots, seed], second.manifests[shots, seed]
        if digests[0] != digests[1]:
            raise DataError(
                f"A paired test needs the same episodes, but {where} are of different manifests:\n"
                f"  {first.path}: {digests[0]}\n  {second.path}: {digests[1]}\n"
                f"Evaluate both on one (`hsnet episodes make`, `hsnet evaluate --manifest`). Nothing was computed."
            )
    if not shared:
        raise DataError(
            f"{files[0].path} and {against[0].path} have no number of shots in common. Nothing was computed."
        )


def require_same_rows(first: ScoredEpisodes, second: ScoredEpisodes, what: str) -> None:
    """Refuse to pair what has other episodes though the manifests' digests agree. Raises DataError."""
    if len(first) != len(second):
        raise DataError(f"{what}: {len(first)} and {len(second)} episodes under one manifest. Evaluate again.")
    for i in range(len(first)):
        pair = [(int(e.numbers[i]), int(e.classes[i]), e.queries[i], e.supports[i]) for e in (first, second)]
        if pair[0] != pair[1]:
            raise DataError(
                f"{what}: the digests of the manifests agree, but episode {pair[0][0]} is {pair[0][1:]} here and "
                f"{pair[1][1:]} there. One of the files was changed; evaluate again."
            )


def _by_key(files: Sequence[Results]) -> dict[tuple[int, int, int], Results]:
    return {(file.fold, shots, seed): file for file in files for shots, seed in file.manifests}
