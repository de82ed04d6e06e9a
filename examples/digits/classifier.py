"""An ordinary image classifier, as its author wrote it: nothing in it knows of adapters."""

from __future__ import annotations

import lightning.pytorch as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(L.LightningModule):
    """Four convolutions with batch norm, and a linear head."""

    def __init__(self, classes: int = 5, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.conv1, self.norm1 = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.conv2, self.norm2 = nn.Conv2d(16, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32)
        self.conv3, self.norm3 = nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.conv4, self.norm4 = nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64)
        self.head = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, 1, 28, 28) to logits (N, classes)."""
        x = F.max_pool2d(self.norm1(self.conv1(x)).relu(), 2)
        x = F.max_pool2d(self.norm2(self.conv2(x)).relu(), 2)
        x = self.norm3(self.conv3(x)).relu()
        x = self.norm4(self.conv4(x)).relu()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Cross-entropy."""
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Accuracy."""
        images, labels = batch
        self.log("accuracy", (self(images).argmax(1) == labels).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on all there is; what is frozen gets no gradient and is left alone."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams["lr"], weight_decay=0.0)
