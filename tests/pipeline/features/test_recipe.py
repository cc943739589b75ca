import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest

from hsnet.backbone import BACKBONES
from hsnet.errors import ConfigError, ImageSizeError
from pipeline.features.backbones import default_image_size
from pipeline.features.recipe import Coding, Recipe, difference_lines
from pipeline.store.attributes import DatasetState, StoreFacts

SHA = "sha256:" + "0" * 64


def test_reads_back_what_it_wrote():
    recipe = Recipe.of("resnet50", SHA, image_size=400, precision="float16")
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert Recipe.from_dict(recipe.to_dict()) == recipe


def test_sizes_follow_from_the_backbone_table():
    recipe = Recipe.of("resnet50", SHA)
    assert recipe.level_shapes() == ((4, 50, 50, 512), (6, 25, 25, 1024), (3, 13, 13, 2048))
    assert recipe.dtype == np.int8
    assert sum(math.prod(shape) for shape in recipe.level_shapes()) == 9_998_336  # 10.0 M values


def test_differences_name_every_field_with_both_values():
    one = Recipe.of("resnet50", SHA)
    other = Recipe.of("vgg16", SHA, precision="float32")
    differences = one.differences(other)
    assert set(differences) == {"backbone", "precision", "taps"}
    assert differences["precision"] == ("int8", "float32")
    assert "precision     stored 'int8', wanted 'float32'" in difference_lines(differences)
    assert one.differences(one) == {}


def test_every_backbone_has_a_recipe():
    for name in BACKBONES:
        assert Recipe.of(name, SHA).taps == tuple(tap.node for tap in BACKBONES[name].taps)


RECORDED = {
    "vgg16": (
        "dab95dd9218200304577176ddb12f058b4161f311f233580f5931e424ec984b6",
        "353c0802e666e49beb1dad909a64a0816144eaa76a7ef11630357685e352e6fa",
        "0d740366fd8407b2be03279945ad42df101786055ee471ed4c7d53026ad9f3ba",
    ),
    "resnet50": (
        "90a25a589d95661264875ab77ac410505d456145bbafbd71a8534d5323e89b2d",
        "f4ad9a0146f85c0f14a84a2e69901a23f3484b58adb2ab4d5386f89bc83da8a6",
        "b4468b8ea1124143b07b97559be1387ecad26f36d2c7cb11c5f4d3bf6fd8ca12",
    ),
    "resnet101": (
        "55e53591ae325fdab072b7f4b98548e93153e876d3998e52331ae5d9d95b7101",
        "62fba57ec4179d53ee3a1ca8f14434fa87eaa170935e71e81d6cf36221577b87",
        "1620eac4ae94793a07798e3cca00b69bb581d93aee87fcb9d493be058c888c56",
    ),
    "squeezenet1_1": (
        "e00df3c45ab629527919f659022fafaf1cbd7963dc0093eff555575cd5da7032",
        "f22cadfd29141958077229d852c1409820ba1377abe8a2a2f3ce907fd1372e56",
        "fbfccffe85317b52ce165b0ac307796f5dd0ae44c46e3dc1b2aa3fc7fef3e321",
    ),
}
"""sha256 of recipe JSON, of the same when coded, and digest of a run: by the version before networks of timm's."""


@pytest.mark.parametrize("name", BACKBONES)
def test_recipes_and_runs_of_built_in_networks_are_what_they_always_were(name):
    """Stores, markers and run directories are recognised by these."""
    from pipeline.heads.config import RunConfig

    recipe = Recipe.of(name, SHA, 401, "int8")
    coding = Coding(bytes_per_image=5, images=2, positions=3, seed=0, fit=SHA, level_bytes=(4, 5, 6))
    coded = replace(recipe, precision="coded", coding=coding)
    config = RunConfig(fold=1, recipe=recipe, data=SHA, steps=7)
    texts = [hashlib.sha256(one.to_json().encode()).hexdigest() for one in (recipe, coded)]
    assert (*texts, config.digest.removeprefix("sha256:")) == RECORDED[name]
    assert config.learner_arguments == {"layers": list(reversed(BACKBONES[name].layers))}
    assert recipe.identity() == recipe.to_dict()
    assert StoreFacts(recipe, 16, (DatasetState(SHA, 3, 0),)).identity == (
        "sha256:" + hashlib.sha256(f"{recipe.to_json()}\n{SHA}".encode()).hexdigest()
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"precision": "int4"}, "int4"),
        ({"weights": "squeezenet.pth"}, "64 hex digits"),
        ({"image_size": 0}, "1 to 4096"),
        ({"image_size": 10**9}, "1 to 4096"),
        ({"image_size": 400.0}, "image_size"),
        ({"image_size": True}, "image_size"),
        ({"taps": [1, 2]}, "taps"),
        ({"taps": "abc"}, "taps"),
        ({"backbone": None}, "backbone"),
        ({"colour": "blue"}, "colour"),
    ],
)
def test_refuses_values_that_cannot_be_meant(change, text):
    values = {**Recipe.of("squeezenet1_1", SHA, 64).to_dict(), **change}
    with pytest.raises(ConfigError, match=text):
        Recipe.from_json(json.dumps(values))


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"backbone": "vgg16"}', "3"])
def test_refuses_what_is_no_recipe(text):
    with pytest.raises(ConfigError, match=r"[Rr]ecipe"):
        Recipe.from_json(text)


def test_refuses_taps_that_this_version_does_not_read():
    values = {**Recipe.of("squeezenet1_1", SHA, 64).to_dict(), "taps": ["features.3.cat"]}
    with pytest.raises(ConfigError, match=r"features\.4\.cat"):
        Recipe.from_dict(values).level_shapes()


def test_an_image_size_whose_levels_cannot_be_mixed_names_those_that_work():
    """SqueezeNet at 400 px ends at 4x4, 4x4 and 3x3; the published code would add them by broadcasting."""
    with pytest.raises(ImageSizeError, match=r"3x3, 4x4, 4x4.*Nearest image sizes that work: 388 and 401") as caught:
        Recipe.of("squeezenet1_1", "sha256:" + "0" * 64, 400).require_trainable()
    assert caught.value.nearest == (388, 401)
    with pytest.raises(ConfigError, match=r"vgg16 at 264 px.*1x1, 1x1, 2x2.*263 and 288"):
        Recipe.of("vgg16", "sha256:" + "0" * 64, 264).require_trainable()
    for backbone in ("vgg16", "resnet50", "resnet101"):
        Recipe.of(backbone, "sha256:" + "0" * 64, 400).require_trainable()


def test_every_built_in_network_has_a_default_size_that_works():
    """The published one where its grids fit."""
    assert {name: default_image_size(name)[0] for name in BACKBONES} == {
        "vgg16": 400, "resnet50": 400, "resnet101": 400, "squeezenet1_1": 401,
    }  # fmt: skip
    assert default_image_size("resnet50")[1] == ""
    assert "at 400 px gives levels whose support grids end at" in default_image_size("squeezenet1_1")[1]
    with pytest.raises(ConfigError, match="Unknown backbone"):
        default_image_size("resnet999")
