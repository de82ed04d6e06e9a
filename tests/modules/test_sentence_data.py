"""Sentences as batches of numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_peft.modules import Pieces, SentenceData, Sentences
from lightning_peft.modules.vocabulary import END, PAD, START, UNKNOWN

CUT = Sentences(fewest=2)


def test_batches_are_filled_to_their_own_longest(write: Any, rows: Any) -> None:
    data = SentenceData(write("t.tab", rows), cut=CUT, batch_size=5, val_share=0.0)
    data.setup("fit")
    widths = set()
    for batch in data.train_dataloader():
        tokens, lengths = batch["tokens"], batch["lengths"]
        widths.add(tokens.shape[1])
        assert batch.keys() == {"tokens", "lengths"}
        assert int(lengths.max()) == tokens.shape[1] - 1
        assert torch.equal((tokens != PAD).sum(1), lengths + 1)
        assert torch.equal(tokens[:, 0], torch.full((len(tokens),), START))
        assert torch.equal(tokens.gather(1, lengths[:, None])[:, 0], torch.full((len(tokens),), END))
    assert len(widths) > 1


def test_words_of_held_out_texts_are_not_known(write: Any) -> None:
    source = write("t.csv", [(f"word{i} sky", "a") for i in range(20)])
    data = SentenceData(source, cut=CUT, val_share=0.25)
    data.setup("fit")
    assert len(data.vocabulary) == 4 + 1 + 15
    for batch in data.val_dataloader():
        assert (batch["tokens"][:, 1] == UNKNOWN).all()
        assert batch["position"].tolist() == [0, 1, 2, 3, 4]


def test_the_vocabulary_is_the_training_sets_at_every_stage(write: Any, rows: Any) -> None:
    train, test = write("a.csv", rows), write("b.csv", [("the purple sky", "x")])
    fitted, tested = (SentenceData(train, test=test, cut=CUT) for _ in range(2))
    fitted.setup("fit")
    tested.setup("test")
    tested.setup("predict")
    assert fitted.vocabulary.words == tested.vocabulary.words
    (batch,) = tested.test_dataloader()
    assert tested.vocabulary.decode(batch["tokens"][0]) == "the <unk> sky"
    (batch,) = tested.predict_dataloader()
    assert "position" not in batch


def test_most_takes_a_drawn_share(write: Any, rows: Any) -> None:
    def taken(seed: int) -> list[list[int]]:
        data = SentenceData(write("t.csv", rows), cut=Pieces(3), val_share=0.0, most=9, seed=seed)
        data.setup("fit")
        rows_ = data._split("train")
        return [rows_[i]["tokens"].tolist() for i in range(len(rows_))]

    assert len(taken(0)) == 9
    assert taken(0) == taken(0) != taken(1)


def test_a_pretrained_encoder_gets_its_own_numbers(write: Any, rows: Any, tiny_bert: str) -> None:
    data = SentenceData(write("t.csv", rows), cut=CUT, tokenizer=tiny_bert, val_share=0.0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert torch.equal(batch["attention_mask"].sum(1), batch["lengths"] + 1)  # [CLS] and [SEP], each a word
    assert torch.equal(batch["input_ids"][:, 0], torch.full((len(batch["tokens"]),), 2))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"cut": Sentences(fewest=30)},
            r"t\.csv' has no sentence that cut=Sentences\(fewest=30.* Pieces\(words=",
        ),
        ({"val_share": 0.001}, r"t\.csv' has 47 text\(s\), too few to hold out a share of 0\.001"),
        ({"most": 0}, r"most=0: at least 1 sentence is read"),
        ({"tokenizer": "no/such"}, r"tokenizer='no/such' cannot be loaded"),
    ],
)
def test_bad_arguments(arguments: Any, sentence: str, write: Any, rows: Any) -> None:
    with pytest.raises(ValueError, match=sentence):
        SentenceData(write("t.csv", rows), **{"cut": CUT, **arguments}).setup("fit")
