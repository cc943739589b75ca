"""What a report is made of: rows of evaluations, put into sets of one configuration, and run directories."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hsnet.errors import ConfigError, DataError
from pipeline.scores.rows import Results, differences, read_results, require_one_configuration


@dataclass(frozen=True)
class ResultSet:
    """Files of one configuration: folds, seeds and numbers of shots of one method on one store."""

    files: tuple[Results, ...]
    label: str
    """Tells it from the other sets of the page."""

    @property
    def first(self) -> Results:
        return self.files[0]

    @property
    def dataset(self) -> str:
        return str(self.first.facts["dataset"])

    @property
    def method(self) -> Mapping[str, Any]:
        return as_dict(self.first.facts.get("method"))

    @property
    def backbone(self) -> str:
        return str(as_dict(self.first.facts.get("recipe")).get("backbone", ""))

    @property
    def folds(self) -> tuple[int, ...]:
        return tuple(sorted({file.fold for file in self.files}))

    @property
    def shots(self) -> tuple[int, ...]:
        return tuple(sorted({k for file in self.files for k in file.shots}))


@dataclass(frozen=True)
class Run:
    """What a training run wrote down."""

    path: Path
    label: str
    config: Mapping[str, Any]
    steps: tuple[int, ...]
    losses: tuple[float, ...]
    """Training loss of each step."""
    seconds: tuple[float, ...]
    """Seconds of each step; empty if the run did not say."""
    validated: tuple[int, ...]
    """Steps after which the head was validated."""
    miou: tuple[float, ...]
    """Validation mIoU, percent."""

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, mIoU) of the best validation; None if there was none."""
        if not self.validated:
            return None
        best = max(range(len(self.miou)), key=lambda i: self.miou[i])
        return self.validated[best], self.miou[best]


def read_inputs(paths: Sequence[Path]) -> tuple[list[ResultSet], list[Run]]:
    """Read the rows files and run directories of a command line.

    Raises:
        DataError: nothing there, neither of the two, damaged, or the same rows twice.
        CheckpointError: a run directory cannot be read.
        ConfigError: no path at all.
    """
    if not paths:
        raise ConfigError("A report needs rows of `hsnet evaluate --out`, run directories of `hsnet train`, or both.")
    files: list[Results] = []
    runs: list[Run] = []
    for path in paths:
        if path.is_dir():
            runs.append(read_run(path))
        elif path.exists():
            files.append(read_results(path))
        else:
            raise DataError(f"{path} does not exist. Give rows of `hsnet evaluate --out`, or a run directory.")
    names = _distinct([run.path for run in runs])
    return result_sets(files), [replace(run, label=name) for run, name in zip(runs, names, strict=True)]


def result_sets(files: Sequence[Results]) -> list[ResultSet]:
    """Files that belong together, in the order given. Raises DataError if the same episodes were given twice."""
    sets: list[list[Results]] = []
    for file in files:
        home = next((same for same in sets if _belongs(file, same)), None)
        if home is None:
            sets.append([file])
        else:
            require_one_configuration([*home, file])
            home.append(file)
    labels = _labels(sets)
    return [ResultSet(tuple(same), label) for same, label in zip(sets, labels, strict=True)]


def _belongs(file: Results, same: Sequence[Results]) -> bool:
    """Whether a file is of the configuration, and of the same head where the fold is there already."""
    if differences(same[0], file):
        return False
    rivals = [other for other in same if other.fold == file.fold]
    if any(other.checkpoint != file.checkpoint or _threshold(other) != _threshold(file) for other in rivals):
        return False
    # Another set of episodes under the same seed is another result, not more of this one.
    return all(other.manifests.get(key, digest) == digest for other in rivals for key, digest in file.manifests.items())


def _threshold(file: Results) -> tuple[object, ...]:
    method = as_dict(file.facts.get("method"))
    return tuple(method.get(name) for name in ("threshold", "object_share", "seed", "step"))


def _labels(sets: Sequence[Sequence[Results]]) -> list[str]:
    """Method names where they tell the sets apart, with the data set, then the file, where they do not."""
    plain = [method_name(same[0]) for same in sets]
    with_data = [f"{name} on {same[0].facts['dataset']}" for name, same in zip(plain, sets, strict=True)]
    files = _distinct([same[0].path for same in sets])
    labels = []
    for number, name in enumerate(plain):
        if plain.count(name) == 1:
            labels.append(name)
        elif with_data.count(with_data[number]) == 1:
            labels.append(with_data[number])
        else:
            labels.append(f"{name} ({files[number]})")
    return labels


def method_name(file: Results) -> str:
    """What a reader calls the method of a file."""
    method = as_dict(file.facts.get("method"))
    name = str(method.get("name", "unknown"))
    known = {
        **dict.fromkeys(("hsnet", "trained"), "HSNet"),
        "hsnet+bg": "HSNet with background",
        "untrained": "HSNet, untrained",
        "cosine": "cosine map",
        "location": "location only",
    }
    return known.get(name, name)


def read_run(path: Path) -> Run:
    """Read what `hsnet train` wrote into its run directory.

    Raises:
        DataError: the folder holds no run.
        CheckpointError: its configuration cannot be read.
    """
    from pipeline.heads.run_dir import CONFIG, read_config, read_metrics  # brings torch: not for rows alone

    if not (path / CONFIG).is_file():
        raise DataError(f"{path} is a folder without {CONFIG}: give the --run-dir of `hsnet train`, or a rows file.")
    config, lines = read_config(path), read_metrics(path)
    steps = [(line["step"], *(_number(line.get("train"), name) for name in ("loss", "seconds"))) for line in lines]
    train = [(step, loss, seconds) for step, loss, seconds in steps if loss is not None]
    val = [(line["step"], miou) for line in lines if (miou := _number(line.get("val"), "miou")) is not None]
    return Run(
        path,
        path.name,
        config,
        tuple(step for step, _, _ in train),
        tuple(loss for _, loss, _ in train),
        tuple(seconds for _, _, seconds in train if seconds is not None),
        tuple(step for step, _ in val),
        tuple(miou for _, miou in val),
    )


def as_dict(values: object) -> Mapping[str, Any]:
    """The object of a file that may hold anything; empty if it is none."""
    return values if isinstance(values, dict) else {}


def _number(values: object, name: str) -> float | None:
    value = values.get(name) if isinstance(values, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < float("inf") else None


def _distinct(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ.

    >>> _distinct([Path("runs/a/0"), Path("runs/b/0"), Path("c")])
    ['a/0', 'b/0', 'c']
    """
    names = []
    for number, path in enumerate(paths):
        others = [other.parts for i, other in enumerate(paths) if i != number]
        length = 1
        while length < len(path.parts) and any(other[-length:] == path.parts[-length:] for other in others):
            length += 1
        names.append("/".join(path.parts[-length:]) or str(path))
    return names
