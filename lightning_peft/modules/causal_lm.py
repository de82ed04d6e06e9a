"""A causal language model from any pretrained decoder; adapters are whatever a callback put into it."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM

from lightning_peft.modules.documents import IGNORED
from lightning_peft.modules.generation import Generated, write
from lightning_peft.modules.language_data import LanguageBatch
from lightning_peft.modules.optimization import Schedule
from lightning_peft.modules.packing import attention_within, require_packable, why_mixed
from lightning_peft.modules.perplexity import Perplexity, TokenLoss
from lightning_peft.modules.pretrained import from_folder_or_hub
from lightning_peft.modules.text_generator import TextGenerator


class CausalLM(TextGenerator):
    """Next-token prediction, on blocks of text, packed documents or padded rows, and generation.

    The module trains the parameters that require a gradient and asks nothing more: alone it is full fine-tuning, with
    ``AdapterInjection`` in the trainer's callbacks it is adapter training. The loss is the mean over the batch's tokens
    whose label is not -100, and the perplexity exp of the mean over those of the whole set, but for the first of a row:
    only a trained prompt predicts it, and numbers that are compared are to be of the same tokens.

    Args:
        backbone: hub name, or folder with a ``config.json`` and weights.
        lr: peak learning rate.
        weight_decay: AdamW's decoupled weight decay.
        warmup: share of the optimizer steps in which the rate rises from 0.
        schedule: "linear" lets it fall to 0 then, "constant" leaves it.
        generation: arguments of transformers' ``generate`` for ``predict_step``, such as ``num_beams`` or ``do_sample``
            with ``temperature``; 64 new tokens at most and no sampling, where they say nothing else.
    Attributes:
        newly_initialized: names of the model's parameters that the backbone did not have.
    Shape:
        input_ids, labels: (batch, length) -> logits (batch, length, vocabulary)
    Raises:
        ValueError: the backbone cannot be found; warmup outside [0, 1), or an unknown schedule.
    Example:
        >>> CausalLM("no/such/folder")
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
        generation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(backbone, lr, weight_decay, warmup, schedule, generation)
        self.save_hyperparameters()
        self.model, self.newly_initialized = from_folder_or_hub(AutoModelForCausalLM, backbone)
        self.val_loss, self.test_loss = TokenLoss(), TokenLoss()
        self.val_perplexity, self.test_perplexity = Perplexity(), Perplexity()
        self._mixed = why_mixed(self.model)  # now: a wrapper's forward tells nothing

    def forward(self, batch: LanguageBatch) -> Any:
        """Run the model; the output has ``logits`` and ``loss``. Keys and values are not kept: nothing is generated.

        Raises:
            MisconfigurationException: documents are packed, and this kind of model would not keep them apart.
        """
        inputs: dict[str, Any] = {**batch}
        documents = inputs.pop("document_ids", None)
        if documents is not None:
            model: Any = self.model
            require_packable(model.config, self._mixed, documents.shape[1])
            inputs["attention_mask"] = attention_within(documents, model.dtype)
        return self.model(**inputs, use_cache=False)

    def validation_step(self, batch: LanguageBatch, batch_idx: int) -> None:
        """Log ``val/loss``, the mean over all predicted tokens, and ``val/perplexity``."""
        self._evaluate(batch, self.val_loss, self.val_perplexity, "val")

    def test_step(self, batch: LanguageBatch, batch_idx: int) -> None:
        """Log ``test/loss`` and ``test/perplexity`` likewise."""
        self._evaluate(batch, self.test_loss, self.test_perplexity, "test")

    def predict_step(self, batch: LanguageBatch, batch_idx: int) -> Generated:
        """What the model writes behind prompts that are padded on the left."""
        return write(self, batch, self.generation, skip=batch["input_ids"].shape[1])

    def _evaluate(self, batch: LanguageBatch, mean: TokenLoss, perplexity: Perplexity, stage: str) -> None:
        labels = batch["labels"].clone()
        labels[:, 0] = IGNORED  # only a trained prompt predicts it: all methods are judged by the same tokens
        loss, predicted = self({**batch, "labels": labels}).loss, int((labels != IGNORED).sum())
        for metric, name in ((mean, "loss"), (perplexity, "perplexity")):
            metric.update(loss, predicted)
            self.log(f"{stage}/{name}", metric, prog_bar=name != "loss" or stage == "val", batch_size=len(labels))
