"""Options that change the learner, for every command that makes one."""

from __future__ import annotations

import click

from commands.options import Whole

HEADS = ("hsnet", "hsnet+bg")
KERNELS = ("center-pivot", "original", "separable")

LEARNER_OPTIONS = (
    click.option(
        "--head",
        type=click.Choice(HEADS),
        default="hsnet",
        show_default=True,
        help="hsnet+bg also sees the support's background.",
    ),
    click.option(
        "--kernel",
        type=click.Choice(KERNELS),
        default="center-pivot",
        show_default=True,
        help="4D kernels of the learner: the paper's Table 5.",
    ),
    click.option(
        "--layers",
        metavar="WORD|LIST",
        default="all",
        show_default=True,
        help="Layers correlated: all, shallow or deep (one of each level), or numbers from the shallowest: 3,5,8-11.",
    ),
    click.option(
        "--levels",
        metavar="WORD|LIST",
        default="all",
        show_default=True,
        help="Levels correlated: all, finest, deepest, or numbers from the finest: 2,3.",
    ),
    click.option(
        "--depth",
        type=click.IntRange(1, 4),
        help="Convolutions of a squeeze block; strides and channels follow. [default: 3]",
    ),
    click.option("--channels", metavar="LIST", help="Channels of a squeeze block. [default: 16,64,128]"),
    click.option("--groups", type=Whole(), help="Groups of the learner's normalisations. [default: 4]"),
    click.option(
        "--support-mask/--no-support-mask",
        default=True,
        help="--no-support-mask correlates with the whole support photo, not with its object alone.",
    ),
)
"""The keyword of each is a key of `pipeline.heads.learner.LEARNER_CHOICES`."""
