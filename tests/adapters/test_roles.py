"""Value and output projections by their roles, whatever an architecture calls them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_peft.adapters.roles import value_and_output
from lightning_peft.patterns import matches
from lightning_peft.surgery.layers import adaptable

BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, "vocab_size": 9}
T5 = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2, "vocab_size": 9}
BART = {"d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 9, "pad_token_id": 0}  # fmt: skip
DISTIL = {"dim": 8, "n_layers": 1, "n_heads": 2, "hidden_dim": 12, "vocab_size": 9}


def built(kind: str, config: dict[str, Any]) -> nn.Module:
    model = getattr(transformers, kind)
    with torch.device("meta"):
        made: nn.Module = model(model.config_class(**config))
    return made


def chosen(model: nn.Module) -> list[str]:
    patterns = value_and_output(model)
    return [name for name in adaptable(model) if matches(patterns, name)]


@pytest.mark.parametrize(
    ("kind", "config", "ends"),
    [
        ("BertModel", BERT, ["attention.self.value", "attention.output.dense"]),
        ("AlbertModel", BERT | {"embedding_size": 4}, ["attention.value", "attention.dense"]),
        ("DistilBertModel", DISTIL, ["attention.v_lin", "attention.out_lin"]),
        ("LlamaForCausalLM", BERT, ["self_attn.v_proj", "self_attn.o_proj"]),
        ("T5Model", T5, 2 * ["SelfAttention.v", "SelfAttention.o"] + ["EncDecAttention.v", "EncDecAttention.o"]),
        ("BartModel", BART, 2 * ["self_attn.v_proj", "self_attn.out_proj"] +
         ["encoder_attn.v_proj", "encoder_attn.out_proj"]),
    ],
)  # fmt: skip
def test_every_attention_is_found(kind: str, config: dict[str, Any], ends: list[str]) -> None:
    found = chosen(built(kind, config))
    assert sorted(next(end for end in ends if name.endswith("." + end)) for name in found) == sorted(ends)


def test_projections_in_one_layer_are_named_by_the_user() -> None:
    gpt2 = built("GPT2Model", {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 9})
    with pytest.raises(ValueError, match=r"'h\.0\.attn\.c_attn' projects to query, .* targets=\['c_attn', \.\.\.\]"):
        value_and_output(gpt2)
    with pytest.raises(ValueError, match=r"'self_attn\.in_proj' projects to query, key and value in one layer"):
        value_and_output(nn.TransformerEncoderLayer(8, 2))


def test_a_module_without_attention() -> None:
    with pytest.raises(ValueError, match=r"Sequential has no value and output .* Name them: .* there are '0', '1'"):
        value_and_output(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
