"""`hsnet evaluate`: score a head on episodes of held-out classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.groups import on_interrupt
from commands.options import (
    ANY_PATH,
    DATASETS,
    FILE,
    HEADS,
    STORE,
    BackgroundScore,
    Episodes,
    Integers,
    Whole,
    absent_option,
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
    ways_option,
    workers_option,
)
from commands.steps import emit, open_runner, parse_data_options, pick_arithmetic, pick_device, store_source
from commands.terminal import Progress, fact_lines, plain, set_up_logging, table
from commands.way_tables import EXPLAINED, background_text, ways_text
from pipeline.common.text import printable
from pipeline.scores.tables import interval_text

if TYPE_CHECKING:
    from pipeline.evaluate.plan import EvaluationPlan


@click.command(short_help="mIoU and FB-IoU on held-out classes.")
@click.option(
    "--checkpoint",
    "checkpoints",
    type=ANY_PATH,
    multiple=True,
    metavar="C",
    help="Checkpoint, or a run: its best. May be repeated: each is tested on its own fold.",
)
@click.option(
    "--head",
    metavar="|".join(HEADS),
    help="Instead of a checkpoint: a head that needs no training; `hsnet heads` says what each is. With --checkpoint: "
    "one that stands on a trained head (tune).",
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
@options(ways_option, absent_option)
@click.option(
    "--background",
    type=BackgroundScore(),
    metavar="fit|B",
    help="With --ways: the background's score, or fit it on training classes. [default: fit; 0 for one class]",
)
@click.option(
    "--fusion",
    "fusions",
    type=click.Choice(("vote", "logits", "probabilities", "joint", "all")),
    multiple=True,
    help="Also score this way to combine supports, from the same pass. May be repeated. The headline of a head "
    "with a way of its own is that one, or the only one named here.",
)
@click.option(
    "--transfer", is_flag=True, help="Test on all classes of the store's data set that the head was not trained on."
)
@click.option(
    "--trained-on",
    type=STORE,
    metavar="S.zarr|C",
    help="With --transfer: the training store, if C is an older head. With --head: store or checkpoint of a head to "
    "compare with, whose classes are left out.",
)
@click.option(
    "--dataset",
    "reader",
    type=click.Choice(DATASETS),
    help="With --data-root: the data set's reader, for scores at the photos' own size. [default: the store's]",
)
@options(data_root_option, splits_option, data_option)
@click.option(
    "--out",
    type=ANY_PATH,
    metavar="ROWS.parquet|DIR",
    help="Write one row per episode; of several checkpoints, a file for each into a folder.",
)
@click.option("--overwrite", is_flag=True, help="With --out: replace rows of another test, or any other file there.")
@options(resident_option, arithmetic_option, workers_option, address_option, device_option)
@common_options
def evaluate(
    checkpoints: tuple[Path, ...],
    store: str | Path,
    protocol: str,
    choices: tuple[tuple[str, Any], ...],
    shots: tuple[int, ...] | None,
    episodes: Any,
    distinct_supports: bool,
    seed: int | None,
    manifest: Path | None,
    ways: int | None,
    absent: float | None,
    background: str | float | None,
    fusions: tuple[str, ...],
    data_options: tuple[str, ...],
    out: Path | None,
    overwrite: bool,
    workers: int,
    address: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
    **tested: Any,
) -> Any:
    """Score a checkpoint on episodes of the fold's held-out classes: mIoU, FB-IoU and IoU per class.

    The same rows come out for any number of workers. With --out, what was answered before an interruption is kept
    beside it (ROWS.parquet.parts), and the same command goes on from there. With --data-root, scores at the photos'
    own size come from the same pass; the protocol (`hsnet evaluate --protocol`) says which score is the headline.

    \b
    Example:
      hsnet evaluate --checkpoint runs/voc-0 --store voc.zarr --fold 0 --shots 1,5 --out rows.parquet
      hsnet evaluate --checkpoint runs/voc-0 --store voc.zarr --protocol hsnet --data-root VOC2012 --fusion all
      hsnet evaluate --checkpoint runs/voc-0 --store voc.zarr --ways 3 --absent 20% --out three.parquet
    """
    set_up_logging(quiet)
    on_interrupt("Give the same command again: it goes on." if out else "No result was written.")
    reference = episodes == "reference"
    if reference and distinct_supports:
        raise click.UsageError("The reference episodes let supports repeat: leave out --distinct-supports.")
    if not checkpoints and tested["head"] is None:
        raise click.UsageError(f"Give --checkpoint C or --head {'|'.join(HEADS)}.")
    if tested["trained_on"] and not tested["transfer"]:
        raise click.UsageError("--trained-on is for --transfer.")
    drawn = (episodes, distinct_supports, absent)
    if manifest is not None and (tested["transfer"] or any(drawn) or seed is not None):
        raise click.UsageError("--manifest says which episodes: leave out --transfer, --episodes, --seed and the like.")
    from pipeline.common.files import require_writable
    from pipeline.episodes.manifest_file import read
    from pipeline.episodes.protocols import FUSIONS, resolve
    from pipeline.evaluate.plan import plan_evaluation

    named = FUSIONS if "all" in fusions else fusions
    files = _files(out, checkpoints)
    for file in files:
        if file is not None:
            require_writable(file)
    given = {
        "shots": shots,
        "draw": "reference" if reference else None,
        "episodes": None if reference else episodes,
        "seeds": None if seed is None else (seed,),
        "repeat_supports": False if distinct_supports else None,
        "ways": None if manifest else ways,
        "absent": absent,
    }
    rules = resolve(protocol, **dict(choices) | {name: value for name, value in given.items() if value is not None})
    stored = None if manifest is None else read(manifest)
    # A store that grew since still has the lists the manifest was made for.
    make_source = store_source(store, stored.data if stored else None)
    source = make_source()
    device = pick_device(device, address)
    tested["arithmetic"] = pick_arithmetic(tested["arithmetic"], device, address)
    plans = [
        plan_evaluation(
            make_source,
            rules,
            source=source,
            checkpoint=checkpoint,
            manifest=stored,
            shots=shots or (),
            ways=ways,
            fusions=named,
            fusion=dict(choices).get("fusion") or (named[0] if len(named) == 1 else None),
            data_options=parse_data_options(data_options),
            device=device,
            **tested,
        )
        for checkpoint in checkpoints or (None,)
    ]
    if ways is not None or plans[0].protocol.several:
        if len(plans) > 1:
            raise click.UsageError("N-way episodes are for one --checkpoint at a time.")
        return _evaluate_ways(plans[0], background, out, overwrite, workers, address, as_json, quiet)
    if background is not None:
        raise click.UsageError("--background is for --ways.")
    return _evaluate_all(plans, files, checkpoints, overwrite, workers, address, as_json, quiet)


def _files(out: Path | None, checkpoints: Sequence[Path]) -> list[Path | None]:
    """Where the rows of each checkpoint go: `out`, or files in it, named after the runs."""
    if out is None or len(checkpoints) < 2:
        return [out] * max(1, len(checkpoints))
    if out.is_file():
        raise click.UsageError(f"{out} is a file; the rows of several checkpoints go into a folder.")
    names: list[str] = []
    for checkpoint in checkpoints:
        whole = checkpoint.absolute()
        base = name = whole.parent.name if whole.suffix == ".safetensors" else whole.name
        number = 1
        while name in names:
            number += 1
            name = f"{base}-{number}"
        names.append(name)
    return [out / f"{name}.parquet" for name in names]


def _evaluate_all(
    plans: Sequence[EvaluationPlan],
    files: Sequence[Path | None],
    checkpoints: Sequence[Path],
    overwrite: bool,
    workers: int,
    address: str | None,
    as_json: bool,
    quiet: bool,
) -> Any:
    from pipeline.evaluate.stage import evaluate_to

    outcomes = []
    with open_runner(workers, address, plans[0].device) as runner, Progress("evaluate", "episodes", quiet) as progress:
        for number, (plan, file) in enumerate(zip(plans, files, strict=True)):
            if len(plans) > 1:
                progress.say(f"{printable(checkpoints[number])}: {number + 1} of {len(plans)}, fold {plan.fold}")
            done = evaluate_to(plan, file, runner=runner, on_event=progress.update, overwrite=overwrite)
            outcomes.append(done)
    classes = plans[0].source.index.classes
    reports = [
        {
            "scores": [
                {
                    **plain(scores),
                    "per_class": {classes[c]: value for c, value in scores.per_class.items()},
                    "episodes_per_class": {classes[c]: n for c, n in scores.episodes_per_class.items()},
                }
                for scores in outcome.scores
            ],
            "facts": outcome.facts,
            "rows": outcome.rows,
        }
        for outcome in outcomes
    ]
    head = fact_lines(plans[0].protocol.lines())
    if len(plans) > 1:
        each = [{"checkpoint": c, **report} for c, report in zip(checkpoints, reports, strict=True)]
        named = [printable(checkpoint) for checkpoint in checkpoints]
        text = _table_of_all(named, [plan.fold for plan in plans], [outcome.scores for outcome in outcomes])
        printed = emit({"checkpoints": each}, f"{head}\n\n{text}", as_json)
    else:
        printed = emit(reports[0], f"{head}\n\n{_scores_text(outcomes[0].scores, classes)}", as_json)
    notes = [*outcomes[0].facts["notes"]]
    if without := sum(count == 0 for count in outcomes[0].scores[0].episodes_per_class.values()):
        notes.append(f"{without} classes had no episode and count as 0. Use more --episodes.")
    for note in () if quiet else notes:
        click.echo(f"Note: {note}", err=True)
    return printed


def _table_of_all(names: Sequence[str], folds: Sequence[int], scores: Sequence[Sequence[Any]]) -> str:
    """One line per checkpoint."""
    head = ["", "fold"]
    for some in scores[0]:
        head += [f"{some.shots}-shot mIoU", "FB-IoU"]
    rows = []
    for name, fold, each in zip(names, folds, scores, strict=True):
        figures = [text for some in each for text in (interval_text(some.miou_interval), f"{some.fb_iou:.1f}")]
        rows.append([name, str(fold), *figures])
    return f"{table(rows, head)}\n\nIn brackets: 95 % intervals. `hsnet analyze` puts folds together."


def _evaluate_ways(
    plan: EvaluationPlan,
    background: str | float | None,
    out: Path | None,
    overwrite: bool,
    workers: int,
    address: str | None,
    as_json: bool,
    quiet: bool,
) -> Any:
    """The same for N classes per episode."""
    from pipeline.evaluate.nway import evaluate_ways

    with open_runner(workers, address, plan.device) as runner, Progress("evaluate", "episodes", quiet) as progress:
        result = evaluate_ways(
            plan, background=background, runner=runner, on_event=progress.update, out=out, overwrite=overwrite
        )
    head = fact_lines({**plan.protocol.lines(), "background": background_text(result.facts["background"])})
    text = f"{head}\n\n{ways_text(result.scores)}\n\n{EXPLAINED}"
    printed = emit({"scores": result.scores, "facts": result.facts, "rows": out}, text, as_json)
    for note in () if quiet else result.facts["notes"]:
        click.echo(f"Note: {note}", err=True)
    return printed


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
