"""`hsnet episodes`: write the episodes of a test down, look at them, check them, bring in those of other code."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.groups import OrderedGroup
from commands.options import (
    ANY_PATH,
    DATASETS,
    STORE,
    Integers,
    Whole,
    absent_option,
    common_options,
    data_option,
    data_root_option,
    fold_option,
    json_option,
    options,
    splits_option,
    ways_option,
)
from commands.steps import emit, open_data
from commands.terminal import fact_lines, plain, table
from pipeline.common.text import printable
from pipeline.episodes.protocols import BALANCES, DRAWS, PROTOCOLS, ROLES

if TYPE_CHECKING:
    from pipeline.datasets.index import DatasetIndex
    from pipeline.episodes.manifest import Manifest

dataset_options = options(
    click.argument("dataset", type=click.Choice(DATASETS), required=False),
    click.option("--store", type=STORE, metavar="S.zarr", help="Take the data set's lists from a feature store."),
    data_root_option,
    splits_option,
    data_option,
)
"""A data set, given as other commands take it or as the store that holds its lists; read by `_index`."""

manifest_argument = click.argument("path", type=ANY_PATH, metavar="M.parquet")


@click.group(cls=OrderedGroup)
def episodes() -> None:
    """Write the episodes of a test down, so that every method is tested on the same ones.

    \b
    Example:
      hsnet episodes make --store voc.zarr --fold 0 --shots 5 --out fold0.parquet
    """


@episodes.command("make", short_help="Draw episodes and write them down.")
@dataset_options
@click.option(
    "--protocol", type=click.Choice(tuple(PROTOCOLS)), default="default", show_default=True, help="Rules to draw by."
)
@fold_option
@click.option("--shots", type=Integers(), metavar="K,...", help="Supports per query. [default: the protocol's]")
@click.option("--episodes", "count", type=Whole(), help="How many. [default: the protocol's]")
@click.option("--seed", type=Whole(0), help="Another seed, other episodes. [default: the protocol's]")
@click.option("--role", type=click.Choice(ROLES), help="Which lists: test, or val. [default: the protocol's]")
@click.option("--draw", type=click.Choice(DRAWS), help="Counter-based, or the published code's own sequence.")
@click.option("--balance", type=click.Choice(BALANCES), help="Queries as listed, or the same number per class.")
@click.option(
    "--distinct-supports/--repeat-supports", "distinct", default=None, help="Whether a support may occur twice."
)
@options(ways_option, absent_option)
@click.option("--out", type=ANY_PATH, metavar="M.parquet", required=True, help="Where to write them.")
@common_options
def make(
    protocol: str,
    fold: int,
    shots: tuple[int, ...] | None,
    count: int | None,
    seed: int | None,
    role: str | None,
    draw: str | None,
    balance: str | None,
    distinct: bool | None,
    ways: int | None,
    absent: float | None,
    out: Path,
    as_json: bool,
    **lists: Any,
) -> Any:
    """Draw the episodes of a protocol and write them to a manifest.

    Fewer shots are the first supports of more, so one file serves every number of shots. Only the published code's
    sequence is another one for every number: it takes a file each, named after it, as do several seeds.

    \b
    Example:
      hsnet episodes make pascal --data-root VOC2012 --splits splits --fold 2 --protocol hsnet --out fold2.parquet
    """
    from pipeline.episodes.drawing import of_protocol
    from pipeline.episodes.manifest_file import write
    from pipeline.episodes.protocols import resolve

    rules = resolve(
        protocol,
        episodes=count,
        shots=shots,
        seeds=None if seed is None else (seed,),
        role=role,
        draw=draw,
        balance=balance,
        repeat_supports=None if distinct is None else not distinct,
        ways=ways,
        absent=absent,
    )
    index, skipped = _index(**lists)
    planned = of_protocol(rules, index, fold, skipped)
    results, texts = [], []
    for test in planned:
        same_seed = sum(other.seed == test.seed for other in planned)
        name = out.stem + (f"-{test.manifest.shots}shot" if same_seed > 1 else "")
        name += f"-seed{test.seed}" if len(rules.seeds) > 1 else ""
        path = out.with_name(name + (out.suffix or ".parquet"))
        write(path, test.manifest)
        results.append(_facts(path, test.manifest))
        texts.append(_text(path, test.manifest))
    return emit(results, "\n\n".join(texts), as_json)


@episodes.command("show", short_help="What a manifest holds: classes, photos, digest.")
@manifest_argument
@click.option("--rows", type=Whole(0), default=0, metavar="N", help="Also list the first N episodes.")
@json_option
def show(path: Path, rows: int, as_json: bool) -> None:
    """Show what a manifest holds, and what a reader of a score on it should know.

    \b
    Example:
      hsnet episodes show fold2.parquet --rows 5
    """
    from pipeline.episodes.manifest import row_text
    from pipeline.episodes.manifest_file import read

    manifest = read(path)
    some = manifest.rows[:rows]
    listed = [f"{number}: {printable(row_text(row, manifest.classes))}" for number, row in enumerate(some)]
    text = "\n".join([_text(path, manifest), *([""] if listed else []), *listed])
    named = [{**plain(row), "classes": [manifest.classes[class_id] for class_id, _ in row.classes]} for row in some]
    emit({**_facts(path, manifest), **({"rows": named} if rows else {})}, text, as_json)


@episodes.command("verify", short_help="Check a manifest against the data, and draw it again.")
@manifest_argument
@dataset_options
@common_options
@click.pass_context
def verify(ctx: click.Context, path: Path, as_json: bool, **lists: Any) -> None:
    """Check that a manifest is as it was written, is of these data, and comes out again when drawn again.

    Exit code 1 if not.

    \b
    Example:
      hsnet episodes verify fold2.parquet --store voc.zarr
    """
    from pipeline.episodes.drawing import redraw
    from pipeline.episodes.manifest import difference, episodes_in
    from pipeline.episodes.manifest_file import read

    manifest = read(path)
    index, skipped = _index(**lists, digest=manifest.data)
    episodes_in(manifest, index, skipped)
    again = redraw(manifest, index)
    first_difference = None if again is None else difference(manifest, again)
    drawn = "imported: there is nothing to draw again" if again is None else "drawn again: the same episodes"
    if first_difference:
        drawn = f"drawn again, other episodes came out; first difference (file, now): {printable(first_difference)}"
    facts = {
        **_facts(path, manifest),
        "drawn_again": None if again is None else not first_difference,
        "difference": first_difference,
    }
    emit(facts, f"{printable(path)}: {len(manifest):,} episodes, all of these data; {drawn}", as_json)
    if first_difference:
        ctx.exit(1)


@episodes.command("import", short_help="Bring in episodes that other code drew.")
@click.argument("source", type=ANY_PATH, metavar="LIST")
@dataset_options
@fold_option
@click.option("--role", type=click.Choice(ROLES), default="test", show_default=True, help="Which lists they are of.")
@click.option(
    "--first-class", type=Whole(0), default=0, show_default=True, help="Number of the first class in the list: 0 or 1."
)
@click.option("--out", type=ANY_PATH, metavar="M.parquet", required=True, help="Where to write them.")
@common_options
def import_(source: Path, fold: int, role: str, first_class: int, out: Path, as_json: bool, **lists: Any) -> Any:
    """Turn a list of episodes (LIST, .csv or .jsonl) into a manifest; or a manifest made for other lists (.parquet).

    A CSV file has the columns query, supports (separated by spaces or semicolons) and class (a name or a number);
    JSON lines have the same fields, supports being a list. Photos are named by id or by a path that ends in it. Every
    photo must be listed for its class in this fold.

    \b
    Example:
      hsnet episodes import theirs.csv --store voc.zarr --fold 0 --first-class 1 --out theirs.parquet
    """
    from pipeline.episodes.imported import import_episodes
    from pipeline.episodes.manifest_file import write

    index, _ = _index(**lists)
    manifest = import_episodes(source, index, fold, role, first_class=first_class)
    write(out, manifest)
    return emit(_facts(out, manifest), _text(out, manifest), as_json)


def _index(
    dataset: str | None,
    store: str | Path | None,
    data_root: Path | None,
    splits: Path | None,
    data_options: Sequence[str],
    quiet: bool,
    digest: str | None = None,
) -> tuple[DatasetIndex, tuple[int, ...]]:
    """The lists that were asked for, and the images that cannot be used; of a store that grew, the state `digest`."""
    if (dataset is None) == (store is None):
        raise click.UsageError("Give a data set (with its --data-root) or --store S.zarr, one of them.")
    if store is None:
        assert dataset is not None
        return open_data(dataset, data_root, splits, data_options, quiet).index, ()
    if data_root or splits or data_options:
        raise click.UsageError(
            "--data-root, --splits and --data-option belong to a data set; --store has its own lists."
        )
    from hsnet.errors import StoreMismatch
    from pipeline.store.feature_store import FeatureStore

    try:
        opened = FeatureStore.open(store, require_complete=False, index_digest=digest)
    except StoreMismatch:  # it never had that state: the manifest's own check says what differs
        opened = FeatureStore.open(store, require_complete=False)
    return opened.index, tuple(opened.skipped)


def _facts(path: Path, manifest: Manifest) -> dict[str, Any]:
    from pipeline.episodes.balance import balance_of, notes
    from pipeline.episodes.published import published_name

    balance = balance_of(manifest)
    return {
        "path": path,
        "digest": manifest.digest,
        "dataset": manifest.dataset,
        "data": manifest.data,
        "fold": manifest.fold,
        "role": manifest.role,
        "shots": manifest.shots,
        "ways": manifest.ways,
        "absent": manifest.absent,
        "episodes": len(manifest),
        "made": manifest.made,
        "published": published_name(manifest),
        "fingerprint": manifest.fingerprint,
        "per_class": {manifest.classes[class_id]: count for class_id, count in balance.per_class.items()},
        "queries": balance.queries,
        "photos": balance.photos,
        "repeating": balance.repeating,
        "notes": notes(manifest),
    }


def _text(path: Path, manifest: Manifest) -> str:
    facts = _facts(path, manifest)
    made = dict(facts["made"])
    drawn = {"stream": "counter-based", "reference": "the published code's sequence"}.get(made.get("draw", ""))
    if drawn:
        drawn += f", seed {made.get('seed')}"
        drawn += ", classes balanced" if made.get("balance") == "class" else ""
        drawn += "" if made.get("repeat_supports", True) else ", distinct supports"
        drawn += f", {len(made['skipped'])} unreadable photos left out" if made.get("skipped") else ""
    lines = {
        "manifest": f"{printable(path)} ({manifest.digest[:15]})",
        "data set": f"{printable(manifest.dataset)} ({manifest.data[:15]}), fold {manifest.fold}, '{manifest.role}'",
        "episodes": f"{len(manifest):,} with {manifest.shots} support{'s' if manifest.shots > 1 else ''} each"
        + (f" of {manifest.ways} classes" if manifest.ways > 1 else "")
        + (f"; {manifest.absent:,} queries show none" if manifest.absent else ""),
        "drawn": drawn or printable(f"imported from {made.get('from', 'elsewhere')}"),
        "photos": f"{facts['queries']:,} different queries, {facts['photos']:,} photos in all",
    }
    if facts["published"]:
        lines["published"] = f"exactly the published code's episodes of {facts['published']}"
    share = 100 / len(manifest)
    most = sorted(facts["per_class"].items(), key=lambda item: -item[1])
    rows = [
        [f"  {printable(name)}", f"{n:,}", f"{n * share:.1f} %"] for name, n in (most[:20] if len(most) > 25 else most)
    ]
    shown = table(rows, ["class", "episodes", "share"])
    if len(most) > 25:
        shown += f"\n  ... and {len(most) - 20} more classes with {most[-1][1]:,} to {most[20][1]:,} episodes"
    return "\n".join([fact_lines(lines), shown, *(f"Note: {printable(note)}" for note in facts["notes"])])
