"""Folders of models and texts that are small enough to train in a blink; tokens are whole words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green", "blue", "and", "the", "car", "tree", "sky"]
TEXTS = {"plant": "the green tree", "street": "the red car", "weather": "the blue sky"}


def save_tokenizer(folder: Path, classifies: bool) -> None:
    """A tokenizer of whole words; one for a classifier frames each text."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]"}
    if classifies:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    else:
        names |= {"eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)


def save_encoder(folder: Path, num_labels: int = 3, **config: Any) -> str:
    """A BERT of two layers with a head, without dropout. Large weights, so that texts have logits which differ."""
    save_tokenizer(folder, classifies=True)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    made = BertConfig(
        vocab_size=len(WORDS), max_position_embeddings=32, initializer_range=0.3, num_labels=num_labels,
        **{**sizes, **still, **config},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        BertForSequenceClassification(made).save_pretrained(folder)
    return str(folder)


def save_decoder(folder: Path, **config: Any) -> str:
    """A Llama of two layers, its output layer tied to its embeddings."""
    save_tokenizer(folder, classifies=False)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    made = LlamaConfig(
        vocab_size=len(WORDS), intermediate_size=32, max_position_embeddings=64, initializer_range=0.3,
        **{"tie_word_embeddings": True, **sizes, **tokens, **config},
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(made).save_pretrained(folder)
    return str(folder)


def save_texts(path: Path, count: int = 16) -> str:
    """`count` texts of each kind, of three lengths, with their labels; as csv, as jsonl, or (.txt) the texts alone."""
    rows = [(" ".join([text] * (1 + i % 3)), label) for i in range(count) for label, text in TEXTS.items()]
    if path.suffix == ".txt":
        content = "\n".join(text for text, _ in rows)
    elif path.suffix == ".jsonl":
        content = "\n".join(json.dumps({"text": text, "label": label}) for text, label in rows)
    else:
        content = "\n".join(["text,label", *(f"{text},{label}" for text, label in rows)])
    path.write_text(content + "\n", encoding="utf-8")
    return str(path)
