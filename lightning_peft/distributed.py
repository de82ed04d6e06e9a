"""What crosses processes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process, by rank; a list of one where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
