"""Training in a group of two processes is the same run.

The processes import this file without tests/conftest.py, so what that loads is imported by the tests themselves.
"""

import multiprocessing
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from hsnet.backbone import FrozenBackbone
from pipeline.common.process_group import Distributed
from pipeline.episodes.stream import batch_numbers, steps_per_epoch
from pipeline.heads.run_dir import RunDir
from pipeline.loading.source import OnlineSource
from pipeline.train import (
    fit,
    training_stream,
)


def gloo_rank(rank, world_size, file, config, recipe, shapes, state_dict, path, stops=(100,), read_every=None):
    """One process of a group, which begins the run once for each of `stops`: the number of events to stop after."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world_size)
    source = OnlineSource(shapes, FrozenBackbone("squeezenet1_1", state_dict), recipe)
    save = RunDir.save
    # A slow disk: whoever goes on at once must not find what was there before.
    RunDir.save = lambda *given: (time.sleep(0.5), save(*given))
    for stop_after in stops:
        events = []
        stop = lambda events=events, n=stop_after: len(events) >= n  # noqa: E731
        ranks = Distributed()
        fit(config, source, path, ranks=ranks, micro_batch=2, read_every=read_every, stop=stop, on_event=events.append)
    torch.distributed.destroy_process_group()


def run_group(*arguments):
    """`gloo_rank` in two processes."""
    spawn = multiprocessing.get_context("spawn")
    processes = [spawn.Process(target=gloo_rank, args=(rank, 2, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0], f"not {-signal.SIGKILL}: a rank waits forever"


@pytest.mark.slow
def test_two_ranks_are_the_same_run(tiny_config, tiny_source, tiny_recipe, tiny_shapes, squeezenet, tmp_path):
    """Batch 5 of an epoch of 72 episodes ends in a batch of 2; here also in one of 1, so that a rank is left idle.

    Two gloo processes, three steps across the end of the epoch: losses as in one process up to rounding.
    """
    from tiny_runs import losses

    config = tiny_config(steps=3, batch_size=71, validate_every=3, select_on="none")
    epoch = training_stream(config, tiny_source).epoch_length
    assert steps_per_epoch(71, epoch) == 2, "the second step is a batch of one episode"
    assert len(batch_numbers(1, 71, epoch)) == epoch - 71 == 1
    fit(config, tiny_source, tmp_path / "one")
    run_group(tmp_path / "group", config, tiny_recipe, tiny_shapes, squeezenet.state_dict, tmp_path / "two")
    # Features of other batch sizes and another order of summing differ by 1e-6 before Adam divides.
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=2e-4)


@pytest.mark.slow
def test_two_ranks_average_the_same_weights(
    stable_run, tiny_config, tiny_source, tiny_recipe, tiny_shapes, squeezenet, tmp_path
):
    """Two gloo processes that read two or three steps together, stopped and started again: as in one process, up to
    rounding. They validate after four steps and after the last."""
    from tiny_runs import STABLE, losses, weights

    config, two = replace(tiny_config(steps=6, **STABLE), validate_every=4), tmp_path / "two"
    run_group(tmp_path / "group", config, tiny_recipe, tiny_shapes, squeezenet.state_dict, two, (2, 100), 3)
    assert len(losses(two)) == 6
    np.testing.assert_allclose(losses(two), losses(stable_run[0]), rtol=0, atol=2e-4)
    for name, value in weights(stable_run[0]).items():
        torch.testing.assert_close(weights(two)[name], value, rtol=0, atol=2e-3, msg=name)
