"""A user's words for the learner's switches: what they resolve to, what is refused, and what a run keeps of them."""

from functools import partial

import pytest
import torch
from click.testing import CliRunner

from commands import learner_options
from commands.train import train
from hsnet.errors import ConfigError
from hsnet.kernels import KERNELS
from hsnet.model import HSNet
from pipeline.episodes.stream import EpisodeStream
from pipeline.features.network import LevelLayout, Network
from pipeline.features.recipe import UNKNOWN, Recipe, normalisation_text
from pipeline.heads import catalogue
from pipeline.heads.checkpoint import load_checkpoint
from pipeline.heads.learner import LEARNED_HEADS, LEARNER_CHOICES, learner_arguments, pick
from pipeline.heads.run_dir import RunDir
from pipeline.heads.segmenters import pairs_per_pass
from pipeline.loading.batch import load_batch

RESNET = Recipe.of("resnet50", UNKNOWN)  # 4, 6 and 3 layers on grids of 50, 25 and 13


def other(*levels):
    """A recipe of another network: (side, layers) of its levels, finest first."""
    network = Network(
        levels=tuple(LevelLayout(side, side, (8,) * layers) for side, layers in levels), mean=(0.5,) * 3, std=(0.5,) * 3
    )
    taps = tuple(f"tap{number}" for number in range(sum(layers for _, layers in levels)))
    text = normalisation_text(network.mean, network.std)
    return Recipe(backbone="timm:other", weights=UNKNOWN, taps=taps, normalisation=text, network=network)


def test_published_choices_change_nothing():
    said = {
        "head": "hsnet",
        "kernel": "center-pivot",
        "layers": "all",
        "levels": "all",
        "depth": 3,
        "channels": "16,64,128",
        "groups": 4,
        "support_mask": True,
    }
    assert set(said) == set(LEARNER_CHOICES)
    for recipe in (RESNET, Recipe.of("vgg16", UNKNOWN), other((16, 4)), other((37, 2), (37, 2))):
        assert learner_arguments(recipe) == learner_arguments(recipe, **said) == {}


@pytest.mark.parametrize(
    ("choices", "picked"),
    [
        ({"layers": "shallow"}, [[0], [0], [0]]),
        ({"layers": "deep"}, [[2], [5], [3]]),
        ({"layers": "3,5,8-11"}, [[0], [0, 3, 4, 5], [2]]),
        ({"layers": [11, 1]}, [[0], [], [0]]),
        ({"layers": 13}, [[2], [], []]),
        ({"levels": "deepest"}, [[0, 1, 2], [], []]),
        ({"levels": "finest"}, [[], [], [0, 1, 2, 3]]),
        ({"levels": "2, 3"}, [[0, 1, 2], [0, 1, 2, 3, 4, 5], []]),
        ({"levels": (2,), "layers": "deep"}, [[], [5], []]),
    ],
)
def test_layers_and_levels_are_counted_from_the_shallow_end(choices, picked):
    assert pick(RESNET, **choices) == picked
    found = learner_arguments(RESNET, **choices)
    assert found["picked"] == picked
    assert found["layers"] == [len(level) for level in picked if level]
    plans = {3: ([3, 3, 3], [2, 2, 2]), 6: ([5, 3, 3], [4, 2, 2]), 4: ([5, 5, 3], [4, 4, 2])}
    kept = [plans[count] for count, level in zip((3, 6, 4), picked, strict=True) if level]
    if len(kept) < 3:
        assert (found["kernels"], found["strides"]) == tuple(map(list, zip(*kept, strict=True)))
    else:
        assert set(found) == {"picked", "layers"}


def test_other_depths_come_with_strides_and_channels_by_rule():
    found = {depth: learner_arguments(RESNET, depth=depth) for depth in (1, 2, 4)}
    assert {depth: part["channels"] for depth, part in found.items()} == {
        1: [128],
        2: [64, 128],
        4: [16, 64, 128, 128],
    }
    assert found[1]["strides"] == [[2], [4], [8]]
    assert found[2]["strides"] == [[4, 2], [4, 4], [8, 4]]
    assert found[4]["strides"] == [[2, 2, 2, 1], [2, 2, 2, 2], [4, 2, 2, 2]]
    assert found[2]["kernels"] == [[5, 3], [5, 5], [9, 5]]
    assert learner_arguments(RESNET, channels=[64, 128]) == found[2]
    assert learner_arguments(RESNET, depth=2, channels="8,16", groups=8) == {
        **found[2],
        "channels": [8, 16],
        "groups": 8,
    }
    assert learner_arguments(other((16, 4)), depth=1)["strides"] == [[8]]


def test_what_is_chosen_makes_a_learner():
    for choices in (
        {"kernel": "original", "levels": "2,3", "depth": 4},
        {"kernel": "separable", "layers": "deep", "head": "hsnet+bg"},
        {"support_mask": False, "channels": "4,8,8", "groups": 2},
    ):
        found = learner_arguments(RESNET, **choices)
        model = HSNet(**{**RESNET.learner_arguments(), **found})
        assert model.kernel == choices.get("kernel", "center-pivot")
        assert model.background == (choices.get("head") == "hsnet+bg")
        assert model.support_mask == choices.get("support_mask", True)
        assert len(model.squeeze) == (2 if "levels" in choices else 3)


@pytest.mark.parametrize(
    ("choices", "text"),
    [
        ({"kernel": "round"}, r"Unknown kernel 'round'\. Choose one of: center-pivot, original, separable"),
        ({"head": "hsnet-bg"}, r"Unknown head 'hsnet-bg'\. Choose one of: hsnet, hsnet\+bg"),
        (
            {"layers": "4,14,20"},
            r"layers '4,14,20' asks for 14, 20, but the features have 13 layers \(4, 6, 3 per level",
        ),
        ({"layers": [0]}, r"layers '0' asks for 0, .* Count from 1"),
        ({"levels": 4}, "levels '4' asks for 4, but the features have 3 levels"),
        ({"layers": "last"}, "layers must be all, shallow, deep or numbers such as 3,5,8-11, got 'last'"),
        ({"layers": "9-5"}, "got '9-5'"),
        ({"layers": []}, "layers must be"),
        ({"levels": "deep"}, "levels must be all, finest, deepest or numbers"),
        ({"layers": "1,2", "levels": "deepest"}, "layers '1,2' and levels 'deepest' have no layer in common"),
        ({"channels": "16,x"}, "channels must be numbers such as"),
        ({"depth": 2, "channels": "16,64,128"}, "3 channels, 16, 64, 128, cannot be those of a depth of 2"),
        ({"groups": 3}, r"3 groups do not divide the learner's channels \(16, 64, 128\)"),
        ({"groups": 0}, "0 groups do not divide"),
        ({"channels": "0,8,8"}, "must be positive"),
        ({"depth": 0}, "1 to 4 convolutions, got a depth of 0"),
        ({"depth": 5}, "1 to 4 convolutions, got a depth of 5"),
    ],
)
def test_what_cannot_be_meant_or_is_not_there_is_refused(choices, text):
    with pytest.raises(ConfigError, match=text):
        learner_arguments(RESNET, **choices)


def test_a_depth_that_does_not_fit_names_those_that_do():
    """Four halving levels: one convolution would have to shrink the finest by 16."""
    recipe = other((64, 1), (32, 1), (16, 1), (8, 1))
    assert learner_arguments(recipe) == {}
    with pytest.raises(ConfigError, match=r"8x8, 16x16, 32x32, 64x64 .* at depth 1: .* Depths that fit .*: 2, 3, 4\."):
        learner_arguments(recipe, depth=1)
    assert learner_arguments(recipe, depth=1, levels="2-4")["strides"] == [[2], [4], [8]]


def test_the_commands_offer_what_there_is():
    assert tuple(KERNELS) == learner_options.KERNELS
    assert learner_options.HEADS == LEARNED_HEADS


def of_batch(source, *switches):
    """A batch of two shots, and learners with the switches of the words given."""
    stream = EpisodeStream(source.index, 0, "test", 2, 0)
    slim = {"channels": "4,8,16", "groups": 2}
    arguments = [learner_arguments(source.recipe, **{**slim, **choices}) for choices in switches]
    return load_batch(source, [stream[number] for number in range(2)]), [
        HSNet(**{**source.recipe.learner_arguments(), **found}).eval() for found in arguments
    ]


def test_a_pass_holds_more_pairs_of_fewer_layers(tiny_source, monkeypatch):
    monkeypatch.setattr("pipeline.heads.segmenters.PASS_ELEMENTS", {"cpu": 10**6})
    batch, (every, deepest) = of_batch(tiny_source, {}, {"levels": "deepest"})
    assert pairs_per_pass(batch, every) == pairs_per_pass(batch) < pairs_per_pass(batch, deepest)
    sides = [level.shape[2] for level in batch.query]
    assert pairs_per_pass(batch, deepest) == 10**6 // (batch.query[-1].shape[1] * sides[-1] ** 4)


SWITCHED = ["--kernel", "separable", "--layers", "deep", "--levels", "2,3", "--depth", "2", "--channels", "4,8"]
SWITCHED += ["--groups", "2", "--head", "hsnet+bg", "--no-support-mask"]


@pytest.fixture(scope="module")
def switched(tiny_source, tmp_path_factory):
    """`hsnet train` with every switch, and the arguments that it resolved; more options may follow."""
    run_dir = tmp_path_factory.mktemp("runs") / "switched"
    few = ["--steps", "1", "--batch-size", "2", "--validate-every", "1", "--validate-episodes", "2"]

    def run(*more):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("commands.train.store_source", lambda *_: lambda: tiny_source)
            patched.setattr("commands.train.set_up_logging", lambda quiet: None)
            line = ["--store", "tiny.zarr", "--run-dir", str(run_dir), *few, "--quiet", *more]
            return CliRunner().invoke(train, line)

    done = run(*SWITCHED)
    assert done.exit_code == 0, done.output
    return run_dir, run


def test_a_run_keeps_its_switches_and_a_checkpoint_answers_with_them(switched, tiny_source):
    run_dir, _ = switched
    checkpoint = load_checkpoint(run_dir)
    model = checkpoint.learner()
    assert (model.kernel, model.background, model.support_mask) == ("separable", True, False)
    counts = tiny_source.recipe.layout.layers
    assert model.picked == ((counts[2] - 1,), (counts[1] - 1,), ())
    assert checkpoint.info.config.learner["channels"] == [4, 8]
    method = catalogue.trained(run_dir, tiny_source)
    stream = EpisodeStream(tiny_source.index, 0, "test", 2, 0)
    batch = load_batch(tiny_source, [stream[number] for number in range(2)])
    answers = method.make().answer(batch, joint=(2,))
    twice = [level.repeat_interleave(2, 0) for level in batch.query]
    with torch.no_grad():
        wanted = model.answer(twice, batch.support, batch.support_mask).unflatten(0, (2, 2)).transpose(0, 1)
    torch.testing.assert_close(answers.logits, wanted, rtol=0, atol=1e-4)
    assert answers.joint[2].shape == wanted[0].shape


def test_a_run_is_not_continued_with_other_switches(switched):
    run_dir, run = switched
    assert run(*SWITCHED).exit_code == 0, "the same words go on"
    before = {file: file.read_bytes() for file in run_dir.iterdir() if file.is_file()}
    other = run(*SWITCHED, "--kernel", "original", "--support-mask")
    assert isinstance(other.exception, ConfigError)
    text = str(other.exception)
    assert "learner kernel stored 'separable', wanted 'original'" in text
    assert "learner support_mask stored False, wanted 'default'" in text
    assert "picked" not in text
    assert "Nothing was changed" in text
    assert {file: file.read_bytes() for file in before} == before


def test_a_run_of_published_switches_is_the_run_it_always_was(tiny_config, tmp_path):
    config = partial(tiny_config, learner={})
    assert config().digest == tiny_config(learner=learner_arguments(config().recipe, kernel="center-pivot")).digest
    RunDir(tmp_path, config())
    with pytest.raises(ConfigError, match="learner background stored 'default', wanted True"):
        RunDir(tmp_path, config(learner={"background": True}))
