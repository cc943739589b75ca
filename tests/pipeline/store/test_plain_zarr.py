"""The example of docs/store.md: a hypercorrelation from a store with zarr and NumPy alone, equal to this program's."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from hsnet.correlation import build_hypercorrelation
from pipeline.datasets.shapes import Shapes
from pipeline.extract.stage import extract
from pipeline.features.weights import load_weights
from pipeline.store.feature_store import FeatureStore

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def program():
    (text,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "store.md").read_text(), re.DOTALL)
    return text


def test_it_needs_nothing_of_ours(program):
    imported = {
        alias.name for node in ast.walk(ast.parse(program)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert imported == {"json", "numpy", "zarr"}
    assert "from " not in program
    assert len([line for line in program.splitlines() if line and not line.startswith("import")]) <= 12


@pytest.mark.parametrize("precision", ["int8", "float32"])
def test_it_rebuilds_a_hypercorrelation(program, precision, tmp_path, monkeypatch, capsys):
    data = Shapes(size=64, trn_per_class=2, val_per_class=2)
    extract(data, load_weights("squeezenet1_1"), tmp_path / "shapes.zarr", image_size=64, precision=precision)
    monkeypatch.chdir(tmp_path)
    values = {}
    exec(program, values)
    names = data.index.images
    assert capsys.readouterr().out.startswith(f"{names[0]} against {names[1]} (2, 7, 7, 7, 7)")
    level = torch.from_numpy(FeatureStore.open("shapes.zarr").features([0, 1])[1].astype(np.float32))
    query, support = level[None, 0], level[None, 1]
    ours = build_hypercorrelation(query, support, torch.ones(1, 7, 7))[0]  # (L, U, V, H, W)
    ours = ours.permute(0, 3, 4, 1, 2).numpy()
    # 1e-5: this program adds that much to each norm, as the published code does.
    np.testing.assert_allclose(values["correlation"], ours, atol=1e-5)
