"""RankDyna on two processes: cut while it trains under DDP, and by the factors' own gradients, also where these are
sharded; each with the ranks and weights of one process.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hosts import Host, Job, ShardedAroundAdapters, change, train_all

from lightning_peft import Distillation, Factorized, Regularization, presets
from lightning_peft.testing.processes import run_processes

pytestmark = pytest.mark.dist


class Around(ShardedAroundAdapters):
    adapter = Factorized
    beside = (".*",)


def job(teacher: Any = None, distilled: bool = False, **options: Any) -> Job:
    def callbacks() -> list[Any]:
        term = Regularization({"teacher": Distillation(5.0, teacher, hidden=["0"])})
        return [*presets.rankdyna(0.5, interval=2, **options), *([term] if distilled or teacher else [])]

    return Job(callbacks, around=Around)


JOBS = {
    "masks": job(),
    "cut": job(compact=2),
    "elementwise": job(aggregation="elementwise_sum", uncertainty=True, score="per_cost"),
    "distilled": job(distilled=True, compact=3),
    "taught": job(teacher=Host),
}
BOTH = ["ddp", "fsdp2 around"]
RUNS = {"masks": BOTH, "cut": ["ddp"], "elementwise": BOTH, "distilled": ["ddp"], "taught": ["fsdp2 around"]}


@cache
def results(world: int) -> list[dict[Any, Any]]:
    kinds = {name: ["single"] if world == 1 else kinds for name, kinds in RUNS.items()}
    runs = [(kind, name) for name, own in kinds.items() for kind in own]
    return run_processes(world, train_all, runs, JOBS, world, timeout=300)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in RUNS.items() for kind in kinds])
def test_two_processes_are_one(name: str, kind: str) -> None:
    alone = results(1)[0]["single", name]
    assert isinstance(alone, dict), alone
    removed = [sum(not open_ for mask in masks.values() for open_ in mask) for masks in alone["events"].values()]
    assert max(removed) > 0
    for both in results(2):
        result = both[kind, name]
        assert isinstance(result, dict), result
        assert result["events"] == alone["events"]
        assert result["masks"] == alone["masks"]
        assert change(result, alone) < 1e-5


def test_cutting_and_the_teacher_make_a_difference() -> None:
    found = results(1)[0]
    masks, cut, distilled = (found["single", name] for name in ("masks", "cut", "distilled"))
    assert sum(map(len, cut["masks"].values())) < sum(map(len, masks["masks"].values()))
    assert distilled["weights"].keys() == masks["weights"].keys()
    assert any((distilled["weights"][key] != masks["weights"][key]).any() for key in ("net.2.weight", "net.2.bias"))
