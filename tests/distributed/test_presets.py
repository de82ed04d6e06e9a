"""Every preset on two processes gives what it gives on one: the same masks at every event, the same weights."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
from hosts import Job, change, train_all
from presets.every import NAMES, small

from lightning_peft.testing.processes import run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]

# Dropout draws anew for every batch, and a process has half of each.
JOBS = {name: Job(partial(small, name, dropout=0.0)) for name in NAMES}


@cache
def results(world: int, *kinds: str) -> list[dict[Any, Any]]:
    runs = [(kind, name) for kind in kinds for name in JOBS]
    return run_processes(world, train_all, runs, JOBS, world, timeout=600)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_are_one(name: str, kind: str) -> None:
    alone = results(1, "single", "half")[0]["single", name]
    assert isinstance(alone, dict), alone
    for both in results(2, "ddp", "fsdp2"):
        result = both[kind, name]
        assert isinstance(result, dict), result
        assert result["events"] == alone["events"]
        assert result["masks"] == alone["masks"]
        assert change(result, alone) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_it_could_fail(name: str) -> None:
    """A run that has lost half of every batch is another one."""
    alone = results(1, "single", "half")[0]
    assert change(alone["half", name], alone["single", name]) > 1e-3
