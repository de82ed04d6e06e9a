"""Steps that are not plain, under FSDP2: by hand, with several optimizers, with an adapter left out."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import LoRA, RankBudget, presets
from lightning_peft.testing.processes import run_processes

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:1 adapters took no part in the first loss"),
]


class Net(L.LightningModule):
    """The same global batches however many processes there are; shards itself where there are several."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
            self.spare = nn.Linear(16, 4)

    def configure_model(self) -> None:
        if self.trainer.world_size > 1 and not isinstance(next(self.parameters()), DTensor):
            for part in (self.net, self.spare):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        return self.loss(batch)

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(96, 16, generator=generator), torch.randint(0, 4, (96,), generator=generator)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = [list(range(i + rank * 8 // world, i + (rank + 1) * 8 // world)) for i in range(0, 96, 8)]
        return DataLoader(TensorDataset(x, y), batch_sampler=batches)  # type: ignore[arg-type]  # a list is iterable

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class ByHand(Net):
    """Two backwards before a step, as one takes a loss in parts."""

    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.manual_backward(0.3 * self.net(batch[0]).square().mean())
        optimizer.step()


class TwoOptimizers(Net):
    """In turn, each with a half of the adapters."""

    automatic_optimization = False

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        optimizer: Any = self.optimizers()[batch_idx % 2]
        self.manual_backward(self.loss(batch))
        optimizer.step()
        optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        parameters = [p for p in self.parameters() if p.requires_grad]
        return [torch.optim.AdamW(parameters[::2], lr=0.01), torch.optim.SGD(parameters[1::2], lr=0.1)]


class Sometimes(Net):
    """One adapter is used for a few batches only, and one never."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        if batch_idx in (4, 5):
            return self.loss(batch) + self.spare(batch[0]).square().mean()
        return self.loss(batch)


def train(module: type[Net], world: int, **options: Any) -> dict[str, Any]:
    torch.manual_seed(5)
    model = module()
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", devices=world, use_distributed_sampler=False,
        strategy=ModelParallelStrategy(world, 1) if world > 1 else "auto",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*presets.lora(rank=4, targets=["net.0", "net.2", "spare"], train=[])],
        **options,
    )  # fmt: skip
    trainer.fit(model)
    found = {name: site.adapter for name, site in RankBudget.of(model).items()}
    assert all(isinstance(adapter, LoRA) for adapter in found.values())
    return {f"{n}.{k}": p.detach().numpy() for n, a in found.items() for k, p in a.own_parameters()}


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (ByHand, {}),
        (TwoOptimizers, {}),
        (Sometimes, {}),
        (Sometimes, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}),
    ],
    ids=["by_hand", "two_optimizers", "unused", "unused_accumulated_clipped"],
)
def test_two_processes_give_what_one_gives(module: type[Net], options: dict[str, Any]) -> None:
    (alone,) = run_processes(1, lambda: train(module, 1, **options))
    first, second = run_processes(2, lambda: train(module, 2, **options))
    assert abs(alone["net.0.B"]).max() > 1e-3
    for name, value in alone.items():
        assert (first[name] == second[name]).all(), name
        assert abs(first[name] - value).max() <= 1e-6 * max(abs(value).max(), 1e-3), name
