"""A text-to-text model from any pretrained encoder-decoder; adapters are whatever a callback put into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoModelForSeq2SeqLM

from lightning_peft.modules.documents import IGNORED
from lightning_peft.modules.generation import Generated, write
from lightning_peft.modules.optimization import Schedule
from lightning_peft.modules.perplexity import TokenLoss
from lightning_peft.modules.pretrained import from_folder_or_hub
from lightning_peft.modules.seq2seq_data import Seq2SeqBatch
from lightning_peft.modules.text_generator import TextGenerator
from lightning_peft.modules.text_metrics import TextMetric, TextMetrics


class Seq2Seq(TextGenerator):
    """Text to text with an encoder-decoder of the kinds of T5 and BART.

    The module trains the parameters that require a gradient and asks nothing more: alone it is full fine-tuning, with
    ``AdapterInjection`` in the trainer's callbacks it is adapter training. It is trained and its loss is measured with
    the wanted text before each token (teacher forcing). In validation and test it also writes, and `metrics` compare
    what it has written with what was wanted. That takes most of an evaluation's time: ``metrics=()`` writes nothing.

    Args:
        backbone: hub name, or folder with a ``config.json``, weights and a tokenizer.
        lr: peak learning rate.
        weight_decay: AdamW's decoupled weight decay.
        warmup: share of the optimizer steps in which the rate rises from 0.
        schedule: "linear" lets it fall to 0 then, "constant" leaves it.
        metrics: among "exact_match", "bleu" (sacreBLEU), "chrf", and "rouge1", "rouge2", "rougeL" (F-measures); all are
            between 0 and 1.
        generation: arguments of transformers' ``generate``, such as ``num_beams``; 64 new tokens at most and no
            sampling, where they say nothing else.
    Attributes:
        newly_initialized: names of the model's parameters that the backbone did not have.
    Shape:
        input_ids, attention_mask: (batch, length), labels: (batch, written) -> logits (batch, written, vocabulary)
    Raises:
        ValueError: the backbone cannot be found; warmup outside [0, 1), an unknown schedule or metric; metrics where
            several texts are generated for each.
    Example:
        >>> Seq2Seq("no/such/folder")
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
        metrics: Sequence[TextMetric] = ("exact_match",),
        generation: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(backbone, lr, weight_decay, warmup, schedule, generation)
        several = self.generation.get("num_return_sequences", 1)
        if metrics and several != 1:
            raise ValueError(
                f"generation has num_return_sequences={several}, and metrics compare one text with each reference. "
                "Leave it out, or give metrics=()."
            )
        self.save_hyperparameters()
        self.val_loss, self.test_loss = TokenLoss(), TokenLoss()
        self.val_metrics, self.test_metrics = TextMetrics(metrics), TextMetrics(metrics)
        self.model, self.newly_initialized = from_folder_or_hub(AutoModelForSeq2SeqLM, backbone)

    def forward(self, batch: Seq2SeqBatch) -> Any:
        """Run encoder and decoder; the output has ``logits`` and ``loss``. Keys and values are not kept."""
        inputs = {name: value for name, value in batch.items() if name != "references"}
        return self.model(**inputs, use_cache=False)

    def on_validation_epoch_start(self) -> None:
        """Forget the texts of the last validation."""
        self.val_metrics.reset()

    def validation_step(self, batch: Seq2SeqBatch, batch_idx: int) -> None:
        """Log ``val/loss``, the mean over all tokens of the targets; write, and keep what the metrics need of it."""
        self._evaluate(batch, self.val_loss, self.val_metrics, "val")

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the texts of all processes, as ``val/exact_match`` and so on."""
        self._report(self.val_metrics, "val")

    def on_test_epoch_start(self) -> None:
        """Forget the texts of the last test."""
        self.test_metrics.reset()

    def test_step(self, batch: Seq2SeqBatch, batch_idx: int) -> None:
        """Log ``test/loss``, and write, likewise."""
        self._evaluate(batch, self.test_loss, self.test_metrics, "test")

    def on_test_epoch_end(self) -> None:
        """Log the metrics, as ``test/exact_match`` and so on."""
        self._report(self.test_metrics, "test")

    def predict_step(self, batch: Seq2SeqBatch, batch_idx: int) -> Generated:
        """What the model writes; tokens begin with the one that starts a decoder."""
        return write(self, batch, self.generation)

    def _evaluate(self, batch: Seq2SeqBatch, mean: TokenLoss, metrics: TextMetrics, stage: str) -> None:
        mean.update(self(batch).loss, int((batch["labels"] != IGNORED).sum()))
        self.log(f"{stage}/loss", mean, prog_bar=stage == "val", batch_size=len(batch["labels"]))
        if len(metrics):
            metrics.update(write(self, batch, self.generation)["texts"], batch["references"])

    def _report(self, metrics: TextMetrics, stage: str) -> None:
        if len(metrics):
            values = {f"{stage}/{name}": value for name, value in metrics.compute().items()}
            self.log_dict(values, prog_bar=True, sync_dist=True)  # equal in all processes already
