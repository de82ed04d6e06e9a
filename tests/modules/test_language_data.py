"""Texts in blocks of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TEXTS, WORDS, save_decoder, save_texts
from torch import Tensor

from lightning_peft.modules import LanguageData
from lightning_peft.modules.text_files import read_texts


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_decoder(tmp_path_factory.mktemp("decoder"))


def blocks(data: LanguageData, split: str) -> Tensor:
    rows = data._split(split)
    return torch.stack([rows[i] for i in range(len(rows))])


def test_texts_follow_each_other_each_closed_by_the_end_token(decoder: str, tmp_path: Path) -> None:
    data = LanguageData(save_texts(tmp_path / "t.csv", 2), decoder, block_size=5, val_share=0.0)
    data.setup("fit")
    words = [word for i in range(2) for text in TEXTS.values() for word in [*([*text.split()] * (1 + i)), "[SEP]"]]
    wanted = torch.tensor([WORDS.index(word) for word in words])
    assert len(wanted) % 5  # something is left over
    assert torch.equal(blocks(data, "train").flatten().long(), wanted[: len(wanted) // 5 * 5])


def test_a_batch_has_the_tokens_as_labels(decoder: str, tmp_path: Path) -> None:
    data = LanguageData(save_texts(tmp_path / "t.txt"), decoder, block_size=6, batch_size=3, val_share=0.0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["input_ids"].shape == (3, 6)
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["labels"], batch["input_ids"])


def test_blocks_are_held_out_by_the_seed(decoder: str, tmp_path: Path) -> None:
    source = save_texts(tmp_path / "t.jsonl")

    def split(seed: int) -> tuple[list[int], list[int]]:
        data = LanguageData(source, decoder, block_size=4, val_share=0.25, seed=seed)
        data.setup("fit")
        return data._split("train").chosen.tolist(), data._split("val").chosen.tolist()

    train, val = split(0)
    assert len(val) == round(0.25 * (len(train) + len(val)))
    assert sorted(train + val) == list(range(len(train) + len(val)))
    assert split(0) == (train, val)
    assert split(1)[1] != val


def test_files_of_their_own_are_not_mixed(decoder: str, tmp_path: Path) -> None:
    train, other = save_texts(tmp_path / "a.csv", 8), save_texts(tmp_path / "b.csv", 2)
    data = LanguageData(train, decoder, val=other, test=other, block_size=4)
    data.setup("fit")
    data.setup("test")
    assert len(data._split("train")) > len(data._split("val")) == len(data._split("test"))
    assert torch.equal(blocks(data, "val"), blocks(data, "test"))


def test_epochs_differ_and_repeat(decoder: str, tmp_path: Path) -> None:
    data = LanguageData(save_texts(tmp_path / "t.csv"), decoder, block_size=4, batch_size=2, val_share=0.0)
    data.setup("fit")
    loader: Any = data.train_dataloader()
    orders = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        orders.append(torch.cat([batch["input_ids"] for batch in loader]))
    assert torch.equal(orders[0], orders[2])
    assert not torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0].sort(0).values, orders[1].sort(0).values)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"block_size": 1}, r"block_size=1: a block needs at least 2 tokens"),
        ({"block_size": 5000}, r"tokens, less than one block of 5000\. Give more text, or a smaller block_size"),
        ({"block_size": 100}, r"blocks of 100 tokens, too few to hold out a share of 0\.1\. Give more text"),
        ({"val_share": 1.0}, r"val_share=1\.0: it is a share"),
        ({"train": "t.pdf"}, r"'t\.pdf' has suffix '\.pdf'; files end in \.txt, \.csv"),
        ({"train": "no.txt"}, r"there is no file 'no\.txt'"),
        ({"text": "body"}, r"has no column 'body'"),
        ({"tokenizer": "no/such/folder"}, r"tokenizer='no/such/folder' cannot be loaded"),
    ],
)
def test_refusals(decoder: str, tmp_path: Path, arguments: dict[str, Any], sentence: str) -> None:
    source = save_texts(tmp_path / "t.csv")
    with pytest.raises(ValueError, match=sentence):
        LanguageData(**{"train": source, "tokenizer": decoder, **arguments}).setup("fit")


def test_plain_text_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("one line\n\nanother line\n")
    assert read_texts(tmp_path / "t.txt") == ["one line\n\nanother line\n"]
    with pytest.raises(ValueError, match=r"is plain text and has no column 'body'; leave text out"):
        read_texts(tmp_path / "t.txt", "body")
