"""Text to text: what the data module makes of pairs, and what the module trains, writes and reports."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quiet import QUIET
from tiny_models import WORDS, save_translator

from lightning_peft import presets
from lightning_peft.modules import Seq2Seq, Seq2SeqData

PAIRS = [("the red", "car"), ("the blue", "sky and sky"), ("and the green", "tree"), ("red", "")]


@pytest.fixture(scope="module")
def translators(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: save_translator(tmp_path_factory.mktemp(kind), kind) for kind in ("t5", "bart")}


@pytest.fixture
def source(tmp_path: Path) -> str:
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps({"source": a, "target": b}) + "\n" for a, b in PAIRS))
    return str(path)


def words(ids: torch.Tensor) -> str:
    return " ".join(WORDS[i] for i in ids.tolist() if i >= 0)


def test_a_batch_has_sources_and_padded_labels(translators: dict[str, str], source: str) -> None:
    data = Seq2SeqData(
        source, translators["t5"], prefix="and ", max_source_length=4, max_target_length=3, val_share=0.0
    )
    data.setup("fit")
    (batch,) = data.train_dataloader()
    shown = {
        words(ids[mask.bool()]): (words(labels), labels.tolist().count(-100))
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    }
    assert shown == {
        "and the red [SEP]": ("car [SEP]", 1),
        "and the blue [SEP]": ("sky and [SEP]", 0),  # three tokens at most
        "and and the [SEP]": ("tree [SEP]", 1),  # four
    }
    assert "references" not in batch


def test_evaluation_has_whole_references_and_prediction_all_sources(translators: dict[str, str], source: str) -> None:
    data = Seq2SeqData(source, translators["t5"], val=source, test=source, max_target_length=2, batch_size=2)
    data.setup("validate")
    data.setup("predict")
    batches = list(data.val_dataloader())
    assert [batch["references"] for batch in batches] == [["car", "sky and sky"], ["tree"]]  # from short to long
    assert words(batches[0]["labels"][1]) == "sky [SEP]"
    assert [words(row) for batch in data.predict_dataloader() for row in batch["input_ids"]] == [
        "the red [SEP]", "the blue [SEP]", "and the green [SEP]", "red [SEP] [PAD] [PAD]",
    ]  # fmt: skip
    assert "labels" not in next(iter(data.predict_dataloader()))


def test_rows_are_held_out_by_the_seed(translators: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("source,target\n" + "".join(f"the,{'sky ' * (1 + i)}\n" for i in range(9)))

    def references(seed: int) -> list[str]:
        data = Seq2SeqData(str(tmp_path / "t.csv"), translators["t5"], val_share=0.3, seed=seed)
        data.setup("fit")
        assert len(data._split("train")) == 6
        return [text for batch in data.val_dataloader() for text in batch["references"]]

    assert references(0) == references(0) != references(1)
    assert len(references(0)) == 3


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_loss_is_the_mean_over_all_wanted_tokens(kind: str, translators: dict[str, str], source: str) -> None:
    model = Seq2Seq(translators[kind], metrics=())
    data = Seq2SeqData(source, translators[kind], test=source, batch_size=2)
    (metrics,) = Trainer(**QUIET).test(model, datamodule=data, verbose=False)
    losses = []
    for a, b in PAIRS[:3]:
        inputs, labels = (model.tokenizer(text, return_tensors="pt").input_ids for text in (a, b))
        shifted = torch.cat([torch.tensor([[0]]), labels[:, :-1]], 1)
        with torch.no_grad():
            logits = model.model.eval()(input_ids=inputs, decoder_input_ids=shifted).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0], reduction="none"))
    assert metrics == {"test/loss": pytest.approx(torch.cat(losses).mean().item(), rel=1e-5)}


def test_it_learns_to_write_what_is_wanted(translators: dict[str, str], source: str) -> None:
    data = Seq2SeqData(source, translators["t5"], val=source, batch_size=3, predict=source)
    model = Seq2Seq(
        translators["t5"], lr=0.003, metrics=["exact_match", "chrf", "rougeL"], generation={"max_new_tokens": 6}
    )
    trainer = Trainer(max_steps=100, check_val_every_n_epoch=100, **QUIET)
    (before,) = trainer.validate(model, datamodule=data, verbose=False)
    assert before["val/exact_match"] < 1
    trainer.fit(model, datamodule=data)
    found = trainer.callback_metrics
    assert [float(found[f"val/{name}"]) for name in ("exact_match", "chrf", "rougeL")] == [1.0, 1.0, 1.0]
    written: Any = trainer.predict(model, datamodule=data)
    assert [text for batch in written for text in batch["texts"]][:3] == ["car", "sky and sky", "tree"]


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_adapters_alone_are_trained(kind: str, translators: dict[str, str], source: str) -> None:
    model = Seq2Seq(translators[kind], lr=0.01, metrics=())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = Seq2SeqData(source, translators[kind], val_share=0.0)
    Trainer(max_steps=2, callbacks=[*presets.lora(rank=2)], **QUIET).fit(model, datamodule=data)
    after = {name.replace(".base.", "."): p for name, p in model.named_parameters()}
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert len(after) > len(before)


def test_refusals(translators: dict[str, str], source: str) -> None:
    folder = translators["t5"]
    with pytest.raises(ValueError, match=r"has no column 'question'; it has 'source', 'target'\. Name it with source="):
        Seq2SeqData(source, folder, source="question").setup("fit")
    with pytest.raises(ValueError, match=r"has no row with a target in column 'answer'\. Name the column with target="):
        Seq2SeqData(source, folder, target="answer").setup("fit")
    with pytest.raises(ValueError, match=r"has 3 rows, too few to hold out a share of 0\.1"):
        Seq2SeqData(source, folder).setup("fit")
    with pytest.raises(ValueError, match=r"max_target_length=0: it is a number of tokens"):
        Seq2SeqData(source, folder, max_target_length=0)
    with pytest.raises(ValueError, match=r"Seq2SeqData has no predict set: give predict="):
        Seq2SeqData(source, folder).predict_dataloader()
    with pytest.raises(ValueError, match=r"num_return_sequences=2, and metrics compare one text"):
        Seq2Seq(folder, generation={"num_return_sequences": 2, "num_beams": 2})
    with pytest.raises(ValueError, match=r"schedule='cosine'"):
        Seq2Seq(folder, schedule="cosine")  # type: ignore[arg-type]
    frozen = Seq2Seq(folder).requires_grad_(False)
    with pytest.raises(MisconfigurationException, match=r"Seq2Seq has no trainable parameter"):
        Trainer(max_steps=1, **QUIET).fit(frozen, datamodule=Seq2SeqData(source, folder, val_share=0.0))
