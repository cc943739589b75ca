"""A tiny real setting: 64 px shapes, the real SqueezeNet, features computed once and kept in memory."""

from __future__ import annotations

import pytest
import torch
from tiny_runs import STABLE

from hsnet.backbone import FrozenBackbone
from pipeline.datasets.shapes import Shapes
from pipeline.features.recipe import Recipe
from pipeline.features.weights import load_weights
from pipeline.heads.config import RunConfig
from pipeline.loading.source import OnlineSource
from pipeline.train import StepDone, fit


class RememberingSource(OnlineSource):
    """Online features and labels, each computed once, one image at a time."""

    def __init__(self, *args):
        super().__init__(*args)
        self.kept = {}
        self.maps = {}

    def labels(self, images):
        for image in images:
            if image not in self.maps:
                self.maps[image] = super().labels([image])[0]
        return torch.stack([self.maps[image] for image in images])

    def features(self, images):
        for image in images:
            if image not in self.kept:
                self.kept[image] = [level[0] for level in super().features([image])]
        return [torch.stack([self.kept[image][level] for image in images]) for level in range(3)]


@pytest.fixture(scope="session")
def squeezenet():
    return load_weights("squeezenet1_1")


@pytest.fixture(scope="session")
def tiny_shapes():
    return Shapes(size=64, trn_per_class=3, val_per_class=4)


@pytest.fixture(scope="session")
def tiny_recipe(squeezenet):
    return Recipe.of("squeezenet1_1", squeezenet.sha256, 64, "float32")


@pytest.fixture(scope="session")
def tiny_source(tiny_shapes, squeezenet, tiny_recipe):
    return RememberingSource(tiny_shapes, FrozenBackbone("squeezenet1_1", squeezenet.state_dict), tiny_recipe)


@pytest.fixture(scope="session")
def tiny_config(tiny_shapes, tiny_recipe):
    """Builds run configurations for the tiny setting."""

    def build(**changes):
        values = {
            "fold": 0,
            "recipe": tiny_recipe,
            "data": tiny_shapes.index.digest,
            "steps": 4,
            "batch_size": 4,
            "validate_every": 2,
            "validate_episodes": 6,
            # A slim learner: the loop is under test here, not the model.
            "learner": {"channels": [4, 8, 16]},
        }
        return RunConfig(**{**values, **changes})

    return build


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, tiny_config, tiny_source):
    """Six steps without interruption: what the others are compared with."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    events = []
    summary = fit(tiny_config(steps=6), tiny_source, path, on_event=events.append)
    return path, summary, events


@pytest.fixture(scope="session")
def stable_run(tmp_path_factory, tiny_config, tiny_source):
    """Six steps with every training choice, without interruption."""
    path = tmp_path_factory.mktemp("runs") / "stable"
    events = []
    fit(tiny_config(steps=6, **STABLE), tiny_source, path, on_event=events.append)
    return path, [event for event in events if isinstance(event, StepDone)]
