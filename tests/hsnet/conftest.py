"""The generators behind the golden arrays (rules in tests/golden/README.md)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hsnet.published import split_published


def uniform(rng: np.random.RandomState, shape, low: float, high: float) -> np.ndarray:
    """Numbers that are bit-identical on every platform: numpy's legacy generator is frozen."""
    return (low + (high - low) * rng.random_sample(math.prod(shape)).reshape(shape)).astype(np.float32)


def fill(named_shapes, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.RandomState(seed)
    state = {}
    for name, shape in named_shapes:
        if len(shape) >= 2:
            bound = math.sqrt(3 / math.prod(shape[1:]))
            values = uniform(rng, shape, -bound, bound)
        elif name.endswith(("running_var", "weight")):
            values = uniform(rng, shape, 0.5, 1.5)
        else:
            values = uniform(rng, shape, -0.1, 0.1)
        state[name] = torch.from_numpy(values)
    return state


def published_shapes(layers, channels=(16, 64, 128)):
    """Names and shapes of the published learner in its own order; `layers` deepest level first."""
    width = channels[-1]
    blocks = [
        (f"encoder_layer{name}", (count, *channels[:-1]), channels, kernels)
        for name, count, kernels in zip((4, 3, 2), layers, ((3, 3, 3), (5, 3, 3), (5, 5, 3)), strict=True)
    ] + [(f"encoder_layer{name}", (width,) * 3, (width,) * 3, (3, 3, 3)) for name in ("4to3", "3to2")]
    for name, inputs, outputs, kernels in blocks:
        for j, (ins, outs, k) in enumerate(zip(inputs, outputs, kernels, strict=True)):
            for conv in ("conv1", "conv2"):
                yield f"{name}.{3 * j}.{conv}.weight", (outs, ins, k, k)
                yield f"{name}.{3 * j}.{conv}.bias", (outs,)
            yield f"{name}.{3 * j + 1}.weight", (outs,)
            yield f"{name}.{3 * j + 1}.bias", (outs,)
    for name, ins, outs in (
        ("decoder1.0", width, width),
        ("decoder1.2", width, width // 2),
        ("decoder2.0", width // 2, width // 2),
        ("decoder2.2", width // 2, 2),
    ):
        yield f"{name}.weight", (outs, ins, 3, 3)
        yield f"{name}.bias", (outs,)


def published_state(layers, seed: int, channels=(16, 64, 128)) -> dict[str, torch.Tensor]:
    """A published learner's state dict, as saved: `module.hpn_learner.` before every name."""
    state = fill(published_shapes(layers, channels), seed)
    return {f"module.hpn_learner.{name}": value for name, value in state.items()}


def learner_state(layers, seed: int, channels=(16, 64, 128)) -> dict[str, torch.Tensor]:
    """The same by our names."""
    return split_published(published_state(layers, seed, channels))[0]


def backbone_state(name: str, seed: int) -> dict[str, torch.Tensor]:
    from hsnet.backbone import BACKBONES, random_state_dict

    shapes = [
        (key, tuple(value.shape))
        for key, value in random_state_dict(name).items()
        if not key.startswith(f"{BACKBONES[name].head}.") and not key.endswith("num_batches_tracked")
    ]
    return fill(shapes, seed)


@pytest.fixture(scope="session")
def make():
    """The generators, as one namespace."""

    class Make:
        pass

    Make.uniform = staticmethod(uniform)
    Make.published_shapes = staticmethod(published_shapes)
    Make.published_state = staticmethod(published_state)
    Make.learner_state = staticmethod(learner_state)
    Make.backbone_state = staticmethod(backbone_state)
    return Make
