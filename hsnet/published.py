"""Published HSNet checkpoints: their names, translated to ours.

A published file is a whole model saved from `nn.DataParallel`: every key begins with `module.`, the frozen backbone
(with its unused classifier) is inside, and the learner's blocks are numbered `nn.Sequential` entries.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from hsnet.errors import CheckpointError

LEARNER = "hpn_learner."
BACKBONE = "backbone."

_BLOCKS = {
    "encoder_layer4": "squeeze.0",
    "encoder_layer3": "squeeze.1",
    "encoder_layer2": "squeeze.2",
    "encoder_layer4to3": "mix.0",
    "encoder_layer3to2": "mix.1",
    "decoder1": "decode_coarse",
    "decoder2": "decode_fine",
}
_SIDES = {"conv1": ("query", 2), "conv2": ("support", 4)}  # our name, and where its 3D kernel has the extra 1


def split_published(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Separate a published state dict into (learner by our names, backbone by torchvision's names).

    Raises:
        CheckpointError: there is no learner in it, or a name is not one of the published model.
    """
    plain = {name.removeprefix("module."): value for name, value in state.items()}
    strangers = [name for name in plain if not name.startswith((LEARNER, BACKBONE))]
    if strangers or not any(name.startswith(LEARNER) for name in plain):
        raise CheckpointError(
            f"Not a published HSNet checkpoint: expected names '{LEARNER}...' and '{BACKBONE}...', "
            f"{f'found {strangers[0]!r}' if strangers else 'found no learner'}. Nothing was imported."
        )
    learner = dict(
        _rename(name.removeprefix(LEARNER), value) for name, value in plain.items() if name.startswith(LEARNER)
    )
    backbone = {name.removeprefix(BACKBONE): value for name, value in plain.items() if name.startswith(BACKBONE)}
    return learner, backbone


def layers_of(learner: Mapping[str, Tensor]) -> tuple[int, ...]:
    """Correlation layers per level, deepest first, read off a learner's first kernels."""
    return tuple(int(learner[f"squeeze.{level}.0.query.weight"].shape[1]) for level in range(3))


def _rename(name: str, value: Tensor) -> tuple[str, Tensor]:
    block, _, rest = name.partition(".")
    if block not in _BLOCKS:
        raise CheckpointError(f"Unknown name '{LEARNER}{name}' in a published checkpoint. Nothing was imported.")
    parts = rest.split(".")
    if len(parts) == 3 and parts[1] in _SIDES:
        side, axis = _SIDES[parts[1]]
        parts[1] = side
        value = value.unsqueeze(axis) if parts[2] == "weight" else value
    return f"{_BLOCKS[block]}.{'.'.join(parts)}", value
