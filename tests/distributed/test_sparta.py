"""SpaRTA on two processes: the weights of one, its entries in step with delta, and what every process writes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from hosts import ROUNDINGS, STRATEGIES, Job, Sharded, ShardedAroundAdapters, change, train_all
from torch.distributed.tensor import DTensor

from lightning_peft import AdapterCheckpoint, AdapterInjection, DropAndRegrow, RankPruning, SpaRTA
from lightning_peft.distributed import gather_objects, whole
from lightning_peft.rank.schedule import Linear
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


class Moves(L.Callback):
    """Whether entries move in the run, and are the same on all processes after every step."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.seen: set[str] = set()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        mine = str([adapter.indices.tolist() for adapter in adapters(pl_module).values()])  # type: ignore[operator, union-attr]
        assert set(gather_objects(mine)) == {mine}
        self.seen.add(mine)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert len(self.seen) == 3  # as drawn, and after steps 4 and 12 of 24; none moves at the last event, step 20


def callbacks(*more: type[L.Callback]) -> Sequence[L.Callback]:
    return [*(kind() for kind in more), AdapterInjection(FACTORY, train=["net.2"], verbose=False), Witness()]


def regrowing() -> Sequence[L.Callback]:
    policy = DropAndRegrow(0.3, Linear(warmup=0.2, tail=0.2), interval=8)
    return [*callbacks(), RankPruning(policy), Moves()]


class Around(ShardedAroundAdapters):
    adapter = FACTORY
    beside = ("net.2",)


JOBS = {
    "plain": Job(callbacks, around=Around),
    "accumulated": Job(callbacks, trainer={"accumulate_grad_batches": 2}),
    "apart": Job(partial(callbacks, Apart)),
    "regrowing": Job(regrowing),
}
RUNS = {
    "plain": ["ddp", "fsdp2", "fsdp2 around"],
    "accumulated": ["ddp", "fsdp2"],
    "apart": ["ddp"],
    "regrowing": ["ddp", "fsdp2"],
}


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
        assert change(result, alone) < ROUNDINGS


class SaveAt(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 7:
            trainer.save_checkpoint(self.path)


def fit(path: Path, resume: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    model = Sharded()
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy=STRATEGIES["fsdp2"](2), use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, max_epochs=1,
        callbacks=[*callbacks(), AdapterCheckpoint(), *([] if resume else [SaveAt(path)])],
    )  # fmt: skip
    trainer.fit(model, ckpt_path=path if resume else None)
    assert trainer.global_step == 12
    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def interrupt(folder: Path) -> list[str]:
    """What is different in a sharded run that was stopped: of everything, the weights that are written included."""
    torch.set_num_threads(1)
    path = folder / "stopped.ckpt"
    through, resumed = fit(path, False), fit(path, True)
    return [name for name, value in through.items() if not torch.equal(resumed[name], value)]


def test_a_sharded_run_that_is_stopped_and_resumed_is_the_run_through(tmp_path: Path) -> None:
    assert run_processes(2, interrupt, tmp_path, timeout=300) == [[], []]


def test_fsdp1_is_refused() -> None:
    for both in results(2):
        assert str(both["fsdp1", "plain"]).startswith(
            "MisconfigurationException: the adapter at 'net.0.0' writes into its layer's weight, which"
        )
