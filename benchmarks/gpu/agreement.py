"""Whether devices and arithmetics agree, and whether a device agrees with itself: parts `agreement` and `repeat`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.blocks import largest
from benchmarks.gpu.measuring import Bench, Row, attempt
from benchmarks.gpu.ways import BFLOAT16, FLOAT32, TF32, Mode, OurWay, Scene, Variant, Work
from hsnet.backbone import FrozenBackbone
from hsnet.fused import FusedHSNet
from hsnet.loss import episode_losses
from hsnet.model import HSNet, predict_mask

EPISODES = 2


def agreement(bench: Bench) -> Iterator[dict[str, Any]]:
    """Logits, masks, gradients and features of the device and of the CPU, against float64 on the CPU."""
    options = bench.options
    host, device = torch.device("cpu"), bench.device
    scene = Scene.make(bench.backbone, options.size, options.object_share, host)
    model = scene.learner()
    query = [level[:EPISODES] for level in scene.features[False]]
    support = [level[EPISODES : 2 * EPISODES] for level in scene.features[False]]
    masks, target = scene.masks[EPISODES : 2 * EPISODES], scene.masks[:EPISODES]
    exact = copy.deepcopy(model).double()

    def plain() -> Tensor:
        return exact.answer([level.double() for level in query], [level.double() for level in support], masks)

    wanted, gradients = _learned(exact, plain, target)
    rows: dict[str, Row] = {
        "largest logit": {"value": largest([wanted]), "unit": ""},
        "largest gradient": {"value": largest(gradients), "unit": ""},
    }
    ways: dict[str, tuple[torch.device, Mode, bool]] = {
        "CPU, float32, object positions only": (host, Mode(), True),
        "CPU, float32, every position": (host, Mode(), False),
        "CPU, bfloat16, object positions only": (host, BFLOAT16, True),
        "device, float32, every position": (device, Mode(), False),
        "device, float32, object positions only": (device, Mode(), True),
        "device, TF32, every position": (device, TF32, False),
        "device, bfloat16, every position": (device, BFLOAT16, False),
    }
    for name, (where, mode, sparse) in ways.items():
        found, reason = attempt(lambda w=where, m=mode, s=sparse: _on(model, query, support, masks, target, w, m, s))
        if found is None:
            rows[name] = {"failed": str(reason)}
            continue
        logits, learned = found
        moved = float((predict_mask(logits) != predict_mask(wanted)).float().mean())
        error = largest([one - other for one, other in zip(learned, gradients, strict=True)])
        rows[f"{name}: logits"] = {"value": largest([logits - wanted]), "unit": "largest difference"}
        rows[f"{name}: masks"] = {"value": 100 * moved, "unit": "% of pixels differ"}
        rows[f"{name}: gradients"] = {"value": error, "unit": "largest difference"}
    yield bench.measurement("agreement", f"against float64 on the CPU, {EPISODES} episodes", rows)

    backbone = FrozenBackbone(bench.backbone, scene.state)
    photos = scene.photos[:EPISODES]
    exact_levels = copy.deepcopy(backbone).double()(photos.double())
    rows = {}
    for name, where, mode in (
        ("CPU, float32", host, Mode()),
        ("device, float32", device, Mode()),
        ("device, TF32", device, TF32),
        ("device, bfloat16 autocast", device, BFLOAT16),
    ):
        levels, reason = attempt(lambda w=where, m=mode: _features(backbone, photos, w, m))
        if levels is None:
            rows[name] = {"failed": str(reason)}
            continue
        away = [1 - nn.functional.cosine_similarity(a, b, dim=-1) for a, b in zip(levels, exact_levels, strict=True)]
        mean = float(torch.cat([level.flatten() for level in away]).mean())
        note = f"largest {largest(away):.1e}"
        rows[name] = {"value": mean, "unit": "mean 1 - cosine of feature vectors", "note": note}
    yield bench.measurement("agreement-features", f"features of {bench.backbone} against float64 on the CPU", rows)


def _learned(model: HSNet, logits: Callable[[], Tensor], target: Tensor) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad(set_to_none=True)
    found = logits()
    episode_losses(found, target).mean().backward()
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    return found.detach().cpu().double(), [one.cpu().double() for one in gradients]


def _on(
    model: HSNet,
    query: list[Tensor],
    support: list[Tensor],
    masks: Tensor,
    target: Tensor,
    device: torch.device,
    mode: Mode,
    sparse: bool,
) -> tuple[Tensor, list[Tensor]]:
    here = copy.deepcopy(model).to(device)
    fused = FusedHSNet(here, "bfloat16" if mode.bfloat16 else "float32", sparse)
    moved = [[level.to(device) for level in levels] for levels in (query, support)]
    with mode.on():
        return _learned(here, lambda: fused(*moved, masks.to(device)), target.to(device))


@torch.no_grad()
def _features(backbone: FrozenBackbone, photos: Tensor, device: torch.device, mode: Mode) -> list[Tensor]:
    network = copy.deepcopy(backbone).to(device)
    with mode.on(), torch.autocast(device.type, torch.bfloat16, enabled=mode.bfloat16):
        return [level.cpu().double() for level in network(photos.to(device))]


def repeat(bench: Bench) -> Iterator[dict[str, Any]]:
    """The same steps twice from the same start: equal to the bit? As torch chooses, and asked to be repeatable."""
    options, batch, steps = bench.options, min(4, *bench.options.train_batch), max(2, bench.options.steps)
    scene = Scene.make(bench.backbone, options.size, options.object_share, bench.device)
    rows: dict[str, Row] = {}
    for name, mode in (("float32", FLOAT32), ("bfloat16", BFLOAT16)):
        for asked in (False, True):
            label = f"{name}{', deterministic algorithms' if asked else ''}"
            found, reason = attempt(lambda m=mode, a=asked: _twice(bench, scene, batch, steps, m, a))
            if found is None:
                rows[label] = {"failed": str(reason)}
                continue
            differing, most, said = found
            rows[label] = {"value": differing, "unit": "% of weights differ", "note": f"by at most {most:.1e}{said}"}
    yield bench.measurement("repeat", f"{steps} training steps of {batch}, twice from the same start", rows)


def _twice(bench: Bench, scene: Scene, batch: int, steps: int, mode: Mode, asked: bool) -> tuple[float, float, str]:
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic
    ends = []
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            if asked:
                torch.use_deterministic_algorithms(True, warn_only=True)
                torch.backends.cudnn.deterministic = True
            for _ in range(2):
                way = OurWay(scene, Work("", "train", batch), Variant("", mode))
                for _ in range(steps):
                    way.step()
                ends.append(torch.cat([one.detach().flatten() for one in way.model.parameters()]))
        finally:
            torch.use_deterministic_algorithms(before[0])
            torch.backends.cudnn.deterministic = before[1]
    words = "deterministic implementation"
    named = sorted({str(one.message).split(" does not have")[0][:80] for one in heard if words in str(one.message)})
    away = (ends[0] - ends[1]).abs()
    said = f"; not repeatable: {', '.join(named)}" if named else ""
    return 100 * float((away > 0).float().mean()), float(away.max()), said
