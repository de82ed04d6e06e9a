"""Rows and batches of tokens for a language model: blocks of a stream, padded documents, and prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, default_collate

from lightning_peft.modules.documents import IGNORED


class LanguageBatch(TypedDict, total=False):
    """A batch, (batch, length) each: ``input_ids``, and ``labels``, which the model itself shifts; -100 has no loss.

    Rows that are padded have an ``attention_mask``. Packed documents have ``position_ids``, which begin again with each
    document, and ``document_ids``, numbered from 1 in each row; 0 is padding.
    """

    input_ids: Tensor
    labels: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    document_ids: Tensor


class Blocks(Dataset[Tensor]):
    """Texts one after the other as one row of tokens, cut into blocks of one length; what is left over is dropped.

    Args:
        ids: (n,) int32, the tokens.
        size: tokens per block.
        chosen: numbers of the blocks that belong to this set; ``None`` for all.
    """

    def __init__(self, ids: Tensor, size: int, chosen: Tensor | None = None) -> None:
        self.ids = ids[: len(ids) // size * size].view(-1, size)
        self.chosen = torch.arange(len(self.ids)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[self.chosen[index]]


class Prompts(Dataset[Tensor]):
    """Prompts, each with its last tokens if it is longer than there is room.

    Args:
        ids: tokens of each.
        size: tokens at most.
    Raises:
        ValueError: one is empty: there is nothing that a first token could follow.
    """

    def __init__(self, ids: Sequence[Sequence[int]], size: int) -> None:
        if empty := [number for number, row in enumerate(ids, 1) if not row]:
            raise ValueError(f"row {empty[0]} to predict is empty; a model goes on with at least one token.")
        self._ids = [torch.tensor(row[-size:], dtype=torch.int64) for row in ids]

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Tensor:
        return self._ids[index]


def stack(rows: list[Tensor]) -> LanguageBatch:
    """A batch of blocks."""
    ids = torch.stack(rows).long()
    return {"input_ids": ids, "labels": ids}


def stack_packed(rows: list[LanguageBatch]) -> LanguageBatch:
    """A batch of rows of packed documents."""
    batch: LanguageBatch = default_collate(rows)
    return batch


class PadRight:
    """Makes a batch of documents, padded behind their ends to its own longest.

    Args:
        pad_id: token that fills up.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: list[tuple[Tensor, Tensor]]) -> LanguageBatch:
        ids = [ids.long() for ids, _ in rows]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
            "labels": pad_sequence([labels.long() for _, labels in rows], batch_first=True, padding_value=IGNORED),
        }


class PadLeft:
    """Makes a batch of prompts, padded before their starts, since what is written follows their ends.

    Args:
        pad_id: token that fills up.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: list[Tensor]) -> LanguageBatch:
        masks = [torch.ones_like(row) for row in rows]
        return {
            "input_ids": pad_sequence(rows, batch_first=True, padding_value=self._pad_id, padding_side="left"),
            "attention_mask": pad_sequence(masks, batch_first=True, padding_side="left"),
        }
