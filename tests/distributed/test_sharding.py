"""FSDP1 and FSDP2: small things whole, the base sharded, and the result that of one process."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    DynamicDoRA,
    RankBudget,
    inject,
    load,
    merge,
    presets,
    save_merged,
    small_parameters,
    to_hf_peft,
)
from lightning_peft.testing.processes import CpuFSDPStrategy, run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Net(L.LightningModule):
    """Plain; the same numbers on every process, and the same global batches however many there are."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Sequential(nn.Linear(16, 33), nn.Tanh()),  # rows that two processes cannot share evenly
                nn.Sequential(nn.Linear(33, 32), nn.Tanh()),
                nn.Linear(32, 4),
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    validation_step = training_step

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(128, 16, generator=generator), torch.randint(0, 4, (128,), generator=generator)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = [list(range(i + rank * 8 // world, i + (rank + 1) * 8 // world)) for i in range(0, 128, 8)]
        return DataLoader(TensorDataset(x, y), batch_sampler=batches)  # type: ignore[arg-type]  # a list is iterable

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class ShardsItself(Net):
    """FSDP2 as a user writes it who knows nothing of adapters: all is sharded, also the head."""

    def configure_model(self) -> None:
        if isinstance(next(self.parameters()), DTensor):
            return
        mesh = self.device_mesh["data_parallel"]
        for block in self.net[:2]:
            fully_shard(block, mesh=mesh)
        fully_shard(self.net, mesh=mesh)


class InjectsThenShards(Net):
    """FSDP2 with adapters known: they and the head are left whole."""

    def configure_model(self) -> None:
        if isinstance(next(self.parameters()), DTensor):
            return
        inject(self, partial(DynamicDoRA, rank=6, dropout=0.0))
        mesh, small = self.device_mesh["data_parallel"], set(small_parameters(self))
        for block in self.net[:2]:
            fully_shard(block, mesh=mesh, ignored_params=small)
        fully_shard(self.net, mesh=mesh, ignored_params=small)


KINDS: dict[str, tuple[type[Net], Any]] = {
    "one": (Net, lambda world: "auto"),
    "ddp": (Net, lambda world: DDPStrategy()),
    "fsdp2-auto": (ShardsItself, lambda world: ModelParallelStrategy(world, 1)),
    "fsdp2-helper": (InjectsThenShards, lambda world: ModelParallelStrategy(world, 1)),
    "fsdp1": (Net, lambda world: CpuFSDPStrategy()),
    "fsdp1-nested": (Net, lambda world: CpuFSDPStrategy(auto_wrap_policy={nn.Sequential, nn.Linear})),
}


def train(kind: str, world: int, folder: Path, ckpt_path: Path | None = None, **options: Any) -> dict[str, Any]:
    torch.manual_seed(5)
    module, strategy = KINDS[kind]
    model = module()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", devices=world, strategy=strategy(world), use_distributed_sampler=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[
            *presets.dynamic_dora(final_rank=4, interval=3, dropout=0.0),
            ModelCheckpoint(folder, filename=f"{kind}-{{step}}", every_n_train_steps=11, save_top_k=-1),
        ],
        **options,
    )  # fmt: skip
    trainer.fit(model, ckpt_path=ckpt_path)
    budget = RankBudget.of(model)
    return {
        "masks": {name: site.gate.mask.tolist() for name, site in budget.items()},
        "weights": {f"{n}.{k}": p.detach().numpy() for n, s in budget.items() for k, p in s.adapter.own_parameters()},
    }


def export_where_it_is(kind: str, folder: Path) -> list[str]:
    said = []
    module, strategy = KINDS[kind]
    model = module()
    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", devices=2, strategy=strategy(2), use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[*presets.lora(rank=2)],
    )  # fmt: skip
    trainer.fit(model)
    for leave in (merge, partial(to_hf_peft, folder=folder / "adapter"), partial(save_merged, folder=folder / "model")):
        try:
            leave(model)
        except RuntimeError as error:
            said.append(str(error))
    trainer.save_checkpoint(folder / f"{kind}.ckpt")
    return said


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (result,) = run_processes(1, train, "one", 1, tmp_path_factory.mktemp("one"))
    return result  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_two_processes_give_what_one_gives(tmp_path: Path, alone: dict[str, Any], kind: str) -> None:
    first, second = run_processes(2, train, kind, 2, tmp_path)
    assert first["masks"] == second["masks"] == alone["masks"]
    for name, value in alone["weights"].items():
        assert (first["weights"][name] == second["weights"][name]).all(), name
        # the same sums in another order: a few roundings of float32
        assert abs(first["weights"][name] - value).max() <= 1e-6 * abs(value).max(), name


@pytest.mark.parametrize("kind", ["fsdp2-helper", "fsdp1"])
def test_export_of_a_sharded_base_says_how_to_get_there(tmp_path: Path, kind: str) -> None:
    for said in run_processes(2, export_where_it_is, kind, tmp_path):
        assert len(said) == 3
        for verb, sentence in zip(("merge", "to_hf_peft", "save_merged"), said, strict=True):
            assert sentence.startswith(f"{verb} needs the base in one piece, and 'net.0.0.base.weight' is split over")
    plain = load(Net(), tmp_path / f"{kind}.ckpt")
    merge(plain)
    assert not RankBudget.of(plain)
