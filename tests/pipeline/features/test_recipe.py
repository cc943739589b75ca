import json
import math

import numpy as np
import pytest

from hsnet.backbone import BACKBONES
from hsnet.errors import ConfigError
from pipeline.features.recipe import Recipe, difference_lines

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
    with pytest.raises(ConfigError, match=r"3x3, 4x4, 4x4.*Nearest image sizes that work: 388 and 401"):
        Recipe.of("squeezenet1_1", "sha256:" + "0" * 64, 400).require_trainable()
    with pytest.raises(ConfigError, match=r"vgg16 at 264 px.*1x1, 1x1, 2x2.*263 and 288"):
        Recipe.of("vgg16", "sha256:" + "0" * 64, 264).require_trainable()
    for backbone in ("vgg16", "resnet50", "resnet101"):
        Recipe.of(backbone, "sha256:" + "0" * 64, 400).require_trainable()
