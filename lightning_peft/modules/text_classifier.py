"""A text classifier from any pretrained encoder; adapters are whatever a callback put into it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassF1Score
from transformers import AutoModelForSequenceClassification

from lightning_peft.arguments import require_integer
from lightning_peft.modules.likelihood import NegativeLogLikelihood
from lightning_peft.modules.optimization import Schedule, adamw, require_schedule
from lightning_peft.modules.pretrained import from_folder_or_hub
from lightning_peft.surgery.layers import adapters


class TextBatch(TypedDict, total=False):
    """A batch: ``input_ids`` (batch, length), ``attention_mask`` (batch, length), ``labels`` (batch,) where known."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor


class Prediction(TypedDict):
    """What ``predict_step`` returns: ``logits`` and ``probabilities``, (batch, classes) each."""

    logits: Tensor
    probabilities: Tensor


class TextClassifier(LightningModule):
    """Sequence classification with two learning rates, one for the new head and one for all else that trains.

    The module trains the parameters that require a gradient and asks nothing more: alone it is full fine-tuning, with
    ``AdapterInjection`` in the trainer's callbacks it is adapter training. A new head needs a larger step than the
    adapters: with one rate for both it is the bottleneck.

    Attention is the library's own choice (``sdpa`` where the model has it): on a CPU as fast as ``eager`` or faster.

    Args:
        backbone: hub name, or folder with a ``config.json`` and weights.
        num_labels: number of classes, at least 2.
        lr: peak learning rate of trainable parameters inside the encoder (adapters).
        head_lr: peak learning rate of trainable parameters outside the encoder (the classification head).
        weight_decay: AdamW's decoupled weight decay, for both groups.
        warmup: share of the optimizer steps in which the rates rise from 0.
        schedule: "linear" lets them fall to 0 then, "constant" leaves them.
        calibration_bins: bins of the expected calibration error (15 is usual), which is logged as ``val/ece`` and
            ``test/ece`` with the negative log-likelihood, ``val/nll`` and ``test/nll``; 0 for neither.
    Attributes:
        newly_initialized: names of the model's parameters that the backbone did not have: those of a new head.
    Shape:
        input_ids, attention_mask: (batch, length) -> logits (batch, num_labels)
    Raises:
        ValueError: the backbone cannot be found; fewer than two classes; warmup outside [0, 1), or an unknown schedule;
            fewer than no bins.
    Example:
        >>> TextClassifier("no/such/folder", num_labels=2)
        Traceback (most recent call last):
        ValueError: backbone='no/such/folder' cannot be loaded: ...
    """

    def __init__(
        self,
        backbone: str,
        num_labels: int,
        lr: float = 1e-3,
        head_lr: float = 5e-3,
        weight_decay: float = 0.01,
        warmup: float = 0.06,
        schedule: Schedule = "linear",
        calibration_bins: int = 0,
    ) -> None:
        super().__init__()
        if num_labels < 2:
            raise ValueError(f"num_labels={num_labels}: a classifier needs at least 2 classes.")
        require_integer("calibration_bins", calibration_bins)
        if calibration_bins < 0:
            raise ValueError(f"calibration_bins={calibration_bins}: it is a number of bins, such as 15, or 0 for none.")
        require_schedule(warmup, schedule)
        self.save_hyperparameters()
        self.lr, self.head_lr, self.weight_decay = lr, head_lr, weight_decay
        self.warmup, self.schedule = warmup, schedule
        self.model, self.newly_initialized = _pretrained(backbone, num_labels)
        metrics = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_labels, average="micro"),
                "macro_f1": MulticlassF1Score(num_labels, average="macro"),
            }
        )
        self.val_metrics = metrics.clone(prefix="val/")
        self.test_metrics = metrics.clone(prefix="test/")
        calibration: dict[str, Metric | MetricCollection] = {}
        if calibration_bins:
            calibration["ece"] = MulticlassCalibrationError(num_labels, n_bins=calibration_bins)
            calibration["nll"] = NegativeLogLikelihood()
        self.val_calibration = MetricCollection(calibration, prefix="val/")
        self.test_calibration = MetricCollection(calibration, prefix="test/").clone()

    def forward(self, batch: TextBatch) -> Any:
        """Run the model; the output has ``logits``, and ``loss`` if the batch has ``labels``."""
        return self.model(**batch)

    def training_step(self, batch: TextBatch, batch_idx: int) -> Mapping[str, Tensor]:
        """Cross-entropy of one batch; the logits ride along for loss terms that need them."""
        outputs = self(batch)
        self.log("train/loss", outputs.loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return {"loss": outputs.loss, "logits": outputs.logits}

    def validation_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Log ``val/loss``, ``val/accuracy``, ``val/macro_f1``; with calibration_bins ``val/ece`` and ``val/nll``."""
        self._evaluate(batch, self.val_metrics, self.val_calibration, "val")

    def test_step(self, batch: TextBatch, batch_idx: int) -> None:
        """Log ``test/loss``, ``test/accuracy``, ``test/macro_f1``; and ``test/ece``, ``test/nll`` likewise."""
        self._evaluate(batch, self.test_metrics, self.test_calibration, "test")

    def predict_step(self, batch: TextBatch, batch_idx: int) -> Prediction:
        """Logits and probabilities of one batch; labels, if any, are not looked at."""
        logits = self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()
        return {"logits": logits, "probabilities": logits.softmax(-1)}

    def _evaluate(self, batch: TextBatch, metrics: MetricCollection, calibration: MetricCollection, stage: str) -> None:
        outputs, labels = self(batch), batch["labels"]
        metrics.update(outputs.logits, labels)
        if len(calibration):
            calibration.update(outputs.logits.float().softmax(-1), labels)
            self.log_dict(calibration, batch_size=len(labels))
        self.log(f"{stage}/loss", outputs.loss, prog_bar=stage == "val", batch_size=len(labels), sync_dist=True)
        self.log_dict(metrics, prog_bar=True, batch_size=len(labels))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Trainable parameters in two groups, ``adapters`` and ``head``; an empty group is left out.

        The head is what trains outside the encoder, which every transformers model names in ``base_model_prefix``, and
        is no adapter: a prompt stands around the whole model.
        """
        encoder = getattr(self.model, str(self.model.base_model_prefix), self.model)
        inside = set(encoder.parameters())
        inside |= {p for adapter in adapters(self).values() for _, p in adapter.own_parameters()}
        trainable = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"name": "adapters", "lr": self.lr, "params": [p for p in trainable if p in inside]},
            {"name": "head", "lr": self.head_lr, "params": [p for p in trainable if p not in inside]},
        ]
        return [group for group in groups if group["params"]]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW on both groups, with linear warm-up and decay over the trainer's own number of steps.

        Raises:
            MisconfigurationException: nothing is trainable, or the number of steps is not known.
        """
        advice = "let the head train (train=['classifier'])"
        return adamw(self, self.parameter_groups(), self.weight_decay, self.warmup, self.schedule, advice)


def _pretrained(backbone: str, num_labels: int) -> tuple[nn.Module, tuple[str, ...]]:
    """The pretrained encoder in training mode, its head new if it has none for as many labels; and what is new."""
    return from_folder_or_hub(
        AutoModelForSequenceClassification,
        backbone,
        num_labels=num_labels,
        problem_type="single_label_classification",
        ignore_mismatched_sizes=True,  # a head for other classes is replaced by a new one
    )
