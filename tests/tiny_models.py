"""Folders of models and texts that are small enough to train in a blink; tokens are whole words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
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


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token."""
    alphabet = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")


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
        intermediate_size=32, initializer_range=0.3,
        **{"vocab_size": len(WORDS), "tie_word_embeddings": True, "max_position_embeddings": 64,
           **sizes, **tokens, **config},
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


def save_translator(folder: Path, kind: str = "t5") -> str:
    """A T5 or a BART of one layer on each side, without dropout; its tokenizer ends each text."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(single="$A [SEP]", special_tokens=[("[SEP]", 3)])
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    tokens = {"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0, "vocab_size": len(WORDS)}
    model: PreTrainedModel
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if kind == "t5":
            sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
            model = T5ForConditionalGeneration(T5Config(dropout_rate=0.0, **sizes, **tokens))
        else:
            sides = {
                f"{side}_{name}": number
                for side in ("encoder", "decoder")
                for name, number in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 32))
            }
            sizes = {"d_model": 16, "max_position_embeddings": 32, "bos_token_id": 2, "forced_eos_token_id": 3}
            model = BartForConditionalGeneration(BartConfig(dropout=0.0, init_std=0.3, **sides, **sizes, **tokens))
        model.save_pretrained(folder)
    return str(folder)
