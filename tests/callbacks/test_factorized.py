"""Factorised layers in a Trainer: pruned, cut, stopped and resumed by callbacks that know nothing of them."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Cubic,
    Factorized,
    RankBudget,
    RankMonitor,
    RankPolicy,
    RankPruning,
    Taylor,
    adapter_state_dict,
    load,
)
from lightning_peft.adapters import ThinLinear
from lightning_peft.inspection import report

FINAL = 250  # parameters, of 12 * 20 + 20 * 16 = 560 that the weights have
STEPS = 24


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Dropout(0.1), nn.Linear(20, 16), nn.Linear(16, 3))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss: Tensor = (self.net(batch[0]) - batch[0][:, :3].sin()).square().mean()
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(1)
        return DataLoader(TensorDataset(torch.randn(64, 12, generator=generator)), batch_size=8, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Saves(L.Callback):
    """Writes a checkpoint after these steps."""

    def __init__(self, folder: Path, steps: tuple[int, ...]) -> None:
        self.folder, self.steps = folder, steps

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step in self.steps:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit(
    *others: L.Callback, compact: Literal["never", "final"] = "never", trained: bool = True, ckpt_path: Any = None
) -> Net:
    policy = RankPolicy(Cubic(0.1, 0.2), Taylor(), Budget(parameters=FINAL), 3, minimum=1)
    model = Net()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=3, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[
            AdapterInjection(partial(Factorized, trained=trained), train=[".*"] if trained else None, verbose=False),
            RankPruning(policy, compact=compact), RankMonitor(), AdapterCheckpoint(), *others,
        ],
    )  # fmt: skip
    torch.manual_seed(3 if ckpt_path is None else 4)
    trainer.fit(model, ckpt_path=ckpt_path)
    assert trainer.global_step == STEPS
    return model


@pytest.mark.parametrize("compact", ["never", "final"])
def test_interrupted_is_uninterrupted(compact: Any, tmp_path: Path) -> None:
    """In warm-up, between two events, right after the cut, in the tail; and the file says the same in a bare script."""
    stops = (2, 10, 19, 22)
    through = adapter_state_dict(fit(Saves(tmp_path, stops), compact=compact))
    for stop in stops:
        resumed = adapter_state_dict(fit(compact=compact, ckpt_path=tmp_path / f"{stop}.ckpt"))
        assert resumed.keys() == through.keys()
        assert [name for name, value in through.items() if not torch.equal(value, resumed[name])] == [], stop
    sizes = {name: tuple(value.shape) for name, value in through.items()}
    assert (sizes["net.0.U"] == (20, 12)) == (compact == "never")
    last = load(Net(), tmp_path / "22.ckpt")
    assert {name: tuple(value.shape) for name, value in adapter_state_dict(last).items()} == sizes
    budget = RankBudget.of(last)
    (total,) = [line.split() for line in report(tmp_path / "22.ckpt").splitlines() if line.startswith("2 layers")]
    assert total[2:] == [f"{budget.spent}/28", f"{budget.spent_parameters}"]


def test_property_16_8_what_is_exported_is_within_the_budget() -> None:
    model = fit(compact="final").eval()
    x = torch.randn(9, 12)
    y = model.net(x)
    plain = copy.deepcopy(model.net)
    for index, layer in enumerate(plain):
        if isinstance(layer, Factorized):
            plain[index] = layer.thin()
    torch.testing.assert_close(plain(x), y, rtol=1e-5, atol=1e-5)
    spent = RankBudget.of(model).spent_parameters
    factors = [p for m in plain if isinstance(m, ThinLinear) for p in (m.down.weight, m.up.weight)]  # type: ignore[union-attr]
    assert sum(p.numel() for p in factors) == spent <= FINAL
    remainder = (20 + 16) + (16 * 3 + 3)  # biases, and the head
    assert sum(p.numel() for p in plain.parameters()) == spent + remainder


def test_frozen_factors_are_pruned_and_not_moved() -> None:
    """Their masks say what they are worth, and the head is trained beside them."""
    model, start = fit(trained=False), Net()
    budget = RankBudget.of(model)
    assert 0 < budget.spent_parameters <= FINAL
    for name in ("net.0", "net.3"):
        site = budget[name]
        dense = start.get_submodule(name)
        assert isinstance(dense, nn.Linear)
        fresh = Factorized(dense)
        pairs = zip(site.adapter.own_parameters(), fresh.own_parameters(), strict=True)
        assert [part for (part, one), (_, other) in pairs if not torch.equal(one, other)] == []
        assert torch.equal(site.adapter.bias, dense.bias)
    assert not torch.equal(model.net[4].weight, start.net[4].weight)  # type: ignore[arg-type]
