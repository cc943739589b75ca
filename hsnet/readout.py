"""Logistic regressions fitted to a few supports: one straight cut through the features, object on one side.

Dimension key: n positions, D channels, M regressions solved at once.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hsnet.errors import ShapeError

STEPS = 60
"""Iterations of LBFGS at most; what is left of the gradient then changes no mask."""


def balanced(shares: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of positions as object and as background.

    Args:
        shares: (n,) in [0, 1], how much of a position is object.

    Returns:
        Two (n,): each side's weights sum to 1/2 (to 0 where there is nothing of it), so that a small object counts as
        much as a large background.
    """
    background = 1 - shares
    tiny = torch.finfo(shares.dtype).tiny
    return shares / (2 * shares.sum()).clamp(min=tiny), background / (2 * background.sum()).clamp(min=tiny)


def fit_readouts(
    vectors: Tensor, positive: Tensor, negative: Tensor, penalty: Tensor, steps: int = STEPS
) -> tuple[Tensor, Tensor]:
    """Fit M logistic regressions to the same positions with other weights, in one run.

    Args:
        vectors: (n, D), any float dtype.
        positive, negative: (M, n), weights of each position as object and as background; soft targets have both.
        penalty: (M,) above 0: half of it times the squared length of the direction is added to each loss. The bias is
            free.
        steps: iterations at most.

    Returns:
        Directions (M, D) and biases (M,). `vectors @ directions.T + biases` is above 0 on the object's side.

    Raises:
        ShapeError: the four do not fit.

    The optimum is unique, and where it lies does not depend on how many are fitted at once; how near LBFGS comes does,
    in its last digits.
    """
    n, channels = vectors.shape
    problems = len(penalty)
    if positive.shape != (problems, n) or negative.shape != (problems, n):
        raise ShapeError(
            f"Weights must be ({problems}, {n}) like penalties and positions, got {tuple(positive.shape)} and "
            f"{tuple(negative.shape)}."
        )
    # The bias is free, so a shift of the origin moves no optimum; without it the bias fights the direction.
    centre = vectors.mean(0)
    centred = vectors - centre
    solution = vectors.new_zeros(problems, channels + 1).requires_grad_()
    search = torch.optim.LBFGS(
        [solution],
        max_iter=steps,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        with torch.no_grad():
            direction, bias = solution[:, :-1], solution[:, -1:]
            margin = direction @ centred.T + bias
            pull = negative * margin.sigmoid() - positive * (-margin).sigmoid()
            solution.grad = torch.cat([pull @ centred + penalty[:, None] * direction, pull.sum(1, keepdim=True)], 1)
            lost = positive * F.softplus(-margin) + negative * F.softplus(margin)
            return lost.sum() + (penalty[:, None] * direction.square()).sum() / 2

    with torch.enable_grad():
        search.step(loss)
    direction, bias = solution.detach()[:, :-1], solution.detach()[:, -1]
    return direction, bias - direction @ centre
