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


def shown_texts(batch: Any) -> list[tuple[Tensor | None, Tensor]]:
    """The texts of a batch: `input_ids`, where they have that name, and which of them are text and no padding.

    One for every mapping in it that says so, by its `attention_mask`: (batch, length), or whole numbers for every pair
    of tokens, (batch, [heads,] length, length), of which those are text that some token sees. Without one by the
    `document_ids` of packed rows, where 0 is padding. What is shown is (batch, length) bool.
    """
    found = []
    for part in [batch, *batch] if isinstance(batch, list | tuple) else [batch]:
        shown = _shown(part) if isinstance(part, Mapping) else None
        if shown is not None:
            ids = part.get("input_ids")
            found.append((ids if isinstance(ids, Tensor) else None, shown))
    return found


def _shown(text: Mapping[str, Any]) -> Tensor | None:
    mask, documents = text.get("attention_mask"), text.get("document_ids")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.ne(0)
    # Of floats it is not known whether 0 hides or shows: they may be added to scores.
    if isinstance(mask, Tensor) and mask.dim() in (3, 4) and not mask.is_floating_point():
        return mask.ne(0).flatten(1, -2).any(1)
    if isinstance(documents, Tensor) and documents.dim() == 2:
        return documents.ne(0)
    return None
