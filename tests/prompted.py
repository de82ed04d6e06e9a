"""Tiny transformers models of text of every sort, with large weights and no dropout; what they read, and prompts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import Adapter, AdapterFactory, inject

TOKENS, LENGTH = 40, 7
TEXTS = [torch.tensor([5, 6, 7, 8, 9]), torch.tensor([10, 11, 12])]

_SIZES: dict[str, Any] = {
    "vocab_size": TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32,
    "initializer_range": 0.3, "max_position_embeddings": 32,
}  # fmt: skip
_DRY: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _bert(kind: str) -> nn.Module:
    labels = 2 if "Answering" in kind else 3
    model: nn.Module = getattr(hf, kind)(hf.BertConfig(**_SIZES, **_DRY, num_labels=labels))
    return model


def _roberta(kind: str) -> nn.Module:
    sizes = {**_SIZES, "max_position_embeddings": 34}
    model: nn.Module = getattr(hf, kind)(hf.RobertaConfig(**sizes, **_DRY, num_labels=3, pad_token_id=1))
    return model


def _llama(kind: str) -> nn.Module:
    model: nn.Module = getattr(hf, kind)(
        hf.LlamaConfig(**_SIZES, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    )
    return model


def _gpt2(kind: str) -> nn.Module:
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": TOKENS}
    model: nn.Module = getattr(hf, kind)(
        hf.GPT2Config(
            **sizes, **dry, initializer_range=0.3, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2
        )
    )
    return model


def _t5(kind: str) -> nn.Module:
    model: nn.Module = getattr(hf, kind)(
        hf.T5Config(
            vocab_size=TOKENS, d_model=16, d_kv=8, num_layers=2, num_heads=2, d_ff=32, dropout_rate=0.0,
            pad_token_id=0, decoder_start_token_id=0, eos_token_id=1, num_labels=3,
        )
    )  # fmt: skip
    return model


def _bart(kind: str) -> nn.Module:
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {f"{side}_layers": 2, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 32}
    model: nn.Module = getattr(hf, kind)(
        hf.BartConfig(
            **sides, vocab_size=TOKENS, d_model=16, max_position_embeddings=32, init_std=0.3, scale_embedding=True,
            dropout=0.0, num_labels=3,
        )
    )  # fmt: skip
    return model


MODELS = {
    "bert": partial(_bert, "BertForSequenceClassification"),
    "bert backbone": partial(_bert, "BertModel"),
    "bert tokens": partial(_bert, "BertForTokenClassification"),
    "bert answers": partial(_bert, "BertForQuestionAnswering"),
    "roberta": partial(_roberta, "RobertaForSequenceClassification"),
    "llama": partial(_llama, "LlamaForCausalLM"),
    "llama classifier": partial(_llama, "LlamaForSequenceClassification"),
    "gpt2": partial(_gpt2, "GPT2LMHeadModel"),
    "gpt2 classifier": partial(_gpt2, "GPT2ForSequenceClassification"),
    "t5": partial(_t5, "T5ForConditionalGeneration"),
    "t5 encoder": partial(_t5, "T5EncoderModel"),
    "bart": partial(_bart, "BartForConditionalGeneration"),
    "bart classifier": partial(_bart, "BartForSequenceClassification"),
}


def build(kind: str) -> Any:
    """The model, in eval mode; the same one at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS[kind]().eval()


def two_texts(model: Any, side: str) -> dict[str, Tensor]:
    """Both texts, padded on the "left" or on the "right" to more than the longer one needs."""
    pad = 0 if model.config.pad_token_id is None else model.config.pad_token_id
    ids, mask = torch.full((2, LENGTH), pad), torch.zeros(2, LENGTH, dtype=torch.long)
    for i, text in enumerate(TEXTS):
        at = slice(0, len(text)) if side == "right" else slice(LENGTH - len(text), LENGTH)
        ids[i, at], mask[i, at] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


class Host(nn.Module):
    """Holds a model, as a LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def plain(kind: str, dtype: torch.dtype = torch.float32) -> Host:
    """A model without a prompt, in eval mode; the same one at every call."""
    return Host(build(kind)).to(dtype).eval()


def prompted(
    kind: str, factory: AdapterFactory, dtype: torch.dtype = torch.float32, *, start: bool = False, seed: int = 1
) -> tuple[Host, Any]:
    """The model with a prompt, moved off its start unless `start`; and the prompt."""
    host = plain(kind, dtype)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject(host, factory, train=[])
        (prompt,) = (child for child in host.modules() if isinstance(child, Adapter))
        if not start:
            with torch.no_grad():
                for _, parameter in prompt.own_parameters():
                    parameter.add_(0.3 * torch.randn_like(parameter))
    return host, prompt


def batch(kind: str, seed: int = 2, rows: int = 3, length: int = 7) -> dict[str, Tensor]:
    """Texts without padding."""
    ids = torch.randint(3, 40, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids} | ({"decoder_input_ids": ids[:, :3]} if kind == "t5" else {})


def padded(inputs: dict[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    """The same texts with padding and a mask that says so."""
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    pads = {"input_ids": (ids, 0), "attention_mask": (mask, 0)}
    return inputs | {name: nn.functional.pad(t, (left, right), value=value) for name, (t, value) in pads.items()}
