"""Backbones: which layers are read, how they make levels, and the built-in ImageNet networks.

A built-in network is one row of `BACKBONES`. Everything else in the project (pyramid levels, grid sizes, store layout,
learner input channels) follows from a network's `TapLayout`, whoever runs the network.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from hsnet.errors import ConfigError, ShapeError, WeightsError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Tap:
    """One layer whose output is read.

    `node` is its name in the network's traced graph, `level` the pyramid level (0 = finest grid), `channels`
    the width of its output.
    """

    node: str
    level: int
    channels: int


@dataclass(frozen=True)
class Window:
    """What a convolution or pooling makes of the side of a map. `ceil`: a last window may hang over the edge."""

    kernel: int
    stride: int = 2
    padding: int = 0
    ceil: bool = False

    def side(self, side: int) -> int:
        """Outputs along an axis of `side` inputs; below 1 if none fits."""
        room = side + 2 * self.padding - self.kernel
        outputs = (-(-room // self.stride) if self.ceil else room // self.stride) + 1
        # A window that would begin beyond the input is not counted.
        return outputs - (self.ceil and (outputs - 1) * self.stride >= side + self.padding)


@dataclass(frozen=True)
class TapLayout:
    """What is read of a network: its name, and its taps from shallow to deep, level by level."""

    name: str
    taps: tuple[Tap, ...]

    @property
    def levels(self) -> int:
        """Number of pyramid levels."""
        return self.taps[-1].level + 1

    @property
    def layers(self) -> tuple[int, ...]:
        """Taps per level, finest level first: (4, 6, 3) for ResNet-50."""
        return tuple(len(widths) for widths in self.channels)

    @property
    def channels(self) -> tuple[tuple[int, ...], ...]:
        """Channels of each tap, level by level, finest level first."""
        return tuple(tuple(tap.channels for tap in self.taps if tap.level == level) for level in range(self.levels))


@dataclass(frozen=True)
class BackboneSpec(TapLayout):
    """A built-in network: its torchvision name and taps, what shrinks the map, and the head no tap needs.

    `shrinks` are the windows on the way from the image to level 0, then from each level to the next. They say what
    the network says itself (tests compare), without building it: torchvision takes a second to import.
    """

    shrinks: tuple[tuple[Window, ...], ...]
    head: str

    def level_shape(self, level: int, image_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """(layers, rows, columns, channels) of a level for an image of (height, width) pixels.

        Raises:
            ShapeError: the image is too small for the network.
        """
        grid = image_size
        for windows in self.shrinks[: level + 1]:
            for window in windows:
                grid = (window.side(grid[0]), window.side(grid[1]))
                if min(grid) < 1:
                    raise ShapeError(
                        f"{self.name} cannot read images of {image_size[0]} x {image_size[1]} pixels: too small."
                    )
        widths = self.channels[level]
        return len(widths), *grid, max(widths)


def _rows(level: int, channels: int, nodes: Sequence[str]) -> tuple[Tap, ...]:
    return tuple(Tap(node, level, channels) for node in nodes)


def _bottlenecks(level: int, channels: int, stage: str, count: int) -> tuple[Tap, ...]:
    # The residual sum before the block's last ReLU: after it the negative responses are gone and results no
    # longer compare with the published ones (12 of 13 ResNet-50 taps differ).
    return _rows(level, channels, [f"{stage}.{block}.add" for block in range(count)])


def _resnet(name: str, blocks: tuple[int, int, int]) -> BackboneSpec:
    stages = enumerate(zip(("layer2", "layer3", "layer4"), (512, 1024, 2048), blocks, strict=True))
    return BackboneSpec(
        name,
        tuple(tap for level, (stage, width, count) in stages for tap in _bottlenecks(level, width, stage, count)),
        shrinks=((Window(7, padding=3), *[Window(3, padding=1)] * 2), (Window(3, padding=1),), (Window(3, padding=1),)),
        head="fc",
    )


BACKBONES: dict[str, BackboneSpec] = {
    spec.name: spec
    for spec in (
        # Six convolutions before their ReLU, and pool5 (after its ReLU), as in the published code.
        BackboneSpec(
            "vgg16",
            _rows(0, 512, ["features.17", "features.19", "features.21"])
            + _rows(1, 512, ["features.24", "features.26", "features.28"])
            + _rows(2, 512, ["features.30"]),
            shrinks=((Window(2), Window(2), Window(2)), (Window(2),), (Window(2),)),
            head="classifier",
        ),
        _resnet("resnet50", (4, 6, 3)),
        _resnet("resnet101", (4, 23, 3)),
        # fire2..fire9; a fire module ends in two ReLUs joined, so its taps are after the ReLU.
        BackboneSpec(
            "squeezenet1_1",
            _rows(0, 128, ["features.3.cat", "features.4.cat"])
            + _rows(1, 256, ["features.6.cat", "features.7.cat"])
            + _rows(2, 384, ["features.9.cat", "features.10.cat"])
            + _rows(2, 512, ["features.11.cat", "features.12.cat"]),
            shrinks=((Window(3), Window(3, ceil=True)), (Window(3, ceil=True),), (Window(3, ceil=True),)),
            head="classifier",
        ),
    )
}


def backbone_spec(name: str) -> BackboneSpec:
    """The row of a network. Raises ConfigError naming those there are."""
    try:
        return BACKBONES[name]
    except KeyError:
        raise ConfigError(f"Unknown backbone '{name}'. Choose one of: {', '.join(BACKBONES)}.") from None


def pack_levels(taps: Sequence[Tensor], spec: TapLayout, out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Arrange tap outputs as pyramid levels, positions before channels.

    Args:
        taps: one (B, C, H, W) map per tap of `spec`, shallow to deep.
        out: what an earlier call returned for taps of the same shapes and type, to be overwritten. Fresh memory is
            most of the time this takes (ResNet-50, 400 px: 16 ms with it, 3 without).

    Returns:
        One (B, layers, H, W, C) tensor per level, finest first, contiguous. Where the layers of a level differ
        in width (SqueezeNet's deepest), the narrow ones end in zero channels, which change no cosine.

    Raises:
        ShapeError: a layer of a level has another grid than its first.
    """
    levels = []
    for level in range(spec.levels):
        maps = [(tap, values) for tap, values in zip(spec.taps, taps, strict=True) if tap.level == level]
        grid = maps[0][1].shape[-2:]
        width = max(values.shape[1] for _, values in maps)
        packed = maps[0][1].new_zeros(len(maps[0][1]), len(maps), *grid, width) if out is None else out[level]
        for row, (tap, values) in enumerate(maps):
            if values.shape[-2:] != grid:
                raise ShapeError(
                    f"{spec.name}: {tap.node} gives a {tuple(values.shape[-2:])} grid, but level {level} begins "
                    f"with {tuple(grid)}. All layers of a level share one grid."
                )
            packed[:, row, :, :, : values.shape[1]] = values.permute(0, 2, 3, 1)
        levels.append(packed)
    return levels


class Backbone(nn.Module, ABC):
    """A network that is read, whoever built it: photos in, pyramid levels out. Only `FinetunedBackbone` changes."""

    spec: TapLayout
    mean: tuple[float, ...] = IMAGENET_MEAN
    """Mean of each colour, 0 to 1: photos are normalised with it before they come here."""
    std: tuple[float, ...] = IMAGENET_STD

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode, also inside a model that is switched to training."""
        return super().train(False)

    @abstractmethod
    def taps(self, images: Tensor) -> list[Tensor]:
        """Tap outputs, in the order of `spec`, each (B, C, H, W) float32, for normalised (B, 3, H, W) images."""

    def forward(self, images: Tensor) -> list[Tensor]:
        """Pyramid levels, finest first, each (B, layers, rows, columns, channels); see `pack_levels`."""
        return pack_levels(self.taps(images), self.spec)


class FrozenBackbone(Backbone):
    """A built-in ImageNet network that is read and never changes: eval mode, no gradients, fixed BatchNorm statistics.

    Args:
        name: a key of `BACKBONES`.
        state_dict: the weights by torchvision's names. The classification head may be absent.
        autocast: type in which products are computed (torch.bfloat16 or torch.float16), for GPUs; None is float32. Taps
            are float32 whatever it is.

    Raises:
        WeightsError: names or shapes are not those of the network; lists the first few.

    One traced pass yields every tap; all ReLUs work out of place, because an in-place ReLU would overwrite the
    pre-activation taps before they are read.
    """

    def __init__(self, name: str, state_dict: Mapping[str, Tensor], autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.autocast = autocast
        self.spec = spec = backbone_spec(name)
        with torch.device("meta"):  # without drawing initial weights, which takes VGG16 a second
            network = _network(name)
        network = network.to_empty(device=torch.get_default_device())
        _load(network, spec, state_dict)
        for module in network.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        # Positions before channels, as the levels are kept: on a CPU (400 px, one thread) SqueezeNet takes 0.45 of the
        # time, VGG16 0.81, ResNet-50 0.86, and packing a third. Images of any layout will do.
        network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        nodes = {tap.node: tap.node for tap in self.spec.taps}
        from torchvision.models.feature_extraction import create_feature_extractor

        self.network = create_feature_extractor(network, nodes, suppress_diff_warning=True)
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def taps(self, images: Tensor) -> list[Tensor]:
        """Tap outputs, shallow to deep, each (B, C, H, W), for (B, 3, H, W) images normalised as ImageNet's."""
        return self._taps(images)

    def weights(self) -> dict[str, Tensor]:
        """The weights by torchvision's names, without the classification head; not copied."""
        state = self.network.state_dict()
        return {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}

    def _taps(self, images: Tensor) -> list[Tensor]:
        require_images(images)
        if self.autocast is None:
            outputs = self.network(images)
        else:
            with torch.autocast(images.device.type, self.autocast):
                outputs = self.network(images)
        return [outputs[tap.node].float() if self.autocast else outputs[tap.node] for tap in self.spec.taps]


class FinetunedBackbone(FrozenBackbone):
    """A built-in network whose weights are trained. Its BatchNorm statistics stay those it came with, in `train()` too.

    Statistics of a batch would be those of some twenty photos and depend on how a step is divided; features of a photo
    would depend on the photos beside it, which a store could never repeat. Scale and shift of BatchNorm are trained.
    """

    def __init__(self, name: str, state_dict: Mapping[str, Tensor]) -> None:
        super().__init__(name, state_dict)
        self.requires_grad_(True)

    def taps(self, images: Tensor) -> list[Tensor]:
        """As of any backbone, with gradients where they are kept."""
        return self._taps(images)


def require_images(images: Tensor) -> None:
    """Raise ShapeError unless images are (B, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ShapeError(f"Images must be (B, 3, H, W), got {tuple(images.shape)}.")


def random_state_dict(name: str, seed: int = 0) -> dict[str, Tensor]:
    """Weights of a freshly initialised network, for tests and timings. Features of such a network mean nothing."""
    backbone_spec(name)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return dict(_network(name).state_dict())


def _network(name: str) -> nn.Module:
    # Only here: a second that training, evaluation and all who open a store can do without.
    from hsnet.torchvision_ops import ensure_importable

    ensure_importable()
    import torchvision.models

    return torchvision.models.get_model(name, weights=None)


def _load(network: nn.Module, spec: BackboneSpec, state_dict: Mapping[str, Tensor]) -> None:
    in_head = (f"{spec.head}.",)
    wanted = {name: value for name, value in network.state_dict().items() if not name.startswith(in_head)}
    given = {name: value for name, value in state_dict.items() if not name.startswith(in_head)}
    missing = [name for name in wanted if name not in given and not name.endswith("num_batches_tracked")]
    unknown = [name for name in given if name not in wanted]
    misfits = [
        f"{name} is {tuple(given[name].shape)}, wanted {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in given and given[name].shape != value.shape
    ]
    if missing or unknown or misfits:
        problems = [f"missing {name}" for name in missing] + [f"unknown {name}" for name in unknown] + misfits
        raise WeightsError(
            f"These are not weights of {spec.name}: {'; '.join(problems[:4])}"
            f"{f'; and {len(problems) - 4} more' if len(problems) > 4 else ''}. "
            f"Give the weights of {spec.name} by torchvision's names, or choose the backbone they belong to."
        )
    network.load_state_dict(given, strict=False)
