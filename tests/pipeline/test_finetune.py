"""Runs that train the backbone too: exact, whole in their checkpoints, and never mixed with frozen features."""

import json
import multiprocessing
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hsnet.backbone import FrozenBackbone
from hsnet.errors import CheckpointError, CheckpointMismatch, ConfigError
from hsnet.metrics import mean_iou, sum_by_class
from pipeline.common.process_group import Distributed
from pipeline.features.network import LevelLayout, Network
from pipeline.features.recipe import Recipe, normalisation_text
from pipeline.features.weights import load_weights
from pipeline.heads.checkpoint import load_checkpoint, read_tensors, save_backbone
from pipeline.heads.config import FINETUNING, RunConfig
from pipeline.heads.segmenters import LearnedSegmenter
from pipeline.heads.training import WeightAverage, make_optimiser, set_rate
from pipeline.loading.batch import load_batch
from pipeline.loading.source import OnlineSource, PhotoSource
from pipeline.sweep import sweep_choices
from pipeline.train import fit, make_model, selection_stream

EVERY_CHOICE = {"average": 0.9, "optimiser": "adamw", "weight_decay": 0.05, "clip": 1.0, "both_directions": True}


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["train"]["loss"] for line in lines if "train" in line]


@pytest.fixture(scope="module")
def photos(tiny_shapes, squeezenet, tiny_recipe):
    return PhotoSource(tiny_shapes, FrozenBackbone("squeezenet1_1", squeezenet.state_dict), tiny_recipe)


@pytest.fixture(scope="module")
def config(tiny_config):
    return tiny_config(finetune_backbone=True, backbone_lr=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory, config, photos):
    """Four steps, validated at the second and the last."""
    path = tmp_path_factory.mktemp("runs") / "finetuned"
    fit(config, photos, path)
    return path


def test_the_backbone_is_trained_and_kept_with_the_head(run, config, squeezenet, photos, tmp_path):
    last = load_checkpoint(run / "last.safetensors")
    assert last.info.finetuned
    assert last.info.config == config
    assert last.info.config.recipe.weights == squeezenet.sha256, "what it began with"
    trained = last.backbone_weights()
    assert trained.state_dict.keys() == squeezenet.state_dict.keys()
    moved = [float((value - squeezenet.state_dict[name]).abs().max()) for name, value in trained.state_dict.items()]
    assert all(0 < move <= 4.1e-4 for move in moved), "four Adam steps of at most 1e-4 each"
    assert all(torch.equal(value, squeezenet.state_dict[n]) for n, value in photos.backbone.weights().items())

    target = tmp_path / "trained.safetensors"
    save_backbone(last, target)
    again = load_weights("squeezenet1_1", target)
    assert again.sha256 == trained.sha256 == last.recipe.weights != squeezenet.sha256
    assert again.source == f"finetuned with a head, step 4 of {last.digest}"


def test_a_frozen_and_a_finetuned_run_begin_alike(run, tiny_config, tiny_source, tmp_path):
    """The same head and the same episodes: Fig. 9 compares nothing but the backbone."""
    fit(tiny_config(), tiny_source, tmp_path / "frozen")
    frozen, finetuned = losses(tmp_path / "frozen"), losses(run)
    assert finetuned[0] == pytest.approx(frozen[0], abs=1e-5)
    assert abs(finetuned[3] - frozen[3]) > 1e-4


def test_validation_is_of_the_features_that_a_store_of_these_weights_holds(run, config, tiny_shapes, photos):
    best = load_checkpoint(run)
    recipe = replace(config.recipe, weights=best.recipe.weights)
    frozen = OnlineSource(tiny_shapes, FrozenBackbone("squeezenet1_1", best.backbone_weights().state_dict), recipe)
    best.require(frozen.recipe, "the store")
    stream = selection_stream(config, frozen)
    episodes = [stream[number] for number in range(config.validate_episodes)]
    batch = load_batch(frozen, episodes)
    counts = LearnedSegmenter(best.learner()).answer(batch).count(batch)
    totals = sum_by_class(counts, [episode.class_id for episode in episodes], stream.class_ids)
    assert mean_iou(totals) == best.info.scores["miou"]
    read = load_batch(photos, episodes).read_by(frozen.network.backbone)
    assert all(map(torch.equal, read.query + read.support, batch.query + batch.support))


def test_resumed_equals_uninterrupted(config, photos, tmp_path):
    """Backbone, moments and average to the last bit."""
    config = replace(config, **EVERY_CHOICE, validate_episodes=2)
    fit(config, photos, tmp_path / "whole")
    for stop_at in (1, 2):
        asked = iter(range(100))
        fit(config, photos, tmp_path / "parts", stop=lambda asked=asked, n=stop_at: next(asked) >= n)
    assert fit(config, photos, tmp_path / "parts").resumed_at == 3
    for name in ("resume", "last", "best"):
        whole, parts = (read_tensors(tmp_path / side / f"{name}.safetensors") for side in ("whole", "parts"))
        assert whole[1] == parts[1]
        assert all(torch.equal(value, parts[0][tensor]) for tensor, value in whole[0].items())
        assert any(".features.0.weight" in tensor or "backbone.features.0" in tensor for tensor in whole[0])
    kept = load_checkpoint(tmp_path / "whole" / "last.safetensors").backbone["features.0.weight"]
    resume = read_tensors(tmp_path / "whole" / "resume.safetensors")[0]
    assert torch.equal(kept, resume["average.backbone.network.features.0.weight"]), "the average is what is kept"
    assert not torch.equal(kept, resume["model.backbone.network.features.0.weight"])


def test_micro_batches_keep_the_global_batch(run, config, photos, tmp_path):
    fit(replace(config, steps=2, select_on="none"), photos, tmp_path / "run", micro_batch=1)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(run)[:2], rtol=0, atol=2e-4)


def test_both_directions_in_micro_batches(config, photos, tmp_path):
    """Every photo is read once and used twice; how a step is divided changes rounding only."""
    both = replace(config, both_directions=True, steps=1, select_on="none")
    for path, micro_batch in (("both", None), ("small", 2)):
        fit(both, photos, tmp_path / path, micro_batch=micro_batch)
    fit(replace(both, batch_size=2, both_directions=False), photos, tmp_path / "one")
    assert losses(tmp_path / "small")[0] == pytest.approx(losses(tmp_path / "both")[0], abs=1e-5)
    assert losses(tmp_path / "both")[0] != pytest.approx(losses(tmp_path / "one")[0], abs=1e-5)


def test_the_average_holds_a_backbone_in_eval_mode(config, photos):
    """Copies of traced networks come back in training mode, in which BatchNorm would take a batch's statistics."""
    average = WeightAverage(make_model(config, photos), 0.9)
    assert not any(module.training for module in average.model.modules())


def test_the_backbone_has_a_learning_rate_of_its_own(config, photos):
    model = make_model(config, photos)
    optimiser = make_optimiser(config, model)
    head, backbone = optimiser.param_groups
    assert sum(map(torch.numel, backbone["params"])) == sum(map(torch.numel, photos.backbone.parameters()))
    assert sum(map(torch.numel, head["params"])) == sum(value.numel() for value in model.head_state().values())
    set_rate(optimiser, 5e-4)
    assert (head["lr"], backbone["lr"]) == (5e-4, pytest.approx(5e-5))
    same = make_optimiser(replace(config, backbone_lr=0.0), model)
    set_rate(same, 5e-4)
    assert [group["lr"] for group in same.param_groups] == [5e-4, 5e-4]


def test_frozen_features_and_photos_are_not_mixed_up(config, tiny_config, tiny_source, photos, tmp_path):
    with pytest.raises(ConfigError, match=r"features given are frozen[\s\S]*--features online --finetune-backbone"):
        fit(config, tiny_source, tmp_path / "run")
    with pytest.raises(ConfigError, match="Photos were given in the place of features"):
        fit(tiny_config(), photos, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_goes_on_only_as_it_was_begun(run, config, tiny_config, tiny_source, photos):
    with pytest.raises(ConfigError, match=r"finetune_backbone +stored True, wanted False"):
        fit(tiny_config(), tiny_source, run)
    with pytest.raises(ConfigError, match=r"backbone_lr +stored 0.0001, wanted 0.001"):
        fit(replace(config, backbone_lr=1e-3), photos, run)


def test_features_of_the_original_weights_are_refused_with_the_way_out(run, tiny_recipe):
    best = load_checkpoint(run)
    said = (
        rf"weights +checkpoint '{best.recipe.weights}'[\s\S]*finetuned[\s\S]*hsnet checkpoint backbone[\s\S]*--weights"
    )
    with pytest.raises(CheckpointMismatch, match=said):
        best.require(tiny_recipe, "the store")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone_lr": 1e-4}, "backbone_lr is 0.0001, but the backbone is not trained"),
        ({"finetune_backbone": True, "backbone_lr": 1.0}, "backbone_lr must be at least 0 and below 1, got 1.0"),
        ({"finetune_backbone": True, "backbone_lr": -1e-4}, "backbone_lr must be at least 0"),
    ],
)
def test_choices_that_cannot_be_meant_are_refused(tiny_config, change, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**change)


def test_features_without_gradients_are_refused(tiny_config, tiny_recipe, tiny_shapes):
    with pytest.raises(ConfigError, match=r"Features in int8 have no gradient[\s\S]*--features online"):
        tiny_config(finetune_backbone=True, recipe=replace(tiny_recipe, precision="int8"))
    network = Network(levels=(LevelLayout(4, 4, (8,)),), mean=(0.5,) * 3, std=(0.5,) * 3, patch=16, autocast="bfloat16")
    timm = replace(
        tiny_recipe,
        backbone="timm:some_net",
        taps=("1",),
        network=network,
        normalisation=normalisation_text(network.mean, network.std),
    )
    with pytest.raises(ConfigError, match="Only the built-in backbones can be finetuned"):
        tiny_config(finetune_backbone=True, recipe=timm)
    with pytest.raises(ConfigError, match="Only built-in backbones can be finetuned, not timm:some_net"):
        PhotoSource(tiny_shapes, torch.nn.Identity(), timm)


def test_runs_of_earlier_versions_keep_their_digest(tiny_config):
    config = tiny_config()
    old = {name: value for name, value in config.to_dict().items() if name not in FINETUNING}
    assert RunConfig.from_dict(old) == config
    digests = {config.digest, tiny_config(finetune_backbone=True).digest}
    digests.add(tiny_config(finetune_backbone=True, backbone_lr=1e-4).digest)
    assert len(digests) == 3
    fixed = Recipe.of("squeezenet1_1", "sha256:" + "1" * 64, 64, "float32")
    one = RunConfig(fold=0, recipe=fixed, data="sha256:" + "2" * 64, steps=4)
    assert one.digest == "sha256:3a4c9ede11f74b6cc0d2be18b4bb7ca7c4feda697a40d20a450e4d9cbfcb2a85"


def test_a_sweep_offers_no_finetuning():
    assert not set(FINETUNING) & set(sweep_choices())


def test_a_checkpoint_without_its_backbone_is_damaged(run, tmp_path):
    tensors, metadata = read_tensors(run / "last.safetensors")
    save_file({n: v for n, v in tensors.items() if not n.startswith("backbone.")}, tmp_path / "a.safetensors", metadata)
    with pytest.raises(CheckpointError, match="by its header its backbone was finetuned, but 0 tensors"):
        load_checkpoint(tmp_path / "a.safetensors")
    save_file({**tensors, "backbone.features.0.bias": torch.ones(64)}, tmp_path / "b.safetensors", metadata)
    with pytest.raises(CheckpointError, match=r"damaged: the backbone inside has the sha256[\s\S]*Nothing was written"):
        save_backbone(load_checkpoint(tmp_path / "b.safetensors"), tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_weights_file_replaces_nothing(run, tmp_path):
    last = load_checkpoint(run / "last.safetensors")
    (tmp_path / "there.safetensors").write_text("precious")
    with pytest.raises(CheckpointError, match="exists and was left as it is"):
        save_backbone(last, tmp_path / "there.safetensors")
    with pytest.raises(CheckpointError, match=r"must end in \.safetensors"):
        save_backbone(last, tmp_path / "weights.pth")
    assert (tmp_path / "there.safetensors").read_text() == "precious"


def gloo_rank(rank, file, config, recipe, shapes, state_dict, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    source = PhotoSource(shapes, FrozenBackbone("squeezenet1_1", state_dict), recipe)
    fit(config, source, path, ranks=Distributed(), micro_batch=2)
    torch.distributed.destroy_process_group()


def test_two_ranks_are_the_same_run(run, config, tiny_recipe, tiny_shapes, squeezenet, tmp_path):
    """Gradients of the backbone are averaged over the group too: as in one process, up to rounding."""
    given = (
        tmp_path / "group",
        replace(config, steps=2),
        tiny_recipe,
        tiny_shapes,
        squeezenet.state_dict,
        tmp_path / "two",
    )
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=gloo_rank, args=(rank, *given)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(run)[:2], rtol=0, atol=2e-4)
    trained = load_checkpoint(tmp_path / "two" / "last.safetensors").backbone
    moved = [float((value - squeezenet.state_dict[name]).abs().max()) for name, value in trained.items()]
    assert all(0 < move <= 2.1e-4 for move in moved)
