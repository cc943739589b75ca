"""What an evaluation will do: the method, its fold, the episodes and the masks, found before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hsnet.errors import ConfigError, DataError
from pipeline.datasets import DATASETS, open_dataset, reader_of
from pipeline.datasets.index import DatasetIndex
from pipeline.datasets.unseen import training_index, unseen_classes
from pipeline.episodes.drawing import PlannedTest
from pipeline.episodes.manifest import Manifest
from pipeline.episodes.protocols import FUSIONS, Protocol
from pipeline.features.recipe import difference_lines
from pipeline.heads.catalogue import FOLD, Method, head_named, made, on_trained, trained
from pipeline.heads.checkpoint import BEST, LAST, SAME_FEATURES, load_checkpoint
from pipeline.loading.source import FeatureSource, RelistedSource, StoreSource
from pipeline.store.feature_store import FeatureStore

if TYPE_CHECKING:
    from pipeline.datasets import Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """One method, the episodes it is tested on, and the rules it is scored by."""

    method: Method
    source: FeatureSource
    make_source: Callable[[], FeatureSource] | None = None
    """Opens the source in a worker process, so it must be picklable for Ray; None if all work is done in this one."""
    fold: int
    protocol: Protocol
    manifests: Sequence[PlannedTest] = ()
    """Instead of the protocol's own episodes; see `pipeline.episodes.manifest`."""
    index: DatasetIndex | None = None
    """The source's index with other lists (`pipeline.datasets.unseen`); None takes the source's own."""
    skipped: Collection[int] = ()
    """Images that must not be drawn, beside those that the source lacks."""
    fusions: Sequence[str] = ()
    """Ways to combine supports that get rows beside the protocol's own."""
    dataset: Dataset | None = None
    """The photos behind the source, for scores at original size; only masks are read. Needed if the protocol's
    headline is at original size."""
    data_root: Path | None = None
    """Folder of `dataset`, for the results: a report may look for photos there."""
    trained_on: Sequence[str] = ()
    """Names of the tested classes that the head was trained on; told with the results."""
    resident: str = "off"
    """Keep the episodes' images in memory, in every worker process (`pipeline.loading.resident.keep`)."""
    device: str = "cpu"


def plan_evaluation(
    make_source: Callable[[], FeatureSource],
    protocol: Protocol,
    *,
    checkpoint: Path | None = None,
    head: str | None = None,
    fold: int | None = None,
    transfer: bool = False,
    trained_on: str | Path | None = None,
    manifest: Manifest | None = None,
    shots: Sequence[int] = (),
    ways: int | None = None,
    fusions: Sequence[str] = (),
    fusion: str | None = None,
    reader: str | None = None,
    data_root: Path | None = None,
    splits: Path | None = None,
    data_options: Mapping[str, Any] | None = None,
    resident: str = "off",
    arithmetic: str = "float32",
    device: str = "cpu",
    source: FeatureSource | None = None,
) -> EvaluationPlan:
    """Find out what is to be evaluated: the method, its fold, the episodes and the masks at the photos' own size.

    Args:
        make_source: opens the features, here and once per worker process; must be picklable for Ray.
        checkpoint, head: what answers: a checkpoint (or a run directory), or a name of
            `pipeline.heads.catalogue.HEADS`; one of them, or both for a head that stands on a trained one.
        fold: whose classes are tested; None is the one that the head held out, or 0.
        transfer: test on all classes that the head was not trained on instead.
        trained_on: with `transfer`, the store it was trained on, for heads that do not say. For a head without a
            checkpoint: the store, or the checkpoint, of a head that it shall be compared with, whose classes are left
            out for it, too. A head that is fitted on training classes is fitted on that store's; with a checkpoint, on
            photos of its classes that the tested store has; with neither, on the training classes of `fold`.
        manifest: its episodes, fold and role instead of the protocol's; the protocol is changed to match.
        shots: with `manifest`, the numbers of shots; none takes the manifest's.
        ways: with `manifest`, the number of classes its episodes must have; None takes the manifest's.
        fusions: ways to combine supports that get rows beside the headline's.
        fusion: the headline's way, if somebody asked for one; None is the head's own or, without one, the protocol's.
        reader, data_root, splits, data_options: the data set behind the features, as `pipeline.datasets.open_dataset`
            takes it, for scores at original size. By default only shapes, which need no folder, are opened.
        source: what `make_source` opens, if it was opened before.

    Raises:
        ConfigError: a data set whose reader is not known, a fusion that the head has not, or what `open_dataset`,
            `made` and `trained` refuse.
        DataError: a manifest of another number of ways.
        CheckpointError, CheckpointMismatch, DataError, StoreError: what was named is not there or does not fit.
    """
    if manifest is not None and ways is not None:
        require_ways(manifest, ways)
    source = source or make_source()
    data_root = data_root and data_root.absolute()  # a worker on another machine has another working directory
    dataset = _full_size(source.index, reader, data_root, splits and splits.absolute(), data_options or {})
    index = None
    if checkpoint is not None:
        method = trained(checkpoint, source, device, arithmetic)
        if head is not None:
            method = on_trained(head, method)
        if not transfer and fold is None:
            fold = method.held_out
    elif transfer and head_named(str(head)).needs == FOLD:
        method, trained_on = _fitted(str(head), source, trained_on, fold or 0, protocol.seeds[0], device), None
    else:
        method = made(str(head), source, fold=fold or 0, seed=protocol.seeds[0], device=device)
    if transfer:
        index, fold = _transfer(method, source.index, trained_on, fold)
    fold = fold or 0
    manifests: tuple[PlannedTest, ...] = ()
    if manifest is not None:
        fold, wanted = manifest.fold, tuple(sorted(shots or (manifest.shots,)))
        drawn = {name: manifest.made[name] for name in ("draw", "balance", "repeat_supports") if name in manifest.made}
        drawn |= {"ways": manifest.ways, "absent": float(manifest.made.get("absent", manifest.absent / len(manifest)))}
        seed = int(manifest.made.get("seed", 0))
        manifests = (PlannedTest(wanted, seed, manifest.first(wanted[-1])),)
        protocol = replace(protocol, episodes=len(manifest), shots=wanted, seeds=(seed,), role=manifest.role, **drawn)
    protocol, fusions = _with_fusion(protocol, method, fusion, fusions)
    known = () if transfer else _classes_known(method, source.index, fold, protocol.role)
    return EvaluationPlan(
        method=method,
        source=source,
        make_source=make_source,
        fold=fold,
        protocol=protocol,
        manifests=manifests,
        index=index,
        fusions=fusions,
        dataset=dataset,
        data_root=data_root,
        trained_on=known,
        resident=resident,
        device=device,
    )


def require_ways(manifest: Manifest, ways: int) -> None:
    """Refuse episodes of another number of classes. Raises DataError."""
    if manifest.ways != ways:
        raise DataError(
            f"The manifest holds {manifest.ways}-way episodes, {ways}-way ones were asked for. Give --ways "
            f"{manifest.ways}, or make a manifest with `hsnet episodes make --ways {ways}`. Nothing was computed."
        )


def _with_fusion(
    protocol: Protocol, method: Method, asked: str | None, others: Sequence[str]
) -> tuple[Protocol, Sequence[str]]:
    """The protocol with the head's own fusion as the headline's, or the one that was asked for, and the other fusions.

    Where all are wanted, those are all that the head has.

    Raises:
        ConfigError: a joint answer of a head that has none.
    """
    if (head := method.head) is None:
        return protocol, others
    if head.fusion is not None:
        protocol = replace(protocol, fusion=asked or head.fusion)
    if set(others) == set(FUSIONS) and not head.joint:
        others = [name for name in others if name != "joint"]
    if not head.joint and "joint" in (protocol.fusion, *others) and max(protocol.shots) > 1:
        raise ConfigError(
            f"Head '{method.facts['name']}' answers each support by itself: it has no fusion joint. Choose vote, "
            f"logits or probabilities. Nothing was computed."
        )
    return protocol, others


def _full_size(
    index: DatasetIndex, reader: str | None, root: Path | None, splits: Path | None, options: Mapping[str, Any]
) -> Dataset | None:
    """The data set behind an index, opened for its masks; None if there is none to open."""
    name = reader or reader_of(index.name)
    asked_for = root is not None or reader is not None
    if not asked_for and name != "shapes":
        return None
    if name not in DATASETS:
        raise ConfigError("--data-root needs --dataset: the store does not say which reader made it.")
    dataset = open_dataset(name, root, splits, **options)
    for note in dataset.index.notes:
        log.info("Note: %s", note)
    # Shapes of other options than the store's: nobody asked for scores at their size.
    return dataset if asked_for or dataset.index.digest == index.digest else None


def _transfer(
    method: Method, index: DatasetIndex, trained_on: str | Path | None, fold: int | None
) -> tuple[DatasetIndex, int]:
    """The index narrowed to what the head has not seen, and its fold. Says which classes that are."""
    held_out = fold if method.held_out is None else method.held_out
    if (names := _names_of(trained_on)) is None or method.checkpoint:
        training = None
        if trained_on and names is None:
            training = FeatureStore.open(trained_on, require_complete=False).index
        names = method.names_seen(training, held_out)
    unseen = unseen_classes(index, names, held_out or 0)
    log.info("Tested on %s the head has not seen: %s.", _classes(len(unseen.tested)), ", ".join(unseen.tested))
    log.info("Left out, trained on: %s.", ", ".join(unseen.left_out) or "none")
    for role, some in unseen.elsewhere.items():
        log.info("Held out by no fold of this store, so tested on photos of the '%s' lists: %s.", role, ", ".join(some))
    if unseen.too_few:
        some = tuple(f"{name} ({count})" for name, count in unseen.too_few.items())
        log.info("Not tested, fewer than 2 photos listed (in brackets): %s.", ", ".join(some))
    return unseen.index, unseen.fold


def _names_of(trained_on: str | Path | None) -> tuple[str, ...] | None:
    """Names of the training classes of a checkpoint or run; None for a store or nothing.

    Raises:
        ConfigError: a checkpoint that does not say.
        CheckpointError: as `load_checkpoint`.
    """
    path = None if trained_on is None or "://" in str(trained_on) else Path(trained_on)
    if path is None or not (path.is_file() or any((path / name).is_file() for name in (BEST, LAST))):
        return None
    if classes := load_checkpoint(path).info.classes:
        return tuple(classes)
    raise ConfigError(
        f"{path} does not say which classes it was trained on (it was imported, or made by an earlier version). Give "
        f"the store it was trained on with --trained-on, and the fold it held out with --fold. Nothing was computed."
    )


def _fitted(
    head: str, source: FeatureSource, trained_on: str | Path | None, fold: int, seed: int, device: str
) -> Method:
    """A head fitted on training classes, for a test on all other classes. Says which they were.

    Raises:
        ConfigError: no photo to fit on, or the store named has features of another kind.
    """
    if (names := _names_of(trained_on)) is not None:
        on: FeatureSource = RelistedSource(source, training_index(source.index, names, fold))
        where = "their photos in the store that is tested"
    elif trained_on is not None:
        on, where = StoreSource(FeatureStore.open(trained_on)), f"the training list of fold {fold} of {trained_on}"
        differing = on.recipe.differences(source.recipe)
        if differing := {name: pair for name, pair in differing.items() if name in SAME_FEATURES}:
            raise ConfigError(
                f"Head '{head}' cannot be fitted on {trained_on}, whose features are of another kind:\n"
                f"{difference_lines(differing, 'fitted on', 'tested on')}\nGive a store of features as those tested, "
                f"or leave out --trained-on. Nothing was computed."
            )
    else:
        on, where = source, f"the training list of fold {fold} of the same store"
    classes = on.index.classes
    split = on.index.split(fold, "trn")
    if names is not None and not split.entries:
        raise ConfigError(
            f"Head '{head}' needs classes to be fitted on that are not tested, and {source.index.name} has photos of "
            f"none of the {len(names)} of {trained_on}. Give the store that it was trained on with --trained-on, or a "
            f"head that needs nothing (`hsnet heads`). Nothing was computed."
        )
    fitted = [classes[class_id] for class_id in split.class_ids]
    method = made(head, on, fold=fold, seed=seed, device=device)
    log.info("Head %s is fitted on %s, %s: %s.", head, _classes(len(fitted)), where, ", ".join(fitted))
    return replace(method, facts={**method.facts, "classes": tuple(names or fitted), "fitted_on": fitted})


def _classes(count: int) -> str:
    return f"{count} class{'' if count == 1 else 'es'}"


def _classes_known(method: Method, index: DatasetIndex, fold: int, role: str) -> tuple[str, ...]:
    """Names of the tested classes that the head was trained on, with a warning if there are some."""
    seen = tuple(index.classes[class_id] for class_id in method.classes_seen(index, fold, role))
    if not seen:
        return ()
    trained_on, tested = method.facts.get("trained_on"), len(index.split(fold, role).class_ids)
    same = trained_on is not None and trained_on["data"] == index.digest
    if same and method.held_out != fold:
        why = f"it held out fold {method.held_out}, not fold {fold}"
    else:
        why = "as its checkpoint names them" if not same else f"the list '{role}' is of training classes"
    log.warning(
        "the head was trained on %d of the %s tested here (%s%s): %s. This is no few-shot result%s.",
        len(seen),
        _classes(tested),
        ", ".join(seen[:5]),
        ", ..." if len(seen) > 5 else "",
        why,
        "" if same else "; --transfer tests the classes that are new to it",
    )
    return seen
