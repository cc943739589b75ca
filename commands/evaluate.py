"""`hsnet evaluate`: score a head on episodes of held-out classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.groups import on_interrupt
from commands.options import (
    ANY_PATH,
    DATASETS,
    FILE,
    STORE,
    Episodes,
    Integers,
    Whole,
    address_option,
    arithmetic_option,
    choice_option,
    common_options,
    data_option,
    data_root_option,
    device_option,
    options,
    protocol_option,
    resident_option,
    splits_option,
    store_option,
    workers_option,
)
from commands.steps import emit, open_data, open_runner, pick_device, store_source
from commands.terminal import Progress, fact_lines, plain, set_up_logging, table
from pipeline.scores.tables import interval_text

if TYPE_CHECKING:
    from pipeline.datasets import Dataset
    from pipeline.datasets.index import DatasetIndex
    from pipeline.episodes.manifest import Planned
    from pipeline.episodes.protocols import Protocol
    from pipeline.heads.methods import Method
    from pipeline.loading.source import FeatureSource


@click.command(short_help="mIoU and FB-IoU on held-out classes.")
@click.option("--checkpoint", "checkpoint_path", type=ANY_PATH, metavar="C", help="Checkpoint, or a run: its best.")
@click.option(
    "--baseline",
    type=click.Choice(("cosine", "location", "untrained")),
    help="Instead of a checkpoint: a cosine map cut at a threshold fitted on training episodes; one mask for all "
    "queries, where training objects usually are; or an untrained head.",
)
@store_option
@click.option(
    "--fold",
    type=Whole(0),
    help="Fold whose classes are held out. [default: the one the checkpoint was trained for, or 0]",
)
@options(protocol_option, choice_option)
@click.option("--shots", type=Integers(), metavar="K,...", help="Supports per query. [default: the protocol's]")
@click.option(
    "--episodes",
    type=Episodes(),
    metavar="N|reference",
    help="How many; or the published code's own sequence. [default: the protocol's]",
)
@click.option(
    "--distinct-supports", is_flag=True, help="No support twice in an episode; the published code lets them repeat."
)
@click.option("--seed", type=Whole(0), help="Same seed, same episodes. [default: the protocol's]")
@click.option("--manifest", type=FILE, metavar="M.parquet", help="Test on the episodes of `hsnet episodes make`.")
@click.option(
    "--fusion",
    "fusions",
    type=click.Choice(("vote", "logits", "probabilities", "joint", "all")),
    multiple=True,
    help="Also score this way to combine supports, from the same pass. May be repeated.",
)
@click.option(
    "--transfer", is_flag=True, help="Test on all classes of the store's data set that the head was not trained on."
)
@click.option(
    "--trained-on", type=STORE, metavar="S.zarr", help="With --transfer: the training store, if C is an older head."
)
@click.option(
    "--dataset",
    "data_name",
    type=click.Choice(DATASETS),
    help="With --data-root: the data set's reader, for scores at the photos' own size. [default: the store's]",
)
@options(data_root_option, splits_option, data_option)
@click.option("--out", type=ANY_PATH, metavar="ROWS.parquet", help="Write one row per episode.")
@options(resident_option, arithmetic_option, workers_option, address_option, device_option)
@common_options
def evaluate(**options: Any) -> Any:
    """Score a checkpoint on episodes of the fold's held-out classes: mIoU, FB-IoU and IoU per class.

    The same rows come out for any number of workers. With --data-root, scores at the photos' own size come from the
    same pass; the protocol (`hsnet evaluate --protocol`) says which score is the headline.

    \b
    Example:
      hsnet evaluate --checkpoint runs/voc-0 --store voc.zarr --fold 0 --shots 1,5 --out rows.parquet
      hsnet evaluate --checkpoint runs/voc-0 --store voc.zarr --protocol hsnet --data-root VOC2012 --fusion all
    """
    return _evaluate(**options)


def _evaluate(
    checkpoint_path: Path | None,
    baseline: str | None,
    store: str | Path,
    fold: int | None,
    protocol: str,
    choices: tuple[tuple[str, Any], ...],
    shots: tuple[int, ...] | None,
    episodes: Any,
    distinct_supports: bool,
    seed: int | None,
    manifest: Path | None,
    fusions: tuple[str, ...],
    transfer: bool,
    trained_on: str | Path | None,
    data_name: str | None,
    data_root: Path | None,
    splits: Path | None,
    data_options: tuple[str, ...],
    out: Path | None,
    resident: str,
    arithmetic: str,
    workers: int,
    address: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
) -> Any:
    set_up_logging(quiet)
    on_interrupt("No result was written.")
    if episodes == "reference" and distinct_supports:
        raise click.UsageError("The reference episodes let supports repeat: leave out --distinct-supports.")
    if (checkpoint_path is None) == (baseline is None):
        raise click.UsageError("Give --checkpoint C or --baseline cosine|location|untrained, one of them.")
    if transfer and checkpoint_path is None:
        raise click.UsageError("--transfer asks what a checkpoint was trained on: give --checkpoint.")
    if trained_on and not transfer:
        raise click.UsageError("--trained-on is for --transfer.")
    if manifest is not None and (transfer or episodes or distinct_supports or seed is not None):
        raise click.UsageError("--manifest says which episodes: leave out --transfer, --episodes, --seed and the like.")
    from pipeline.common.files import require_writable, write_table
    from pipeline.episodes.manifest_file import read
    from pipeline.episodes.protocols import FUSIONS, resolve
    from pipeline.evaluate import evaluate as stage
    from pipeline.heads import methods

    if out is not None:
        require_writable(out)
    reference = episodes == "reference"
    rules = resolve(
        protocol,
        **{
            **dict(choices),
            **_given(
                shots=shots,
                draw="reference" if reference else None,
                episodes=None if reference else episodes,
                seeds=None if seed is None else (seed,),
                repeat_supports=False if distinct_supports else None,
            ),
        },
    )
    device = pick_device(device, address)
    # A store that grew since still has the lists the manifest was made for.
    make_source = store_source(store, None if manifest is None else read(manifest).data)
    source = make_source()
    index = source.index
    dataset: Dataset | None = None
    reader = data_name or index.name.split()[0]
    if data_root is not None and reader not in DATASETS:
        raise click.UsageError("--data-root needs --dataset: the store does not say which reader made it.")
    if data_root is not None or data_name is not None or reader == "shapes":
        dataset = open_data(reader, data_root, splits, data_options, quiet)
        if data_root is None and data_name is None and dataset.index.digest != index.digest:
            dataset = None  # other shapes; nobody asked for scores at their size
    if checkpoint_path is not None:
        method = methods.trained(checkpoint_path, source, device, arithmetic)
        if transfer:
            index, fold = _transfer(method, index, trained_on, fold, quiet)
        else:
            fold = _tested_fold(method, source, fold)
    elif baseline == "untrained":
        fold, method = fold or 0, methods.untrained(source, rules.seeds[0], device)
    else:
        click.echo(f"Fitting the {baseline} baseline on training episodes", err=True) if not quiet else None
        fold = fold or 0
        method = (methods.cosine if baseline == "cosine" else methods.location)(source, fold, rules.seeds[0])
    planned: tuple[Planned, ...] = ()
    if manifest is not None:
        planned, rules = _from_file(manifest, rules, shots)
        fold = planned[0].manifest.fold
    notes = rules.departures(dataset=index.name, image_size=source.recipe.image_size, has_ignore=index.has_ignore)
    with open_runner(workers, address, device) as runner, Progress("evaluate", "episodes", quiet) as progress:
        result = stage(
            method.make,
            make_source,
            index,
            fold=fold,
            protocol=rules,
            fusions=FUSIONS if "all" in fusions else fusions,
            dataset=dataset,
            manifests=planned,
            skipped=tuple(source.skipped),
            runner=runner,
            device=device,
            resident=resident,
            store=source.store.identity,
            checkpoint=str(method.facts.get("checkpoint", "")),
            facts={
                "method": method.facts,
                "recipe": source.recipe.to_dict(),
                "notes": notes,
                # Where a report may look for photos and head; what they are is said by the digests.
                "paths": {
                    "store": source.store.path,
                    "checkpoint": checkpoint_path and str(checkpoint_path.absolute()),
                    "data_root": data_root and str(data_root.absolute()),
                },
            },
            on_event=progress.update,
        )
    classes = index.classes
    named = [
        {
            **plain(scores),
            "per_class": {classes[c]: value for c, value in scores.per_class.items()},
            "episodes_per_class": {classes[c]: n for c, n in scores.episodes_per_class.items()},
        }
        for scores in result.scores
    ]
    report = {"scores": named, "facts": result.facts, "rows": out}
    head = fact_lines(rules.lines())
    printed = emit(report, f"{head}\n\n{_scores_text(result.scores, classes)}", as_json)
    if out is not None:  # after the table: a disk that is full by now does not cost it
        write_table(out, result.rows)
    without = sum(count == 0 for count in result.scores[0].episodes_per_class.values())
    for note in () if quiet else notes:
        click.echo(f"Note: {note}", err=True)
    if without and not quiet:
        click.echo(f"Note: {without} classes had no episode and count as 0. Use more --episodes.", err=True)
    return printed


def _from_file(path: Path, rules: Protocol, shots: tuple[int, ...] | None) -> tuple[tuple[Planned, ...], Protocol]:
    """The episodes of a manifest, and the rules with what it decides."""
    from pipeline.episodes.manifest import Planned
    from pipeline.episodes.manifest_file import read

    stored = read(path)
    wanted = tuple(sorted(shots or (stored.shots,)))
    made = {name: stored.made[name] for name in ("draw", "balance", "repeat_supports") if name in stored.made}
    seed = int(stored.made.get("seed", 0))
    fixed = dataclasses.replace(rules, episodes=len(stored), shots=wanted, seeds=(seed,), role=stored.role, **made)
    return (Planned(wanted, seed, stored.first(wanted[-1])),), fixed


def _given(**choices: Any) -> dict[str, Any]:
    return {name: value for name, value in choices.items() if value is not None}


def _transfer(
    method: Method, index: DatasetIndex, trained_on: str | Path | None, fold: int | None, quiet: bool
) -> tuple[DatasetIndex, int]:
    """The store's index narrowed to what the head has not seen. Says which classes that are."""
    from pipeline.datasets.unseen import unseen_classes
    from pipeline.heads.methods import names_seen
    from pipeline.store.feature_store import FeatureStore

    training = FeatureStore.open(trained_on, require_complete=False).index if trained_on else None
    held_out = (method.facts.get("trained_on") or {}).get("fold", fold)
    found = unseen_classes(index, names_seen(method, training, held_out), held_out or 0)
    if not quiet:
        click.echo(f"Tested on {len(found.tested)} classes the head has not seen: {', '.join(found.tested)}.", err=True)
        click.echo(f"Left out, trained on: {', '.join(found.left_out) or 'none'}.", err=True)
    return found.index, found.fold


def _tested_fold(method: Method, source: FeatureSource, fold: int | None) -> int:
    """The fold to test a trained head on: its own unless another is asked for. Warns if it knows the classes."""
    from pipeline.heads.methods import classes_seen, tested_fold

    fold = tested_fold(method) if fold is None else fold
    seen = [source.index.classes[class_id] for class_id in classes_seen(method, source, fold)]
    if seen:
        click.echo(
            f"Warning: the head was trained on {len(seen)} of the classes tested here ({', '.join(seen[:5])}): it held "
            f"out fold {tested_fold(method)}, not fold {fold}. This is no few-shot result.",
            err=True,
        )
    return fold


def _scores_text(all_scores: Sequence[Any], classes: Mapping[int, str]) -> str:
    head = ["", *(f"{scores.shots}-shot" for scores in all_scores)]
    rows = [
        ["mIoU", *(interval_text(scores.miou_interval) for scores in all_scores)],
        ["FB-IoU", *(interval_text(scores.fb_iou_interval) for scores in all_scores)],
        ["episodes", *(str(scores.episodes) for scores in all_scores)],
    ]
    for c in all_scores[0].per_class:
        rows.append([f"  {classes[c]}", *(f"{scores.per_class[c]:.1f}" for scores in all_scores)])
    return f"{table(rows, head)}\n\nIn brackets: 95 % intervals, episodes drawn again within each class."
