"""The loss, and what becomes of boundary pixels."""

import pytest
import torch
import torch.nn.functional as F

from hsnet.errors import ConfigError
from hsnet.loss import episode_losses
from hsnet.model import resize_logits


def test_is_the_mean_over_all_pixels_and_boundary_counts_as_background():
    torch.manual_seed(0)
    logits = torch.randn(3, 2, 4, 5)
    target = torch.rand(3, 8, 10) < 0.4
    ignore = ~target & (torch.rand(3, 8, 10) < 0.2)
    expected = F.cross_entropy(resize_logits(logits, (8, 10)), target.long())
    torch.testing.assert_close(episode_losses(logits, target, ignore).mean(), expected)
    paper = F.cross_entropy(
        resize_logits(logits, (8, 10))[:1], target[:1].long().masked_fill(ignore[:1], 255), ignore_index=255
    )
    torch.testing.assert_close(episode_losses(logits, target, ignore, boundary="ignore")[0], paper)


def test_an_episode_of_nothing_but_boundary_has_no_loss():
    nothing = episode_losses(torch.randn(1, 2, 4, 4), torch.zeros(1, 8, 8), torch.ones(1, 8, 8).bool(), "ignore")
    assert nothing.item() == 0


def test_bad_option_is_named():
    with pytest.raises(ConfigError, match="'background' or 'ignore', got 'drop'"):
        episode_losses(torch.randn(1, 2, 4, 4), torch.zeros(1, 8, 8), boundary="drop")
