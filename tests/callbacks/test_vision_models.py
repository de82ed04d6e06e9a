"""A network of convolutions and batch norm through a Trainer: planned, trained, stopped, resumed, loaded, cut."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    DynamicDoRA,
    LoRA,
    RankBudget,
    inject,
    load,
    plan,
    presets,
)


class Network(LightningModule):
    """As a user writes it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
            self.conv2, self.norm2 = nn.Conv2d(8, 12, 3, stride=2), nn.BatchNorm2d(12)
            self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())).relu()
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-2)


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(48, 3, 6, 6, generator=generator) + 1, torch.randint(4, (48,), generator=generator)
    return TensorDataset(x, y)


class SaveAt(Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(compact: Any, *others: Callback, ckpt_path: Path | None = None) -> Network:
    """Four epochs of six steps: cuts after steps 4 to 12, all open components kept from then on."""
    return train([*presets.dynamic_dora(final_rank=4, interval=2, compact=compact), *others], ckpt_path)


def train(callbacks: list[Callback], ckpt_path: Path | None = None) -> Network:
    seed_everything(0, verbose=False)
    model = Network()
    trainer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    trainer.fit(model, DataLoader(images(), batch_size=8, shuffle=True), ckpt_path=ckpt_path, weights_only=True)
    return model


@pytest.mark.parametrize(("compact", "step"), [("never", 9), ("final", 9), ("final", 15)])
def test_resumed_it_is_bitwise_the_uninterrupted_run_statistics_included(
    compact: str, step: int, tmp_path: Path
) -> None:
    part, last = tmp_path / "part.ckpt", tmp_path / "last.ckpt"
    through = fit(compact, SaveAt(step, part), SaveAt(24, last))
    assert sum(RankBudget.of(through).ranks().values()) == 8
    assert not torch.equal(through.norm1.running_mean, Network().norm1.running_mean)  # type: ignore[arg-type]
    resumed = fit(compact, ckpt_path=part)
    whole = through.state_dict()
    assert resumed.state_dict().keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in resumed.state_dict().items())
    with torch.no_grad():
        x = images().tensors[0]
        assert torch.equal(load(Network(), last).eval()(x), through.eval()(x))


def test_its_plan_is_what_it_takes() -> None:
    module = Network()
    inject(module, partial(DynamicDoRA, rank=6))
    trained = [p for p in module.parameters() if p.requires_grad]
    cost = 6 * (27 + 8 + 1) + 6 * (72 + 12 + 1) + 12 * 4 + 4
    assert sum(p.numel() for p in trained) == cost
    with torch.device("meta"):
        shapes = Network()
        inject(shapes, partial(DynamicDoRA, rank=6))
    planned = plan(shapes, final=Budget(rank=4))
    assert planned == plan(module, final=Budget(rank=4))
    assert planned.start.adapter_parameters + planned.start.trained_parameters == cost
    assert planned.start.exported is not None  # PEFT can have them
    assert planned.base_parameters == sum(p.numel() for p in Network().parameters()) - 12 * 4 - 4


@pytest.mark.parametrize("compact", ["never", "at_once"])
@pytest.mark.parametrize("preset", [partial(presets.eva, 3), partial(presets.gora, 3)], ids=["eva", "gora"])
def test_convolutions_are_calibrated(preset: Any, compact: str, tmp_path: Path) -> None:
    part, last = tmp_path / "part.ckpt", tmp_path / "last.ckpt"

    def callbacks(*others: Callback) -> list[Callback]:
        return [*preset(batches=4, compact=compact), *others]

    through = train(callbacks(SaveAt(15, part), SaveAt(24, last)))
    budget = RankBudget.of(through)
    assert set(budget.extents) == {"conv1", "conv2"}
    assert 0 < budget.spent < budget.capacity
    if compact == "at_once":
        assert sum(len(site.gate) for site in budget.values()) == budget.spent
    untouched = train(
        [AdapterInjection(partial(LoRA, rank=6)), SaveAt(1, tmp_path / "plain.ckpt"), AdapterCheckpoint()]
    )
    assert not torch.equal(through.fc.weight, untouched.fc.weight)  # the start matters

    whole = through.state_dict()
    resumed = train(callbacks(), ckpt_path=part)  # adapters from the file, not calibrated again
    assert all(torch.equal(value, whole[name]) for name, value in resumed.state_dict().items())
    with torch.no_grad():
        x = images().tensors[0]
        assert torch.equal(load(Network(), last).eval()(x), through.eval()(x))


def test_evas_directions_on_a_convolution_are_those_of_its_patches() -> None:
    """Rows of A span the leading principal directions of what the kernel is laid over."""

    class Look(Callback):
        A: Tensor

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            if trainer.global_step == 0:
                site = RankBudget.of(pl_module)["conv1"]
                self.A = site.adapter.A[site.gate.open()].detach().clone()  # type: ignore[union-attr,index]

    look = Look()
    # all six batches are seen, so that order does not matter: one SVD of all patches has the same directions
    train([*presets.eva(2, rho=1.0, tau=1.0, batches=6), look])
    patches = nn.functional.unfold(images().tensors[0], 3, padding=1).mT.reshape(-1, 27)
    leading = torch.linalg.svd(patches - patches.mean(0), full_matrices=False).Vh[:2]
    found = torch.linalg.qr(look.A.mT).Q
    assert (leading @ found).square().sum() > 1.9  # of 2; incremental, each step keeps a few directions
