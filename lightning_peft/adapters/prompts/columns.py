"""Columns: where a prompt's columns stand among those of a text, and how the two are put together and taken apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """m columns of a prompt in a batch of texts.

        first is None    [ P ; X ]                         before everything, paddings included
        else             [ X[:first+1] ; P ; X[first+1:] ] after one column of each text

    Args:
        length: m, columns of the prompt.
        first: (B,) the text's column that the prompt comes after; -1 for none.
    """

    length: int
    first: Tensor | None = None

    def put_together(self, prompt: Tensor, text: Tensor) -> Tensor:
        """(B, m, ...), or (1, m, ...) for all, and (B, L, ...) -> (B, m + L, ...)."""
        both = torch.cat([prompt.expand(len(text), *prompt.shape[1:]).to(text.dtype), text], 1)
        if self.first is None:
            return both
        column = torch.arange(both.shape[1], device=text.device)
        first = self.first[:, None]
        before, inside = column + self.length, column - first - 1
        return _gathered(both, torch.where(column <= first, before, inside.where(inside < self.length, column)))

    def filled(self, text: Tensor, value: int) -> Tensor:
        """The text's numbers, (B, L), with one number in all of the prompt's columns: (B, m + L)."""
        return self.put_together(text.new_full((1, self.length), value), text)

    def text_of(self, both: Tensor) -> Tensor:
        """(B, m + L, ...) -> (B, L, ...)."""
        if self.first is None:
            return both[:, self.length :]
        column = torch.arange(both.shape[1] - self.length, device=both.device)
        return _gathered(both, self.moved(column.expand(len(both), -1)))

    def moved(self, column: Tensor) -> Tensor:
        """Where columns of the text stand among all: (B, ...) -> (B, ...)."""
        if self.first is None:
            return column + self.length
        first = self.first.view(-1, *[1] * (column.dim() - 1))
        return column + self.length * (column > first)


def _gathered(both: Tensor, column: Tensor) -> Tensor:
    index = column.view(*column.shape, *[1] * (both.dim() - 2))
    return both.gather(1, index.expand(*column.shape, *both.shape[2:]))
