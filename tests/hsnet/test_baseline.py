"""The cosine baseline's map."""

import torch

from hsnet.baseline import cosine_map


def test_is_the_best_match_inside_the_object():
    pyramid = torch.zeros(1, 2, 2, 2, 1, 3)
    pyramid[0, :, 0, 0, 0] = torch.tensor([[0.2, 0.4, 0.0], [0.4, 0.0, 0.0]])
    pyramid[0, :, 1, 1, 0] = torch.tensor([0.1, 0.9, 0.9])  # outside the object
    mask = torch.tensor([[[1.0, 0.1], [0.0, 0.0]]])
    torch.testing.assert_close(cosine_map(pyramid, mask), torch.tensor([[[0.3, 0.2, 0.0]]]))
    assert cosine_map(pyramid, torch.zeros(1, 2, 2)).count_nonzero() == 0
