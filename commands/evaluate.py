"""`hsnet evaluate`: score a head on episodes of held-out classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.groups import on_interrupt
from commands.options import (
    ANY_PATH,
    Episodes,
    Integers,
    Whole,
    address_option,
    arithmetic_option,
    common_options,
    device_option,
    options,
    seed_option,
    store_option,
    workers_option,
)
from commands.steps import emit, open_runner, pick_device, store_source
from pipeline.terminal import Progress, plain, set_up_logging, table

if TYPE_CHECKING:
    from pipeline.features import FeatureSource
    from pipeline.methods import Method


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
@click.option("--shots", type=Integers(), default="1", show_default=True, metavar="K,...", help="Supports per query.")
@click.option(
    "--episodes",
    type=Episodes(),
    default="1000",
    show_default=True,
    metavar="N|reference",
    help="How many; or the published code's own 1,000.",
)
@click.option(
    "--distinct-supports", is_flag=True, help="No support twice in an episode; the published code lets them repeat."
)
@seed_option
@click.option("--out", type=ANY_PATH, metavar="ROWS.parquet", help="Write one row per episode.")
@options(arithmetic_option, workers_option, address_option, device_option)
@common_options
def evaluate(
    checkpoint_path: Path | None,
    baseline: str | None,
    store: Path,
    fold: int | None,
    shots: tuple[int, ...],
    episodes: Any,
    distinct_supports: bool,
    seed: int,
    out: Path | None,
    arithmetic: str,
    workers: int,
    address: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
) -> Any:
    """Score a checkpoint on episodes of the fold's held-out classes: mIoU, FB-IoU and IoU per class.

    The same rows come out for any number of workers.

    \b
    Example:
      hsnet evaluate --checkpoint runs/voc-0 --store voc.zarr --fold 0 --shots 1,5 --out rows.parquet
    """
    set_up_logging(quiet)
    on_interrupt("No result was written.")
    if episodes == "reference" and distinct_supports:
        raise click.UsageError("The reference episodes let supports repeat: leave out --distinct-supports.")
    if (checkpoint_path is None) == (baseline is None):
        raise click.UsageError("Give --checkpoint C or --baseline cosine|location|untrained, one of them.")
    from pipeline import methods
    from pipeline.evaluate import evaluate as stage
    from pipeline.evaluate import require_writable, write_rows

    if out is not None:
        require_writable(out)

    device = pick_device(device, address)
    make_source = store_source(store)
    source = make_source()
    if checkpoint_path is not None:
        method = methods.trained(checkpoint_path, source, device, arithmetic)
        fold = _tested_fold(method, source, fold)
    elif baseline == "untrained":
        fold, method = fold or 0, methods.untrained(source, seed, device)
    else:
        click.echo(f"Fitting the {baseline} baseline on training episodes", err=True) if not quiet else None
        fold = fold or 0
        method = (methods.cosine if baseline == "cosine" else methods.location)(source, fold, seed)
    with open_runner(workers, address, device) as runner, Progress("evaluate", "episodes", quiet) as progress:
        result = stage(
            method.make,
            make_source,
            source.index,
            fold=fold,
            shots=shots,
            episodes=episodes,
            seed=seed,
            repeat_supports=not distinct_supports,
            skipped=tuple(source.skipped),
            runner=runner,
            device=device,
            protocol={"method": method.facts, "recipe": source.recipe.to_dict()},
            on_event=progress.update,
        )
    classes = source.index.classes
    named = [
        {
            **plain(scores),
            "per_class": {classes[c]: value for c, value in scores.per_class.items()},
            "episodes_per_class": {classes[c]: n for c, n in scores.episodes_per_class.items()},
        }
        for scores in result.scores
    ]
    report = {"scores": named, "protocol": result.protocol, "rows": out}
    printed = emit(report, _scores_text(result.scores, classes), as_json)
    if out is not None:  # after the table: a disk that is full by now does not cost it
        write_rows(out, result.rows)
    without = sum(count == 0 for count in result.scores[0].episodes_per_class.values())
    if without and not quiet:
        click.echo(f"Note: {without} classes had no episode and count as 0. Use more --episodes.", err=True)
    return printed


def _tested_fold(method: Method, source: FeatureSource, fold: int | None) -> int:
    """The fold to test a trained head on: its own unless another is asked for. Warns if it knows the classes."""
    from pipeline.methods import classes_seen

    trained_on = method.facts["trained_on"]
    if fold is None:
        fold = trained_on["fold"] if trained_on else 0
    seen = [source.index.classes[class_id] for class_id in classes_seen(method, source, fold)]
    if seen:
        click.echo(
            f"Warning: the head was trained on {len(seen)} of the classes tested here ({', '.join(seen[:5])}): it held "
            f"out fold {trained_on['fold']}, not fold {fold}. This is no few-shot result.",
            err=True,
        )
    return fold


def _scores_text(all_scores: Sequence[Any], classes: Mapping[int, str]) -> str:
    head = ["", *(f"{scores.shots}-shot" for scores in all_scores)]
    rows = [
        ["mIoU", *(f"{scores.miou:.1f}" for scores in all_scores)],
        ["FB-IoU", *(f"{scores.fb_iou:.1f}" for scores in all_scores)],
        ["episodes", *(str(scores.episodes) for scores in all_scores)],
    ]
    for c in all_scores[0].per_class:
        rows.append([f"  {classes[c]}", *(f"{scores.per_class[c]:.1f}" for scores in all_scores)])
    return table(rows, head)
