"""The logistic regression against its own definition, in float64."""

import pytest
import torch

from hsnet.errors import ShapeError
from hsnet.readout import balanced, fit_readouts


def problem(seed=0, n=40, channels=7):
    torch.manual_seed(seed)
    vectors = torch.randn(n, channels, dtype=torch.float64) + 3  # far from the origin: the bias has work to do
    return vectors, torch.rand(n, dtype=torch.float64).round(decimals=1)


def loss(vectors, positive, negative, penalty, direction, bias):
    """As it is written: weighted cross entropy of soft targets, position by position."""
    total = penalty / 2 * (direction @ direction)
    for x, p, q in zip(vectors, positive, negative, strict=True):
        chance = 1 / (1 + torch.exp(-(x @ direction + bias)))
        total = total - p * torch.log(chance) - q * torch.log(1 - chance)
    return total


@pytest.mark.parametrize("penalty", [1e-3, 0.1])
def test_the_gradient_is_zero_at_the_optimum(penalty):
    vectors, shares = problem()
    positive, negative = balanced(shares)
    weights = torch.tensor([penalty], dtype=torch.float64)
    directions, biases = fit_readouts(vectors, positive[None], negative[None], weights, steps=500)
    direction, bias = directions[0].requires_grad_(), biases[0].requires_grad_()
    loss(vectors, positive, negative, penalty, direction, bias).backward()
    assert direction.grad.abs().max() < 1e-6
    assert bias.grad.abs() < 1e-6
    assert direction.detach().norm() > 0.1


def test_many_at_once_are_each_of_them_alone():
    vectors, shares = problem(1)
    _, others = problem(2)
    positive, negative = (torch.stack(side) for side in zip(balanced(shares), balanced(others), strict=True))
    penalties = torch.tensor([0.01, 0.3], dtype=torch.float64)
    directions, biases = fit_readouts(vectors, positive, negative, penalties, steps=500)
    for one in range(2):
        mine = slice(one, one + 1)
        direction, bias = fit_readouts(vectors, positive[mine], negative[mine], penalties[mine], steps=500)
        torch.testing.assert_close(direction[0], directions[one], rtol=0, atol=1e-5)
        torch.testing.assert_close(bias[0], biases[one], rtol=0, atol=1e-5)


def test_both_sides_weigh_alike():
    shares = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0])
    positive, negative = balanced(shares)
    assert (float(positive.sum()), float(negative.sum())) == (0.5, 0.5)
    torch.testing.assert_close(positive / positive[0], shares)
    torch.testing.assert_close(negative / negative[2], 1 - shares)
    assert [float(side.sum()) for side in balanced(torch.zeros(3))] == [0, 0.5]


def test_weights_that_do_not_fit_are_named():
    vectors, shares = problem()
    with pytest.raises(ShapeError, match=r"Weights must be \(2, 40\) .* got \(1, 40\)"):
        fit_readouts(vectors, shares[None], shares[None], torch.ones(2))
