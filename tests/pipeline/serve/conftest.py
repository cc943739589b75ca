"""A served bank, asked without a network."""

from __future__ import annotations

import shutil

import pytest
from tiny_bank import make_bank

from pipeline.predict.prepare import Choices
from pipeline.serve.app import create_app
from pipeline.serve.engine import Engine
from pipeline.serve.guard import Access


@pytest.fixture(scope="session")
def ready_bank(tmp_path_factory):
    """Two photos of one class, their features kept; to be copied."""
    folder = tmp_path_factory.mktemp("bank")
    bank = make_bank(folder)
    assert Engine(bank.root, Choices(head="contrast")).prepared() is not None
    return bank.root


@pytest.fixture
def engine(ready_bank, tmp_path):
    root = tmp_path / "tiny.bank"
    shutil.copytree(ready_bank, root)
    return Engine(root, Choices(head="contrast"))


@pytest.fixture
def client(engine):
    return create_app(engine, Access()).test_client()


@pytest.fixture
def with_token(engine):
    """Reachable from other machines."""
    access = Access(host="0.0.0.0", token="a-token-of-many-letters", max_bytes=1 << 20)
    return create_app(engine, access).test_client()
