from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from callbacks.noise_hosts import TextCNN, assert_close, fit, loader, rows, trainer, weights
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.utils.data import default_collate
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from lightning_peft import RDrop, presets
from lightning_peft.functional.r_drop import symmetric_kl


class Net(LightningModule):
    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.net = TextCNN(dropout=dropout)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch["input_ids"]), batch["labels"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.net.configure_optimizers()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_it_is_the_loss_written_by_hand(reduction: Any) -> None:
    module, reference, every = Net(), Net(), rows()
    torch.manual_seed(3)
    fit(module, RDrop(alpha=2.0, reduction=reduction), max_steps=1)
    torch.manual_seed(3)
    reference.configure_optimizers()
    torch.empty((), dtype=torch.int64).random_()  # what the loader's iterator draws
    batch = default_collate(every[:4])
    first, second = (reference.net(batch["input_ids"]) for _ in range(2))
    losses = torch.stack([nn.functional.cross_entropy(logits, batch["labels"]) for logits in (first, second)])
    (getattr(losses, reduction)() + 2 * symmetric_kl(first, second)).backward()
    reference.configure_optimizers().step()
    assert_close(weights(module), weights(reference))
    assert not torch.equal(first, second)


def test_it_makes_predictions_agree() -> None:
    found = []
    for alpha in (1e-6, 20.0):
        torch.manual_seed(0)
        run = trainer(RDrop(alpha=alpha), max_epochs=15)
        run.fit(Net(), loader(8))
        found.append(run.callback_metrics["loss/r_drop"])
    assert 0 < found[1] < found[0] / 2


def test_tokens_that_a_mask_hides_count_for_nothing() -> None:
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 3)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            noise = torch.randn(*input_ids.shape, 8) * ~attention_mask.bool()[..., None]  # where nothing is shown
            logits: Tensor = self.head(self.embed(input_ids) + noise)
            return logits

    class Tags(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Tagger()

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            shown = {key: batch[key] for key in ("input_ids", "attention_mask")}
            logits = self.model(**shown)
            return nn.functional.cross_entropy(logits[:, 0], batch["labels"])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.warns(UserWarning, match="both passes of RDrop gave the same predictions in 5 steps, so it only costs"):
        run = fit(Tags(), RDrop(), max_steps=5)
    assert run.callback_metrics["loss/r_drop"] == 0


def decoder() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=20,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_dropout=0.5,
        )
    )


def translator() -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )


@pytest.mark.parametrize(("model", "shift"), [(decoder, 1), (translator, 0)])
def test_tokens_that_are_not_predicted_count_for_nothing(model: Callable[[], nn.Module], shift: int) -> None:
    class Writer(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model()
            self.logits: list[Tensor] = []

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            # As long as what is written: the mask of what an encoder reads must not be taken for it.
            shown = torch.ones_like(batch["labels"])
            shown[:, :3] = 0
            output = self.model(input_ids=batch["input_ids"], attention_mask=shown, labels=batch["labels"])
            self.logits.append(output.logits.detach())
            loss: Tensor = output.loss
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    module, tokens = Writer(), torch.randint(1, 20, (4, 7))
    batch = {"input_ids": tokens, "labels": tokens.masked_fill(torch.arange(7) < 4, -100)}
    run = trainer(RDrop(), max_steps=1)
    run.fit(module, torch.utils.data.DataLoader([batch], batch_size=None))
    first, second = module.logits
    answers = slice(4 - shift, 7 - shift)
    expected = symmetric_kl(first[:, answers], second[:, answers])
    torch.testing.assert_close(run.callback_metrics["loss/r_drop"], expected)
    assert not torch.isclose(expected, symmetric_kl(first, second))


def test_logits_that_are_somewhere_else() -> None:
    class Pair(Net):
        def forward(self, batch: dict[str, Tensor]) -> tuple[int, Tensor]:
            return 0, self.net(batch["input_ids"])

        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return nn.functional.cross_entropy(self(batch)[1], batch["labels"])

    fit(Pair(), RDrop(of="", read=lambda output: output[1]), max_steps=1)
    with pytest.raises(RuntimeError, match=r"no logits were found in .* a tuple. Say how to get them: RDrop\(read="):
        fit(Pair(), RDrop(of=""), max_steps=1)


def test_a_model_that_is_not_called_is_told() -> None:
    says = "called the module itself 0 times in one pass and 0 times in the other, so there are no two predictions to"
    with pytest.raises(RuntimeError, match=says):
        fit(Net(), RDrop(of=""), max_steps=1)


def test_dropout_in_an_adapter_that_starts_at_zero_is_no_reason_for_a_warning() -> None:
    torch.manual_seed(0)
    run = fit(Net(dropout=0.0), *presets.lora(rank=2, dropout=0.5), RDrop(), max_steps=6)  # warnings are errors
    assert run.callback_metrics["loss/r_drop"] > 0
