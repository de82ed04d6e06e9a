"""Checkpoints from odd places: inside a batch, amid an optimizer step, beside a validation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import RankBudget, presets

LOST = "written inside a batch, amid an optimizer step: the gradients of the step's earlier micro-batches are lost"


class Net(L.LightningModule):
    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        self.fail_at = fail_at
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Linear(8, 2))
        self.seen: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.trainer.fit_loop.epoch_loop.total_batch_idx == self.fail_at:
            raise ArithmeticError("a bad batch")
        self.seen.append(batch[0].clone())
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(32, 4, generator=generator), torch.randint(0, 2, (32,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Validated(Net):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        torch.randn(3)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train_dataloader().dataset, batch_size=4)


class SaveOnError(L.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.save_checkpoint(self.path)


def trainer(*extra: L.Callback, first: bool = False, **options: Any) -> L.Trainer:
    ours = presets.dynamic_dora(final_rank=2, interval=2)
    return L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[*extra, *ours] if first else [*ours, *extra], **options,
    )  # fmt: skip


def run_through(**options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    net = Net()
    trainer(**options).fit(net)
    return net.seen


def interrupted(at: int, path: Path, **options: Any) -> list[Tensor]:
    torch.manual_seed(3)
    with pytest.raises(ArithmeticError, match="a bad batch"):
        trainer(SaveOnError(path), **options).fit(Net(fail_at=at))
    torch.manual_seed(77)
    net = Net()
    trainer(**options).fit(net, ckpt_path=path)
    return net.seen


@pytest.mark.parametrize(("at", "first"), [(0, False), (3, False), (3, True), (7, False), (8, False), (11, False)])
def test_a_batch_that_failed_is_taken_again(tmp_path: Path, at: int, first: bool) -> None:
    whole, rest = run_through(), interrupted(at, tmp_path / "error.ckpt", first=first)
    assert len(whole) == 16
    assert len(rest) == 16 - at
    epoch = 8 * (at // 8 + 1)  # the order of a later epoch is drawn after the numbers that the failed batch used up
    assert all(map(torch.equal, rest[: epoch - at], whole[at:epoch]))


@pytest.mark.parametrize(("at", "lost"), [(4, False), (5, True)])
def test_gradients_lost_inside_a_batch_are_said_to_be_lost(tmp_path: Path, at: int, lost: bool) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        interrupted(at, tmp_path / "error.ckpt", accumulate_grad_batches=2)
    assert any(LOST in str(warning.message) for warning in caught) == lost


class FailsToStart(L.Callback):
    def on_train_start(self, trainer: L.Trainer, *args: Any) -> None:
        raise ArithmeticError("a bad start")


def test_what_a_failed_start_had_read_is_not_lost(tmp_path: Path) -> None:
    torch.manual_seed(3)
    with pytest.raises(ArithmeticError, match="a bad batch"):
        trainer(SaveOnError(tmp_path / "good.ckpt")).fit(Net(fail_at=11))
    with pytest.raises(ArithmeticError, match="a bad start"):
        trainer(FailsToStart(), SaveOnError(tmp_path / "again.ckpt"), first=True).fit(
            Net(), ckpt_path=tmp_path / "good.ckpt"
        )
    good, again = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True)["callbacks"] for name in ("good", "again"))
    assert {"RankPruning", "AdapterCheckpoint"} <= good.keys()
    for name in ("RankPruning", "AdapterCheckpoint"):
        assert str(again[name]) == str(good[name])


def test_compaction_waits_for_the_gradients_of_an_open_step(tmp_path: Path) -> None:
    """The file is of a run that did not compact, from between two micro-batches of the tail."""
    options: dict[str, Any] = {"accumulate_grad_batches": 2}
    torch.manual_seed(3)
    run = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*presets.dynamic_dora(final_rank=2, interval=2), SaveAt(13, tmp_path / "open.ckpt")], **options,
    )  # fmt: skip
    run.fit(Net())
    assert "lightning_peft_gradients" in torch.load(tmp_path / "open.ckpt", weights_only=True)
    net = Net()
    L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*presets.dynamic_dora(final_rank=2, interval=2, compact="final")], **options,
    ).fit(net, ckpt_path=tmp_path / "open.ckpt")  # fmt: skip
    assert sum(len(site.gate) for site in RankBudget.of(net).values()) == RankBudget.of(net).spent == 4


class SaveAt(L.Callback):
    """Saves after so many batches."""

    def __init__(self, batches: int, path: Path) -> None:
        self.batches, self.path, self.seen = batches, path, 0

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.seen += 1
        if self.seen == self.batches:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("interval", [3, 8])
def test_training_does_not_depend_on_validation(interval: int) -> None:
    nets = []
    for module, options in ((Net, {}), (Validated, {"val_check_interval": interval})):
        torch.manual_seed(3)
        nets.append(module())
        trainer(**options).fit(nets[-1])
    assert all(map(torch.equal, nets[0].seen, nets[1].seen))
    assert all(map(torch.equal, nets[0].parameters(), nets[1].parameters()))
