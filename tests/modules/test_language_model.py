"""The ready language model: what it trains, and what it reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tiny_models import WORDS, save_decoder, save_texts
from torchmetrics.text import Perplexity as Torchmetrics

from lightning_peft import presets
from lightning_peft.modules import LanguageData, LanguageModel
from lightning_peft.modules.language_model import Perplexity

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


@pytest.fixture
def data(decoder: str, tmp_path: Path) -> LanguageData:
    source = save_texts(tmp_path / "t.csv")
    return LanguageData(source, decoder, val=source, test=source, block_size=8, batch_size=7)


def test_perplexity_is_torchmetrics(decoder: str) -> None:
    """Over batches of different sizes, on ordinary logits."""
    ours, theirs = Perplexity(), Torchmetrics()
    for rows in (3, 1):
        logits, labels = torch.randn(rows, 6, 11), torch.randint(11, (rows, 6))
        theirs.update(logits, labels)
        ours.update(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), rows * 6)
    assert ours.compute().item() == pytest.approx(theirs.compute().item(), rel=1e-5)


def test_perplexity_survives_tokens_that_seem_impossible() -> None:
    logits = torch.tensor([[[200.0, 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[1, 0]])
    theirs = Torchmetrics()
    theirs.update(logits, labels)
    assert theirs.compute().isinf()
    ours = Perplexity()
    ours.update(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), 2)
    assert ours.compute().log().item() == pytest.approx((200 + math.log(2)) / 2, rel=1e-6)


def test_it_reports_the_perplexity_of_all_predicted_tokens(decoder: str, data: LanguageData) -> None:
    model = LanguageModel(decoder)
    (metrics,) = Trainer(**QUIET).test(model, datamodule=data, verbose=False)
    rows = data._split("test")
    ids = torch.stack([rows[i] for i in range(len(rows))]).long()
    assert len(ids) % 7  # the last batch is smaller
    with torch.no_grad():
        logits = model.model.eval()(ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert metrics["test/perplexity"] == pytest.approx(loss.exp().item(), rel=1e-5)
    assert metrics["test/loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_it_learns(decoder: str, data: LanguageData) -> None:
    model = LanguageModel(decoder, lr=0.01)
    trainer = Trainer(max_steps=60, **QUIET)
    (before,) = trainer.validate(model, datamodule=data, verbose=False)
    trainer.fit(model, datamodule=data)
    assert trainer.callback_metrics["val/perplexity"] < 3 < len(WORDS) / 2 < before["val/perplexity"]


def test_adapters_alone_are_trained(decoder: str, data: LanguageData) -> None:
    model = LanguageModel(decoder, lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Trainer(max_steps=2, callbacks=[*presets.lora(rank=2)], **QUIET).fit(model, datamodule=data)
    after = {name.replace(".base.", "."): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert len(after) > len(before)


def test_a_constant_rate_stays(decoder: str, data: LanguageData) -> None:
    model = LanguageModel(decoder, lr=0.5, warmup=0.0, schedule="constant")
    trainer = Trainer(max_steps=3, **QUIET)
    trainer.fit(model, datamodule=data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_a_folder_without_output_weights_is_noticed(decoder: str, tmp_path: Path) -> None:
    assert LanguageModel(decoder).newly_initialized == ()
    untied = save_decoder(tmp_path / "untied", tie_word_embeddings=False)
    model = LanguageModel(untied).model
    model.model.save_pretrained(tmp_path / "base")
    assert LanguageModel(str(tmp_path / "base")).newly_initialized == ("lm_head.weight",)


def test_refusals(decoder: str, data: LanguageData) -> None:
    with pytest.raises(ValueError, match=r"backbone='no/such/folder' cannot be loaded"):
        LanguageModel("no/such/folder")
    with pytest.raises(ValueError, match=r"warmup=1\.0: it is a share"):
        LanguageModel(decoder, warmup=1.0)
    with pytest.raises(ValueError, match=r"schedule='cosine': choose 'linear' \(to 0\) or 'constant'"):
        LanguageModel(decoder, schedule="cosine")  # type: ignore[arg-type]
    frozen = LanguageModel(decoder).requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"LanguageModel has no trainable parameter"):
        Trainer(max_steps=1, **QUIET).fit(frozen, datamodule=data)
