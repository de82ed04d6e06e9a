"""A bottleneck in a model without adapters, of which nobody else averages gradients: two processes are one."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hosts import ROUNDINGS, Job, change, train_all

from lightning_peft import VIB, Regularization
from lightning_peft.testing.processes import run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]


def callbacks() -> list[Any]:
    return [Regularization({"vib": VIB(features=6, beta=1.0, growth="none", samples=3)})]


JOBS = {"vib": Job(callbacks)}


@cache
def results(world: int, *kinds: str) -> list[dict[Any, Any]]:
    return run_processes(world, train_all, [(kind, "vib") for kind in kinds], JOBS, world, timeout=300)


@pytest.mark.parametrize("kind", ["ddp", "fsdp1", "fsdp2"])
def test_two_processes_are_one(kind: str) -> None:
    alone = results(1, "single", "half")[0]
    for both in results(2, "ddp", "fsdp1", "fsdp2"):
        result = both[kind, "vib"]
        assert isinstance(result, dict), result
        assert change(result, alone["single", "vib"]) < ROUNDINGS


def test_it_could_fail() -> None:
    alone = results(1, "single", "half")[0]
    assert change(alone["half", "vib"], alone["single", "vib"]) > 1e-3
