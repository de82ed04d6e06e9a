"""SpaRTA on two processes: the weights of one, its entries in step with delta, and what every process writes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import Job, ShardedAroundAdapters, change, train_all
from torch.distributed.tensor import DTensor

from lightning_peft import AdapterInjection, SpaRTA
from lightning_peft.distributed import whole
from lightning_peft.surgery import adapters
from lightning_peft.testing.processes import run_processes

pytestmark = pytest.mark.dist

FACTORY = partial(SpaRTA, density=0.2)


class Witness(L.Callback):
    """After every step: whether the bases' weights are what the adapters say, over all processes."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step % 4 or not trainer.global_step:
            return
        for name, adapter in adapters(pl_module).items():
            assert isinstance(adapter, SpaRTA)
            weight: Any = adapter.base.weight
            now = whole(weight.detach()).flatten()[adapter.indices.long()]
            assert torch.equal(now, adapter.entries().detach()), f"{name} is behind in step {trainer.global_step}"
            assert adapter.delta.abs().max() > 0.001
            if trainer.strategy.__class__.__name__ == "ModelParallelStrategy":
                assert isinstance(weight, DTensor)


class Apart(L.Callback):
    """Every process would start from a base of its own; DDP gives all of them process 0's."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        with torch.no_grad():
            for p in pl_module.parameters():
                p.add_(0.1 * trainer.global_rank)


def callbacks(*more: type[L.Callback]) -> Sequence[L.Callback]:
    return [*(kind() for kind in more), AdapterInjection(FACTORY, train=["net.2"], verbose=False), Witness()]


class Around(ShardedAroundAdapters):
    adapter = FACTORY
    beside = ("net.2",)


JOBS = {
    "plain": Job(callbacks, around=Around),
    "accumulated": Job(callbacks, trainer={"accumulate_grad_batches": 2}),
    "apart": Job(partial(callbacks, Apart)),
}
RUNS = {"plain": ["ddp", "fsdp2", "fsdp2 around"], "accumulated": ["ddp", "fsdp2"], "apart": ["ddp"]}


@cache
def results(world: int) -> list[dict[Any, Any]]:
    kinds = {name: ["single"] if world == 1 else kinds for name, kinds in RUNS.items()}
    runs = [(kind, name) for name, own in kinds.items() for kind in own]
    refused = [("fsdp1", "plain")] if world > 1 else []
    return run_processes(world, train_all, [*runs, *refused], JOBS, world, timeout=300)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kinds in RUNS.items() for kind in kinds])
def test_two_processes_are_one(name: str, kind: str) -> None:
    alone = results(1)[0]["single", name]
    assert isinstance(alone, dict), alone
    for both in results(2):
        result = both[kind, name]
        assert isinstance(result, dict), result
        assert change(result, alone) < 1e-6


def test_fsdp1_is_refused() -> None:
    for both in results(2):
        assert str(both["fsdp1", "plain"]).startswith(
            "MisconfigurationException: the adapter at 'net.0.0' writes into its layer's weight, which"
        )
