"""Layers by the role that they have in a transformer, whatever their architecture calls them."""

from __future__ import annotations

from torch import nn

from lightning_peft.adapters.attention import has_in_proj
from lightning_peft.adapters.layers import why_not
from lightning_peft.patterns import matches
from lightning_peft.rank.budget import clean_name

_INNER = r"(self_attn|encoder_attn|cross_attn|self_attention|attention|attn)"
# The value projection and the output projection of an attention, as architectures name them.
_VALUE_AND_OUTPUT = (
    (r"attention\.self\.value(_proj)?", r"attention\.output\.dense"),  # BERT, RoBERTa, ELECTRA, DeBERTa
    (r"attention\.attention\.value", r"attention\.output\.dense"),  # ViT
    (r"attention\.value", r"attention\.dense"),  # ALBERT
    (r"attention\.attn\.v", r"attention\.attn\.o"),  # MPNet
    (r"attention\.v_lin", r"attention\.out_lin"),  # DistilBERT
    (r"(Self|EncDec)Attention\.v", r"(Self|EncDec)Attention\.o"),  # T5
    (rf"{_INNER}\.v_proj", rf"{_INNER}\.(o_proj|out_proj)"),  # Llama, Mistral, Gemma, Qwen, OPT, BART, Whisper
)
# Query, key and value in one layer: the value's rows have no name of their own.
_FUSED = r"(c_attn|query_key_value|qkv|qkv_proj|Wqkv|W_pack)"


def value_and_output(module: nn.Module) -> list[str]:
    """Patterns of the value and output projections of a module's attentions, cross-attention included.

    Raises:
        ValueError: there are none by the names that are known, or an attention has query, key and value in one layer.
    """
    named = {clean_name(name): child for name, child in module.named_modules()}
    layers = [name for name, child in named.items() if why_not(child) is None]
    fused = next((f"{name}.in_proj".lstrip(".") for name, child in named.items() if has_in_proj(child)), None)
    fused = fused or next((name for name in layers if matches([_FUSED], name)), None)
    if fused is not None:
        raise ValueError(
            f"{fused!r} projects to query, key and value in one layer, so the value's part cannot be chosen by itself. "
            f"Name the layers to adapt: targets=[{fused.rpartition('.')[2]!r}, ...]."
        )
    found: list[str] = []
    for pair in _VALUE_AND_OUTPUT:
        if all(any(matches([pattern], name) for name in layers) for pattern in pair):
            found += pair
    if not found:
        names = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))[:8]
        raise ValueError(
            f"{type(module).__name__} has no value and output projections by a known name, which are adapted where "
            f"nobody says which layers. Name them: targets=[...]; there are {', '.join(map(repr, names)) or 'none'}."
        )
    return list(dict.fromkeys(found))
