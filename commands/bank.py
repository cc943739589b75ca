"""`hsnet bank`: annotated photos in one folder, to be used again, added to, corrected and checked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.groups import OrderedGroup, on_interrupt
from commands.options import ANY_PATH, Backbone, Integers, Whole, common_options, json_option, options, weights_option
from commands.predict import PHOTO_HEADS
from commands.steps import emit
from commands.terminal import Progress, fact_lines, set_up_logging, table
from pipeline.common.text import printable, size_text

if TYPE_CHECKING:
    from pipeline.annotations.item import Annotation
    from pipeline.annotations.read import Annotations
    from pipeline.bank.advice import Report

KINDS = ("auto", "folder", "masks", "coco", "labelstudio", "cvat", "labelme", "yolo")
"""Of annotation files; compared with `pipeline.annotations.read` by a test."""

bank_argument = click.argument("path", type=ANY_PATH, metavar="BANK")


@click.group(cls=OrderedGroup)
def bank() -> None:
    """Keep annotated photos: N classes, a few photos each, and photos known not to show them.

    \b
    Example:
      hsnet bank new cups.bank
      hsnet bank add cups.bank cup1.jpg:cup1.png cup2.jpg:cup2.png --class cup
      hsnet bank check cups.bank
      hsnet predict --bank cups.bank --query photos/ --out masks/
    """


@bank.command("new", short_help="Make an empty bank.")
@bank_argument
@click.option(
    "--backbone", type=Backbone(), default="squeezenet1_1", show_default=True, help="Network of its features."
)
@click.option("--image-size", type=Whole(32), help="Side of the square that a photo or tile is squashed to, pixels.")
@click.option("--tile", type=Whole(32), metavar="PX", help="Read photos in overlapping tiles of this side.")
@options(weights_option, json_option)
def bank_new(
    path: Path, backbone: str, image_size: int | None, tile: int | None, weights: str | None, as_json: bool
) -> Any:
    """Make an empty bank for one network and size.

    \b
    Example:
      hsnet bank new cups.bank --backbone timm:vit_small_patch14_dinov2
    """
    from pipeline.bank.folder import Bank
    from pipeline.bank.reading import Reading, default_size
    from pipeline.features.backbones import new_recipe
    from pipeline.features.weights import load_weights

    loaded = load_weights(backbone, weights)
    recipe = new_recipe(backbone, loaded, image_size or default_size(backbone), "float32")
    made = Bank.create(path, Reading(recipe, tile))
    return emit(
        {"bank": path, "reading": made.reading.text, "weights": loaded.sha256},
        f"{printable(path)}: empty, for {made.reading.text}",
        as_json,
    )


@bank.command("add", short_help="Add annotated photos, or what is newly known of them.")
@bank_argument
@click.argument("sources", nargs=-1, metavar="SOURCE...")
@click.option("--class", "name", default="object", show_default=True, help="What PHOTO:MASK pairs show.")
@click.option(
    "--take",
    "table_of",
    multiple=True,
    metavar="FROM[=TO]",
    help="Only this class of a file, number or #colour of a mask, under another name if one is given. May be repeated.",
)
@click.option("--without", multiple=True, metavar="NAME", help="A class that PHOTO sources without a mask do not show.")
@click.option("--complete", is_flag=True, help="Classes of the bank that are not marked on a photo are not in it.")
@click.option("--photos", type=ANY_PATH, metavar="DIR", help="Where the photos of an annotation file are.")
@click.option("--kind", type=click.Choice(KINDS), default="auto", show_default=True, help="Of an annotation file.")
@click.option("--replace", "again", is_flag=True, help="Take the new mask where a photo has another one of the class.")
@common_options
def bank_add(
    path: Path,
    sources: tuple[str, ...],
    name: str,
    table_of: tuple[str, ...],
    without: tuple[str, ...],
    complete: bool,
    photos: Path | None,
    kind: str,
    again: bool,
    as_json: bool,
    quiet: bool,
) -> Any:
    """Add annotated photos to a bank. A SOURCE is one of

    \b
      PHOTO:MASK            of the class --class; PHOTO:MASK:8 or :#ff0000 for one value of a mask
      a folder or file      class folders, masks, COCO, Label Studio, CVAT, LabelMe or YOLO (docs/formats.md)
      PHOTO                 without a mask: shows none of the classes --without

    \b
    Example:
      hsnet bank add cups.bank cup1.jpg:cup1.png cup2.jpg:cup2.png --class cup
      hsnet bank add cups.bank export/coco.json --take cup --take mug=cup
      hsnet bank add cups.bank empty-table.jpg --without cup
    """
    set_up_logging(quiet)
    on_interrupt("Photos added so far are whole; give the same command again for the others.")
    from pipeline.bank.folder import Bank

    if not sources:
        raise click.UsageError("give photos with masks, an annotation file or a folder")
    opened = Bank(path)
    given = list(_annotations(sources, name, table_of, without, photos, kind))
    total, done, new, changed, nothing = sum(map(len, given)), 0, 0, 0, 0
    with Progress("bank add", "photos", quiet) as progress:
        for annotation in chain.from_iterable(given):
            told = _complete(annotation, opened.classes) if complete else annotation
            if not told.masks and not told.absent:
                nothing += 1
                continue
            added = opened.add(told, replace_masks=again)
            done, new, changed = done + 1, new + added.new, changed + bool(added.changed)
            progress.update(done, total)
    notes = [note for annotations in given for note in getattr(annotations, "notes", ())]
    text = f"{done} photos: {new} new, {changed - new} with new masks, {done - changed} as they were"
    if nothing:
        notes.append(f"{nothing} photos left out: nothing is marked on them, and nothing is said to be absent")
    return emit(
        {"bank": path, "photos": done, "new": new, "changed": changed, "classes": opened.classes, "notes": notes},
        "\n".join([*map(printable, notes), f"{printable(path)}: {text}", _counts(opened)]),
        as_json,
    )


def _annotations(
    sources: Sequence[str],
    name: str,
    table_of: Sequence[str],
    without: Sequence[str],
    photos: Path | None,
    kind: str,
) -> Iterator[Annotations | list[Annotation]]:
    """What the sources hold, pairs of one class together."""
    from hsnet.errors import DataError
    from pipeline.annotations.item import Annotation
    from pipeline.annotations.read import read_annotations, read_pairs
    from pipeline.datasets.images import PHOTO_SUFFIXES

    parts = [one.partition("=") for one in table_of]
    chosen = {source: target or source for source, _, target in parts} or None
    plain = [Path(source) for source in sources if Path(source).exists()]
    negatives = [one for one in plain if one.is_file() and one.suffix.lower() in PHOTO_SUFFIXES]
    pairs = [source for source in sources if not Path(source).exists()]
    if negatives and not without:
        raise DataError(
            f"{negatives[0]} is a photo without a mask: give it as PHOTO:MASK, or say what it does not show by "
            f"--without NAME. Nothing was added."
        )
    if pairs:
        yield read_pairs(pairs, name, chosen)
    for one in plain:
        if one not in negatives:
            yield read_annotations(one, photos=photos, kind=kind, classes=chosen)
    if negatives:
        yield [Annotation(one, absent=frozenset(without)) for one in negatives]


def _complete(annotation: Annotation, classes: Sequence[str]) -> Annotation:
    return replace(annotation, absent=annotation.absent | (set(classes) - set(annotation.masks)))


def _counts(opened: Any) -> str:
    photos = opened.photos()
    rows = [
        [
            printable(name),
            str(sum(name in photo.item.masks for photo in photos)),
            str(sum(name in photo.item.absent for photo in photos)),
        ]
        for name in opened.classes
    ]
    return table(rows, ["class", "photos", "photos without"]) if rows else "no class yet"


@bank.command("remove", short_help="Remove photos, or what is known of a class on them.")
@bank_argument
@click.argument("names", nargs=-1, required=True, metavar="PHOTO...")
@click.option("--class", "classes", multiple=True, metavar="NAME", help="Only what is known of this class.")
@json_option
def bank_remove(path: Path, names: tuple[str, ...], classes: tuple[str, ...], as_json: bool) -> Any:
    """Remove photos by file name or id (`hsnet bank show`).

    \b
    Example:
      hsnet bank remove cups.bank cup7.jpg
    """
    from pipeline.bank.folder import Bank

    opened = Bank(path)
    gone = [opened.forget(name, classes).item.name for name in names]
    return emit(
        {"bank": path, "removed": gone, "classes": opened.classes},
        f"{', '.join(map(printable, gone))}: {'no longer of ' + ', '.join(classes) if classes else 'removed'}\n"
        f"{_counts(opened)}",
        as_json,
    )


@bank.command("show", short_help="What a bank holds.")
@bank_argument
@json_option
def bank_show(path: Path, as_json: bool) -> Any:
    """List the photos of a bank, what is known of them, and how large their objects are to the network.

    \b
    Example:
      hsnet bank show cups.bank
    """
    from pipeline.bank.folder import Bank
    from pipeline.bank.tiles import object_pixels

    opened = Bank(path)
    size = opened.reading.recipe.image_size
    photos, rows = [], []
    for photo in opened.photos():
        item = photo.item
        seen = {name: object_pixels(mask, size) for name in item.masks if (mask := photo.mask(name)) is not None}
        photos.append({"id": photo.id, "photo": item.name, "size": [item.height, item.width], "network_pixels": seen})
        photos[-1]["absent"] = list(item.absent)
        shows = ", ".join(f"{name} ({pixels:,} px)" for name, pixels in seen.items())
        none = f"no {', no '.join(item.absent)}" if item.absent else ""
        words = printable("; ".join(filter(None, (shows, none))))
        rows.append([photo.id, printable(item.name), f"{item.width} x {item.height}", words])
    kept = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    facts = {"bank": printable(path), "network": opened.reading.text, "size": size_text(kept)}
    text = [fact_lines(facts), "", _counts(opened)]
    if rows:
        text += ["", table(rows, ["id", "photo", "pixels", "shows (pixels that the network sees)"], left=4)]
    values = {"bank": path, "reading": opened.reading.text, "classes": opened.classes, "photos": photos, "bytes": kept}
    return emit(values, "\n".join(text), as_json)


@bank.command("check", short_help="The IoU to expect on your own photos.")
@bank_argument
@click.option("--class", "classes", multiple=True, metavar="NAME", help="Only this class. May be repeated.")
@click.option("--head", type=click.Choice(PHOTO_HEADS), default="auto", show_default=True, help="auto: all of them.")
@click.option("--checkpoint", "checkpoint_path", type=ANY_PATH, metavar="C", help="A trained head to try, too.")
@click.option("--image-size", "sizes", type=Integers(), help="Other sizes to try, commas between them.")
@click.option("--tile", "tiles", type=Integers(), metavar="PX,...", help="Tiles to try, commas between them.")
@weights_option
@common_options
def bank_check(
    path: Path,
    classes: tuple[str, ...],
    head: str,
    checkpoint_path: Path | None,
    sizes: tuple[int, ...] | None,
    tiles: tuple[int, ...] | None,
    weights: str | None,
    as_json: bool,
    quiet: bool,
) -> Any:
    """Leave every annotated photo out once and find it by the others: what to expect, before a folder is run.

    Says which head does best, which annotated photo makes the others worse, and what would help. The interval is that
    of the pooled IoU of thirty new photos like the annotated ones; few photos make it wide.

    \b
    Example:
      hsnet bank check cups.bank --tile 512,1024
    """
    set_up_logging(quiet)
    on_interrupt("Nothing was changed.")
    from pipeline.bank.advice import check_bank
    from pipeline.bank.folder import Bank
    from pipeline.heads.checkpoint import load_checkpoint

    with Progress("bank check", "fits", quiet) as progress:
        found = check_bank(
            Bank(path),
            weights,
            classes=classes,
            head=head,
            checkpoint=None if checkpoint_path is None else load_checkpoint(checkpoint_path),
            sizes=sizes or (),
            tiles=tiles or (),
            on_event=progress.update,
        )
    return emit(found, "\n".join(_report_lines(found)), as_json)


def _report_lines(found: Report) -> Iterator[str]:
    rows = []
    for reading, checks in found.checks.items():
        for check in checks:
            for score in check.scores:
                ious = sorted(round(100 * iou) for iou in score.ious)
                rows.append(
                    [
                        printable(check.name),
                        reading,
                        score.head,
                        f"{100 * score.pooled:.0f} [{100 * score.low:.0f}, {100 * score.high:.0f}]",
                        f"{ious[0]} .. {ious[-1]}",
                        str(len(check.photos)),
                    ]
                )
    if rows:
        yield table(rows, ["class", "read as", "head", "expected IoU", "photos from .. to", "photos"], left=3)
        yield ""
    yield from (printable(line) for line in found.advice)
