"""What is compared of training runs, by the tests of several files; their fixtures are in tests/pipeline/conftest.py.

`from tiny_runs import losses` works in every test module: tests/conftest.py loads this file.
"""

import json

import numpy as np
import torch

from pipeline.heads.checkpoint import load_checkpoint, read_tensors

STABLE = {
    "optimiser": "adamw",
    "weight_decay": 0.05,
    "schedule": "cosine",
    "warmup": 2,
    "clip": 0.5,
    "average": 0.9,
    "both_directions": True,
}
"""Every training choice."""


def losses(run_dir):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["train"]["loss"] for line in lines if "train" in line]


def weights(run_dir):
    return load_checkpoint(run_dir / "last.safetensors").state


def assert_same_run(a, b, atol):
    np.testing.assert_allclose(losses(a), losses(b), rtol=0, atol=atol)
    for name, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[name], rtol=0, atol=10 * atol, msg=name)


def resume_file(run_dir):
    return read_tensors(run_dir / "resume.safetensors")[0]
