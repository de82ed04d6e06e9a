"""What models that write texts share: how they are trained, and the tokenizer that reads what they have written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor

from lightning_peft.modules.generation import DEFAULTS
from lightning_peft.modules.optimization import Schedule, adamw, require_schedule
from lightning_peft.modules.pretrained import tokenizer_from


class TextGenerator(LightningModule):
    """A module whose model's `generate` writes; a subclass loads the model, runs it, and says how it is judged.

    Args:
        backbone: hub name, or folder with a ``config.json``, weights and a tokenizer.
        lr: peak learning rate.
        weight_decay: AdamW's decoupled weight decay.
        warmup: share of the optimizer steps in which the rate rises from 0.
        schedule: "linear" lets it fall to 0 then, "constant" leaves it.
        generation: arguments of transformers' ``generate``, over this package's defaults.
    Raises:
        ValueError: warmup outside [0, 1), or an unknown schedule.
    """

    def __init__(
        self,
        backbone: str,
        lr: float,
        weight_decay: float,
        warmup: float,
        schedule: Schedule,
        generation: dict[str, Any] | None,
    ) -> None:
        super().__init__()
        require_schedule(warmup, schedule)
        self.lr, self.weight_decay, self.warmup, self.schedule = lr, weight_decay, warmup, schedule
        given = generation or {}
        # transformers heeds max_new_tokens where it has both.
        ours = {
            name: value for name, value in DEFAULTS.items() if name != "max_new_tokens" or "max_length" not in given
        }
        self.generation = {**ours, **given}
        self._backbone, self._tokenizer = backbone, None

    @property
    def tokenizer(self) -> Any:
        """The backbone's, loaded when it is first asked for.

        Raises:
            ValueError: it cannot be loaded.
        """
        if self._tokenizer is None:
            self._tokenizer = tokenizer_from(self._backbone)
        return self._tokenizer

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Mapping[str, Tensor]:
        """Mean cross-entropy of a batch; the logits ride along for loss terms that need them."""
        outputs = self(batch)
        self.log("train/loss", outputs.loss.detach(), prog_bar=True, batch_size=len(batch["labels"]))
        return {"loss": outputs.loss, "logits": outputs.logits}

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
