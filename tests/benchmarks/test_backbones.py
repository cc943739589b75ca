"""The training-free comparison of layers, against a literal reading."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.backbones import contrast_maps, groups, rate, score
from pipeline.datasets.shapes import Shapes
from pipeline.extract.stage import extract
from pipeline.features.backbones import Reading
from pipeline.features.weights import load_weights


def test_contrast_is_the_largest_cosine_to_the_object_less_the_largest_to_the_background():
    torch.manual_seed(0)
    query, support = (F.normalize(torch.randn(2, 3, 3, 5), dim=-1) for _ in range(2))
    mask = torch.zeros(3, 3, dtype=torch.bool)
    mask[1, 1] = mask[0, 2] = True
    found = contrast_maps([query], [support], mask, [((0, 1),), ((1,),)])
    for group, layers in enumerate(([0, 1], [1])):
        for row in range(3):
            for column in range(3):
                cosines = [
                    [
                        float(sum(query[n, row, column] @ support[n, u, v] for n in layers)) / len(layers)
                        for v in range(3)
                    ]
                    for u in range(3)
                ]
                inside = max(cosines[u][v] for u in range(3) for v in range(3) if mask[u, v])
                outside = max(cosines[u][v] for u in range(3) for v in range(3) if not mask[u, v])
                assert abs(float(found[group, row, column]) - (inside - outside)) < 1e-5


def test_a_backbone_is_timed():
    found = rate("timm:test_vit", "random", 32, Reading("5"))
    assert found["layers"] == ["blocks.5"]
    assert found["photos"] > 8
    assert found["share"] > 0


def test_groups_are_layers_runs_levels_and_all():
    chosen = groups([2, 3], 2)
    assert chosen[:5] == [((0,), ()), ((1,), ()), ((), (0,)), ((), (1,)), ((), (2,))]
    assert chosen[-1] == ((0, 1), (0, 1, 2))
    assert len(set(chosen)) == len(chosen) == 10


def test_a_store_is_scored(tmp_path):
    data = Shapes(size=64, trn_per_class=2, val_per_class=2)
    extract(data, load_weights("timm:test_vit", "random"), tmp_path / "s.zarr", image_size=64, precision="int8")
    result = score(tmp_path / "s.zarr", 0, 4, [1, 2], 0, 1)
    assert [row["layers"] for row in result["scores"]] == [["blocks.4"], ["blocks.5"], ["blocks.4", "blocks.5"]]
    assert all(0 <= value <= 100 for row in result["scores"] for value in row["miou"].values())
    assert result["bytes_per_photo"] == 2 * 16 * 64
