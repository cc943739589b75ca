"""Loads what tests of this folder share: tests are no package, so they cannot import what was not loaded before."""

import importlib.util
import sys
from pathlib import Path

for name in ("stores_by_hand", "growing", "attacks"):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
