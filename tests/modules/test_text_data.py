"""Labels, splits and batches of the data module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_peft.modules import TextData


def test_labels_are_sorted_and_rows_without_are_dropped(write: Any, tiny_bert: str) -> None:
    train = write("t.csv", [("red", "b"), ("car", ""), ("sky", "a"), ("tree", "b")])
    data = TextData(train, tokenizer=tiny_bert, val_share=0.0)
    assert (data.label_names, data.num_labels) == (["a", "b"], 2)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    assert sorted(batch["labels"].tolist()) == [0, 1, 1]


def test_numbers_are_sorted_as_numbers(write: Any, tiny_bert: str) -> None:
    data = TextData(write("t.csv", [("red", str(n)) for n in (10, 9, -1, 2)]), tokenizer=tiny_bert)
    assert data.label_names == ["-1", "2", "9", "10"]


def test_held_out_share_is_taken_of_every_class(write: Any, tiny_bert: str) -> None:
    rows = [("red", "often")] * 50 + [("car", "rare")] * 10 + [("sky", "once")]
    train = write("t.tsv", rows)

    def split(seed: int) -> tuple[list[int], list[int]]:
        data = TextData(train, tokenizer=tiny_bert, val_share=0.2, seed=seed)
        data.setup("fit")
        held = torch.cat([batch["labels"] for batch in data.val_dataloader()]).bincount(minlength=3)
        kept = torch.cat([batch["labels"] for batch in data.train_dataloader()]).bincount(minlength=3)
        return held.tolist(), kept.tolist()

    assert split(0) == split(1) == ([10, 0, 2], [40, 1, 8])  # often, once, rare: a class never loses its last row


def test_held_out_rows_are_the_seeds(write: Any, tiny_bert: str) -> None:
    train = write("t.tsv", [(" ".join(["red"] * (1 + i)), "ab"[i % 2]) for i in range(40)])

    def held(seed: int) -> set[int]:
        data = TextData(train, tokenizer=tiny_bert, val_share=0.25, seed=seed)
        data.setup("fit")
        lengths = {int(n) for batch in data.val_dataloader() for n in batch["attention_mask"].sum(1)}
        rest = {int(n) for batch in data.train_dataloader() for n in batch["attention_mask"].sum(1)}
        assert lengths.isdisjoint(rest)
        return lengths

    assert held(3) == held(3) != held(4)


def test_given_val_and_test_sets(write: Any, tiny_bert: str, rows: Any) -> None:
    train, val, test = write("a.csv", rows), write("b.csv", rows[:7]), write("c.jsonl", rows[:4])
    data = TextData(train, tokenizer=tiny_bert, val=val, test=test, val_share=0.5)
    for stage in ("fit", "validate", "test", "predict"):
        data.setup(stage)
    assert [len(data._split(split)) for split in ("train", "val", "test", "predict")] == [47, 7, 4, 4]


def test_label_that_training_never_saw(write: Any, tiny_bert: str) -> None:
    data = TextData(write("a.csv", [("red", "a"), ("car", "b")]), tiny_bert, test=write("b.csv", [("sky", "c")]))
    with pytest.raises(
        ValueError, match=r"'.*b\.csv' has labels that the training set '.*a\.csv' .*: 'c'\. Known: 'a', 'b'"
    ):
        data.setup("test")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"val_share": 1.0}, r"val_share=1\.0: it is a share of the training rows"),
        ({"batch_size": 0}, r"batch_size=0: it must be at least 1"),
        ({"tokenizer": "no/such/folder"}, r"tokenizer='no/such/folder' cannot be loaded"),
    ],
)
def test_bad_arguments(arguments: Any, sentence: str, write: Any, tiny_bert: str, rows: Any) -> None:
    with pytest.raises(ValueError, match=sentence):  # where it is noticed differs
        data = TextData(**{"train": write("t.csv", rows), "tokenizer": tiny_bert, **arguments})
        data.setup("fit")
        data.train_dataloader()


def test_one_class_is_not_enough(write: Any, tiny_bert: str) -> None:
    with pytest.raises(ValueError, match=r"t\.csv' has 1 class\(es\) in 2 labelled rows; it needs at least 2"):
        _ = TextData(write("t.csv", [("red", "a"), ("car", "a")]), tokenizer=tiny_bert).num_labels


def test_missing_set_and_missing_setup(write: Any, tiny_bert: str, rows: Any) -> None:
    data = TextData(write("t.csv", rows), tokenizer=tiny_bert)
    with pytest.raises(ValueError, match=r"TextData has no test set: give test="):
        data.test_dataloader()
    with pytest.raises(RuntimeError, match=r"TextData has not read its train set: call setup\(\) first"):
        data.train_dataloader()


def test_batches_are_padded_to_their_own_longest_row(write: Any, tiny_bert: str, rows: Any) -> None:
    data = TextData(write("t.tab", rows), tokenizer=tiny_bert, max_length=12, batch_size=5, val_share=0.0)
    data.setup("fit")
    widths = set()
    for batch in data.train_dataloader():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        widths.add(ids.shape[1])
        assert int(mask.sum(1).max()) == ids.shape[1] <= 12  # some rows have 21 tokens: cut
        assert torch.equal(ids != 0, mask == 1)  # [PAD] is 0
        assert torch.equal(ids[:, 0], torch.full((len(ids),), 2))  # [CLS]
    assert len(widths) > 1


def test_evaluation_pads_little_and_prediction_keeps_order(write: Any, tiny_bert: str, rows: Any) -> None:
    source = write("t.tab", rows)
    data = TextData(source, tokenizer=tiny_bert, test=source, batch_size=5)
    data.setup("test")
    data.setup("predict")

    def lengths(loader: Any) -> list[int]:
        return [int(n) for batch in loader for n in batch["attention_mask"].sum(1)]

    in_file = [len(text.split()) + 2 for text, _ in rows]
    assert lengths(data.predict_dataloader()) == in_file
    assert lengths(data.test_dataloader()) == sorted(in_file)


def test_prediction_needs_no_labels(write: Any, tiny_bert: str, rows: Any) -> None:
    Path("new.csv").write_text("text\nred car\nblue sky\n")
    data = TextData(write("t.csv", rows), tokenizer=tiny_bert, predict="new.csv")
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert batch.keys() == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape == (2, 4)


def test_token_ids_are_kept_small(write: Any, tiny_bert: str, rows: Any) -> None:
    data = TextData(write("t.csv", rows), tokenizer=tiny_bert, val_share=0.0)
    data.setup("fit")
    ids = data._split("train")._ids
    assert (ids.dtype, ids.ndim) == (torch.int32, 1)
    assert len(ids) == sum(len(text.split()) + 2 for text, _ in rows)
