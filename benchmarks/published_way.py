"""HSNet the published way: the work of the published code, step by step, for timing only. Nothing else uses it.

Written from a description of that code's behaviour. The backbone runs on the query and on every support of every shot
again; features are masked, normalised and multiplied at all positions in float32; a centre-pivot convolution copies
its input into the order each 2D convolution wants, and copies the result back.

Where the description left a choice the cheaper one is taken, so that nothing here is slower than it need be: strided
slices instead of two index selections, one `stack` instead of a stack and a transposed copy, in-place clamping. Not
timed, because it has no counterpart in what is compared: decoding photos, the wrapper for several GPUs, and the masks
that the published training loop also computes to print a running score.

Dimension key: B batch, C channels, L layers of one level, H W query grid, U V support grid, S photo side. Here, as
published, query dimensions come before support dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hsnet.backbone import backbone_spec
from hsnet.model import CHANNELS, GROUPS, MIX_CONVOLUTIONS, SQUEEZE_KERNELS, SQUEEZE_STRIDES, HSNet
from hsnet.torchvision_ops import ensure_importable

EPS = 1e-5


class CopyingConv4d(nn.Module):
    """A centre-pivot convolution from two 2D convolutions: (B, C, H, W, U, V) to (B, C', H, W, U', V')."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.query = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2)
        self.support = nn.Conv2d(in_channels, out_channels, kernel, stride=stride, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width, rows, columns = x.shape
        kept = x[..., :: self.stride, :: self.stride] if self.stride > 1 else x
        planes = kept.permute(0, 4, 5, 1, 2, 3).contiguous().view(-1, channels, height, width)
        over_query = self.query(planes).view(batch, *kept.shape[4:], -1, height, width)
        over_query = over_query.permute(0, 3, 4, 5, 1, 2).contiguous()
        planes = x.permute(0, 2, 3, 1, 4, 5).contiguous().view(-1, channels, rows, columns)
        over_support = self.support(planes).view(batch, height, width, -1, *kept.shape[4:])
        over_support = over_support.permute(0, 3, 1, 2, 4, 5).contiguous()
        return over_query + over_support


def _block(in_channels: int, widths: Sequence[int], kernels: Sequence[int], strides: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width, kernel, stride in zip(widths, kernels, strides, strict=True):
        layers += [CopyingConv4d(in_channels, width, kernel, stride), nn.GroupNorm(GROUPS, width), nn.ReLU(True)]
        in_channels = width
    return nn.Sequential(*layers)


class PublishedLearner(nn.Module):
    """The learner on query-first pyramids, deepest level first. Parameters have the names of `hsnet.model.HSNet`."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        width = CHANNELS[-1]
        self.squeeze = nn.ModuleList(
            _block(count, CHANNELS, kernels, strides)
            for count, kernels, strides in zip(layers, SQUEEZE_KERNELS, SQUEEZE_STRIDES, strict=True)
        )
        ones = (1,) * MIX_CONVOLUTIONS
        mix = [_block(width, (width,) * MIX_CONVOLUTIONS, (3,) * MIX_CONVOLUTIONS, ones) for _ in layers[1:]]
        self.mix = nn.ModuleList(mix)
        self.decode_coarse = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(True), nn.Conv2d(width, width // 2, 3, padding=1),
            nn.ReLU(True),
        )  # fmt: skip
        self.decode_fine = nn.Sequential(
            nn.Conv2d(width // 2, width // 2, 3, padding=1), nn.ReLU(True), nn.Conv2d(width // 2, 2, 3, padding=1)
        )

    def forward(self, pyramid: Sequence[Tensor]) -> Tensor:
        """(B, 2, 2 H, 2 W) logits of levels (B, L, H, W, U, V)."""
        mixed, *finer_levels = [squeeze(level) for squeeze, level in zip(self.squeeze, pyramid, strict=True)]
        for mix, finer in zip(self.mix, finer_levels, strict=True):
            mixed = mix(_resize_query(mixed, finer.shape[2:4]) + finer)
        batch, channels, height, width = mixed.shape[:4]
        context = self.decode_coarse(mixed.view(batch, channels, height, width, -1).mean(-1))
        context = F.interpolate(context, (2 * height, 2 * width), mode="bilinear", align_corners=True)
        return self.decode_fine(context)


def _resize_query(x: Tensor, grid: Sequence[int]) -> Tensor:
    batch, channels, height, width, rows, columns = x.shape
    planes = x.permute(0, 4, 5, 1, 2, 3).contiguous().view(-1, channels, height, width)
    planes = F.interpolate(planes, tuple(grid), mode="bilinear", align_corners=True)
    return planes.view(batch, rows, columns, channels, *grid).permute(0, 3, 4, 5, 1, 2).contiguous()


class PublishedHSNet(nn.Module):
    """Photos in, logits out.

    Args:
        backbone: a key of `hsnet.backbone.BACKBONES`: vgg16, resnet50 or resnet101.
        state_dict: the backbone's weights by torchvision's names; the head may be absent.
        learner: an `HSNet` whose weights are copied, so that results compare.
    """

    def __init__(self, backbone: str, state_dict: dict[str, Tensor], learner: HSNet) -> None:
        super().__init__()
        ensure_importable()
        import torchvision.models

        self.spec = backbone_spec(backbone)
        self.backbone = torchvision.models.get_model(backbone, weights=None)
        setattr(self.backbone, self.spec.head, nn.Identity())  # published code carries it along, unused
        self.backbone.load_state_dict(state_dict, strict=False)
        self.backbone.eval()
        self.learner = PublishedLearner(tuple(reversed(self.spec.layers)))
        self.learner.load_state_dict(translated(learner))

    def train(self, mode: bool = True) -> PublishedHSNet:
        super().train(mode)
        self.backbone.eval()
        return self

    def features(self, images: Tensor) -> list[Tensor]:
        """Taps, shallow to deep, each (B, C, H, W): copies, because the ReLU after a tap works in place."""
        walk = _vgg_taps if self.spec.name.startswith("vgg") else _resnet_taps
        return list(walk(self.backbone, images, {tap.node for tap in self.spec.taps}))

    def correlations(self, query: Sequence[Tensor], support: Sequence[Tensor]) -> list[Tensor]:
        """(B, L, H, W, U, V) of every level, deepest first, from taps of queries and masked taps of supports."""
        layers = [_correlate(q, s) for q, s in zip(query, support, strict=True)]
        levels, start = [], 0
        for count in self.spec.layers:
            levels.append(torch.stack(layers[start : start + count], dim=1))
            start += count
        return levels[::-1]

    def coarse_logits(self, query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        """Logits at the learner's size, (B, 2, 2 H, 2 W), of photos (B, 3, S, S) and support masks (B, S, S)."""
        with torch.no_grad():
            query_taps = self.features(query)
            support_taps = masked(self.features(support), mask)
            pyramid = self.correlations(query_taps, support_taps)
            del query_taps, support_taps
        return self.learner(pyramid)

    def forward(self, query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        """Logits at photo size, (B, 2, S, S)."""
        logits = self.coarse_logits(query, support, mask)
        return F.interpolate(logits, support.shape[-2:], mode="bilinear", align_corners=True)

    @torch.no_grad()
    def predict(self, query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
        """Hard masks (B, S, S) from supports (B, K, 3, S, S) and their masks (B, K, S, S): K passes and the vote."""
        shots = support.shape[1]
        votes = torch.zeros_like(mask[:, 0], dtype=torch.int64)
        for shot in range(shots):
            votes += self(query, support[:, shot], mask[:, shot]).argmax(dim=1)
        if shots == 1:
            return votes.bool()
        most = votes.flatten(1).amax(1).clamp(min=1)
        return votes.float() / most[:, None, None] >= 0.5


def loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over all pixels of logits (B, 2, S, S) at photo size; target (B, S, S)."""
    return F.cross_entropy(logits, target.long())


def masked(taps: Sequence[Tensor], mask: Tensor) -> list[Tensor]:
    """Support features multiplied by the mask at their own size."""
    mask = mask[:, None].to(taps[0].dtype)
    sizes = [tap.shape[-2:] for tap in taps]
    return [
        tap * F.interpolate(mask, size, mode="bilinear", align_corners=True)
        for tap, size in zip(taps, sizes, strict=True)
    ]


def translated(learner: HSNet) -> dict[str, Tensor]:
    """Weights of our learner for `PublishedLearner`: the same names, 3D kernels without their dimension of size 1."""
    axis = {"query": 2, "support": 4}
    return {
        name: value.squeeze(axis[name.split(".")[-2]]) if value.ndim == 5 else value
        for name, value in learner.state_dict().items()
    }


def _correlate(query: Tensor, support: Tensor) -> Tensor:
    grids = (*query.shape[2:], *support.shape[2:])
    query, support = query.flatten(2), support.flatten(2)
    query = query / (query.norm(dim=1, keepdim=True) + EPS)
    support = support / (support.norm(dim=1, keepdim=True) + EPS)
    return torch.bmm(query.transpose(1, 2), support).view(len(query), *grids).clamp_(min=0)


def _vgg_taps(network: nn.Module, x: Tensor, nodes: set[str]) -> Iterator[Tensor]:
    for number, layer in enumerate(network.get_submodule("features").children()):
        x = layer(x)
        if f"features.{number}" in nodes:
            yield x.clone()


def _resnet_taps(network: Any, x: Tensor, nodes: set[str]) -> Iterator[Tensor]:
    x = network.maxpool(network.relu(network.bn1(network.conv1(x))))
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        for number, block in enumerate(getattr(network, stage)):
            out = block.relu(block.bn1(block.conv1(x)))
            out = block.relu(block.bn2(block.conv2(out)))
            out = block.bn3(block.conv3(out))
            out += x if block.downsample is None else block.downsample(x)
            if f"{stage}.{number}.add" in nodes:
                yield out.clone()
            x = block.relu(out)
