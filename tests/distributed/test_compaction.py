"""Compaction on two processes: the ranks stay one, the result is one process's, and a resumed run is the same run."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Cubic,
    LoRA,
    RankBudget,
    RankMonitor,
    RankPolicy,
    RankPruning,
    Taylor,
)
from lightning_peft.callbacks.pruning import Compact

pytestmark = [
    pytest.mark.dist,
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:find_unused_parameters=True was specified"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
]
STEPS, LAST = 32, 16


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(64, 16, generator=generator), torch.randint(0, 4, (64,), generator=generator)
        rank, world = self.trainer.global_rank, self.trainer.world_size
        batches = [list(range(i, i + 8)) for i in range(0, 64, 8)]
        mine = [batch[rank * 8 // world : (rank + 1) * 8 // world] for batch in batches]
        return DataLoader(TensorDataset(x, y), batch_sampler=mine)  # type: ignore[arg-type]  # a list is iterable

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        out: Tensor = self.net(batch[0])
        return out

    def predict_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.ones(8, 16), torch.zeros(8, dtype=torch.long)), batch_size=4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1, momentum=0.9)


class ByLayer(Taylor):
    """All of one layer's components are worth nothing, so that its adapter goes."""

    def measure(self, group: list[Any]) -> Tensor:
        now = super().measure(group)
        for row, site in zip(now, group, strict=True):
            if site.name == "net.2":
                row.zero_()
        return now


class Diary(L.Callback):
    """Writes down what each rank ends with, and whether the wrapper from before compaction is gone."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.wrappers: list[weakref.ref[nn.Module]] = []
        self.alive: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        wrapped: Any = trainer.model
        if isinstance(wrapped, DistributedDataParallel):
            if not any(seen() is wrapped for seen in self.wrappers):
                self.wrappers.append(weakref.ref(wrapped))
            self.alive.append(sum(seen() is not None for seen in self.wrappers))

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer = trainer.optimizers[0]
        held = [p for group in optimizer.param_groups for p in group["params"]]
        torch.save(
            {
                "state": {name: value.clone() for name, value in pl_module.state_dict().items()},
                "momentum": [optimizer.state[p]["momentum_buffer"] for p in held],
                "ranks": RankBudget.of(pl_module).ranks(),
                "wrappers": len(self.wrappers),
                "alive": self.alive,
            },
            self.folder / f"{trainer.world_size}-{trainer.global_rank}.pt",
        )


def callbacks(compact: Compact) -> list[L.Callback]:
    policy = RankPolicy(Cubic(0.1, 0.5), ByLayer(), Budget(rank=2), interval=3)
    return [
        AdapterInjection(partial(LoRA, rank=4), verbose=False),
        RankPruning(policy, compact=compact),
        RankMonitor(),
        AdapterCheckpoint(),
    ]


def run(
    folder: Path, world: int, compact: Compact = "final", ckpt_path: Path | None = None, **kwargs: Any
) -> list[dict[str, Any]]:
    torch.manual_seed(5)
    strategy: Any = DDPStrategy(start_method="fork", **kwargs) if world > 1 else "auto"
    trainer = L.Trainer(
        max_epochs=4, accelerator="cpu", devices=world, strategy=strategy, use_distributed_sampler=False,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[
            *callbacks(compact),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1),
            Diary(folder),
        ],
    )  # fmt: skip
    gc.collect()
    gc.disable()  # in the processes to come as well: what is gone is gone by its references alone
    try:
        trainer.fit(Net(), ckpt_path=ckpt_path)
    finally:
        gc.enable()
    return [torch.load(folder / f"{world}-{rank}.pt", weights_only=True) for rank in range(world)]


def equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["state"].keys() == other["state"].keys()
    for name, value in one["state"].items():
        assert torch.equal(value, other["state"][name]), name
    assert all(map(torch.equal, one["momentum"], other["momentum"]))
    assert one["ranks"] == other["ranks"]


@pytest.mark.parametrize(
    ("kwargs", "compact"),
    [
        ({}, "final"),
        ({"find_unused_parameters": True}, "final"),
        ({"static_graph": True}, "final"),
        ({"gradient_as_bucket_view": True}, "final"),
        ({}, 1),
    ],
    ids=["plain", "find_unused", "static", "bucket_view", "every event"],
)
def test_ddp_equals_one_process(tmp_path: Path, kwargs: dict[str, bool], compact: Compact) -> None:
    (alone,) = run(tmp_path, 1, compact)
    first, second = run(tmp_path, 2, compact, **kwargs)
    equal(first, second)
    assert first["ranks"] == alone["ranks"]
    assert (first["ranks"]["net.2"], sum(first["ranks"].values())) == (0, 4)
    assert first["state"].keys() == alone["state"].keys()
    for name, value in alone["state"].items():
        # the same sums in another order: float32 rounding, grown over 32 steps
        torch.testing.assert_close(first["state"][name], value, rtol=1e-4, atol=1e-5)
    for mine, its in zip(first["momentum"], alone["momentum"], strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-5)
    # One wrapper at a time: the reducer of the old one would still reduce the parameters that stay.
    assert first["wrappers"] == 2 if compact == "final" else first["wrappers"] > 2
    assert set(first["alive"]) == {1}


def test_resumed_is_uninterrupted_bit_for_bit(tmp_path: Path) -> None:
    whole = run(tmp_path, 2)
    for step in (12, LAST, 20):  # before, at and after compaction
        resumed = run(tmp_path, 2, ckpt_path=tmp_path / f"step={step}.ckpt")
        for before, after in zip(whole, resumed, strict=True):
            equal(before, after)


@pytest.mark.filterwarnings("ignore:This checkpoint was written by . processes and goes on with .:")
def test_a_compacted_checkpoint_goes_from_two_processes_to_one_and_back(tmp_path: Path) -> None:
    two, one = tmp_path / "two", tmp_path / "one"
    first, _ = run(two, 2)
    (alone,) = run(one, 1, ckpt_path=two / "step=20.ckpt")
    again, other = run(tmp_path, 2, ckpt_path=one / "step=24.ckpt")
    equal(again, other)
    for name, value in first["state"].items():
        torch.testing.assert_close(alone["state"][name], value, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again["state"][name], value, rtol=1e-4, atol=1e-5)


def test_prediction_from_either_checkpoint_on_two_processes(tmp_path: Path) -> None:
    class Note(L.Callback):
        def on_predict_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            sizes = {name: len(site.gate) for name, site in RankBudget.of(pl_module).items()}
            torch.save(sizes, tmp_path / f"predict-{trainer.global_rank}.pt")

    run(tmp_path, 1)
    for step, size in ((12, 8), (20, 4)):
        L.Trainer(
            accelerator="cpu", devices=2, strategy=DDPStrategy(start_method="fork"), logger=False,
            use_distributed_sampler=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[*callbacks("final"), ModelCheckpoint(tmp_path), Note()],
        ).predict(Net(), ckpt_path=tmp_path / f"step={step}.ckpt", return_predictions=False)  # fmt: skip
        for rank in range(2):
            assert sum(torch.load(tmp_path / f"predict-{rank}.pt", weights_only=True).values()) == size
