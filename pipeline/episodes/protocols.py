"""Protocols by name: every choice that moves a score without touching the model, in one small value.

The field argues about these choices, and they move scores by 1 to 5 points (docs/evaluation.md). A result carries the
resolved protocol and its digest: two results with one digest were scored by the same rules.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, get_type_hints

from hsnet.errors import ConfigError
from pipeline.common.fields import from_json, read_choice

DRAWS = ("stream", "reference")
BALANCES = ("listed", "class")
RESOLUTIONS = ("network", "original")
FUSIONS = ("vote", "logits", "probabilities", "joint")
NORMALISERS = ("max", "shots")
ROLES = ("test", "val", "trn")


def _one_of(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name} must be one of {', '.join(choices)}, got {value!r}.")


def _whole(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name} must be a whole number from {least}, got {value!r}.")


def _yes_or_no(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{name} must be yes or no (true or false), got {value!r}.")


@dataclass(frozen=True, order=True)
class Policy:
    """On which pixels a prediction is scored. One pass over the episodes gives the counts of every policy."""

    resolution: str = "network"
    """ "network": on the squashed square that the network sees; "original": on the photo's own size."""
    ignore: bool = True
    """Whether pixels with the ignore label (PASCAL's boundaries) count for nothing; False counts every pixel."""

    def __post_init__(self) -> None:
        _one_of("resolution", self.resolution, RESOLUTIONS)
        _yes_or_no("ignore", self.ignore)

    @property
    def suffix(self) -> str:
        """What the policy's columns end in: "", "_all", "_original" or "_original_all"."""
        return ("_original" if self.resolution == "original" else "") + ("" if self.ignore else "_all")

    def __str__(self) -> str:
        size = "network size" if self.resolution == "network" else "original size"
        return f"{size}, {'ignored pixels left out' if self.ignore else 'every pixel'}"


POLICIES = tuple(Policy(resolution, ignore) for resolution in RESOLUTIONS for ignore in (True, False))


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How a score is made. The fold, the model and the data are not in it.

    Raises:
        ConfigError: a value is out of range or two of them exclude each other; names the field and the choices.
    """

    name: str
    """The protocol it was made from; not part of the digest."""
    episodes: int = 1000
    """Per fold, seed and number of shots."""
    shots: tuple[int, ...] = (1, 5)
    seeds: tuple[int, ...] = (0,)
    """Seeds of the episodes; several give several sets of episodes, so the spread between them can be told."""
    draw: str = "stream"
    """ "stream": counter-based episodes, fewer shots being the first supports of more. "reference": the published
    code's own sequence, drawn anew for every number of shots."""
    balance: str = "listed"
    """ "listed": queries as the data set's lists have them (541 of PASCAL fold 2's published 1,000 are "person").
    "class": every class of the fold gets the same number of episodes."""
    repeat_supports: bool = True
    """Whether a support may occur twice in an episode, as in the published code."""
    role: str = "test"
    resolution: str = "network"
    """With `ignore`, the policy of the headline; the other policies come from the same pass."""
    ignore: bool = True
    fusion: str = "vote"
    """How several supports are combined: "vote" of hard masks (published), mean "logits", mean "probabilities", or one
    "joint" pass over all supports."""
    tau: float = 0.5
    """Share of votes (or, for other fusions, foreground probability) from which a pixel is object."""
    strict: bool = False
    """Object only above `tau` (the paper's words), not at it (the published code)."""
    normalise: str = "max"
    """Votes are divided by the image's "max" (published) or by the number of "shots"."""
    ways: int = 1
    """Classes per episode; with several, `hsnet evaluate` labels every pixel as background or one of them."""
    absent: float = 0.0
    """Share of the episodes whose query shows none of their classes: what is found there is a false alarm."""
    image_size: int | None = None
    """Side of the network's input, pixels, that the protocol asks for; None takes the store's. It is the store's to
    decide: `departures` tells when it has another."""

    def __post_init__(self) -> None:
        _whole("episodes", self.episodes, 1)
        for name, least in (("shots", 1), ("seeds", 0)):
            values = getattr(self, name)
            if not isinstance(values, tuple) or not values:
                raise ConfigError(f"{name} must be one or more whole numbers, got {values!r}.")
            for value in values:
                _whole(name, value, least)
            object.__setattr__(self, name, tuple(sorted(set(values))))
        _one_of("draw", self.draw, DRAWS)
        _one_of("balance", self.balance, BALANCES)
        _one_of("role", self.role, ROLES)
        _one_of("resolution", self.resolution, RESOLUTIONS)
        _one_of("fusion", self.fusion, FUSIONS)
        _one_of("normalise", self.normalise, NORMALISERS)
        for name in ("repeat_supports", "ignore", "strict"):
            _yes_or_no(name, getattr(self, name))
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)) or not 0 < self.tau < 1:
            raise ConfigError(f"tau must be between 0 and 1, got {self.tau!r}.")
        object.__setattr__(self, "tau", float(self.tau))
        _whole("ways", self.ways, 1)
        if isinstance(self.absent, bool) or not isinstance(self.absent, (int, float)) or not 0 <= self.absent <= 1:
            raise ConfigError(f"absent must be a share from 0 to 1, got {self.absent!r}.")
        object.__setattr__(self, "absent", float(self.absent))
        if self.image_size is not None:
            _whole("image_size", self.image_size, 32)
        if self.draw == "reference" and (self.balance != "listed" or not self.repeat_supports):
            raise ConfigError(
                "The published code's episodes (draw reference) follow its lists and let supports repeat. Choose draw "
                "stream for balanced classes or distinct supports."
            )

    @property
    def several(self) -> bool:
        """Whether its episodes are other than one class that the query shows: `pipeline.evaluate.nway` scores them."""
        return self.ways > 1 or self.absent > 0

    @property
    def policy(self) -> Policy:
        """The policy of the headline."""
        return Policy(self.resolution, self.ignore)

    @property
    def changes(self) -> dict[str, tuple[object, object]]:
        """Field -> (value of the named protocol, value here), for overridden choices."""
        base = PROTOCOLS[self.name][0] if self.name in PROTOCOLS else self
        return {
            item.name: (getattr(base, item.name), getattr(self, item.name))
            for item in fields(self)
            if getattr(base, item.name) != getattr(self, item.name)
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values with the digest; `from_dict` reads them back."""
        return {**_plain(self), "digest": self.digest}

    @property
    def digest(self) -> str:
        """ "sha256:..." of every choice; the name is none."""
        values = {name: value for name, value in _plain(self).items() if name != "name"}
        return "sha256:" + hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_dict(cls, values: object) -> Protocol:
        """Read what `to_dict` gave.

        Raises:
            ConfigError: unknown or missing fields, a value out of range, or a digest of other values.
        """
        plain = {k: v for k, v in values.items() if k != "digest"} if isinstance(values, Mapping) else values
        protocol = from_json(cls, plain, "A protocol", may_lack=tuple(_LATER))
        digest = values.get("digest", protocol.digest) if isinstance(values, Mapping) else None
        if digest != protocol.digest:
            raise ConfigError(f"A protocol says digest {digest}, but its values have {protocol.digest}.")
        return protocol

    def lines(self) -> dict[str, str]:
        """What is printed above a result: fact -> text. Overridden choices are named as such."""
        several = f", supports {'may repeat' if self.repeat_supports else 'are distinct'}"
        drawn = "the published code's sequence" if self.draw == "reference" else "counter-based"
        balanced = "as listed" if self.balance == "listed" else "the same number per class"
        fused = self.fusion
        if self.fusion == "vote":
            fused += f" {'>' if self.strict else '>='} {self.tau:g} of {'the most' if self.normalise == 'max' else 'K'}"
        elif self.tau != 0.5:
            fused += f" {'>' if self.strict else '>='} {self.tau:g}"
        seeds = ", ".join(map(str, self.seeds))
        ways = f"{self.ways}-way, " if self.several else ""
        none = f", {100 * self.absent:g} % with none of their classes shown" if self.absent else ""
        facts = {
            "protocol": f"{self.name} ({self.digest[:15]})",
            "episodes": f"{ways}{self.episodes:,} per fold, {drawn}, seed {seeds}, {balanced}{several}{none}",
            "shots": f"{', '.join(map(str, self.shots))}, {fused}",
            "scored at": str(self.policy),
        }
        if self.changes:
            facts["changed"] = "; ".join(
                f"{k} {_text(new)} (was {_text(old)})" for k, (old, new) in self.changes.items()
            )
        return facts

    def departures(self, *, dataset: str, image_size: int, has_ignore: bool) -> tuple[str, ...]:
        """Where the data and the store cannot give what the protocol says: notes to print and to keep with a result.

        They do not stop an evaluation: the score is a fair one, but not the one that the protocol's name promises.
        """
        notes = []
        if self.image_size is not None and image_size != self.image_size:
            notes.append(
                f"Protocol {self.name} asks for {self.image_size} px, the store has {image_size} px: the score is not "
                f"comparable with others of that name."
            )
        if self.draw == "reference" and dataset == "fss" and self.episodes != 2400:
            notes.append(
                f"The published code tests FSS-1000 on all 2,400 listed photos, not on {self.episodes:,} "
                f"(protocol hsnet-fss)."
            )
        if self.draw == "reference" and dataset not in ("pascal", "coco", "fss"):
            notes.append(
                f"The published code knows no data set '{dataset}': its way of drawing is used on these lists."
            )
        if self.draw == "reference" and self.seeds != (0,):
            notes.append("The published code's episodes are those of seed 0; another seed gives others.")
        if self.ignore and not has_ignore:
            notes.append("The data set has no ignore label: every pixel counts.")
        return tuple(notes)


_HSNET = Protocol(name="hsnet", shots=(1, 5), draw="reference", image_size=400)
_DEFAULT = Protocol(name="default", shots=(1,))

PROTOCOLS: dict[str, tuple[Protocol, str]] = {
    protocol.name: (protocol, reason)
    for protocol, reason in (
        (_DEFAULT, "The published rules on counter-based episodes: one pass gives every number of shots."),
        (_HSNET, "The published evaluation (PASCAL, COCO), episode by episode: to compare with the paper's tables."),
        (
            replace(_HSNET, name="hsnet-fss", episodes=2400),
            "The published evaluation of FSS-1000: every listed photo is a query once.",
        ),
        (
            replace(_HSNET, name="hsnet-original", resolution="original"),
            "The published code's use_original_imgsize: the same episodes, scored at the photos' own size.",
        ),
        (
            Protocol(name="original", resolution="original", ignore=False),
            "Every pixel of the original photo counts: nothing is squashed, no hard pixel is left out.",
        ),
        (
            Protocol(name="original-5000", resolution="original", ignore=False, episodes=5000),
            "The same with 5,000 episodes: an interval less than half as wide.",
        ),
        (
            Protocol(name="original-20000", resolution="original", ignore=False, episodes=20000),
            "The same with 20,000, a habit for COCO: 80 classes need more episodes than 20.",
        ),
        (
            Protocol(name="seeds", seeds=(0, 1, 2, 3, 4)),
            "Five sets of 1,000 episodes: the spread between seeds is shown, not only computed.",
        ),
        (
            Protocol(name="balanced", balance="class"),
            "The same number of episodes per class: mIoU weighs classes alike, so their errors should be alike.",
        ),
        (
            Protocol(name="distinct", repeat_supports=False),
            "No support twice in an episode: five shots are five photos.",
        ),
        (
            Protocol(
                name="strict",
                resolution="original",
                ignore=False,
                episodes=5000,
                balance="class",
                repeat_supports=False,
                shots=(1, 5, 10),
            ),
            "What we would choose for a new table: original size, every pixel, balanced, distinct, 5,000 episodes.",
        ),
    )
}
"""Name -> (protocol, why one would use it)."""


def resolve(name: str = "default", **overrides: Any) -> Protocol:
    """The protocol of that name, with single choices replaced. None keeps the named protocol's choice.

    Raises:
        ConfigError: no such protocol or choice, or a value out of range; names what there is.

    >>> resolve("hsnet", episodes=200).changes
    {'episodes': (1000, 200)}
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"No protocol '{name}': choose one of {', '.join(PROTOCOLS)}.")
    choices = [item.name for item in fields(Protocol) if item.name != "name"]
    given: dict[str, Any] = {}
    for field, value in overrides.items():
        if field not in choices:
            raise ConfigError(f"A protocol has no choice '{field}': it has {', '.join(choices)}.")
        if value is not None:
            given[field] = tuple(value) if isinstance(value, (list, range)) else value
    return replace(PROTOCOLS[name][0], **given)


def protocol_choice(text: str) -> tuple[str, Any]:
    """ "shots=1,5" -> ("shots", (1, 5)): a choice as it is written on a command line, for `resolve`.

    Raises:
        ConfigError: not of the form KEY=VALUE, no such choice, or a value of another kind.
    """
    return read_choice(text, {name: kind for name, kind in get_type_hints(Protocol).items() if name != "name"})


_LATER: dict[str, object] = {"ways": 1, "absent": 0.0}
"""Choices that came later, with what they were before: left out where they are that, so that digests hold."""


def _plain(protocol: Protocol) -> dict[str, Any]:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(protocol).items()}
    return {name: value for name, value in values.items() if name not in _LATER or value != _LATER[name]}


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ",".join(map(str, value)) if isinstance(value, tuple) else "any" if value is None else str(value)
