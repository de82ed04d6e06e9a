"""Two processes give what one gives on the same global batches, and agree with each other at every event."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import RankBudget, RankPruning, presets

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Net(L.LightningModule):
    def __init__(self, shuffle: bool = False) -> None:
        super().__init__()
        self.shuffle = shuffle
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(128, 16, generator=generator), torch.randint(0, 4, (128,), generator=generator)
        if self.shuffle:
            return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = [list(range(i, i + 8)) for i in range(0, 128, 8)]
        mine = [batch[rank * 8 // world : (rank + 1) * 8 // world] for batch in batches]
        return DataLoader(TensorDataset(x, y), batch_sampler=mine)  # type: ignore[arg-type]  # a list is iterable

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


class Diary(L.Callback):
    """Writes down, on each rank, the masks right after each event."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pages: dict[int, dict[str, Tensor]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        pruning = next(c for c in trainer.callbacks if isinstance(c, RankPruning))
        if pruning.event_step == trainer.global_step:
            self.pages[trainer.global_step] = {n: s.gate.open() for n, s in RankBudget.of(pl_module).items()}

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        torch.save(
            {"events": self.pages, "state": state}, self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt"
        )


def run(
    folder: Path, world: int, ckpt_path: Path | None = None, shuffle: bool = False, **kwargs: Any
) -> list[dict[str, Any]]:
    torch.manual_seed(5)
    strategy: Any = DDPStrategy(start_method="fork", **kwargs) if world > 1 else "auto"
    L.Trainer(
        max_epochs=4, accelerator="cpu", devices=world, strategy=strategy, use_distributed_sampler=shuffle,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            *presets.dynamic_dora(final_rank=4, interval=3, dropout=0.0),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=21, save_top_k=-1),
            Diary(folder),
        ],
    ).fit(Net(shuffle), ckpt_path=ckpt_path)  # fmt: skip
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.mark.parametrize("kwargs", [{}, {"find_unused_parameters": True}, {"static_graph": True}])
@pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified")
def test_ddp_equals_one_process(tmp_path: Path, kwargs: dict[str, bool]) -> None:
    (alone,) = run(tmp_path, 1)
    first, second = run(tmp_path, 2, **kwargs)
    assert len(alone["events"]) > 5
    for step, masks in alone["events"].items():
        for name, mask in masks.items():
            assert torch.equal(first["events"][step][name], mask), (step, name)
            assert torch.equal(second["events"][step][name], mask), (step, name)
    for name, value in alone["state"].items():
        assert torch.equal(first["state"][name], second["state"][name]), name
        # the same sums in another order: float32 rounding, grown over 64 steps
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shuffle", [False, True])
def test_resumed_ddp_is_bitwise_the_uninterrupted_one(tmp_path: Path, shuffle: bool) -> None:
    whole = run(tmp_path, 2, shuffle=shuffle)
    for step in (21, 42):  # in the middle of an epoch, while pruning is soft, and in the tail
        resumed = run(tmp_path, 2, ckpt_path=tmp_path / f"step={step}.ckpt", shuffle=shuffle)
        for before, after in zip(whole, resumed, strict=True):
            assert before["state"].keys() == after["state"].keys()
            for name, value in before["state"].items():
                assert torch.equal(value, after["state"][name]), name
            late = [event for event in before["events"] if event > step]
            assert list(after["events"]) == late
