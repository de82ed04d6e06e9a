"""A causal language model from any pretrained decoder; adapters are whatever a callback put into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torchmetrics import Metric
from transformers import AutoModelForCausalLM

from lightning_peft.modules.language_data import LanguageBatch
from lightning_peft.modules.optimization import Schedule, adamw, require_schedule
from lightning_peft.modules.pretrained import from_folder_or_hub


class Perplexity(Metric):
    """exp of the mean loss per predicted token, over all batches and processes.

    torchmetrics' own takes the logarithm of softmax probabilities, and is infinite as soon as one of them underflows
    (a loss of 104): a model that was only just compressed has such tokens. It also needs all probabilities at once,
    which are gigabytes with a large vocabulary. From mean losses neither happens; where nothing underflows, the values
    agree.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.tensor(1.0), tokens=30)
        >>> metric.update(torch.tensor(4.0), tokens=15)
        >>> round(float(metric.compute().log()), 6)
        2.0
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    tokens: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("tokens", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, tokens: int) -> None:
        """Add a batch.

        Args:
            loss: mean negative log-likelihood per token, in nats.
            tokens: how many tokens it is the mean of.
        """
        # Not in place: states that were moved in inference mode could not be changed in training.
        self.total = self.total + loss.detach().double() * tokens
        self.tokens = self.tokens + tokens

    def compute(self) -> Tensor:
        """The perplexity."""
        return (self.total / self.tokens).exp()


class LanguageModel(LightningModule):
    """Next-token prediction on blocks of text.

    The module trains the parameters that require a gradient and asks nothing more: alone it is full fine-tuning, with
    ``AdapterInjection`` in the trainer's callbacks it is adapter training.

    Args:
        backbone: hub name, or folder with a ``config.json`` and weights.
        lr: peak learning rate.
        weight_decay: AdamW's decoupled weight decay.
        warmup: share of the optimizer steps in which the rate rises from 0.
        schedule: "linear" lets it fall to 0 then, "constant" leaves it.
    Attributes:
        newly_initialized: names of the model's parameters that the backbone did not have.
    Shape:
        input_ids, labels: (batch, length) -> logits (batch, length, vocabulary)
    Raises:
        ValueError: the backbone cannot be found; warmup outside [0, 1), or an unknown schedule.
    Example:
        >>> LanguageModel("no/such/folder")
        Traceback (most recent call last):
        ValueError: backbone='no/such/folder' cannot be loaded: ...
    """

    def __init__(
        self,
        backbone: str,
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        schedule: Schedule = "linear",
    ) -> None:
        super().__init__()
        require_schedule(warmup, schedule)
        self.save_hyperparameters()
        self.lr, self.weight_decay, self.warmup, self.schedule = lr, weight_decay, warmup, schedule
        self.model, self.newly_initialized = from_folder_or_hub(AutoModelForCausalLM, backbone)
        self.val_perplexity, self.test_perplexity = Perplexity(), Perplexity()

    def forward(self, batch: LanguageBatch) -> Any:
        """Run the model; the output has ``logits`` and ``loss``. Keys and values are not kept: nothing is generated."""
        return self.model(**batch, use_cache=False)

    def training_step(self, batch: LanguageBatch, batch_idx: int) -> Mapping[str, Tensor]:
        """Mean cross-entropy of a batch; the logits ride along for loss terms that need them."""
        outputs = self(batch)
        self.log("train/loss", outputs.loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return {"loss": outputs.loss, "logits": outputs.logits}

    def validation_step(self, batch: LanguageBatch, batch_idx: int) -> None:
        """Log ``val/loss`` and ``val/perplexity``."""
        self._evaluate(batch, self.val_perplexity, "val")

    def test_step(self, batch: LanguageBatch, batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/perplexity``."""
        self._evaluate(batch, self.test_perplexity, "test")

    def _evaluate(self, batch: LanguageBatch, perplexity: Perplexity, stage: str) -> None:
        outputs, labels = self(batch), batch["labels"]
        perplexity.update(outputs.loss, labels.shape[0] * (labels.shape[1] - 1))  # the first token is not predicted
        self.log(f"{stage}/loss", outputs.loss, prog_bar=stage == "val", batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}/perplexity", perplexity, prog_bar=True, batch_size=len(labels))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters in one group; none if nothing is trainable."""
        trainable = [p for p in self.parameters() if p.requires_grad]
        return [{"name": "model", "lr": self.lr, "params": trainable}] if trainable else []

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW, with linear warm-up and decay over the trainer's own number of steps.

        Raises:
            MisconfigurationException: nothing is trainable, or the number of steps is not known.
        """
        advice = "leave a part of the model to train"
        return adamw(self, self.parameter_groups(), self.weight_decay, self.warmup, self.schedule, advice)
