"""Training choices: recipes, the learning rate of every step, optimisers, the average of the weights."""

import json
import math

import pytest
import torch
from torch import nn

from commands.options import TRAINING_RECIPES
from hsnet.errors import ConfigError
from pipeline.heads.config import TRAINING, RunConfig
from pipeline.heads.training import (
    DEFAULT_RECIPE,
    PUBLISHED,
    RECIPES,
    WeightAverage,
    make_optimiser,
    rate_at,
    recipe_name,
    training_choices,
)


def rates(config: RunConfig) -> list[float]:
    return [rate_at(config, step) for step in range(config.steps)]


def test_recipes_say_every_choice_and_commands_know_their_names():
    assert tuple(RECIPES) == TRAINING_RECIPES
    assert DEFAULT_RECIPE in RECIPES
    assert all(set(recipe) == set(TRAINING) for recipe in RECIPES.values())
    assert RECIPES["hsnet"] == {
        "learning_rate": 1e-3,
        "optimiser": "adam",
        "weight_decay": 0.0,
        "schedule": "constant",
        "warmup": 0,
        "clip": 0.0,
        "average": 0.0,
        "both_directions": False,
    }, "as published"


def test_every_recipe_is_a_valid_run_and_is_known_by_its_values(tiny_config):
    for name in RECIPES:
        assert recipe_name(tiny_config(**training_choices(name))) == name
    assert recipe_name(tiny_config(**training_choices("hsnet", clip=3.0))) is None
    assert recipe_name(tiny_config()) == "hsnet", "a configuration's defaults are the published values"


def test_what_is_given_one_by_one_wins_over_the_recipe_and_the_recipe_over_the_stored_run(tiny_config):
    stored = tiny_config(average=0.5, warmup=7)
    assert training_choices() == dict(RECIPES[DEFAULT_RECIPE])
    assert training_choices(None, stored) == {**PUBLISHED, "average": 0.5, "warmup": 7}
    assert training_choices(None, stored, average=0.0, clip=None) == {**PUBLISHED, "warmup": 7}
    assert training_choices("hsnet", stored, both_directions=True) == {**PUBLISHED, "both_directions": True}
    with pytest.raises(ConfigError, match=r"Unknown training recipe 'fast'\. Choose one of: hsnet, stable"):
        training_choices("fast")
    with pytest.raises(ConfigError, match="Not a training choice: batch_size"):
        training_choices("hsnet", batch_size=3)


def test_the_learning_rate_follows_its_formula(tiny_config):
    assert rates(tiny_config(steps=5)) == [1e-3] * 5
    warm = rates(tiny_config(steps=6, warmup=4, learning_rate=8e-3))
    assert warm == pytest.approx([2e-3, 4e-3, 6e-3, 8e-3, 8e-3, 8e-3], rel=1e-12)
    both = rates(tiny_config(steps=10, warmup=2, schedule="cosine", learning_rate=2e-3))
    expected = [1e-3, 2e-3, *(1e-3 + 1e-3 * math.cos(math.pi * i / 8) for i in range(8))]
    assert both == pytest.approx(expected, rel=1e-12)
    assert rates(tiny_config(steps=3, warmup=6, schedule="cosine")) == pytest.approx([1e-3 / 6, 2e-3 / 6, 3e-3 / 6])


def test_the_cosine_is_that_of_torch(tiny_config):
    config = tiny_config(steps=12, schedule="cosine")
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=12)
    for mine in rates(config):
        assert mine == pytest.approx(optimiser.param_groups[0]["lr"], rel=1e-9)
        optimiser.step()
        theirs.step()


@pytest.mark.parametrize(("optimiser", "decay"), [("adam", 0.0), ("adam", 0.1), ("adamw", 0.1)])
def test_two_steps_of_the_optimiser_by_hand(tiny_config, optimiser, decay):
    """Adam as in its paper; the decay is added to the gradient ("adam") or taken from the weight ("adamw")."""
    rate = 0.01
    parameter = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    config = tiny_config(optimiser=optimiser, weight_decay=decay, learning_rate=rate)
    made = make_optimiser(config, nn.ParameterList([parameter]))
    value, mean, square = parameter.detach().clone(), torch.zeros(2).double(), torch.zeros(2).double()
    for step, slope in enumerate(([0.5, -3.0], [1.5, 0.25]), 1):
        slope = torch.tensor(slope, dtype=torch.float64)
        parameter.grad = slope.clone()
        made.step()
        if optimiser == "adam":
            slope = slope + decay * value
        else:
            value = value - rate * decay * value
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        value = value - rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(parameter.detach(), value, rtol=1e-9, atol=0)


def test_the_average_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    average = WeightAverage(model, 0.5)
    expected = 0.0
    for step in range(1, 20):
        model.weight.data.fill_(float(step))
        average.update(model, step)
        keep = min(0.5, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
    assert average.model.weight.item() == pytest.approx(expected, rel=1e-6)
    assert model.weight.item() == 19.0
    assert not average.model.weight.requires_grad


def test_published_values_leave_a_digest_as_earlier_versions_wrote_it(tiny_config):
    """Literal values of a configuration written before there were training choices."""
    config = tiny_config()
    old = {name: value for name, value in config.to_dict().items() if name not in set(TRAINING) - {"learning_rate"}}
    assert RunConfig.from_dict(json.loads(json.dumps(old))) == config
    recipe = {**config.recipe.to_dict(), "weights": "sha256:" + "0" * 64}
    fixed = RunConfig.from_dict({**old, "recipe": recipe, "data": "sha256:" + "1" * 64})
    assert fixed.digest == "sha256:2363eb859adafc83055b78fdd48457ebf2bb0503d8793c43f6a042d7777b8678"
    for name, value in {"average": 0.9, "schedule": "cosine", "both_directions": True, "clip": 1.0}.items():
        assert RunConfig.from_dict({**fixed.to_dict(), name: value}).digest != fixed.digest


def test_the_length_of_a_run_belongs_to_it_only_with_a_schedule(tiny_config):
    assert tiny_config(warmup=2, steps=8).digest == tiny_config(warmup=2, steps=9).digest
    short, long = tiny_config(schedule="cosine", steps=8), tiny_config(schedule="cosine", steps=9)
    assert short.digest != long.digest
    assert short.differences(long) == {"steps": (8, 9)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimiser": "sgd"}, "optimiser must be one of adam, adamw, got 'sgd'"),
        ({"schedule": "step"}, "schedule must be one of constant, cosine, got 'step'"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and at least 0, got -0.1"),
        ({"weight_decay": math.nan}, "weight_decay must be finite and at least 0, got nan"),
        ({"warmup": -1}, "warmup must be finite and at least 0, got -1"),
        ({"clip": math.inf}, "clip must be finite and at least 0, got inf"),
        ({"average": 1.0}, "average must be at least 0 and below 1, got 1.0"),
        ({"both_directions": True, "batch_size": 3}, "With both_directions batch_size must be even, got 3"),
    ],
)
def test_values_out_of_range_are_named(tiny_config, change, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**change)
