"""Which positions of a batch of text are shown to the model, and which only pad it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def text_of(batch: Any) -> Mapping[str, Any] | None:
    """The batch, or the first part of a list or tuple, that is a mapping with an `attention_mask` of two dimensions."""
    parts = [batch, *batch] if isinstance(batch, list | tuple) else [batch]
    found = next((part for part in parts if isinstance(part, Mapping) and "attention_mask" in part), None)
    mask = None if found is None else found["attention_mask"]
    return found if isinstance(mask, Tensor) and mask.dim() == 2 else None


def attention_mask_of(batch: Any) -> Tensor | None:
    """The `attention_mask` of a batch, (batch, length); ``None`` where it has none of two dimensions."""
    text = text_of(batch)
    return None if text is None else text["attention_mask"]
