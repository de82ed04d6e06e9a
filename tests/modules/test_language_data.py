"""Texts in blocks of tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TEXTS, WORDS, save_decoder, save_texts
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightning_peft.modules import LanguageData
from lightning_peft.modules.chat import conversation
from lightning_peft.modules.documents import as_messages
from lightning_peft.modules.language_rows import Prompts
from lightning_peft.modules.pair_files import Pair
from lightning_peft.modules.pretrained import tokenizer_from
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


# ---- documents that are kept apart, prompts with answers, conversations ----

TEMPLATE = (
    "{% for turn in messages %}{{ turn.role }} : {{ turn.content }} [SEP]\n{% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tokenizer that puts a token before each text, and has a chat template."""
    folder = tmp_path_factory.mktemp("talker")
    names = [*WORDS, "user", "assistant", ":"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(names)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", 2)])
    tokens = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **tokens)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_pairs(path: Path, rows: list[tuple[str, str]]) -> str:
    if path.suffix == ".jsonl":
        lines = [json.dumps({"question": question, "answer": answer}) for question, answer in rows]
    elif path.suffix == ".tab":
        lines = ["question\tanswer", "string\tstring", "\t", *("\t".join(row) for row in rows)]
    else:
        lines = ["question,answer", *(",".join(row) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


PAIRS = [("the car", "red"), ("the tree", "green"), ("the sky", "blue and blue"), ("the", ""), ("sky and tree", "blue")]


def words_of(ids: Tensor, names: list[str] | None = None) -> str:
    known = [*WORDS, "user", "assistant", ":"]
    return " ".join(known[i] for i in ids.tolist())


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".tab"])
def test_answers_alone_are_learned(talker: str, tmp_path: Path, suffix: str) -> None:
    source = save_pairs(tmp_path / f"t{suffix}", PAIRS)
    data = LanguageData(source, talker, prompt="question", answer="answer", separator=" :", batch_size=9, val_share=0.0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    shown = {
        words_of(ids[mask.bool()]): words_of(labels[labels != -100])
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    }
    assert shown == {
        "[CLS] the car : red [SEP]": "red [SEP]",
        "[CLS] the tree : green [SEP]": "green [SEP]",
        "[CLS] the sky : blue and blue [SEP]": "blue and blue [SEP]",
        "[CLS] sky and tree : blue [SEP]": "blue [SEP]",
    }  # the row without an answer is left out
    assert batch["labels"][batch["attention_mask"] == 0].unique().tolist() == [-100]
    assert (batch["attention_mask"].diff() <= 0).all()  # padded behind


def test_prompts_in_a_chat_are_turns(talker: str, tmp_path: Path) -> None:
    source = save_pairs(tmp_path / "t.csv", PAIRS[:1])
    data = LanguageData(
        source, talker, predict=source, prompt="question", answer="answer", template="chat", val_share=0.0
    )
    data.setup("fit")
    data.setup("predict")
    ((ids, labels),) = [data._split("train")[0]]
    assert words_of(ids) == "user : the car [SEP] assistant : red [SEP]"
    assert words_of(labels[labels != -100]) == "red [SEP]"
    assert words_of(data._split("predict")[0]) == "user : the car [SEP] assistant :"


def test_each_turn_of_the_assistant_is_learned(talker: str, tmp_path: Path) -> None:
    turns = [("user", "the car"), ("assistant", "red"), ("user", "and the sky"), ("assistant", "blue")]
    messages = [{"role": role, "content": content} for role, content in turns]
    (tmp_path / "t.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    data = LanguageData(str(tmp_path / "t.jsonl"), talker, predict=str(tmp_path / "t.jsonl"), messages="messages",
                        val_share=0.0)  # fmt: skip
    data.setup("fit")
    data.setup("predict")
    ids, labels = data._split("train")[0]
    whole = "user : the car [SEP] assistant : red [SEP] user : and the sky [SEP] assistant : blue [SEP]"
    assert words_of(ids) == whole
    assert [i for i, label in enumerate(labels.tolist()) if label != -100] == [7, 8, 17, 18]
    assert words_of(data._split("predict")[0]) == whole.removesuffix(" blue [SEP]")


def test_texts_are_packed_whole_with_their_borders(talker: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\nthe red car\nthe sky\nblue and green and red\nsky\n")
    data = LanguageData(str(tmp_path / "t.csv"), talker, packing="documents", block_size=8, batch_size=9, val_share=0.0)
    data.setup("fit")
    (batch,) = data.train_dataloader()
    shown = [
        (words_of(ids), numbers.tolist(), positions.tolist(), (labels == -100).int().tolist())
        for ids, numbers, positions, labels in zip(
            batch["input_ids"], batch["document_ids"], batch["position_ids"], batch["labels"], strict=True
        )
    ]
    assert sorted(shown) == [
        ("[CLS] blue and green and red [SEP] [PAD]", [1] * 7 + [0], [*range(7), 0], [1, *[0] * 6, 1]),
        ("[CLS] the red car [SEP] [CLS] sky [SEP]", [1] * 5 + [2] * 3, [*range(5), *range(3)], [1, *[0] * 4, 1, 0, 0]),
        ("[CLS] the sky [SEP]" + " [PAD]" * 4, [1] * 4 + [0] * 4, [*range(4), 0, 0, 0, 0], [1, 0, 0, 0, 1, 1, 1, 1]),
    ]  # fmt: skip


def test_a_long_text_becomes_several_documents_and_loses_nothing(talker: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\nthe red car and the blue sky\n")
    data = LanguageData(str(tmp_path / "t.csv"), talker, packing="none", block_size=4, val_share=0.0)
    data.setup("fit")
    rows = data._split("train")
    assert [words_of(rows[i][0]) for i in range(len(rows))] == ["[CLS] the red car", "and the blue sky"]  # [SEP] alone
    assert rows.lengths.tolist() == [4, 4]


def test_an_answer_that_is_too_long_is_told(talker: str, tmp_path: Path) -> None:
    source = save_pairs(tmp_path / "t.csv", PAIRS)
    data = LanguageData(
        source, talker, prompt="question", answer="answer", separator=" :", block_size=5, packing="documents",
        val_share=0.0,
    )  # fmt: skip
    with pytest.warns(
        UserWarning, match=r"4 of 4 rows of .* are longer than block_size=5 .* 1 of all rows are left out"
    ):
        data.setup("fit")
    assert sorted(words_of(row["input_ids"]) for row in (data._split("train")[i] for i in range(3))) == [
        "[CLS] the car : red", "[CLS] the sky : blue", "[CLS] the tree : green",
    ]  # fmt: skip


def test_a_row_without_an_answer_is_told(talker: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "car"}]
    lines = [json.dumps({"messages": each}) for each in (turns, turns[:1], turns)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines) + "\n")
    data = LanguageData(str(tmp_path / "t.jsonl"), talker, messages="messages", packing="none", val_share=0.0)
    with pytest.warns(UserWarning, match=r"0 of 3 rows .* 1 of all rows are left out, because they have no answer"):
        data.setup("fit")
    assert len(data._split("train")) == 2


def test_rows_are_held_out_before_they_are_packed(talker: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\n" + "".join(f"{'sky ' * (1 + i)}\n" for i in range(8)))

    def lengths(seed: int) -> dict[str, list[int]]:
        data = LanguageData(
            str(tmp_path / "t.csv"), talker, packing="documents", block_size=16, val_share=0.25, seed=seed
        )
        data.setup("fit")
        return {split: sorted(data._split(split)._documents.lengths.tolist()) for split in ("train", "val")}

    found = lengths(0)
    assert len(found["val"]) == 2
    assert sorted(found["train"] + found["val"]) == [3 + i for i in range(8)]
    assert lengths(0) == found != lengths(1)


def test_prompts_are_padded_on_the_left_and_keep_their_ends(talker: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\nthe red car and the sky\nsky\n")
    data = LanguageData(str(tmp_path / "t.csv"), talker, predict=str(tmp_path / "t.csv"), block_size=4)
    data.setup("predict")
    (batch,) = data.predict_dataloader()
    assert [words_of(ids) for ids in batch["input_ids"]] == ["car and the sky", "[PAD] [PAD] [CLS] sky"]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


TURN = {"role": "user", "content": "the"}


@pytest.mark.parametrize(
    ("arguments", "content", "sentence"),
    [
        ({"prompt": "question"}, "", r"prompt='question', answer=None: give the columns of both"),
        ({"prompt": "q", "answer": "a", "text": "t"}, "", r"text=\.\.\. and prompt=\.\.\. name rows of two kinds"),
        ({"template": "chat"}, "", r"template='chat': choose 'plain', or 'chat' for prompt="),
        ({"packing": "block"}, "", r"packing='block': choose 'documents' or 'none'"),
        ({"prompt": "q", "answer": "a", "packing": "blocks"}, "", r"packing='blocks': .* cut answers"),
        ({"prompt": "q", "answer": "a"}, "question,answer\n", r"it has 'question', 'answer'\. Name it with prompt="),
        ({"prompt": "q", "answer": "a"}, "q,a\nthe,\n", r"has no row with anything to predict in its first 256 tokens"),
        ({"messages": "m"}, "", r"'t\.csv' has suffix '\.csv'; files end in \.jsonl"),
        ({"train": "t.jsonl", "messages": "m"}, '{"m": []}', r"'t\.jsonl, line 1': a conversation is a list of turns"),
        ({"train": "t.jsonl", "messages": "m"}, '{"m": [{"role": "user"}]}', r"each turn has a 'role' and a 'content'"),
        ({"train": "t.jsonl", "messages": "m"}, "{}", r"line 1' has no column 'm'; it has no columns\. Name it"),
        ({"train": "t.jsonl", "messages": "m"}, "{", r"line 1, is not JSON"),
        ({"packing": "none"}, "text\n", r"has no row with anything to predict"),
        ({"packing": "none", "val_share": 0.1}, "text\nthe sky\n", r"has 1 documents, too few to hold out a share"),
    ],
)  # fmt: skip
def test_refusals_of_rows(talker: str, tmp_path: Path, arguments: dict[str, Any], content: str, sentence: str) -> None:
    for name in ("t.csv", "t.jsonl"):
        Path(name).write_text(content)
    with pytest.raises(ValueError, match=sentence):
        LanguageData(**{"train": "t.csv", "tokenizer": talker, "val_share": 0.0, **arguments}).setup("fit")


def test_templates_that_cannot_be_followed_are_refused(decoder: str, talker: str, tmp_path: Path) -> None:
    pair = Pair("the car", "red")
    with pytest.raises(ValueError, match=r"has no chat template: that of an instruction-tuned model has one"):
        LanguageData("t.csv", decoder, prompt="q", answer="a", template="chat").setup("fit")
    tokenizer = tokenizer_from(talker)
    tokenizer.chat_template = "{% for t in messages %}{{ loop.last }} {{ t.content }} {% endfor %}"
    with pytest.raises(ValueError, match=r"writes a turn otherwise once more turns follow.*turn 2 of 3, 'red'"):
        conversation(tokenizer, [*as_messages(pair), {"role": "user", "content": "sky"}])
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(ValueError, match=r"chat template refuses turns of these roles: user, assistant \(no\)"):
        conversation(tokenizer, as_messages(pair))
    with pytest.raises(ValueError, match=r"row 2 to predict is empty"):
        Prompts([[1], []], 4)
