"""Random numbers that a seed and a count tell: a run that is resumed draws on as it would have."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn


class CountedDraws(nn.Module):
    """Counts its draws, in a buffer named `draws` that it registers and a state dict holds.

    The number is kept outside of the buffer too, so that counting waits for no device.
    """

    draws: Tensor
    _count: int | None = None  # how many draws there were; None to look into the buffer

    def next_draw(self) -> int:
        """How many draws there were before this one."""
        count = int(self.draws) if self._count is None else self._count
        self._count = count + 1
        self.draws.fill_(self._count)
        return count

    def restored(self) -> None:
        """Go on from the number of draws in the buffer: a strategy that shards copies into it, and calls nobody."""
        self._put_down()
        self._count = None

    def _put_down(self) -> None:
        # Buffers may have been put back after steps that were only looked at.
        if self._count is not None:
            self.draws.fill_(self._count)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._put_down()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._count = None


def told_by(text: str, device: torch.device | str) -> torch.Generator:
    """A generator whose numbers are those of a text: the same in every process."""
    number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
    return torch.Generator(device).manual_seed(number)
