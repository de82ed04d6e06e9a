"""The ready language model: what it trains, and what it reports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quiet import QUIET
from tiny_models import WORDS, byte_tokenizer, save_decoder, save_texts
from torch.utils.data import DataLoader
from torchmetrics.text import Perplexity as Torchmetrics

from lightning_peft import presets
from lightning_peft.modules import CausalLM, LanguageData
from lightning_peft.modules.perplexity import Perplexity


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
    model = CausalLM(decoder)
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
    model = CausalLM(decoder, lr=0.01)
    trainer = Trainer(max_steps=60, **QUIET)
    (before,) = trainer.validate(model, datamodule=data, verbose=False)
    trainer.fit(model, datamodule=data)
    assert trainer.callback_metrics["val/perplexity"] < 3 < len(WORDS) / 2 < before["val/perplexity"]


def test_adapters_alone_are_trained(decoder: str, data: LanguageData) -> None:
    model = CausalLM(decoder, lr=0.01)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    Trainer(max_steps=2, callbacks=[*presets.lora(rank=2)], **QUIET).fit(model, datamodule=data)
    after = {name.replace(".base.", "."): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert len(after) > len(before)


def test_a_constant_rate_stays(decoder: str, data: LanguageData) -> None:
    model = CausalLM(decoder, lr=0.5, warmup=0.0, schedule="constant")
    trainer = Trainer(max_steps=3, **QUIET)
    trainer.fit(model, datamodule=data)
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5


def test_a_folder_without_output_weights_is_noticed(decoder: str, tmp_path: Path) -> None:
    assert CausalLM(decoder).newly_initialized == ()
    untied = save_decoder(tmp_path / "untied", tie_word_embeddings=False)
    model = CausalLM(untied).model
    model.model.save_pretrained(tmp_path / "base")
    assert CausalLM(str(tmp_path / "base")).newly_initialized == ("lm_head.weight",)


def test_refusals(decoder: str, data: LanguageData) -> None:
    with pytest.raises(ValueError, match=r"backbone='no/such/folder' cannot be loaded"):
        CausalLM("no/such/folder")
    with pytest.raises(ValueError, match=r"warmup=1\.0: it is a share"):
        CausalLM(decoder, warmup=1.0)
    with pytest.raises(ValueError, match=r"schedule='cosine': choose 'linear' \(to 0\) or 'constant'"):
        CausalLM(decoder, schedule="cosine")  # type: ignore[arg-type]
    frozen = CausalLM(decoder).requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"CausalLM has no trainable parameter"):
        Trainer(max_steps=1, **QUIET).fit(frozen, datamodule=data)


def padded(*rows: tuple[list[int], int]) -> dict[str, torch.Tensor]:
    """A batch of rows of token numbers, each with how many of its first are only read."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row, _ in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row, _ in rows])
    labels = ids.masked_fill(mask == 0, -100)
    for i, (_, read) in enumerate(rows):
        labels[i, :read] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_perplexity_counts_tokens_that_are_predicted(decoder: str) -> None:
    """Under padding and -100, over batches with unequally many tokens, and with one that predicts none."""
    batches = [
        padded(([4, 5, 6, 7, 8], 3), ([4, 9], 1)),
        padded(([4, 5, 6, 7, 8, 9, 10], 1)),
        padded(([4, 5], 2)),
    ]
    model = CausalLM(decoder)
    (metrics,) = Trainer(**QUIET).test(model, DataLoader(batches, batch_size=None), verbose=False)  # type: ignore[arg-type]
    wanted = []
    for row, read in (([4, 5, 6, 7, 8], 3), ([4, 9], 1), ([4, 5, 6, 7, 8, 9, 10], 1)):
        with torch.no_grad():
            logits = model.model.eval()(torch.tensor([row])).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, torch.tensor(row[1:]), reduction="none")
        wanted.append(losses[read - 1 :])
    mean = torch.cat(wanted).mean()
    assert len(torch.cat(wanted)) == 2 + 1 + 6
    assert metrics["test/loss"] == pytest.approx(mean.item(), rel=1e-5)
    assert metrics["test/perplexity"] == pytest.approx(mean.exp().item(), rel=1e-5)


def test_it_writes_what_it_has_learned(decoder: str, tmp_path: Path) -> None:
    """Greedy, behind prompts of two lengths, each as if it were alone; and with the arguments of generate."""
    rows = [("the red", "car"), ("and the blue", "sky"), ("the green", "tree")]
    (tmp_path / "t.csv").write_text("prompt,answer\n" + "".join(f"{a},{b}\n" for a, b in rows))
    source = str(tmp_path / "t.csv")
    data = LanguageData(
        source, decoder, predict=source, prompt="prompt", answer="answer", separator="", val_share=0.0, batch_size=3
    )
    model = CausalLM(decoder, lr=0.02, generation={"max_new_tokens": 4})
    trainer = Trainer(max_steps=60, **QUIET)
    trainer.fit(model, datamodule=data)
    (found,) = trainer.predict(model, datamodule=data)  # type: ignore[misc]
    assert found["texts"] == ["car", "sky", "tree"]
    for (prompt, _), tokens in zip(rows, found["tokens"], strict=True):
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        alone = model.model.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :]
        assert tokens.tolist()[: len(alone)] == alone.tolist()
        assert set(tokens.tolist()[len(alone) :]) <= {0}
    model.generation["num_return_sequences"], model.generation["num_beams"] = 2, 2
    (found,) = trainer.predict(model, datamodule=data)  # type: ignore[misc]
    assert len(found["texts"]) == 6


def test_generation_is_what_transformers_takes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(save_decoder(tmp_path / "bytes", vocab_size=len(tokenizer), eos_token_id=None))
    batch: Any = {"input_ids": torch.tensor([[4, 5, 6]]), "attention_mask": torch.ones(1, 3, dtype=torch.int64)}

    def written(**generation: Any) -> list[int]:
        module = CausalLM(str(tmp_path / "bytes"), generation=generation).eval()
        module.trainer = Trainer(**QUIET)
        tokens: list[int] = module.predict_step(batch, 0)["tokens"][0].tolist()
        return tokens

    tokens = written()
    assert len(tokens) == 64
    assert written(max_length=5) == written(max_new_tokens=2) == tokens[:2]
    letter = next(token for token in tokens[2:] if tokenizer.decode(token).isascii())
    assert written(stop_strings=[tokenizer.decode(letter)]) == tokens[: tokens.index(letter) + 1]


def test_it_learns_from_packed_answers(decoder: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("prompt,answer\n" + "the red,car\nthe blue,sky\n" * 8)
    source = str(tmp_path / "t.csv")
    data = LanguageData(
        source, decoder, val=source, prompt="prompt", answer="answer", packing="documents", block_size=12, batch_size=4
    )
    model = CausalLM(decoder, lr=0.02)
    trainer = Trainer(max_steps=20, callbacks=[*presets.lora(rank=4)], **QUIET)
    trainer.fit(model, datamodule=data)
    assert trainer.callback_metrics["val/perplexity"] < 1.5
