"""Mistakes with terms of information: bottlenecks, estimates from batches, and what shows them."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from misuse.setups import LORA, Encoder, Rows, fit
from torch import Tensor

from lightning_peft import (
    VIB,
    AdapterInjection,
    BilinearCritic,
    InformationMonitor,
    MutualInformation,
    Regularization,
    Warmup,
)


class Classes(Encoder):
    """With a cross-entropy, and labels that its batches do not have."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        logits = self.classifier(self.norm(self.value(self.query(batch))))
        return torch.nn.functional.cross_entropy(logits, (batch[:, 0] > 0).long())


class Called(Encoder):
    """Called as a whole, and without dropout."""

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.norm(self.value(self.query(x))))
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self(batch).sum() * 0 + 1


def terms(module: Encoder, term: Any, **options: Any) -> object:
    return fit(module, AdapterInjection(LORA, **options), Regularization({"term": term}))


def information(of: str = "dropout", **options: Any) -> MutualInformation:
    return MutualInformation(options.pop("layers", ["value"]), of=of, **options)


ROWS: Rows = {
    "a bottleneck in the place of what is no layer": (lambda: terms(Classes(), VIB("clasifier")), ValueError),
    "a bottleneck in the place of a layer that is not linear": (lambda: terms(Classes(), VIB("norm")), TypeError),
    "a bottleneck of no features": (lambda: VIB(features=0), ValueError),
    "a negative weight of a bottleneck's divergence": (lambda: VIB(beta=-1e-5), ValueError),
    "a bottleneck that is frozen": (lambda: terms(Classes(), VIB(), train=[]), RuntimeError),
    "samples of a bottleneck without labels": (lambda: terms(Classes(), VIB()), RuntimeError),
    "a loss that is not that of a bottleneck's samples": (
        lambda: terms(Called(), VIB(loss=lambda logits, batch: logits.sum() * 0 + 2)),
        RuntimeError,
    ),
    "a warm-up longer than the run": (lambda: Warmup(0.1, share=1.5), ValueError),
    "less information by a lower bound": (lambda: information(weight=-0.1), ValueError),
    "information of labels, and nobody says how many": (lambda: information("labels"), ValueError),
    "information by an estimator that there is not": (lambda: information(estimator="mine"), ValueError),
    "a critic that is built already": (lambda: information(critic=BilinearCritic(2, 2)), TypeError),
    "information of a layer that there is not": (lambda: terms(Encoder(), information(layers=["pooler"])), ValueError),
    "a batch too small for what is to be shown": (
        lambda: terms(Encoder(), information("query", critic=BilinearCritic)),
        RuntimeError,
    ),
    "information of labels in a batch that has none": (
        lambda: terms(Encoder(), information("labels", classes=2)),
        RuntimeError,
    ),
    "a second view by a module that is not called": (lambda: terms(Encoder(), information(called="")), RuntimeError),
    "two views of a model without dropout": (
        lambda: terms(Called(), information(called="", nats=0)),
        RuntimeError,
    ),
    "cosines of layers of unequal widths": (lambda: terms(Encoder(), information("query", nats=0)), RuntimeError),
    "`InformationMonitor` without adapters": (lambda: fit(Encoder(), InformationMonitor()), MisconfigurationException),
    "`InformationMonitor` without validation": (
        lambda: fit(Encoder(), AdapterInjection(LORA), InformationMonitor()),
        MisconfigurationException,
    ),
}
