"""Networks of timm's: what is read of them, and that it is what their architecture says."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from hsnet.backbone import pack_levels
from hsnet.errors import ConfigError, ShapeError, WeightsError
from pipeline.features.backbones import Reading, default_image_size, new_recipe, open_backbone, same_reading
from pipeline.features.recipe import Recipe
from pipeline.features.weights import Weights, hash_tensors, load_weights, weights_of

KINDS = {
    "convolutional": ("timm:test_resnet", 64),
    "convolutional, several blocks": ("timm:test_convnext", 64),
    "hierarchical transformer": ("timm:pvt_v2_b0", 64),
    "plain transformer": ("timm:test_vit", 64),
    "transformer with registers": ("timm:test_vit2", 64),
}


def random(backbone: str, seed: int = 0) -> Weights:
    return load_weights(backbone, f"random:{seed}")


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_out_is_what_the_recipe_says(kind):
    backbone, size = KINDS[kind]
    weights = random(backbone)
    recipe = new_recipe(backbone, weights, size, "float32")
    network = open_backbone(recipe, weights)
    images = torch.randn(2, 3, size, size)
    levels = network(images)
    assert [tuple(level.shape[1:]) for level in levels] == [tuple(shape) for shape in recipe.level_shapes()]
    assert all(level.dtype == torch.float32 and not level.requires_grad for level in levels)
    assert len(network.taps(images)) == len(recipe.taps) == sum(recipe.layout.layers)
    recipe.require_trainable()
    assert Recipe.from_json(recipe.to_json()) == recipe
    assert network.train().training is False
    with torch.inference_mode():  # as predict runs it
        assert all(torch.equal(one, other) for one, other in zip(network(images), levels, strict=True))


@pytest.mark.parametrize(
    ("backbone", "grids", "taps"),
    [
        ("timm:test_resnet", [(8, 8), (4, 4), (2, 2)], ["layer2.0", "layer3.0", "layer4.0"]),
        ("timm:pvt_v2_b0", [(8, 8), (4, 4), (2, 2)], ["stages.1", "stages.2", "stages.3"]),
        ("timm:test_vit", [(4, 4)], ["blocks.4", "blocks.5"]),
        ("timm:test_vit2", [(4, 4)], ["blocks.6", "blocks.7"]),
        ("timm:vit_small_patch14_dinov2", [(16, 16)], ["blocks.8", "blocks.9", "blocks.10", "blocks.11"]),
        ("timm:vit_small_patch14_reg4_dinov2", [(16, 16)], ["blocks.8", "blocks.9", "blocks.10", "blocks.11"]),
    ],
)
def test_the_rule_reads_the_last_three_strides_or_the_last_third_of_the_blocks(backbone, grids, taps):
    recipe = new_recipe(backbone, None, 224 if "dinov2" in backbone else 64)
    assert [shape[1:3] for shape in recipe.level_shapes()] == grids
    assert list(recipe.taps) == taps


def test_swin_gives_every_block_with_its_channels_last():
    recipe = new_recipe("timm:swin_tiny_patch4_window7_224", None, 64)
    assert recipe.level_shapes() == ((2, 8, 8, 192), (6, 4, 4, 384), (2, 2, 2, 768))
    assert recipe.taps[0] == "layers.1.blocks.0"


def test_taps_choose_layers_and_levels():
    one = new_recipe("timm:test_vit", None, 64, reading=Reading("1,3,5"))
    assert one.level_shapes() == ((3, 4, 4, 64),)
    assert one.taps == ("blocks.1", "blocks.3", "blocks.5")
    two = new_recipe("timm:test_vit", None, 64, reading=Reading("2,3/blocks.4,5"))
    assert two.level_shapes() == ((2, 4, 4, 64), (2, 4, 4, 64))
    assert two.learner_arguments()["strides"] == [[2, 2, 2], [2, 2, 2]]
    convolutional = new_recipe("timm:test_convnext", None, 64, reading=Reading("stages.3,stages.2.blocks.0"))
    assert convolutional.taps == ("stages.2.blocks.0", "stages.3")  # finest grid first
    assert convolutional.level_shapes() == ((1, 4, 4, 48), (1, 2, 2, 64))


@pytest.mark.parametrize("backbone", ["timm:test_resnet", "timm:test_convnext"])
def test_blocks_are_those_that_the_network_computes(backbone):
    """Against hooks of the test's own on the undisturbed network."""
    weights = random(backbone)
    recipe = new_recipe(backbone, weights, 64, "float32")
    import timm

    network = timm.create_model(backbone.removeprefix("timm:"), num_classes=0).eval()
    network.load_state_dict(weights.state_dict, strict=False)
    kept = {}
    for name in recipe.taps:
        network.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: kept.update({name: o.clone()}))
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        network(images)
    for name, values in zip(recipe.taps, open_backbone(recipe, weights).taps(images), strict=True):
        torch.testing.assert_close(values, kept[name], rtol=1e-5, atol=1e-5)


def test_stage_outputs_are_those_of_timms_feature_interface():
    weights = random("timm:pvt_v2_b0")
    recipe = new_recipe("timm:pvt_v2_b0", weights, 64, "float32")
    import timm

    network = timm.create_model("pvt_v2_b0", num_classes=0).eval()
    network.load_state_dict(weights.state_dict)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        wanted = network.forward_intermediates(images, indices=3, intermediates_only=True)
    for values, other in zip(open_backbone(recipe, weights).taps(images), wanted, strict=True):
        torch.testing.assert_close(values, other)


def plain_vit(state, images, patch, heads, blocks, grid, prefix=("cls_token",), eps=1e-6):
    """A vision transformer as its papers say, block by block; (B, C, H, W) of every block asked for."""
    dim = state["patch_embed.proj.weight"].shape[0]
    x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2)
    positions = state["pos_embed"]
    own = math.isqrt(positions.shape[1])  # with or without places for the prefix, the root is the grid's side
    first, places = positions[:, : positions.shape[1] - own**2], positions[:, positions.shape[1] - own**2 :]
    if own != grid:
        places = places.reshape(1, own, own, dim).permute(0, 3, 1, 2)
        places = F.interpolate(places, (grid, grid), mode="bicubic", antialias=True, align_corners=False)
        places = places.flatten(2).transpose(1, 2)
    tokens = torch.cat([state[name].expand(len(images), -1, -1) for name in prefix], 1)
    if first.shape[1] == tokens.shape[1]:
        x = torch.cat([tokens, x], 1) + torch.cat([first, places], 1)
    else:
        x = torch.cat([tokens, x + places], 1)

    def norm(values, name):
        return F.layer_norm(values, (dim,), state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def linear(values, name):
        return values @ state[f"{name}.weight"].t() + state[f"{name}.bias"]

    found = []
    for number in range(max(blocks) + 1):
        at = f"blocks.{number}"
        qkv = linear(norm(x, f"{at}.norm1"), f"{at}.attn.qkv")
        query, key, value = (part.unflatten(2, (heads, dim // heads)).transpose(1, 2) for part in qkv.split(dim, dim=2))
        weights = (query @ key.transpose(2, 3) / math.sqrt(dim // heads)).softmax(-1)
        attended = linear((weights @ value).transpose(1, 2).flatten(2), f"{at}.attn.proj")
        x = x + attended * state.get(f"{at}.ls1.gamma", 1.0)
        inner = linear(norm(x, f"{at}.norm2"), f"{at}.mlp.fc1")
        inner = inner * 0.5 * (1 + torch.erf(inner / math.sqrt(2)))  # exact GELU
        x = x + linear(inner, f"{at}.mlp.fc2") * state.get(f"{at}.ls2.gamma", 1.0)
        if number in blocks:
            out = norm(x, "norm") if "norm.weight" in state else x
            found.append(out[:, len(tokens[0]) :].transpose(1, 2).unflatten(2, (grid, grid)))
    return found


def test_taps_of_the_dinov2_file_agree_with_a_plain_reading(shared):
    path = shared / "weights" / "vit_small_patch14_dinov2_f16.safetensors"
    if not path.is_file():
        pytest.skip(f"needs the real DINOv2-S weights in {path}, which are not part of the repository")
    weights = load_weights("timm:vit_small_patch14_dinov2", path)
    assert weights.source == "file vit_small_patch14_dinov2_f16.safetensors"
    recipe = new_recipe(weights.backbone, weights, 112, "float32")
    torch.manual_seed(0)
    images = torch.randn(1, 3, 112, 112)
    state = {name: value.double() for name, value in weights.state_dict.items()}
    wanted = plain_vit(state, images.double(), 14, 6, (8, 9, 10, 11), 8)
    for values, other in zip(open_backbone(recipe, weights).taps(images), wanted, strict=True):
        assert (values - other).abs().max() < 1e-4 * max(1, float(other.abs().max()))


@pytest.mark.parametrize("size", [160, 64])
def test_taps_of_a_small_transformer_agree_with_a_plain_reading(size):
    """At the network's own image size, and with its positions resampled."""
    weights = random("timm:test_vit")
    scaled = {name: value + 0.02 * torch.randn(value.shape) for name, value in weights.state_dict.items()}
    weights = Weights(weights.backbone, scaled, hash_tensors(scaled), "test")
    recipe = new_recipe(weights.backbone, weights, size, "float32", Reading("0,3,5"))
    images = torch.randn(2, 3, size, size)
    state = {name: value.double() for name, value in scaled.items()}
    wanted = plain_vit(state, images.double(), 16, 2, (0, 3, 5), size // 16)
    for values, other in zip(open_backbone(recipe, weights).taps(images), wanted, strict=True):
        assert values.shape == other.shape
        assert (values - other).abs().max() < 1e-4


def test_registers_are_dropped():
    weights = random("timm:vit_small_patch14_reg4_dinov2")
    recipe = new_recipe(weights.backbone, weights, 56, "float32", Reading("0,1"))
    images = torch.randn(1, 3, 56, 56)
    state = {name: value.double() for name, value in weights.state_dict.items()}
    wanted = plain_vit(state, images.double(), 14, 6, (0, 1), 4, ("cls_token", "reg_token"))
    for values, other in zip(open_backbone(recipe, weights).taps(images), wanted, strict=True):
        assert (values - other).abs().max() < 1e-4


def test_one_photo_at_a_time_gives_the_same_bits_in_any_batch_of_the_pipeline():
    """Photos go through a CPU one by one: features depend on no neighbour."""
    from pipeline.features.forward import BATCH

    assert BATCH["cpu"] == 1
    weights = random("timm:test_vit")
    network = open_backbone(new_recipe(weights.backbone, weights, 64, "float32"), weights)
    images = torch.randn(2, 3, 64, 64)
    first = network(images[:1])
    network(images[1:])
    assert all(torch.equal(one, other) for one, other in zip(network(images[:1]), first, strict=True))


def test_normalisation_is_the_networks_own():
    assert new_recipe("timm:test_vit", None, 64).normalisation.endswith("minus (0.5, 0.5, 0.5), over (0.5, 0.5, 0.5)")
    network = new_recipe("timm:eva02_tiny_patch14_224", None, 56).network
    assert network is not None
    assert network.mean == (0.48145466, 0.4578275, 0.40821073)
    assert network.patch == 14


def test_autocast_is_a_field_of_the_recipe_and_moves_values_a_little():
    weights = random("timm:test_vit")
    exact = new_recipe(weights.backbone, weights, 64, "float32")
    cast = new_recipe(weights.backbone, weights, 64, "float32", Reading(autocast="bfloat16"))
    assert exact.differences(cast) == {"network autocast": ("", "bfloat16")}
    images = torch.randn(1, 3, 64, 64)
    one, other = open_backbone(exact, weights)(images)[0], open_backbone(cast, weights)(images)[0]
    assert other.dtype == torch.float32
    assert 0 < (one - other).abs().max() < 0.2
    assert F.cosine_similarity(one, other, dim=-1).min() > 0.999


def test_source_and_licence_are_told_and_not_compared():
    weights = random("timm:test_vit")
    recipe = new_recipe(weights.backbone, weights, 64)
    assert recipe.network is not None
    assert recipe.network.source == "random, seed 0"
    other = replace(recipe, network=replace(recipe.network, source="elsewhere", licence="MIT"))
    assert other == recipe
    assert recipe.differences(other) == {}
    assert other.identity() == recipe.identity() != other.to_dict()
    assert json.loads(other.to_json())["network"]["licence"] == "MIT"
    assert Recipe.from_json(other.to_json()).network.licence == "MIT"


def test_a_recipe_like_another_keeps_its_layers():
    weights = random("timm:test_vit")
    recipe = new_recipe(weights.backbone, weights, 64, "int8", Reading("1,2"))
    again = same_reading(recipe, random("timm:test_vit", 1), "float32")
    assert set(recipe.differences(again)) == {"weights", "precision"}
    assert recipe.differences(same_reading(recipe, weights)) == {}


@pytest.mark.parametrize(
    ("backbone", "size", "reading", "text"),
    [
        (
            "timm:vit_smal_patch14_dinov2",
            224,
            Reading(),
            r"no network 'vit_smal_patch14_dinov2'\. Nearest: timm:vit_small",
        ),
        ("timm:../weights", 224, Reading(), "has no network"),
        ("timm:hf-hub:timm/resnet50", 224, Reading(), "has no network"),
        ("timm:test_vit.nothing", 64, Reading(), "no weights 'nothing' of test_vit; there are: r160_in1k"),
        ("timm:test_vit", 72, Reading(), r"patches of 16 pixels.*size of 72\. Nearest sizes: 64 and 80\. Nothing"),
        ("timm:test_vit", 8, Reading(), r"Nearest sizes: 16\."),
        ("timm:vit_small_patch14_dinov2", 400, Reading(), "Nearest sizes: 392 and 406"),
        ("timm:hiera_tiny_224", 200, Reading(), "cannot read images of 200 px.*sizes that work: 224"),
        ("timm:maxvit_nano_rw_256", 200, Reading(), "sizes that work: 192 and 224"),
        ("timm:coat_tiny", 224, Reading(), "gives no feature maps"),
        ("timm:test_vit", 64, Reading("5,6"), "no layer 'blocks.6'; its blocks are 0 to 5"),
        ("timm:test_vit", 64, Reading("5,4"), "from shallow to deep"),
        ("timm:test_vit", 64, Reading("5,5"), "a layer twice"),
        ("timm:test_vit", 64, Reading(""), "no layer ''"),
        ("timm:test_convnext", 64, Reading("stages.9"), "no layer 'stages.9'; nearest: stages"),
        ("timm:test_convnext", 64, Reading("stages.2,head"), "gives no feature maps"),
        ("timm:test_convnext", 64, Reading("stages.1,stages.2/stages.3"), "several grids into one level"),
        ("timm:test_convnext", 64, Reading("stages.3/stages.2"), "finest grid to the coarsest"),
        ("timm:test_vit", 64, Reading(autocast="int4"), "Unknown autocast 'int4'"),
        ("resnet50", 224, Reading("layer3"), "what is read of resnet50 is fixed"),
        ("resnet50", 224, Reading(autocast="int4"), "Unknown autocast 'int4'"),
        ("resnet5O", 224, Reading(), "Unknown backbone"),
    ],
)
def test_names_sizes_and_layers_that_do_not_fit_say_why(backbone, size, reading, text):
    with pytest.raises(ConfigError, match=text):
        new_recipe(backbone, None, size, reading=reading)


def test_without_a_size_a_network_is_read_at_the_nearest_to_400_px_that_works():
    assert default_image_size("timm:vit_small_patch14_dinov2")[0] == 406
    assert default_image_size("timm:hiera_tiny_224")[0] == 224, "it has one size"
    assert default_image_size("timm:test_convnext") == (400, "")
    with pytest.raises(ConfigError, match="gives no feature maps"):
        default_image_size("timm:coat_tiny")


def test_weights_of_another_network_or_position_grid_are_refused(tmp_path):
    state = random("timm:test_vit").state_dict
    with pytest.raises(WeightsError, match=r"not weights of timm:test_vit2.*timm's names"):
        weights_of("timm:test_vit2", state, "file")
    torch.save({**state, "pos_embed": torch.zeros(1, 26, 64)}, tmp_path / "grid.pth")
    with pytest.raises(WeightsError, match=r"26 positions, timm:test_vit has 101.*resample_abs_pos_embed"):
        load_weights("timm:test_vit", tmp_path / "grid.pth")
    with pytest.raises(WeightsError, match="missing cls_token"):
        weights_of("timm:test_vit", {name: value for name, value in state.items() if name != "cls_token"}, "file")


def test_a_classifier_in_the_file_changes_nothing(tmp_path):
    weights = random("timm:test_vit")
    torch.save(
        {**weights.state_dict, "head.weight": torch.zeros(5, 64), "head.bias": torch.zeros(5)}, tmp_path / "w.pth"
    )
    assert load_weights("timm:test_vit", tmp_path / "w.pth").sha256 == weights.sha256


def test_a_download_that_fails_says_how_to_go_on(monkeypatch):
    import timm

    from pipeline.features import timm_registry

    asked = timm.create_model

    def fail(name, pretrained=False, **options):
        if pretrained:
            raise OSError("We couldn't connect to 'https://huggingface.co'")
        return asked(name, pretrained=pretrained, **options)

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(WeightsError, match=r"from timm/test_vit.*couldn't connect.*--weights FILE.*HF_HOME"):
        load_weights("timm:test_vit")
    assert timm_registry.entry("timm:mixer_s16_224").source == ""
    with pytest.raises(WeightsError, match="publishes no weights of timm:mixer_s16_224"):
        load_weights("timm:mixer_s16_224")


def test_a_network_that_changed_between_versions_is_noticed():
    weights = random("timm:test_vit")
    recipe = new_recipe(weights.backbone, weights, 64, "float32")
    assert recipe.network is not None
    level = replace(recipe.network.levels[0], channels=(32, 32))
    other = replace(recipe, network=replace(recipe.network, levels=(level,)))
    network = open_backbone(other, weights)
    with pytest.raises(ShapeError, match=r"\(64, 4, 4\).*recipe says \(32, 4, 4\).*extract anew"):
        network.taps(torch.zeros(1, 3, 64, 64))
    with pytest.raises(ShapeError, match="built for 64 px"):
        network.taps(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"levels": []}, "levels or a patch"),
        ({"levels": [{"rows": 0, "columns": 4, "channels": [8, 8]}]}, "levels or a patch"),
        ({"levels": [{"rows": 4, "columns": 4, "channels": [8]}]}, "1 layers, its taps are 2"),
        ({"levels": [{"rows": 4, "columns": 4, "channels": "88"}]}, "A level"),
        ({"levels": 4}, "levels must be tuple"),
        ({"mean": [0.5, 0.5]}, "three numbers as mean"),
        ({"std": [0.5, 0.5, 0.0]}, "three numbers as std"),
        ({"mean": [0.1, 0.1, 0.1]}, "'normalisation' must be"),
        ({"patch": 0}, "levels or a patch"),
        ({"autocast": "int4"}, "Unknown autocast"),
        ({"licence": 3}, "licence must be str"),
        ({"colour": "blue"}, "has the fields"),
    ],
)
def test_a_recipe_with_a_network_that_cannot_be_meant_is_refused(change, text):
    values = new_recipe("timm:test_vit", None, 64).to_dict()
    with pytest.raises(ConfigError, match=text):
        Recipe.from_dict({**values, "network": {**values["network"], **change}})


def test_a_network_belongs_to_a_name_of_timms_and_to_no_other():
    values = new_recipe("timm:test_vit", None, 64).to_dict()
    with pytest.raises(ConfigError, match="'network' does not fit backbone 'resnet50'"):
        Recipe.from_dict({**values, "backbone": "resnet50"})
    del values["network"]
    with pytest.raises(ConfigError, match="'network' does not fit backbone 'timm:test_vit'"):
        Recipe.from_dict(values)


def test_without_timm_the_message_is_the_line_that_installs_it():
    code = """
import sys
class Hidden:
    def find_spec(self, name, *args):
        if name.split(".")[0] == "timm":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
from pipeline.features.backbones import new_recipe
from pipeline.features.weights import load_weights
from hsnet.errors import ConfigError
for call in (lambda: new_recipe("timm:test_vit", None, 64), lambda: load_weights("timm:test_vit", "random")):
    try:
        call()
    except ConfigError as error:
        print(error)
"""
    root = Path(__file__).resolve().parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'hsnet-pipeline[timm]'") == 2


def test_levels_pack_as_they_are_kept():
    weights = random("timm:test_vit2")
    network = open_backbone(new_recipe(weights.backbone, weights, 64, "float32"), weights)
    images = torch.randn(1, 3, 64, 64)
    taps = network.taps(images)
    packed = pack_levels(taps, network.spec)
    assert torch.equal(packed[0][0, 1], taps[1][0].permute(1, 2, 0))
