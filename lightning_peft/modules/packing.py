"""Several documents in one row of tokens, each with positions and attention of its own."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.utils.data import Dataset

from lightning_peft.adapters.prompts.text_model import TextModel
from lightning_peft.modules.documents import IGNORED, Documents


def best_fit(lengths: Sequence[int] | Tensor, size: int) -> list[list[int]]:
    """Which documents share a row: the longest first, each into the row that it fills best.

    Of rows with equal room the first is taken, of documents of equal length the first comes first: the same lengths
    have one packing, on every process.

    Args:
        lengths: tokens of each document, `size` at most.
        size: tokens of a row.

    Returns:
        For each row the numbers of its documents, in rising order.

    Example:
        >>> best_fit([5, 3, 4, 2, 6], size=8)
        [[3, 4], [0, 1], [2]]
    """
    lengths = torch.as_tensor(lengths)
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # what is free, and the row, in rising order
    for index in lengths.argsort(descending=True, stable=True).tolist():
        length = int(lengths[index])
        at = bisect_left(room, (length, 0))
        if at < len(room):
            free, row = room.pop(at)
        else:
            free, row = size, len(rows)
            rows.append([])
        rows[row].append(index)
        if free > length:
            insort(room, (free - length, row))
    return [sorted(row) for row in rows]


class Packed(Dataset[dict[str, Tensor]]):
    """Rows of one length with several documents each; what is left of a row is padded.

    Args:
        documents: the documents.
        size: tokens of a row.
        pad_id: token that fills up.
    """

    def __init__(self, documents: Documents, size: int, pad_id: int) -> None:
        self._documents, self._size, self._pad_id = documents, size, pad_id
        self.rows = best_fit(documents.lengths, size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """A row: tokens, labels, positions within documents, and numbers of the documents from 1 on; 0 is padding."""
        parts = [self._documents[i] for i in self.rows[index]]
        filled = sum(len(ids) for ids, _ in parts)
        rest = torch.zeros(self._size - filled, dtype=torch.int64)
        numbers = [torch.full((len(ids),), number) for number, (ids, _) in enumerate(parts, 1)]
        return {
            "input_ids": torch.cat([*(ids.long() for ids, _ in parts), rest + self._pad_id]),
            "labels": torch.cat([*(labels.long() for _, labels in parts), rest + IGNORED]),
            "position_ids": torch.cat([*(torch.arange(len(ids)) for ids, _ in parts), rest]),
            "document_ids": torch.cat([*numbers, rest]),
        }


def attention_within(documents: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to attention scores so that a token sees itself and those before it in its own document.

    Padding sees padding: a row of scores without any open place would be no number.

    Args:
        documents: number of each token's document, 0 for padding.
        dtype: of the scores.
    Shape:
        documents: (batch, length) -> (batch, 1, length, length); 0 where seen, the dtype's least number elsewhere
    """
    length = documents.shape[1]
    same = documents[:, None, :, None] == documents[:, None, None, :]
    seen = same & torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return torch.zeros(seen.shape, dtype=dtype, device=documents.device).masked_fill(~seen, torch.finfo(dtype).min)


def why_mixed(model: Any) -> str | None:
    """What about a transformers model would mix packed documents, as words that follow its kind; ``None`` if nothing.

    To be asked of the model itself: a wrapper's forward tells nothing.
    """
    config, parts = model.config, TextModel.of(model)
    if "position_ids" not in parts.arguments:
        return "takes none"  # ALiBi, recurrences: it counts on by itself
    if getattr(config, "alibi", False):
        return "weighs distances (ALiBi) that count across documents"
    if parts.carries_state():
        return "has layers that carry what they have read from one document into the next"
    if parts.first_position():  # as RoBERTa's: behind the number of the padding token
        return "counts positions from its padding token on"
    return "takes no mask for pairs of tokens" if config.model_type in _ONE_ROW_MASKS else None


_ONE_ROW_MASKS = {"openai-gpt"}


def require_packable(config: Any, mixed: str | None, length: int) -> None:
    """Check that a model keeps packed documents apart.

    Args:
        config: a transformers model's.
        mixed: what :func:`why_mixed` says of it.
        length: tokens of a row.

    Raises:
        MisconfigurationException: it would mix them, or its attention ignores or replaces our mask.
    """
    kind, remedy = config.model_type, "Use packing='none' for this model."
    if mixed:
        raise MisconfigurationException(
            f"packing='documents' gives each document its own positions, and a {kind} model {mixed}. {remedy}"
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention not in ("eager", "sdpa"):
        raise MisconfigurationException(
            f"packing='documents' needs attention that takes a mask per row, and this model has attn_implementation="
            f"{attention!r}. Load it with 'sdpa' or 'eager', or use packing='none'."
        )
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    window = min((size for size in (window, getattr(config, "attention_chunk_size", None)) if size), default=None)
    if window is not None and window < length:
        raise MisconfigurationException(
            f"this {kind} model attends within a window of {window} tokens, which a mask per document would undo in "
            f"rows of {length}. Use block_size={window} or less, or packing='none'."
        )
