"""Tiny transformers models that get a prompt: large weights, so that what is in front of a text is felt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

from lightning_peft import Adapter, AdapterFactory, inject

_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_TEXT = {"vocab_size": 40, "max_position_embeddings": 64, "initializer_range": 0.3, "pad_token_id": 1}
_ENDS = {"bos_token_id": 2, "eos_token_id": 0}
_DRY = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertForSequenceClassification(hf.BertConfig(**_SIZES, **_TEXT, **_DRY, num_labels=3)),
    "roberta": lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**_SIZES, **_TEXT, **_DRY, num_labels=3)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_SIZES, **_TEXT, **_ENDS)),
    "gpt2": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(
            n_layer=2, n_embd=16, n_head=2, n_positions=64, vocab_size=40, initializer_range=0.3, pad_token_id=1,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **_ENDS,
        )
    ),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(
            d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, vocab_size=40, decoder_start_token_id=1,
            pad_token_id=1, eos_token_id=0, initializer_factor=1.0, dropout_rate=0.0,
        )
    ),
}  # fmt: skip


class Host(nn.Module):
    """Holds a model, as a LightningModule does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs)


def plain(kind: str, dtype: torch.dtype = torch.float32) -> Host:
    """A model without a prompt, in eval mode; the same one at every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Host(MODELS[kind]()).to(dtype).eval()


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
    pads = {"input_ids": (ids, 1), "attention_mask": (mask, 0)}
    return inputs | {name: nn.functional.pad(t, (left, right), value=value) for name, (t, value) in pads.items()}
