"""Mistakes that would make a certificate say what does not hold."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from misuse.setups import Encoder, Once, Rows, Told, cli, pruning, saved
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset, TensorDataset

from lightning_peft import (
    EVA,
    AdapterInjection,
    Calibration,
    LoRA,
    PACBayes,
    PosteriorSampling,
    RankBudget,
    Regularization,
    RiskCertificate,
)
from lightning_peft.surgery.layers import adapters

LORA = partial(LoRA, rank=2)
INJECTION = AdapterInjection(LORA)
DATA = TensorDataset(torch.randn(24, 8), torch.arange(24) % 2)


class Classifier(Encoder):
    """The small module as a classifier of labelled data."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.norm(self.value(self.query(x))))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = torch.nn.functional.cross_entropy(logits, batch[1])
        self.log("train/loss", loss)
        return {"loss": loss, "logits": logits}


class Normalized(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(self.norm.weight.shape[0])  # type: ignore[assignment]


class Diverging(Classifier):
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            torch.nn.init.constant_(self.classifier.weight, torch.inf)


def mixed(items: Any) -> Any:
    x, y = torch.utils.data.default_collate(items)
    return (x + x.flip(0)) / 2, y


def train(module: Any, *parts: Any, **options: Any) -> Trainer:
    """Three steps on labelled data."""
    trainer = Trainer(
        accelerator="cpu", max_steps=3, enable_progress_bar=False, enable_model_summary=False, callbacks=[*parts],
        **{"logger": False, "enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(module, DataLoader(DATA, 2))
    return trainer


def certify(*also: Any, certificate: Any = None, module: Any = None, pac: Any = None, **options: Any) -> object:
    """Train a posterior and certify it."""
    made = certificate or RiskCertificate(DATA, passes=1)
    term = Regularization({"pac": PACBayes(**(pac or {}))})
    return train(module or Classifier(), INJECTION, *also, term, made, **options)


def taught() -> Classifier:
    module = Classifier()
    train(module, INJECTION)
    return module


def renewed() -> Classifier:
    """Its head has learned; its adapters are as good as new."""
    module = taught()
    for adapter in adapters(module).values():
        torch.nn.init.zeros_(adapter.B)  # type: ignore[arg-type]
    return module


def close(trainer: Any, module: Any) -> None:
    next(iter(RankBudget.of(module).values())).gate.mask[0] = 0


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> Any:
        return torch.rand(8), 0


KEEPS = callbacks.ModelCheckpoint

ROWS: Rows = {
    "a certificate without a posterior": (
        lambda: train(Classifier(), INJECTION, RiskCertificate(DATA)),
        MisconfigurationException,
    ),
    "a certificate before the term": (
        lambda: train(Classifier(), INJECTION, RiskCertificate(DATA), Regularization({"pac": PACBayes()})),
        MisconfigurationException,
    ),
    "a certificate with a trained head outside Q": (
        lambda: certify(pac={"over": ["query", "value"]}),
        MisconfigurationException,
    ),
    "a certificate of adapters that were trained before": (
        lambda: certify(module=taught()),
        MisconfigurationException,
    ),
    "a certificate by the examples that chose the prior": (
        lambda: certify(module=taught(), certificate=RiskCertificate(DATA, prior_data=Subset(DATA, range(6)))),
        MisconfigurationException,
    ),
    "a certificate where the prior's examples have another form": (
        lambda: certify(module=taught(), certificate=RiskCertificate(DATA, prior_data=[0, 1])),
        MisconfigurationException,
    ),
    "a certificate of a head that was trained before": (
        lambda: certify(module=renewed()),
        MisconfigurationException,
    ),
    "a certificate by examples of the same content": (
        lambda: certify(
            module=taught(),
            certificate=RiskCertificate(TensorDataset(*DATA[:5]), prior_data=Subset(DATA, range(6))),
        ),
        MisconfigurationException,
    ),
    "a certificate by a `collate_fn` that mixes examples": (
        lambda: certify(certificate=RiskCertificate(DataLoader(DATA, 4, collate_fn=mixed), passes=1)),
        MisconfigurationException,
    ),
    "a certificate of a run that has diverged": (
        lambda: certify(module=Diverging()),
        MisconfigurationException,
    ),
    "a certificate of the best of several checkpoints": (
        lambda: certify(KEEPS(monitor="train/loss"), enable_checkpointing=True),
        MisconfigurationException,
    ),
    "a certificate beside `RankPruning`": (
        lambda: certify(pruning(rank=1)),
        MisconfigurationException,
    ),
    "a certificate beside `Calibration`": (
        lambda: certify(Calibration(EVA(rank=2))),
        MisconfigurationException,
    ),
    "a certificate of a module with running statistics": (
        lambda: certify(module=Normalized()),
        MisconfigurationException,
    ),
    "a certificate before weights are averaged": (
        lambda: train(
            Classifier(),
            INJECTION,
            Regularization({"pac": PACBayes()}),
            RiskCertificate(DATA),
            callbacks.StochasticWeightAveraging(swa_lrs=0.01),
        ),
        MisconfigurationException,
    ),
    "a certificate where something else closes components": (
        lambda: certify(Once("on_train_batch_end", close)),
        MisconfigurationException,
    ),
    "a certificate from a loader that drops examples": (
        lambda: certify(certificate=RiskCertificate(DataLoader(DATA, 5, drop_last=True))),
        MisconfigurationException,
    ),
    "a certificate from a loader that repeats examples": (
        lambda: certify(certificate=RiskCertificate(DataLoader(DATA, sampler=RandomSampler(DATA, replacement=True)))),
        MisconfigurationException,
    ),
    "a certificate from a part that has examples twice": (
        lambda: certify(certificate=RiskCertificate(Subset(DATA, [0, 1, 1]))),
        MisconfigurationException,
    ),
    "a certificate from data that are augmented": (
        lambda: certify(certificate=RiskCertificate(Augmented())),
        MisconfigurationException,
    ),
    "a certificate whose examples have no label": (
        lambda: certify(certificate=RiskCertificate(list(torch.randn(24, 8)))),
        ValueError,
    ),
    "noise for every example where it cannot be": (
        lambda: certify(certificate=RiskCertificate(DATA, unit="example")),
        MisconfigurationException,
    ),
    "sampled predictions without a posterior": (
        lambda: train(Classifier(), INJECTION, PosteriorSampling()).predict(Classifier(), DataLoader(DATA)),
        MisconfigurationException,
    ),
    "command line: a certificate of a checkpoint without a posterior": (
        lambda: cli("certify", saved(), "--data", "texts.csv", "--model", "misuse.setups.Encoder"),
        Told,
    ),
}
