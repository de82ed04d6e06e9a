"""Adopted PEFT models on two processes: DDP and FSDP2 give what one process gives, and resume exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from peft import get_peft_model
from peft_models import Job, base, build, ids, lora
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    AdapterCheckpoint,
    Adoption,
    Budget,
    Cubic,
    RankAllocation,
    RankBudget,
    RankPolicy,
    RankPruning,
    Taylor,
    adapter_state_dict,
    adopt,
    small_parameters,
)
from lightning_peft.testing.processes import run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory"),
]


class Spread(Job):
    """The same global batches on any number of processes."""

    def train_dataloader(self) -> DataLoader[Any]:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        x = ids(32)
        mine = [list(range(i + rank * 4 // world, i + (rank + 1) * 4 // world)) for i in range(0, 32, 4)]
        return DataLoader(TensorDataset(x, x[:, 0] % 3), batch_sampler=mine)  # type: ignore[arg-type]


class Sharded(Spread):
    """Shards the frozen base under FSDP2, and leaves whole what is trained."""

    def configure_model(self) -> None:
        if len(RankBudget.of(self)):
            return
        adopt(self.model)
        mesh = self.device_mesh["data_parallel"]  # type: ignore[index]
        fully_shard(self.model, mesh=mesh, ignored_params=set(small_parameters(self)))


def kasa() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return get_peft_model(base(), lora(kasa_config=peft.KasaConfig(beta=0.1, gamma=0.05)))


def run(kind: str, world: int, folder: Path, ckpt_path: Path | None = None, fsdp: bool = False) -> list[Any]:
    def one() -> Any:
        torch.manual_seed(5)
        job = (Sharded if fsdp and world > 1 else Spread)(model=kasa() if kind == "kasa" else build(kind))
        policy = RankPolicy(Cubic(0.1, 0.3), Taylor(), Budget(rank=2), interval=3)
        driver: Any = RankAllocation() if kind == "adalora" else RankPruning(policy)
        strategy: Any = "auto"
        if world > 1:
            strategy = ModelParallelStrategy(world, 1) if fsdp else DDPStrategy()
        L.Trainer(
            max_epochs=3, accelerator="cpu", devices=world, strategy=strategy, use_distributed_sampler=False,
            logger=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[
                Adoption(verbose=False), driver, AdapterCheckpoint(),
                ModelCheckpoint(folder, filename="{step}", every_n_train_steps=11, save_top_k=-1),
            ],
        ).fit(job, ckpt_path=ckpt_path, weights_only=True)  # fmt: skip
        sharded = any(isinstance(p, DTensor) for p in job.parameters())
        return {n: v.clone() for n, v in adapter_state_dict(job).items()}, RankBudget.of(job).ranks(), sharded

    return run_processes(world, one) if world > 1 else [one()]


def close(kind: str, mine: dict[str, Tensor], alone: dict[str, Tensor]) -> None:
    for name, value in alone.items():
        if name in mine:
            # the same sums in another order, grown by Adam's division where a gradient is almost zero
            torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", ["lora", "dora", "adalora", "kasa"])
def test_ddp_equals_one_process_and_resumes(kind: str, tmp_path: Path) -> None:
    ((alone, ranks, _),) = run(kind, 1, tmp_path / "one")
    first, second = run(kind, 2, tmp_path / "two")
    assert sum(ranks.values()) == 4
    assert first[1] == second[1] == ranks
    for name, value in first[0].items():
        assert torch.equal(value, second[0][name]), name
    close(kind, first[0], alone)
    resumed = run(kind, 2, tmp_path / "two", tmp_path / "two" / "step=22.ckpt")
    for name, value in first[0].items():
        assert torch.equal(value, resumed[0][0][name]), name


def test_fsdp2_equals_one_process(tmp_path: Path) -> None:
    ((alone, ranks, _),) = run("lora", 1, tmp_path / "one")
    first, second = run("lora", 2, tmp_path / "two", fsdp=True)
    assert first[2]  # the base is sharded
    assert first[1] == second[1] == ranks
    close("lora", first[0], alone)
    resumed = run("lora", 2, tmp_path / "two", tmp_path / "two" / "step=11.ckpt", fsdp=True)
    for name, value in first[0].items():
        assert torch.equal(value, resumed[0][0][name]), name
