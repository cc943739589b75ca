"""Run configurations: written, read, compared, hashed."""

import json

import pytest

from hsnet.errors import ConfigError
from pipeline.heads.config import RunConfig


def test_comes_back_from_json(tiny_config):
    config = tiny_config(learning_rate=2e-3)
    assert RunConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_the_features_decide_recipe_data_and_skipped(tiny_config, tiny_source):
    config = tiny_config()
    choices = {name: getattr(config, name) for name in ("fold", "steps", "batch_size", "learner")}
    every = {"validate_every": config.validate_every, "validate_episodes": config.validate_episodes}
    assert RunConfig.of(tiny_source, **choices, **every) == config


def test_layers_of_the_learner_follow_from_the_backbone(tiny_config):
    assert tiny_config(learner={}).learner_arguments == {"layers": [4, 2, 2]}


def test_more_steps_are_the_same_run_and_anything_else_is_not(tiny_config):
    config = tiny_config()
    assert tiny_config(steps=99).digest == config.digest
    assert tiny_config(steps=99).differences(config) == {}
    for change in ({"seed": 1}, {"fold": 2}, {"batch_size": 5}, {"boundary": "ignore"}, {"learner": {}}):
        other = tiny_config(**change)
        assert other.digest != config.digest
        assert {name.split()[0] for name in config.differences(other)} == set(change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fold": "0"}, "fold must be int, got '0'"),
        ({"batch_size": True}, "batch_size must be int, got True"),
        ({"extra": 1}, "found: .*extra"),
        ({"recipe": {}}, "A recipe has the fields"),
    ],
)
def test_what_was_not_written_by_us_is_refused(tiny_config, change, message):
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict({**tiny_config().to_dict(), **change})


def test_a_field_that_came_later_has_its_default(tiny_config):
    """A checkpoint of an earlier version stays readable."""
    values = tiny_config().to_dict()
    for name in ("skipped", "boundary"):
        del values[name]
    assert RunConfig.from_dict(values) == tiny_config()
    del values["fold"]
    with pytest.raises(ConfigError, match="has the fields"):
        RunConfig.from_dict(values)
