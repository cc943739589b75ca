"""`hsnet store`: look at feature stores, check, mend and compare them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.extract import extract, run_extraction
from commands.groups import OrderedGroup
from commands.options import (
    ANY_PATH,
    DATASETS,
    STORE,
    Share,
    Whole,
    address_option,
    common_options,
    data_option,
    data_root_option,
    device_option,
    json_option,
    options,
    seed_option,
    splits_option,
    weights_option,
    workers_option,
)
from commands.steps import emit, image_size_for, online_source, open_data, open_runner, pick_device, store_source
from commands.terminal import Progress, fact_lines, set_up_logging, table
from pipeline.common.text import printable, size_text

if TYPE_CHECKING:
    from pipeline.loading.source import FeatureSource
    from pipeline.store.verify import Verification

_CLASSES_SHOWN = 100
"""Classes that `hsnet store info` lists; its --json has all."""


@click.group(cls=OrderedGroup)
def store() -> None:
    """Look at feature stores.

    \b
    Example:
      hsnet store info voc.zarr
    """


@store.command("info", short_help="What a store holds and what is missing.")
@click.argument("path", type=STORE, metavar="S.zarr")
@json_option
def store_info(path: str | Path, as_json: bool) -> None:
    """Show what a store holds and what is missing.

    \b
    Example:
      hsnet store info voc.zarr
    """
    from pipeline.store.feature_store import FeatureStore

    opened = FeatureStore.open(path, require_complete=False)
    index, photos = opened.index, opened.index.photos_per_class()
    folds = {class_id: [f for f, held_out in index.held_out().items() if class_id in held_out] for class_id in photos}
    info = {
        **opened.info(),
        "per_class": [
            {"id": class_id, "name": name, "photos": photos[class_id], "held_out_in": folds[class_id]}
            for class_id, name in index.classes.items()
        ],
        "groups": len(set(index.groups)),
        "notes": list(index.notes),
    }
    recipe, each = info["recipe"], info["bytes_per_image"]
    done = "complete" if info["complete"] else f"{info['shards_missing']} missing: run the same extract again"
    facts = {
        "data set": f"{info['dataset']}, {info['images']} images, {info['classes']} classes",
        "folds": ", ".join(map(str, info["folds"])),
        "backbone": f"{recipe['backbone']}, weights {recipe['weights'][:15]}",
        "image size": f"{recipe['image_size']} px",
        "precision": recipe["precision"] + _coding_text(recipe.get("coding")),
        **_network_facts(recipe),
        "levels": "  ".join("x".join(map(str, level)) for level in info["levels"]),
        "shards": f"{info['shards']} of {info['shard_images']} images, {done}",
        "bytes": size_text(info["bytes"]) + (f", {size_text(each)} per image" if each else ""),
        "skipped": f"{len(info['skipped'])} unreadable images",
    }
    added = [after - before for before, after in pairwise(info["growths"])]
    if added or info["images_to_come"]:
        facts["grown"] = f"{info['growths'][0]} images first" + "".join(f", then {count}" for count in added)
    if info["images_to_come"]:
        facts["grown"] += f"; {info['images_to_come']} more not finished: run the same extract again"
    if info["groups"]:
        facts["groups"] = f"{info['groups']:,}: photos of one group are never query and support of one episode"
    notes = [f"Note: {printable(note)}" for note in info["notes"]]
    emit(info, "\n".join([fact_lines(facts), "", _class_table(info["per_class"]), *notes]), as_json)


def _class_table(classes: Sequence[Mapping[str, Any]]) -> str:
    """A line per class; of very many the first ones."""
    rows = [
        [printable(c["name"]), f"{c['photos']:,}", ", ".join(map(str, c["held_out_in"])) or "-"]
        for c in classes[:_CLASSES_SHOWN]
    ]
    shown = table(rows, ["class", "photos", "held out in fold"])
    more = len(classes) - len(rows)
    return f"{shown}\n... and {more:,} more: --json has all" if more > 0 else shown


@store.command("verify", short_help="Read everything and name what is damaged.")
@click.argument("path", type=STORE, metavar="S.zarr")
@click.option("--recompute", "share", type=Share(), metavar="SHARE", help="Run the backbone again, such as over 1%.")
@click.option("--dataset", type=click.Choice(DATASETS), help="What --recompute reads photos from.")
@options(data_root_option, splits_option, data_option, weights_option)
@click.option("--seed", type=Whole(0), default=0, show_default=True, help="Of the images that are recomputed.")
@options(workers_option, address_option, device_option)
@common_options
@click.pass_context
def store_verify(
    ctx: click.Context,
    path: str | Path,
    share: float | None,
    dataset: str | None,
    data_root: Path | None,
    splits: Path | None,
    data_options: tuple[str, ...],
    weights: str | None,
    seed: int,
    workers: int,
    address: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """Read every chunk of a store, compare all checksums and name what is damaged. Exit code 1 if anything is.

    With --recompute, a share of the images goes through the backbone again and is compared with what is stored: a photo
    that was changed since is found, too. That takes the data set and the weights that the store was made from.

    \b
    Example:
      hsnet store verify voc.zarr --recompute 1% --dataset pascal --data-root VOC2012
    """
    set_up_logging(quiet)
    if share is not None and dataset is None:
        raise click.UsageError("--recompute reads photos again: say of which data set, with --dataset and its options.")
    found = _verify(path, quiet)
    if share is not None and dataset is not None:
        from pipeline.features.weights import load_weights
        from pipeline.store.feature_store import FeatureStore
        from pipeline.store.recompute import recompute

        opened = FeatureStore.open(path, require_complete=False)
        data = open_data(dataset, data_root, splits, data_options, quiet)
        loaded = load_weights(opened.recipe.backbone, weights)
        device = pick_device(device, address)
        with open_runner(workers, address, device) as runner, Progress("recompute", "images", quiet) as progress:
            recomputed = recompute(
                opened,
                data,
                loaded,
                share=share,
                seed=seed,
                runner=runner,
                device=device,
                on_images=progress.update,
            )
        found = replace(found, recomputed=recomputed)
    emit(found, _verification_text(found), as_json)
    if found.damage or found.summary or found.index or (found.recomputed and found.recomputed.different):
        ctx.exit(1)


def _verification_text(found: Verification) -> str:
    lines = [
        f"{printable(found.path)}: {found.images} images, {size_text(found.bytes)} read; "
        + (f"{len(found.damaged_shards)} of {found.shards} shards are damaged" if found.damage else "no damage")
        + (f"; {len(found.missing)} shards are missing" if found.missing else "")
    ]
    for one in found.damage[:20]:
        what = f"array '{one.array}'" if one.array else "marker"
        image = f", image '{printable(one.image)}'" if one.image else ""
        lines.append(f"shard {one.shard}, {what}{image}: {printable(one.reason)} ({printable(one.file)})")
    if len(found.damage) > 20:
        lines.append(f"... and {len(found.damage) - 20} more; --json lists all.")
    if found.summary:
        lines.append(f"the summary of all markers is wrong: {printable(found.summary)}")
    if found.index:
        lines.append(f"the index of the data set is wrong: {found.index}. Extract into a new store.")
    if found.damage or found.summary:
        lines.append("Mend it with `hsnet store repair` and the options of the `hsnet extract` that made it.")
    again = found.recomputed
    if again is not None:
        close = f", {again.close} within {again.tolerance:g} (1 - cosine, at most {again.largest:.1g})"
        lines.append(
            f"{again.images} images recomputed: {again.equal} the same bit for bit"
            + (close if again.close else "")
            + (f", {len(again.different)} different" if again.different else "")
        )
        for other in again.different[:20]:
            lines.append(f"shard {other.shard}, image '{printable(other.image)}': {printable(other.reason)}")
        if len(again.different) > 20:
            lines.append(f"... and {len(again.different) - 20} more; --json lists all.")
        if again.different:
            lines.append(
                "These photos or masks, the weights or the program changed since. To have them extracted anew, delete "
                "their markers and run the same `hsnet extract` again, or extract into a new store."
            )
    return "\n".join(lines)


@store.command(
    "repair",
    short_help="Extract damaged and missing shards anew.",
    params=[option for option in extract.params if option.name != "dry_run"],
)
def store_repair(**options: Any) -> Any:
    """Verify a store, delete what is damaged and extract it anew. Takes the options of the `hsnet extract` that
    made the store; whole shards stay as they are. Attributes that are lost or damaged are written anew, too.

    \b
    Example:
      hsnet store repair pascal --data-root VOC2012 --backbone resnet50 --store voc.zarr
    """
    set_up_logging(options["quiet"])
    _drop_damaged_summary(options["store"])
    _restore_metadata(options)
    found = _verify(options["store"], options["quiet"])
    return run_extraction(**options, dry_run=False, damaged=found.damaged_shards)


def _drop_damaged_summary(path: str | Path) -> None:
    """Remove a summary of the markers that cannot be used; it is written anew when the store is whole."""
    from pipeline.store.restore import drop_damaged_summary

    reason = drop_damaged_summary(path)
    if reason is not None:
        click.echo(f"{printable(reason)}\nIt was removed; the store is read by its markers.", err=True)


def _restore_metadata(options: Mapping[str, Any]) -> None:
    """Write damaged attributes anew, so that the store can be opened."""
    from pipeline.features.backbones import Reading, new_recipe
    from pipeline.features.fitting import fit_codec
    from pipeline.features.weights import load_weights
    from pipeline.store.restore import needs_restoring, restore_metadata

    path = options["store"]
    reason = needs_restoring(path)
    if reason is None:
        return
    click.echo(f"{reason}\nThe store's attributes are written anew.", err=True)
    data = open_data(
        options["dataset"], options["data_root"], options["splits"], options["data_options"], options["quiet"]
    )
    loaded = load_weights(options["backbone"], options["weights"])
    reading = Reading(options["taps"], options["autocast"] or "")
    size = image_size_for(options["image_size"], options["backbone"], reading)
    recipe = new_recipe(options["backbone"], loaded, size, options["precision"], reading)
    budget, codec = options["bytes_per_image"], None
    if options["budget"] is not None:
        budget = options["budget"] // max(1, len(data.index.images))
    if budget is not None:
        device = pick_device(options["device"], options["address"])
        codec, recipe = fit_codec(data, loaded, recipe, budget, device, options["on_error"] == "skip")
    for name in restore_metadata(path, recipe, data.index, codec):
        click.echo(f"written: {printable(name)}", err=True)


def _verify(path: str | Path, quiet: bool) -> Verification:
    from pipeline.store.feature_store import FeatureStore
    from pipeline.store.verify import verify

    opened = FeatureStore.open(path, require_complete=False)
    with Progress("verify", "shards", quiet) as progress:
        return verify(opened, on_shard=progress.update)


@store.command("compare", short_help="What a store's codec costs: correlations and mIoU.")
@click.option("--store", "path", type=STORE, metavar="A.zarr", required=True, help="Store whose codec is judged.")
@click.option("--against", type=STORE, metavar="B.zarr", help="Store of the same photos in another precision.")
@click.option("--dataset", type=click.Choice(DATASETS), help="Instead of --against: exact features, made on the fly.")
@options(data_root_option, splits_option, data_option, weights_option)
@click.option("--pairs", type=Whole(), default=32, show_default=True, help="Pairs of photos that are correlated.")
@click.option("--checkpoint", "checkpoint_path", type=ANY_PATH, metavar="C", help="Also compare this head's mIoU.")
@click.option("--fold", type=Whole(0), help="Of the episodes. [default: the one the checkpoint was trained for, or 0]")
@click.option("--shots", type=Whole(), default=1, show_default=True, help="Supports per query.")
@click.option("--episodes", type=Whole(), default=1000, show_default=True, help="The same for both.")
@options(seed_option, workers_option, address_option, device_option)
@common_options
def store_compare(
    path: str | Path,
    against: str | Path | None,
    dataset: str | None,
    data_root: Path | None,
    splits: Path | None,
    data_options: tuple[str, ...],
    weights: str | None,
    pairs: int,
    checkpoint_path: Path | None,
    seed: int,
    workers: int,
    address: str | None,
    device: str,
    as_json: bool,
    quiet: bool,
    **tested: Any,
) -> Any:
    """Say what a store's codec costs: errors of correlations, bytes, rates, and with a head its mIoU on both.

    Intervals of mIoU are 95 %, from episodes drawn again within their class. No store is changed.

    \b
    Example:
      hsnet store compare --store voc-2mb.zarr --against voc.zarr --checkpoint runs/voc-0
    """
    set_up_logging(quiet)
    if (against is None) == (dataset is None):
        raise click.UsageError("Give --against B.zarr, or --dataset for exact features made on the fly.")
    from pipeline.compare import compare, compare_scores
    from pipeline.features.backbones import same_reading
    from pipeline.features.weights import load_weights

    device = pick_device(device, address)
    make_source = store_source(path)
    source = make_source()
    make_against: Callable[[], FeatureSource]
    if against is not None:
        make_against = store_source(against)
    else:
        data = open_data(str(dataset), data_root, splits, data_options, quiet)
        loaded = load_weights(source.recipe.backbone, weights)
        make_against = online_source(data, loaded, same_reading(source.recipe, loaded, "float32"), device)
    score = None
    if checkpoint_path is not None:
        with open_runner(workers, address, device) as runner, Progress("compare", "episodes", quiet) as progress:
            score = compare_scores(
                checkpoint_path,
                make_source,
                make_against,
                seed=seed,
                runner=runner,
                device=device,
                on_event=progress.update,
                **tested,
            )
    result = compare(source, make_against(), pairs=pairs, seed=seed, score=score)
    return emit(result, _comparison_text(result), as_json)


def _comparison_text(result: Any) -> str:
    rows = [
        [f"level {e.level}, layer {e.layer}", *(f"{x:.4f}" for x in (e.mean, e.p99, e.largest, e.spread))]
        for e in result.layers
    ]
    sizes = [size_text(n) if n else "not stored" for n in (result.bytes_per_image, result.bytes_per_image_against)]
    facts = {
        "features": f"{sizes[0]} per image, against {sizes[1]}",
        "encoding": f"{result.encode_per_s:.1f} images/s" if result.encode_per_s else "nothing exact to encode",
        "decoding": f"{result.decode_per_s:.1f} images/s",
    }
    if result.score:
        score = result.score
        facts |= {
            "mIoU": f"{score.miou}, against {score.miou_against}",
            "difference": f"{score.difference} points on the same {score.episodes} {score.shots}-shot episodes",
        }
    head = ["error of correlations", "mean", "p99", "largest", "their spread"]
    return f"{table(rows, head)}\n\n{fact_lines(facts)}"


@store.command("export-sample", short_help="A small store of some of its images, to pass on.")
@click.argument("path", type=STORE, metavar="S.zarr")
@click.argument("target", type=ANY_PATH, metavar="SMALL.zarr")
@click.option("--images", type=Whole(), default=32, show_default=True, help="How many at most, drawn for all lists.")
@click.option("--image", "ids", multiple=True, metavar="ID", help="Exactly this image instead. May be repeated.")
@click.option("--class", "classes", multiple=True, metavar="NAME", help="Draw for this class only. May be repeated.")
@click.option("--fold", type=Whole(0), help="Draw for the lists of this fold only. [default: all folds]")
@click.option("--shots", type=Whole(), default=1, show_default=True, help="Supports that an episode shall have.")
@click.option("--seed", type=Whole(0), default=0, show_default=True, help="Same seed, same sample.")
@common_options
def store_export_sample(
    path: str | Path,
    target: Path,
    ids: tuple[str, ...],
    classes: tuple[str, ...],
    fold: int | None,
    as_json: bool,
    quiet: bool,
    **drawn: Any,
) -> Any:
    """Write a small, whole store of some of a store's images, for a bug report, a test or a notebook.

    It holds their features, label maps, names and lists, but no photos, and works wherever the big one does: with
    train, evaluate, verify and plain zarr. Images are drawn so that episodes can be drawn from them; scores on
    them are no results of the data set.

    \b
    Example:
      hsnet store export-sample voc.zarr bug.zarr --images 24 --fold 0
    """
    set_up_logging(quiet)
    if ids and (classes or fold is not None):
        raise click.UsageError("--image names exactly what is taken; --class and --fold are for images that are drawn.")
    from pipeline.store.export import export_sample
    from pipeline.store.feature_store import FeatureStore

    opened = FeatureStore.open(path, require_complete=False)
    result = export_sample(opened, target, ids=ids, classes=classes, fold=fold, **drawn)
    rows = [
        [
            f"fold {one.fold}, {one.role}",
            *map(str, (len(one.classes), one.entries, one.classes_left_out, one.entries_left_out)),
        ]
        for one in result.lists
    ]
    text = (
        f"{printable(result.path)}: {result.images} images, {size_text(result.bytes)}; "
        f"{result.images_left_out} images left out\n\n"
        + table(rows, ["list", "classes", "entries", "classes left out", "entries left out"])
    )
    return emit(result, text, as_json)


def _network_facts(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Layers of a network that is not built in, and where its weights came from."""
    network, autocast = recipe.get("network"), recipe.get("autocast")
    if network is None:
        return {"arithmetic": f"{autocast} in the backbone"} if autocast else {}
    facts = {"layers": printable(", ".join(recipe["taps"]))}
    if network["autocast"]:
        facts["arithmetic"] = f"{network['autocast']} in the backbone"
    told = [network["source"] or "unknown source", network["licence"] or "licence unknown"]
    return {**facts, "weights from": printable(", ".join(told))}


def _coding_text(coding: Mapping[str, Any] | None) -> str:
    if coding is None:
        return ""
    return f", {size_text(coding['bytes_per_image'])} per image asked for, fitted on {coding['images']} training photos"
