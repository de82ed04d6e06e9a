"""Importance from gradients is that of the whole batch, on every process alike."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import AdapterInjection, Budget, Cubic, LoRA, RankBudget, RankPolicy, RankPruning, Taylor

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
]


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = (self.net(batch) - batch.sum(1, keepdim=True).sin()).square().mean()
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(128, 8, generator=torch.Generator().manual_seed(0))
        rank, world = self.trainer.global_rank, self.trainer.world_size
        mine = [list(range(i + rank * 8 // world, i + (rank + 1) * 8 // world)) for i in range(0, 128, 8)]
        return DataLoader(x, batch_sampler=mine)  # type: ignore[arg-type]  # a list is iterable

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Diary(L.Callback):
    def __init__(self, folder: Path, pruning: RankPruning) -> None:
        self.folder, self.pruning = folder, pruning

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        masks = {name: site.gate.mask for name, site in RankBudget.of(pl_module).items()}
        page = {"masks": masks, "scores": self.pruning.policy.importance.scores()}
        torch.save(page, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt")


def run(folder: Path, world: int) -> list[dict[str, dict[str, Tensor]]]:
    torch.manual_seed(5)
    strategy: Any = DDPStrategy(start_method="fork") if world > 1 else "auto"
    pruning = RankPruning(RankPolicy(Cubic(0.1, 0.2), Taylor(), Budget(rank=2), interval=3))
    L.Trainer(
        max_epochs=2, accelerator="cpu", devices=world, strategy=strategy, use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[AdapterInjection(partial(LoRA, rank=4)), pruning, Diary(folder, pruning)],
    ).fit(Net())  # fmt: skip
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def test_scores_are_averaged_over_processes_before_the_absolute_value(tmp_path: Path) -> None:
    (alone,) = run(tmp_path, 1)
    first, second = run(tmp_path, 2)
    for name, scores in alone["scores"].items():
        assert scores.any()
        assert torch.equal(first["scores"][name], second["scores"][name])
        torch.testing.assert_close(first["scores"][name], scores, rtol=1e-3, atol=1e-6)
    for name, mask in alone["masks"].items():
        assert torch.equal(first["masks"][name], mask)
        assert torch.equal(second["masks"][name], mask)
