"""Training in a Ray group: the same run as in one process, stoppable and resumable, user errors as themselves."""

import functools
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cluster import nodes
from cluster.train import Mailbox, Size, _reason, _require_bfloat16, _require_own_gpu, _Watch, fit_on_ray
from hsnet.backbone import FrozenBackbone
from hsnet.errors import ClusterError, ConfigError, DataError
from pipeline.datasets.shapes import Shapes
from pipeline.features.recipe import Recipe
from pipeline.features.weights import load_weights
from pipeline.heads.config import RunConfig
from pipeline.loading.source import OnlineSource
from pipeline.train import StepDone, Validated, fit

# Ray Train imports Ray Data, which sets options of its own that it calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")

SHAPES = Shapes(size=64, trn_per_class=3, val_per_class=4)


class FailingShapes:
    """Shapes whose photos cannot be read after the first few."""

    index = SHAPES.index

    def __init__(self):
        self.reads = 0

    def image(self, number):
        self.reads += 1
        if self.reads > 30:
            raise DataError("photo 'x.jpg' is truncated")
        return SHAPES.image(number)

    def label(self, number):
        return SHAPES.label(number)


def make_source(weights, dataset=SHAPES):
    recipe = Recipe.of("squeezenet1_1", weights.sha256, 64, "float32")
    return OnlineSource(dataset, FrozenBackbone("squeezenet1_1", weights.state_dict), recipe)


@pytest.fixture(scope="module")
def source_maker():
    return functools.partial(make_source, load_weights("squeezenet1_1"))


@pytest.fixture
def config(source_maker):
    return RunConfig(
        fold=0,
        recipe=source_maker().recipe,
        data=SHAPES.index.digest,
        steps=4,
        batch_size=5,  # does not divide by two: the ranks have 3 and 2 episodes
        validate_every=2,
        validate_episodes=7,
        learner={"channels": [4, 8, 16]},
    )


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["train"]["loss"] for line in lines if "train" in line]


@pytest.mark.usefixtures("ray_runner")
def test_a_group_of_two_is_the_same_run_and_can_be_stopped(config, source_maker, tmp_path):
    alone, group = tmp_path / "alone", tmp_path / "group"
    expected = fit(config, source_maker(), alone)
    events = []
    # The wish to stop comes after the first step; the group notices within half a second.
    first = fit_on_ray(config, source_maker, group, workers=2, stop=lambda: bool(events), on_event=events.append)
    assert first.steps >= 1
    second = fit_on_ray(config, source_maker, group, workers=2, on_event=events.append)
    assert (second.resumed_at, second.steps, second.finished) == (first.steps, 4, True)
    # Sums in another order differ by 1e-7, which Adam's division can blow up in weights of no influence.
    np.testing.assert_allclose(losses(group), losses(alone), rtol=0, atol=2e-4)
    assert [event.step for event in events if isinstance(event, StepDone)] == [1, 2, 3, 4]
    assert [event.step for event in events if isinstance(event, Validated)] == [2, 4]
    assert second.best_step == expected.best_step
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "group"], "Ray's own notes are gone"


@pytest.mark.usefixtures("ray_runner")
def test_an_error_of_one_rank_ends_the_group_and_arrives_as_itself(config, source_maker, tmp_path):
    broken = functools.partial(source_maker, FailingShapes())
    with pytest.raises(DataError, match=r"photo 'x.jpg' is truncated"):
        fit_on_ray(config, broken, tmp_path / "run", workers=2)


def test_mistakes_show_before_ray_is_started(config, source_maker, tmp_path):
    from dataclasses import replace

    with pytest.raises(ConfigError, match="no fold 9"):
        fit_on_ray(replace(config, fold=9), source_maker, tmp_path / "run", workers=2)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("ray_runner")
def test_a_group_that_does_not_fit_is_an_error_and_not_an_endless_wait(config, source_maker, tmp_path):
    """Ray itself would wait for more machines without a word."""
    with pytest.raises(ClusterError, match="4 workers need a CPU each, Ray has 3"):
        fit_on_ray(config, source_maker, tmp_path / "run", workers=4)
    with pytest.raises(ClusterError, match="2 workers need a GPU each, Ray has 0"):
        fit_on_ray(config, source_maker, tmp_path / "run", workers=2, device="cuda")


def machines(monkeypatch, *counts):
    """Let the cluster have nodes of these numbers of (CPUs, GPUs)."""
    found = [
        {"NodeID": str(number), "NodeManagerHostname": "vm", "Resources": {"CPU": cpus, "GPU": gpus}}
        for number, (cpus, gpus) in enumerate(counts)
    ]
    monkeypatch.setattr(nodes, "alive", lambda: found)


@pytest.mark.parametrize(
    ("there", "asked", "on_gpu", "expected"),
    [
        ([(2, 0), (2, 0)], (1, 2), False, Size(1, 2, 2, False)),  # one worker on each
        ([(2, 0)], (1, 2), False, Size(1, 2, 1, False)),
        ([(2, 0)], (1, 4), False, Size(1, 4, 1, False)),  # two now, more when machines come
        ([(8, 0), (3, 0)], (2, 2), False, Size(2, 2, 4, False)),
        ([(8, 1), (8, 0)], (1, 4), True, Size(1, 4, 8, True)),  # one now
        ([(64, 8)], (7, 64), True, Size(7, 20, 8, True)),  # a step has 20 episodes
        ([(4, 0)], 2, False, Size(1, 2, 2, False)),  # two at first, whatever is lost later
        ([(64, 0)], 64, False, Size(1, 20, 3, False)),
    ],
)
def test_the_size_of_a_group(monkeypatch, there, asked, on_gpu, expected):
    machines(monkeypatch, *there)
    assert Size.of(asked, on_gpu, 20) == expected


def test_a_group_that_may_be_small_is_refused_where_even_that_does_not_fit(monkeypatch):
    machines(monkeypatch, (2, 0), (1, 4))
    with pytest.raises(ClusterError, match="4 workers need a CPU each, Ray has 3"):
        Size.of((4, 8), False, 20)
    machines(monkeypatch, (8, 1), (8, 2))
    with pytest.raises(ClusterError, match="4 workers need a GPU each, Ray has 3"):
        Size.of((4, 8), True, 20)


def test_waiting_for_machines_is_said_and_can_be_stopped(monkeypatch, caplog):
    """A group that may not be smaller waits for ever; no rank is there that could hear of Ctrl-C."""
    machines(monkeypatch, (2, 0))
    stop = []
    watch = _Watch(None, Size(2, 4, 2, False), lambda: bool(stop), None)
    watch.looked = watch.heard = time.monotonic() - 60
    with caplog.at_level("INFO"):
        watch._look()
    assert "needs room for 2 workers at least; 2 CPUs and 0 GPUs have it for 1" in caplog.text
    stop.append(True)
    watch.looked -= 60
    with pytest.raises(KeyboardInterrupt):
        watch._look()


def test_the_reason_of_a_failure_is_the_line_that_names_it():
    class GroupError(Exception):
        worker_failures = {1: "Traceback (most recent call last):\n  File 'x'\nRuntimeError: out of memory"}  # noqa: RUF012

    assert _reason(GroupError("Training failed due to worker errors:")) == "RuntimeError: out of memory."
    assert _reason(ValueError("one\ntwo")) == "two."
    assert _reason(None) == "it ended without a result."


def test_a_rank_refuses_a_gpu_that_would_imitate_bfloat16(config, monkeypatch):
    monkeypatch.setattr("cluster.train.has_bfloat16", lambda device: False)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "Fake 2080")
    half = replace(config, arithmetic="bfloat16")
    with pytest.raises(ClusterError, match=r"bfloat16, which the Fake 2080 of .* cannot.*--arithmetic float32"):
        _require_bfloat16(half, torch.device("cuda:0"))
    for given, device in ((config, "cuda:0"), (half, "cpu")):
        _require_bfloat16(given, torch.device(device))


def test_two_ranks_on_one_gpu_are_refused_with_both_figures():
    """Before NCCL is asked for anything. The same GPU number on another node is another GPU."""
    mailbox = Mailbox()
    assert mailbox.join(0, 4, "node a", "GPU-1") == ()
    assert mailbox.join(1, 4, "node b", "GPU-1") == ()
    sharing = mailbox.join(3, 4, "node a", "GPU-1")
    assert sharing == (0, 3)
    with pytest.raises(ClusterError, match=r"Ranks 0 and 3 of 4 were given one GPU, GPU-1 of .*: 2 ranks, 1 GPU\."):
        _require_own_gpu(sharing, 4, "GPU-1")
    _require_own_gpu((), 4, "GPU-1")
    # The group starts again, with a GPU each.
    assert [mailbox.join(rank, 2, "node a", f"GPU-{rank}") for rank in range(2)] == [(), ()]
    assert mailbox.group() == (2, 1)
    assert [mailbox.join(rank, 2, "node a") for rank in range(2)] == [(), ()], "CPUs may be shared"
