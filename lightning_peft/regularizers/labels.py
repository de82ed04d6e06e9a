"""The labels of a batch, where nobody says which they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor


def labels_of(batch: Any) -> Tensor | None:
    """Integers under "labels", or the second of two; ``None`` if there are none."""
    found = batch.get("labels") if isinstance(batch, Mapping) else None
    if found is None and isinstance(batch, Sequence) and len(batch) == 2:
        found = batch[1]
    return found if isinstance(found, Tensor) and not found.is_floating_point() else None
