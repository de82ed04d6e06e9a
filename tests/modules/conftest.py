"""A model and data small enough to train in a blink."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue", "and", "the", "car", "tree", "sky"]
TEXTS = {"plant": "the green tree", "street": "the red car", "weather": "the blue sky"}


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a two-layer BERT without dropout, and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny-bert")
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return str(folder)


Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes (text, label) rows to a file, in the format its suffix names."""

    def write(name: str, rows: Iterable[tuple[str, str]]) -> str:
        path, rows = tmp_path / name, list(rows)
        if path.suffix == ".jsonl":
            lines = [json.dumps({"label": label, "text": text}) for text, label in rows]
        elif path.suffix == ".csv":
            lines = ["label,text", *(f'{label},"{text}"' for text, label in rows)]
        elif path.suffix == ".tsv":
            lines = ["label\ttext", *(f"{label}\t{text}" for text, label in rows)]
        else:
            lines = ["Category\tText", "d\tstring", "class\t", *(f"{label}\t{text}" for text, label in rows)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return str(path)

    return write


def sentences(count: int) -> list[tuple[str, str]]:
    """Rows of three classes and of many lengths."""
    names = list(TEXTS)
    return [(" and ".join([TEXTS[names[i % 3]]] * (1 + i % 5)), names[i % 3]) for i in range(count)]


@pytest.fixture
def rows() -> list[tuple[str, str]]:
    """47 labelled rows: nine batches of five and a rest of two."""
    return sentences(47)
