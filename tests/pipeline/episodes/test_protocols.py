"""Protocols: what a name stands for, what may be changed, and that nothing is changed silently."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from hsnet.errors import ConfigError
from pipeline.episodes.protocols import POLICIES, PROTOCOLS, Policy, Protocol, protocol_choice, resolve

OTHER = {
    "episodes": 7,
    "shots": (2,),
    "seeds": (3, 4),
    "draw": "reference",
    "balance": "class",
    "repeat_supports": False,
    "role": "val",
    "resolution": "original",
    "ignore": False,
    "fusion": "logits",
    "tau": 0.4,
    "strict": True,
    "normalise": "shots",
    "image_size": 96,
    "ways": 3,
    "absent": 0.25,
}


def test_the_published_protocol():
    """juhongm999/hsnet @ 6b1bc12, test.py: 400 px squashed, boundaries ignored, 1,000 episodes, seed 0."""
    values = resolve("hsnet").to_dict()
    assert {name: values[name] for name in values if name not in ("name", "digest", "shots")} == {
        "episodes": 1000,
        "seeds": [0],
        "draw": "reference",
        "balance": "listed",
        "repeat_supports": True,
        "role": "test",
        "resolution": "network",
        "ignore": True,
        "fusion": "vote",
        "tau": 0.5,
        "strict": False,
        "normalise": "max",
        "image_size": 400,
    }


def test_the_columns_of_the_policies():
    assert [policy.suffix for policy in POLICIES] == ["", "_all", "_original", "_original_all"]
    assert resolve("hsnet").policy == Policy("network", True)
    assert resolve("original").policy.suffix == "_original_all"
    with pytest.raises(ConfigError, match="resolution must be one of network, original"):
        Policy("full", True)


def test_every_choice_moves_the_digest_and_the_name_does_not():
    base = resolve("default")
    assert set(OTHER) == {item.name for item in fields(Protocol)} - {"name"}
    changed = {name: resolve("default", **{name: value}) for name, value in OTHER.items()}
    assert len({base.digest, *(protocol.digest for protocol in changed.values())}) == len(OTHER) + 1
    for name, protocol in changed.items():
        assert protocol.changes == {name: (getattr(base, name), OTHER[name])}
        assert name in protocol.lines()["changed"]
    assert resolve("default", shots=(1, 5), resolution="original", ignore=False).digest == resolve("original").digest
    assert len({protocol.digest for protocol, _ in PROTOCOLS.values()}) == len(PROTOCOLS)


def test_the_digest_is_stable():
    """A fixed value: a change here means that results of one protocol no longer have one digest."""
    assert resolve("hsnet").digest[:23] == "sha256:bb2afd505ab9d2a2"
    assert resolve("strict").digest[:23] == "sha256:4613c9e09a15ca6f"


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_protocol_survives_being_written(name):
    protocol = resolve(name)
    assert Protocol.from_dict(json.loads(json.dumps(protocol.to_dict()))) == protocol
    assert protocol.changes == {}
    assert "changed" not in protocol.lines()


def test_a_changed_file_is_noticed():
    values = resolve("hsnet").to_dict()
    with pytest.raises(ConfigError, match="says digest"):
        Protocol.from_dict({**values, "episodes": 999})
    for bad in ({**values, "more": 1}, {"episodes": 5}, [], None):
        with pytest.raises(ConfigError, match="A protocol has the fields"):
            Protocol.from_dict(bad)


def test_none_keeps_a_choice_and_lists_are_put_in_order():
    assert resolve("hsnet", episodes=None, shots=[5, 1, 5]) == resolve("hsnet")


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"episodes": 0}, "episodes must be a whole number from 1, got 0"),
        ({"episodes": True}, "episodes must be a whole number"),
        ({"shots": ()}, "shots must be one or more"),
        ({"shots": (0, 1)}, "shots must be a whole number from 1"),
        ({"seeds": (-1,)}, "seeds must be a whole number from 0"),
        ({"draw": "random"}, "draw must be one of stream, reference"),
        ({"fusion": "mean"}, "fusion must be one of vote, logits, probabilities, joint"),
        ({"tau": 0.0}, "tau must be between 0 and 1"),
        ({"tau": float("nan")}, "tau must be between 0 and 1"),
        ({"ignore": "no"}, "ignore must be yes or no"),
        ({"image_size": 10}, "image_size must be a whole number from 32"),
        ({"nshot": 5}, "no choice 'nshot'.*episodes, shots"),
    ],
)
def test_values_that_cannot_work(choice, message):
    with pytest.raises(ConfigError, match=message):
        resolve("default", **choice)


def test_unknown_names_and_choices_that_exclude_each_other():
    with pytest.raises(ConfigError, match=r"No protocol 'hsnett': choose one of default, hsnet"):
        resolve("hsnett")
    for choice in ({"balance": "class"}, {"repeat_supports": False}):
        with pytest.raises(ConfigError, match="follow its lists and let supports repeat"):
            resolve("hsnet", **choice)


@pytest.mark.parametrize(
    ("text", "value"),
    [("shots=1,5", (1, 5)), ("ignore=no", False), ("tau=0.4", 0.4), ("episodes=20", 20), ("fusion=joint", "joint")],
)
def test_choices_as_text(text, value):
    name, read = protocol_choice(text)
    assert (name, read) == (text.split("=")[0], value)
    assert getattr(resolve("default", **{name: read}), name) == value


@pytest.mark.parametrize("text", ["shots", "shot=1", "shots=a", "ignore=maybe", "tau=x", "image_size=big", "name=x"])
def test_choices_that_cannot_be_read(text):
    with pytest.raises(ConfigError, match=r"must be|is not CHOICE=VALUE"):
        protocol_choice(text)


def test_what_a_store_cannot_give_is_said():
    exact = {"dataset": "pascal", "image_size": 400, "has_ignore": True}
    assert resolve("hsnet").departures(**exact) == ()
    (note,) = resolve("hsnet").departures(**{**exact, "image_size": 96})
    assert "400 px" in note
    assert "96 px" in note
    (note,) = resolve("hsnet", image_size=96).departures(**exact)
    assert "asks for 96 px" in note
    (note,) = resolve("hsnet", ignore=False).departures(**{**exact, "dataset": "fss", "has_ignore": False})
    assert "2,400" in note
    assert resolve("hsnet-fss", ignore=False).departures(**{**exact, "dataset": "fss"}) == ()
    assert len(resolve("hsnet", seeds=(1,)).departures(dataset="shapes", image_size=96, has_ignore=False)) == 4
    assert resolve("original").departures(dataset="shapes", image_size=96, has_ignore=False) == ()


def test_the_docs_list_every_protocol_with_its_reason():
    text = (Path(__file__).resolve().parents[3] / "docs" / "evaluation.md").read_text()
    for name, (_, reason) in PROTOCOLS.items():
        assert f"| `{name}` |" in text
        assert reason in text
    for item in fields(Protocol):
        assert item.name == "name" or f"`{item.name}`" in text
