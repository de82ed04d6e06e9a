"""Mistakes with a transformers model that has a prompt in front."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from misuse.setups import Rows
from prompted import build
from torch import nn

from lightning_peft import SoftPrompt, inject, merge

IDS = torch.arange(3, 9).view(1, 6)


class Holder(nn.Module):
    """Holds transformers models, as a LightningModule does."""

    def __init__(self, *kinds: str) -> None:
        super().__init__()
        for name, kind in zip(("model", "other"), kinds, strict=False):
            setattr(self, name, build(kind))


def prompted(kind: str = "llama", **options: Any) -> Any:
    holder = Holder(kind)
    inject(holder, partial(SoftPrompt, **options))
    return holder


def vision() -> None:
    from transformers import ViTConfig, ViTModel

    small = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    SoftPrompt(ViTModel(ViTConfig(**small, image_size=8, patch_size=4)))


def twice() -> None:
    inject(prompted(), SoftPrompt)


def filled_cache() -> None:
    model = prompted().model
    cache = model(input_ids=IDS, use_cache=True).past_key_values
    model.generate(input_ids=IDS, past_key_values=cache)


def foreign_cache() -> None:
    model = prompted().model
    cache = model.base(input_ids=IDS, use_cache=True).past_key_values
    model(input_ids=IDS, past_key_values=cache)


def prefix() -> None:
    with prompted("t5").model.prefix_cached():
        pass


ROWS: Rows = {
    "a prompt for a model by itself": (lambda: inject(build("bert"), SoftPrompt), TypeError),
    "a prompt for one of two models": (lambda: inject(Holder("bert", "t5"), SoftPrompt), ValueError),
    "a prompt for a layer": (lambda: inject(Holder("bert"), SoftPrompt, ["query"]), ValueError),
    "a prompt for a model of images": (vision, TypeError),
    "a second prompt": (twice, ValueError),
    "a prompt of nothing": (lambda: prompted(length=0), ValueError),
    "a prompt as long as the model can read": (lambda: prompted("roberta", length=32), ValueError),
    "a text that is too long with its prompt": (
        lambda: prompted("bert", length=20).model(input_ids=torch.full((2, 16), 3)),
        ValueError,
    ),
    "a misspelt position of a prompt": (lambda: prompted(prompt_position="after_bos"), ValueError),
    "a misspelt start of a prompt": (lambda: prompted(init="vocab"), ValueError),
    "a prompt that starts as a text by its words": (
        lambda: prompted(init="text", text_ids="Classify this text."),
        TypeError,
    ),
    "ids and embeddings of a text with a prompt": (
        lambda: prompted().model(input_ids=IDS, inputs_embeds=torch.zeros(1, 6, 16)),
        ValueError,
    ),
    "texts in three dimensions with a prompt": (lambda: prompted("bert").model(input_ids=IDS[None]), ValueError),
    "packed texts with a prompt": (
        lambda: prompted().model(input_ids=IDS, attention_mask=torch.ones(1, 1, 6, 6)),
        ValueError,
    ),
    "a static cache with a prompt": (
        lambda: prompted().model.generate(input_ids=IDS, cache_implementation="static", max_new_tokens=2),
        ValueError,
    ),
    "a filled cache to go on from, with a prompt": (filled_cache, ValueError),
    "a cache without the prompt": (foreign_cache, ValueError),
    "guesses at the next tokens with a prompt": (
        lambda: prompted().model.generate(input_ids=IDS, prompt_lookup_num_tokens=2),
        ValueError,
    ),
    "a prefix for an encoder with a decoder": (prefix, ValueError),
    "a prompt to be merged": (lambda: merge(prompted()), TypeError),
}
