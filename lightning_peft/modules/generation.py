"""What a model writes, as tokens and as texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_peft.modules.pretrained import padding_of
from lightning_peft.strategies import is_sharded

DEFAULTS: Mapping[str, Any] = {"max_new_tokens": 64, "do_sample": False}
"""What a module's `generation` says where the user's does not, whatever the model's own generation_config says."""


class Generated(TypedDict):
    """What was written: ``tokens`` (rows, new), padded where a row ended before the longest; the same as ``texts``."""

    tokens: Tensor
    texts: list[str]


def write(module: LightningModule, batch: Mapping[str, Any], settings: Mapping[str, Any], skip: int = 0) -> Generated:
    """Let a module's transformers model write behind a batch.

    Args:
        module: with a `model`, and its `tokenizer`.
        batch: ``input_ids`` and ``attention_mask``.
        settings: arguments of transformers' ``generate``.
        skip: tokens of the output that were given and not written.
    """
    model: Any = module.model
    tokenizer: Any = module.tokenizer
    how = {"pad_token_id": padding_of(tokenizer), **settings}
    if settings.get("stop_strings"):
        how["tokenizer"] = tokenizer  # by which transformers knows them in tokens
    if module.trainer.world_size > 1 and is_sharded(module.trainer.strategy):
        how["synced_gpus"] = True  # a process that is done goes on with the others, which need its part of the weights
    given = {name: batch[name] for name in ("input_ids", "attention_mask")}
    tokens: Tensor = model.generate(**given, **how)[:, skip:]
    return {"tokens": tokens, "texts": tokenizer.batch_decode(tokens, skip_special_tokens=True)}
