"""Tiny transformers models, for adapters that stand in the place of a whole one; importing transformers takes long."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

TOKENS = 24
"""What the models have in their vocabulary."""

_SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
# Large weights, so that what is in front of a text is felt.
_TEXT: dict[str, Any] = {"vocab_size": TOKENS, "max_position_embeddings": 40, "initializer_range": 0.3}


def _encoder() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**_SIZES, **_TEXT))


def _decoder() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 24, "n_positions": 40}
    return GPT2LMHeadModel(GPT2Config(**sizes, vocab_size=TOKENS, initializer_range=0.3, pad_token_id=0))


def _encoder_decoder() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    both: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        both |= {f"{side}_layers": 1, f"{side}_attention_heads": 2, f"{side}_ffn_dim": 24}
    text: dict[str, Any] = {
        "vocab_size": TOKENS,
        "max_position_embeddings": 40,
        "init_std": 0.3,
        "scale_embedding": True,
    }
    return BartForConditionalGeneration(BartConfig(d_model=16, **both, **text))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "encoder_model": _encoder,
    "decoder_model": _decoder,
    "encoder_decoder_model": _encoder_decoder,
}
"""The kinds of model that an adapter of whole models is tried on."""


class ModelHost(nn.Module):
    """Holds a model as its child `layer`, and gives its logits."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return logits(self.layer, x)


def logits(model: Any, x: Tensor) -> Tensor:
    """What a model says of token ids (batch, length); a decoder beside an encoder is shown the first two."""
    more = {"decoder_input_ids": x[:, :2]} if model.config.is_encoder_decoder else {}
    found: Tensor = model(input_ids=x, **more).logits
    return found
