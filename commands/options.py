"""Types of options, and the options that several commands share, each written once."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from hsnet.errors import ConfigError
from pipeline.episodes.protocols import PROTOCOLS, protocol_choice

# Spelt out, because the tables they come from import torch; tests compare them.
BACKBONES = ("vgg16", "resnet50", "resnet101", "squeezenet1_1")
DATASETS = ("pascal", "coco", "fss", "folder", "shapes")
PRECISIONS = ("int8", "float16", "float32")
HEADS = ("contrast", "tune", "cosine", "location", "untrained")
"""Those that need no checkpoint."""
TRAINING_RECIPES = ("hsnet", "stable")

F = TypeVar("F", bound=Callable[..., Any])


class Backbone(click.ParamType):
    """A built-in network, or timm:NAME, which only timm can judge."""

    name = "network"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        name = str(value)
        if name not in BACKBONES and not (name.startswith("timm:") and name != "timm:"):
            self.fail(f"'{value}' is none of {', '.join(BACKBONES)}, timm:NAME; see `hsnet backbones`", param, ctx)
        return name


class Device(click.ParamType):
    """auto, cpu, or a GPU that torch can name."""

    name = "device"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value not in ("auto", "cpu", "cuda", "mps") and not (value[:5] == "cuda:" and value[5:].isdecimal()):
            self.fail(f"'{value}' is none of auto, cpu, cuda, cuda:N, mps", param, ctx)
        return str(value)


class Whole(click.ParamType):
    """A whole number that is not too small."""

    name = "n"

    def __init__(self, least: int = 1) -> None:
        self.least = least

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        try:
            number = int(value)
        except ValueError:
            self.fail(f"'{value}' is not a whole number", param, ctx)
        if number < self.least:
            self.fail(f"{number} is less than {self.least}", param, ctx)
        return number


class Ranks(click.ParamType):
    """A number of workers, or MIN:MAX of them."""

    name = "n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | tuple[int, int]:
        if isinstance(value, tuple) or ":" not in str(value):
            return value if isinstance(value, tuple) else Whole(0).convert(value, param, ctx)
        least, _, most = str(value).partition(":")
        if not (least.strip().isdecimal() and most.strip().isdecimal()):
            self.fail(f"'{value}' is neither a whole number nor MIN:MAX such as 1:8", param, ctx)
        if not 1 <= int(least) <= int(most):
            self.fail(f"'{value}' must be MIN:MAX with 1 <= MIN <= MAX", param, ctx)
        return int(least), int(most)


class Bytes(click.ParamType):
    """A number of bytes with its unit, such as 2MB or 60 GB; powers of 1000."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?B?)", str(value).strip())
        if not size:
            self.fail(f"'{value}' is not a size such as 500KB, 2MB or 60GB", param, ctx)
        scale = " KMGT".index(size[2].upper().rstrip("B") or " ")
        number = int(float(size[1]) * 1000**scale)
        if number < 1:
            self.fail(f"'{value}' is less than a byte", param, ctx)
        return number


class Share(click.ParamType):
    """A part of the whole: 1% or 0.01."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            self.fail(f"'{value}' is not a share such as 1% or 0.01", param, ctx)
        if not 0 < share <= 1:
            self.fail(f"'{value}' is not above 0% and at most 100%", param, ctx)
        return share


class Integers(click.ParamType):
    """Positive whole numbers, separated by commas."""

    name = "list"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        parts = str(value).split(",")
        if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
            self.fail(f"'{value}' is not a list of positive whole numbers such as 1,5", param, ctx)
        return tuple(dict.fromkeys(int(part) for part in parts))


class ProtocolChoice(click.ParamType):
    """CHOICE=VALUE: one choice of a protocol, such as ignore=no."""

    name = "choice"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Any]:
        if isinstance(value, tuple):
            return value
        try:
            return protocol_choice(str(value))
        except ConfigError as error:
            self.fail(str(error), param, ctx)


class Episodes(click.ParamType):
    """A positive whole number, or the word reference."""

    name = "episodes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value != "reference" and not (str(value).isdecimal() and int(value) > 0):
            self.fail(f"'{value}' is neither a positive whole number nor 'reference'", param, ctx)
        return value if value == "reference" else int(value)


class BackgroundScore(click.ParamType):
    """A number, or the word fit."""

    name = "score"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | float:
        if value == "fit":
            return "fit"
        try:
            score = float(value)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            self.fail(f"'{value}' is neither a number nor 'fit'", param, ctx)
        return score


class StorePlace(click.ParamType):
    """A path, or the address of a store in an object store, which must not go through pathlib."""

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        from pipeline.store.bucket import address, local_path

        try:
            return address(value) or local_path(value)
        except ConfigError as error:
            self.fail(str(error), param, ctx)


FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
ANY_PATH = click.Path(path_type=Path)
STORE = StorePlace()

dataset_argument = click.argument("dataset", type=click.Choice(DATASETS))
data_root_option = click.option(
    "--data-root", type=ANY_PATH, metavar="DIR", help="Folder of the data set. Not needed for shapes."
)
splits_option = click.option(
    "--splits", type=ANY_PATH, metavar="DIR", help="Folder of the published code's split files. [default: by rule]"
)
data_option = click.option(
    "--data-option",
    "data_options",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the data set's reader, such as trn_per_class=30 for shapes. May be repeated.",
)
BACKBONE_NAMES = f"{'|'.join(BACKBONES)}|timm:NAME"
backbone_option = click.option(
    "--backbone",
    type=Backbone(),
    metavar=BACKBONE_NAMES,
    required=True,
    help="Network whose features are used; see `hsnet backbones`.",
)
taps_option = click.option(
    "--taps",
    metavar="LIST",
    help="Layers of a timm network, such as 8,9,10,11; a slash begins another level. [default: by rule]",
)
autocast_option = click.option(
    "--autocast",
    type=click.Choice(("bfloat16", "float16")),
    help="Arithmetic of the backbone, for GPUs; part of the recipe. [default: float32]",
)
weights_option = click.option(
    "--weights",
    metavar="FILE|random",
    help="Backbone weights: .safetensors or torch state dict, or random. [default: the published ones]",
)
image_size_option = click.option(
    "--image-size",
    type=Whole(32),
    help="Side of the square that photos are squashed to, pixels. [default: 400 as published, or the nearest that the "
    "backbone can be read at]",
)
store_option = click.option(
    "--store", type=STORE, metavar="S.zarr", required=True, help="Feature store made by `hsnet extract`."
)
fold_option = click.option(
    "--fold", type=Whole(0), default=0, show_default=True, help="Fold whose classes are held out."
)
precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="int8",
    show_default=True,
    help="Of stored values; float32 is exact and takes four times the space of int8.",
)
bytes_option = click.option(
    "--bytes-per-image",
    type=Bytes(),
    metavar="SIZE",
    help="Instead of --precision: a budget for the features of an image, such as 2MB.",
)
protocol_option = click.option(
    "--protocol",
    type=click.Choice(tuple(PROTOCOLS)),
    default="default",
    show_default=True,
    help="Rules of episodes and scores; docs/evaluation.md has their table.",
)
choice_option = click.option(
    "--set",
    "choices",
    type=ProtocolChoice(),
    multiple=True,
    metavar="CHOICE=VALUE",
    help="Another choice than the protocol's, such as ignore=no or balance=class. May be repeated.",
)
ways_option = click.option(
    "--ways", type=Whole(), metavar="N", help="Classes per episode, each with K supports. [default: the protocol's, 1]"
)
absent_option = click.option(
    "--absent",
    type=Share(),
    metavar="SHARE",
    help="Share of the queries that show none of their episode's classes. [default: the protocol's, 0]",
)
arithmetic_option = click.option(
    "--arithmetic",
    type=click.Choice(("auto", "float32", "bfloat16")),
    default="auto",
    show_default=True,
    help="Precision of the head's activations; bfloat16 is faster where the processor has it. auto: what a run began "
    "with, else bfloat16 on a GPU that has it, float32 elsewhere.",
)
resident_option = click.option(
    "--resident",
    type=click.Choice(("off", "auto", "host", "device")),
    default="auto",
    show_default=True,
    help="Keep the images that are used in memory: of the device that computes, or read once into the host's cache, "
    "which all workers share. auto: on a GPU with room for them.",
)
seed_option = click.option("--seed", type=Whole(0), default=0, show_default=True, help="Same seed, same episodes.")
training_recipe_option = click.option(
    "--recipe",
    "training_recipe",
    type=click.Choice(TRAINING_RECIPES),
    help="How to train: hsnet as published, stable as measured best here. [default: that of a run that goes on, else "
    "stable]",
)
workers_option = click.option(
    "--workers",
    type=Whole(0),
    default=0,
    show_default=True,
    help="Ray workers; 0 works in this process without Ray.",
)
ranks_option = click.option(
    "--workers",
    type=Ranks(),
    default=0,
    metavar="N|MIN:MAX",
    show_default=True,
    help="Ray workers that share each step; 0 works in this process without Ray. MIN:MAX takes as many as there is "
    "room for, fewer when machines go and more when they come.",
)
ALLOW_MIXED = "allow mixed"
"""Where a command's context keeps whether --allow-mixed was given: only what starts Ray asks for it."""


def _keep_allow_mixed(ctx: click.Context, _: click.Parameter, given: bool) -> None:
    ctx.meta[ALLOW_MIXED] = given


_address = click.option(
    "--address",
    metavar="ADDRESS",
    help="Ray cluster to work on: host:port or auto. [default: a local Ray of its own]",
)
_allow_mixed = click.option(
    "--allow-mixed",
    is_flag=True,
    expose_value=False,
    callback=_keep_allow_mixed,
    help="With --address: go on though machines have other versions of Python, torch, numpy, zarr or Pillow.",
)
device_option = click.option(
    "--device", type=Device(), default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else.")
quiet_option = click.option("--quiet", "-q", is_flag=True, help="No progress, no notes; warnings and errors only.")


def options(*decorators: Callable[[F], F]) -> Callable[[F], F]:
    """Apply several option decorators, in the order in which help shall list them."""

    def decorate(function: F) -> F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


address_option = options(_address, _allow_mixed)
common_options = options(json_option, quiet_option)
