"""PEFT models that the tests of adoption share: a small module, and a config for each kind of adapter.

Not a test file: tests of several folders import it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

STEPS = 24  # 3 epochs of 8 batches


class Text(nn.Module):
    """An embedding, two layers, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.query = nn.Linear(12, 12)
        self.value = nn.Linear(12, 10)
        self.classifier = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = torch.tanh(self.query(self.words(ids).mean(1)))
        y: Tensor = self.classifier(torch.tanh(self.value(h)))
        return y


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["query", "value"], "modules_to_save": ["classifier"], **more})


CONFIGS: dict[str, Callable[[], LoraConfig]] = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "adalora": lambda: AdaLoraConfig(
        init_r=4, target_r=2, total_step=STEPS, tinit=2, tfinal=6, deltaT=3, target_modules=["query", "value"],
        modules_to_save=["classifier"],
    ),
    "rslora": lambda: lora(use_rslora=True, rank_pattern={"value": 6}, alpha_pattern={"value": 3}),
    "embedding": lambda: lora(target_modules=["words", "query"]),
    "embedding-dora": lambda: lora(target_modules=["words", "query"], use_dora=True),
}  # fmt: skip


def base() -> Text:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Text()


def build(kind: str, moved: bool = False) -> Any:
    """A PEFT model, always the same; `moved` away from a start at which adapters add nothing."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = get_peft_model(base(), CONFIGS[kind]())
        if moved:
            with torch.no_grad():
                for _name, parameter in model.named_parameters():
                    if parameter.requires_grad:
                        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def ids(n: int = 5) -> Tensor:
    return torch.randint(0, 20, (n, 6), generator=torch.Generator().manual_seed(3))


class Job(L.LightningModule):
    """Holds a PEFT model as `self.model`, and computes its own loss."""

    def __init__(self, kind: str = "lora", model: Any = None, lr: float = 1e-2) -> None:
        super().__init__()
        self.model = build(kind) if model is None else model
        self.lr = lr
        self.losses: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.model(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def data(shuffle: bool = True) -> DataLoader[Any]:
    x = ids(32)
    return DataLoader(TensorDataset(x, x[:, 0] % 3), batch_size=4, shuffle=shuffle)


def fit(job: L.LightningModule, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> L.Trainer:
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks), **{"max_epochs": 3, "enable_checkpointing": False, **options},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        trainer.fit(job, data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer
