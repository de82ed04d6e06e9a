"""What the tests of noise train: a text CNN with an embedding of its own, and runs of it."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from quiet import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader

VOCABULARY, LENGTH, WIDTH, CLASSES = 20, 6, 8, 3


class TextCNN(LightningModule):
    """A plain module: embedding, convolution, maximum over positions."""

    def __init__(self, frozen: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.embed = nn.Embedding(VOCABULARY, WIDTH, padding_idx=0)
            self.body = nn.Sequential(nn.Conv1d(WIDTH, 8, 3, padding=1), nn.Tanh(), nn.Dropout(dropout))
            self.head = nn.Linear(8, CLASSES)
        self.embed.requires_grad_(not frozen)
        self.embedded: list[Tensor] = []

    def forward(self, ids: Tensor) -> Tensor:
        E = self.embed(ids)
        self.embedded.append(E.detach().clone())
        logits: Tensor = self.head(self.body(E.transpose(1, 2)).amax(2))
        return logits

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
        logits = self(batch["input_ids"])
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        self.log("train/loss", loss.detach(), on_step=True, on_epoch=True)
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    """Texts of several lengths, with a label that depends on their first token."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (count, LENGTH), generator=drawn)
    mask = torch.arange(LENGTH) < torch.randint(3, LENGTH + 1, (count, 1), generator=drawn)
    ids = torch.where(mask, ids, 0)
    return [
        {"input_ids": i, "attention_mask": m.long(), "labels": i[0] % CLASSES} for i, m in zip(ids, mask, strict=True)
    ]


def loader(size: int = 4, count: int = 24, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(rows(count), batch_size=size, shuffle=shuffle)  # type: ignore[arg-type]  # a list is a dataset


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 1, **options})


def fit(module: LightningModule, *callbacks: Callback, ckpt_path: Any = None, **options: Any) -> Trainer:
    run = trainer(*callbacks, **options)
    run.fit(module, loader(), ckpt_path=ckpt_path)
    return run


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-5, atol=1e-6, msg=name)
