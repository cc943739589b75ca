"""`hsnet train`: train a head, here or on Ray's workers."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from commands.learner_options import LEARNER_OPTIONS
from commands.options import (
    ANY_PATH,
    BACKBONE_NAMES,
    DATASETS,
    STORE,
    Backbone,
    Whole,
    address_option,
    arithmetic_option,
    autocast_option,
    common_options,
    data_option,
    data_root_option,
    device_option,
    fold_option,
    image_size_option,
    options,
    ranks_option,
    resident_option,
    seed_option,
    splits_option,
    taps_option,
    training_recipe_option,
    weights_option,
)
from commands.steps import (
    allow_mixed,
    emit,
    image_size_for,
    online_source,
    open_data,
    pick_arithmetic,
    pick_device,
    require_ray,
    stop_on_interrupt,
    store_source,
)
from commands.terminal import Progress, plain, set_up_logging
from hsnet.errors import ConfigError
from pipeline.common.text import printable, time_text

if TYPE_CHECKING:
    from pipeline.loading.source import FeatureSource


SHARE = click.FloatRange(0, 1, max_open=True)
# Without a value of its own each is the recipe's.
training_options = options(
    training_recipe_option,
    click.option("--lr", "learning_rate", type=float, help="Greatest learning rate. [default: the recipe's]"),
    click.option("--optimiser", type=click.Choice(("adam", "adamw")), help="Adam, or with decoupled weight decay."),
    click.option("--weight-decay", type=click.FloatRange(0), metavar="X", help="Of the optimiser."),
    click.option("--schedule", type=click.Choice(("constant", "cosine")), help="Of the learning rate, up to --steps."),
    click.option("--warmup", type=Whole(0), help="Steps over which the learning rate rises from 0."),
    click.option("--clip", type=click.FloatRange(0), metavar="X", help="Greatest norm of a step's gradient; 0: any."),
    click.option("--average", type=SHARE, metavar="D", help="Decay of the weights' moving average; 0: none is kept."),
    click.option(
        "--both-directions/--one-direction", default=None, help="Train on every pair of photos either way, or one way."
    ),
)


WAITS_SOME, WAITS_MUCH = 0.1, 0.25
"""Shares of the steps' time spent waiting for data from which it is told, and from which a note says what helps."""


def waiting(share: float | None) -> str:
    """How much of the time was waited for data, if that is worth telling."""
    return f", {share:.0%} of the time waiting for data" if share is not None and share >= WAITS_SOME else ""


def remedy(features: str, resident: str) -> str:
    """What to do where much time is spent waiting for data."""
    if features == "online":
        return (
            "the steps wait for features that the backbone makes anew for every use of a photo. A store has them made "
            "once: `hsnet extract`, then --store."
        )
    held = {
        "device": "Keep the store on a faster disk",
        "host": "Keep the photos on the GPU (--resident device) or the store on a faster disk",
    }.get(
        resident,
        "Keep the photos in memory (--resident host, on a GPU --resident device) or the store on a faster disk",
    )
    fewer = "take fewer bytes for a photo (`hsnet extract --bytes-per-image`)"
    return f"the steps wait for the store to be read. {held}, or {fewer}."


@click.command(short_help="Train a head on a store's features, or go on with it.")
@click.option("--store", type=STORE, metavar="S.zarr", help="Feature store made by `hsnet extract`.")
@fold_option
@click.option("--run-dir", type=ANY_PATH, metavar="DIR", required=True, help="Where the run is kept; goes on if there.")
@click.option("--steps", type=Whole(), help="Optimiser steps. [default: 10000]")
@click.option("--epochs", type=Whole(), help="Instead of --steps: passes over the training list.")
@click.option("--batch-size", type=Whole(), default=20, show_default=True, help="Losses per step, in all.")
@click.option("--micro-batch", type=Whole(), help="Losses per forward pass; less takes less memory.")
@training_options
@seed_option
@click.option(
    "--validate-every", type=Whole(), help="Steps between validations. [default: that of a run that goes on, else 500]"
)
@click.option(
    "--validate-episodes", type=Whole(), help="Episodes of each. [default: that of a run that goes on, else 200]"
)
@click.option(
    "--select-on",
    type=click.Choice(("val", "test", "none")),
    default="val",
    show_default=True,
    help="Episodes the best checkpoint is chosen on; test is the published habit.",
)
@click.option("--drop-novel-images", is_flag=True, help="Leave out training images that show a held-out class.")
@click.option(
    "--novel-pixels",
    type=click.Choice(("background", "ignore")),
    default="background",
    show_default=True,
    help="What pixels of held-out classes are in the loss: background as in the published code; ignore, for photos of "
    "scenes that show many classes.",
)
@click.option(
    "--boundary",
    type=click.Choice(("background", "ignore")),
    default="background",
    show_default=True,
    help="What boundary pixels are in the loss: background as in the published code, ignore as in the paper.",
)
@options(*LEARNER_OPTIONS)
@options(resident_option, arithmetic_option, ranks_option, address_option, device_option)
@click.option(
    "--features",
    type=click.Choice(("store", "online")),
    default="store",
    show_default=True,
    help="online runs the backbone on the fly: no store, but --dataset and --backbone.",
)
@click.option("--dataset", type=click.Choice(DATASETS), help="With --features online: the data set.")
@options(data_root_option, splits_option, data_option)
@click.option("--backbone", type=Backbone(), metavar=BACKBONE_NAMES, help="With --features online: the network.")
@options(weights_option, image_size_option, taps_option, autocast_option)
@click.option(
    "--finetune-backbone",
    is_flag=True,
    help="With --features online: train the backbone's weights along with the head, as in the paper's Figure 9.",
)
@click.option(
    "--backbone-lr",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="X",
    help="With --finetune-backbone: greatest learning rate of the backbone. [default: that of the head]",
)
@common_options
def train(
    store: str | Path | None,
    run_dir: Path,
    steps: int | None,
    epochs: int | None,
    micro_batch: int | None,
    resident: str,
    workers: int | tuple[int, int],
    address: str | None,
    device: str,
    features: str,
    dataset: str | None,
    data_root: Path | None,
    splits: Path | None,
    data_options: tuple[str, ...],
    backbone: str | None,
    weights: str | None,
    image_size: int | None,
    taps: str | None,
    autocast: str | None,
    finetune_backbone: bool,
    backbone_lr: float | None,
    training_recipe: str | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> Any:
    """Train a head on a store's features; a run that was interrupted goes on where it stopped.

    Ctrl-C saves and stops. The fold's classes are held out: they are never trained on.

    \b
    Example:
      hsnet train --store voc.zarr --fold 0 --run-dir runs/voc-0 --steps 20000 --workers 2
      hsnet train --store /shared/voc.zarr --run-dir /shared/runs/voc-0 --workers 1:8 --address auto
    """
    set_up_logging(quiet)
    if steps and epochs:
        raise click.UsageError("Give --steps or --epochs, not both.")
    if features == "store" and store is None:
        raise click.UsageError("Give --store S.zarr, or --features online with --dataset and --backbone.")
    if features == "online" and (dataset is None or backbone is None):
        raise click.UsageError("--features online needs --dataset and --backbone.")
    if finetune_backbone and features == "store":
        raise ConfigError(
            f"--finetune-backbone cannot train on {printable(store or 'a store')}: its features are frozen, they were "
            "made by the backbone as it was. Use --features online with --dataset and --backbone instead of --store. "
            "Nothing was changed."
        )
    from pipeline.episodes.scenes import novel_photos
    from pipeline.episodes.stream import steps_per_epoch
    from pipeline.features.backbones import Reading, new_recipe
    from pipeline.features.weights import load_weights
    from pipeline.heads.config import VALIDATION, RunConfig
    from pipeline.heads.learner import LEARNER_CHOICES, learner_arguments
    from pipeline.heads.run_dir import run_data, stored_config
    from pipeline.heads.training import PUBLISHED, training_choices
    from pipeline.train import RECENT_STEPS, Baseline, Event, Validated, fit, training_stream

    device = pick_device(device, address)
    make_source: Callable[[], FeatureSource]
    if store is not None and features == "store":
        make_source = store_source(store, run_data(run_dir))
    else:
        assert dataset is not None
        assert backbone is not None
        data = open_data(dataset, data_root, splits, data_options, quiet)
        loaded = load_weights(backbone, weights)
        reading = Reading(taps, autocast or "")
        size = image_size_for(image_size, backbone, reading)
        recipe = new_recipe(backbone, loaded, size, "float32", reading)
        recipe.require_trainable()
        make_source = online_source(data, loaded, recipe, device, photos=finetune_backbone)
    source = make_source()
    given = {name: choices.pop(name) for name in PUBLISHED}
    learner = learner_arguments(source.recipe, **{name: choices.pop(name) for name in LEARNER_CHOICES})
    stored = stored_config(run_dir)
    choices |= training_choices(training_recipe, stored, **given)
    begun_with = stored.arithmetic if stored else None
    choices["arithmetic"] = pick_arithmetic(choices["arithmetic"], device, address, begun_with)
    for name in VALIDATION:
        if choices[name] is None:
            del choices[name]
            choices |= {name: getattr(stored, name)} if stored else {}
    choices |= {"finetune_backbone": finetune_backbone, "backbone_lr": backbone_lr or 0.0}
    config = RunConfig.of(source, steps=steps or 10_000, learner=learner, **choices)
    if epochs:
        per_epoch = steps_per_epoch(config.episodes_per_step, training_stream(config, source).epoch_length)
        config = dataclasses.replace(config, steps=epochs * per_epoch)

    novel = None
    if not config.drop_novel_images:
        novel = novel_photos(
            source.index,
            config.fold,
            source.classes_present,
            source.skipped,
            20_000 if features == "store" else 100,  # without a store, every mask is read
        )
        if not quiet and (note := novel.text(config.novel_pixels)):
            click.echo(f"Note: {note}", err=True)
    with Progress("train", "steps", quiet) as progress, stop_on_interrupt() as stop:
        smooth = None
        recent: deque[tuple[float, float]] = deque(maxlen=RECENT_STEPS)

        def show(event: Event) -> None:
            nonlocal smooth
            if isinstance(event, Validated):
                best = ", the best so far" if event.is_best else ""
                progress.say(f"step {event.step}: validation mIoU {event.miou:.1f}, FB-IoU {event.fb_iou:.1f}{best}")
            elif isinstance(event, Baseline):
                progress.say(f"  without training (head contrast): mIoU {event.miou:.1f}, FB-IoU {event.fb_iou:.1f}")
            else:
                if smooth is not None:  # nothing is read ahead of the first step
                    recent.append((event.waited, event.seconds))
                smooth = event.loss if smooth is None else 0.95 * smooth + 0.05 * event.loss
                seconds = sum(seconds for _, seconds in recent)
                share = sum(waited for waited, _ in recent) / seconds if seconds else None
                progress.update(event.step, event.steps, f"loss {smooth:.3f}{waiting(share)}")

        same: dict[str, Any] = {
            "device": device,
            "micro_batch": micro_batch,
            "resident": resident,
            "baseline": True,
            "stop": stop,
            "on_event": show,
        }
        if workers == 0 and address is None:
            summary = fit(config, source, run_dir, **same)
        else:
            require_ray(workers if isinstance(workers, int) else workers[0], address, device)
            from cluster.train import fit_on_ray

            same["allow_mixed"] = allow_mixed()
            summary = fit_on_ray(config, make_source, run_dir, workers=workers, address=address, **same)
    loss = f", loss {summary.loss:.3f}" if summary.loss == summary.loss else ""
    done = f"{summary.steps} of {max(summary.steps, config.steps)} steps"
    lines = [f"{printable(run_dir)}: {done}, {time_text(summary.seconds)}{loss}{waiting(summary.waited_share)}"]
    if not quiet and (summary.waited_share or 0.0) >= WAITS_MUCH:
        click.echo(f"Note: {remedy(features, resident)}", err=True)
    if summary.best_miou is not None:
        untrained = summary.baseline_miou
        beside = "" if untrained is None else f"; without training (head contrast) {untrained:.1f}"
        lines.append(f"best validation mIoU {summary.best_miou:.1f} at step {summary.best_step}{beside}")
    result = emit({**plain(summary), "novel_photos": novel}, "\n".join(lines), as_json)
    if not summary.finished:
        click.echo("Interrupted. The run is saved: give the same command again to go on.", err=True)
        click.get_current_context().exit(130)
    return result
