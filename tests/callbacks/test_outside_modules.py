"""Modules that somebody else wrote, untouched: one line of callbacks, and they train with a rank budget."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.demos.transformer import LightningTransformer, WikiText2
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import RankBudget, RankPruning, eject, presets

LENGTH, WORDS = 8, 30


class Losses(Callback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.values.append(trainer.callback_metrics["loss/task"].item())


def fit(module: LightningModule, loader: Any, final: float, initial: int, steps: int, **options: Any) -> Losses:
    callbacks = presets.dynamic_dora(final_rank=final, initial_rank=initial, interval=2, **options)
    losses = Losses()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=2,
        callbacks=[*callbacks, losses],
    )
    trainer.fit(module, loader)
    pruning = next(callback for callback in callbacks if isinstance(callback, RankPruning))
    assert pruning.event_step == steps // 2
    budget = RankBudget.of(module)
    assert budget.spent == int(len(budget) * final) < budget.capacity
    assert all(value.isfinite().all() for value in module.state_dict().values())
    return losses


def text() -> DataLoader[Any]:
    words = torch.randint(WORDS, (64, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(words[:, :-1], words[:, 1:]), batch_size=4)


def test_lightnings_boring_model() -> None:
    """One linear layer of 32 inputs and 2 outputs, plain SGD over all parameters, a dictionary for a loss."""
    module, samples = BoringModel(), RandomDataset(32, 64)
    before = module.layer.weight.detach().clone()
    start = module.step(samples.data).item()
    # alpha: its learning rate of 0.1 is made for plain weights, not for a product scaled by 8 / 2
    fit(module, DataLoader(samples, batch_size=16), final=1, initial=2, steps=40, alpha=0.5)
    assert module.step(samples.data).item() < start
    assert RankBudget.of(module).ranks() == {"layer": 1}
    eject(module)
    assert torch.equal(module.layer.weight, before)
    assert all(p.requires_grad for p in module.parameters())


def test_lightnings_transformer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`nn.Transformer` with packed projections that are read and never called, and a loss of its own from logits."""
    # Its prepare_data would download a text and read it; the test has no network and brings its own batches.
    monkeypatch.setattr(WikiText2, "download", staticmethod(lambda destination: None))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "wikitext-2.txt").write_text("a few words\n")
    module = LightningTransformer(vocab_size=WORDS)
    decoder = module.model.decoder.weight.detach().clone()
    embedding = module.model.embedding.weight.detach().clone()
    losses = fit(module, text(), final=2, initial=4, steps=16)
    budget = RankBudget.of(module)
    assert len(budget) == 2 * 4 + 2 * 6
    assert {name.rpartition(".")[2] for name in budget} == {"in_proj", "out_proj", "linear1", "linear2"}
    assert all(site.adapter.gate.gain.any() for site in budget.values() if site.gate.mask.any())  # type: ignore[union-attr]
    assert not torch.equal(module.model.decoder.weight, decoder)  # the head is trained
    assert torch.equal(module.model.embedding.weight, embedding)
    assert losses.values[-1] < losses.values[0]


class Own(LightningModule):
    """A hub's model without labels: the loss is computed from its logits."""

    def build(self) -> nn.Module:
        config = BertConfig(
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            vocab_size=WORDS,
            num_labels=3,
        )
        return BertForSequenceClassification(config)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        words, _ = batch
        return nn.functional.cross_entropy(self.net(words).logits, words[:, 0] % 3)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=5e-3)


class InInit(Own):
    def __init__(self) -> None:
        super().__init__()
        self.net = self.build()


class InConfigureModel(Own):
    def __init__(self) -> None:
        super().__init__()
        self.net: nn.Module | None = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = self.build()


class InSetup(Own):
    def setup(self, stage: str) -> None:
        self.net = self.build()


@pytest.mark.parametrize("kind", [InInit, InConfigureModel, InSetup])
def test_a_hubs_model_with_a_loss_from_its_logits(kind: Callable[[], Own]) -> None:
    module = kind()
    losses = fit(module, text(), final=2, initial=3, steps=32, dropout=0.0)
    budget = RankBudget.of(module)
    assert len(budget) == 7
    assert "net.bert.encoder.layer.0.attention.self.query" in budget
    assert module.net.classifier.weight.requires_grad
    assert sum(losses.values[-8:]) < sum(losses.values[:8])
