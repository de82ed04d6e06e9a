"""What holds for every test: one thread, no network, nothing left in the working folder or the global generator."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before transformers is imported: a model named by mistake fails at once instead of waiting for a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-exactness", action="store_true", help="write the table of docs/exactness.md anew")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Two torch threads on two shared cores can be several times slower than one."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_corner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs the test in a folder of its own, where Lightning may log, with a seeded generator that is put back."""
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
