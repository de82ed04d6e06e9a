"""Adapters of a few entries of a weight that are written into the weight itself: when they are, and how it is undone.

Which entries these are, and what is computed with the weight, is a subclass's matter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.written import Written, batches, whole
from lightning_peft.functional.low_rank import _is_watched
from lightning_peft.functional.sparse import index_fault
from lightning_peft.functional.sparse_layers import spread
from lightning_peft.rank.gate import Gate


class WrittenEntries(Adapter):
    """Trained entries that stand in the base's weight itself.

        W.flat[I] = cast( original + scaling * (m * delta) )

    Args:
        base: a layer with a weight.
        scaling: what multiplies delta.

    Attributes:
        indices: (k,) flat positions in the weight as it is stored, ascending.
        original: (k,) the base's own numbers there.
        delta: (k,), or (n, s) for n components of s entries; in float32, or the base's dtype where that is wider.
    """

    writes_base: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = ("indices", "original")

    gate: Gate
    delta: nn.Parameter
    indices: Tensor
    original: Tensor
    scaling: float

    def __init__(self, base: nn.Module, scaling: float) -> None:
        super().__init__(base)
        self.scaling = scaling
        weight: Tensor = base.weight  # type: ignore[assignment]
        rows = weight.shape[0] if weight.dim() > 1 else 1
        self._matrix = rows, weight.numel() // rows
        self._written = Written(weight)

    def _begin_at(self, indices: Tensor, block: int) -> None:
        """Train these entries, of which components have `block` each, from what the base has there."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        n = len(indices) // block
        shape = (n,) if block == 1 else (n, block)
        wide = torch.promote_types(weight.dtype, torch.float32)
        self.delta = nn.Parameter(torch.zeros(shape, dtype=wide, device=weight.device))
        self.gate = Gate(n, cost=block).to(weight.device)
        self.register_buffer("indices", indices)
        self.register_buffer("original", self._read())
        self._note()

    @torch.no_grad()
    def _read(self) -> Tensor:
        """The base's numbers at the entries: (k,)."""
        return whole(self.base.weight.detach()).reshape(-1)[self.indices]  # type: ignore[operator]

    def value(self) -> Tensor:
        """What multiplies each component, scaling included: (n,)."""
        value = self.gate.value()
        return value if self.scaling == 1 else value * self.scaling

    # When the entries are written.

    def _note(self) -> None:
        """The weight holds the entries as they are now."""
        note = self._written
        note.weight = self.base.weight  # type: ignore[assignment]
        note.delta, note.mask, note.touched = self._state(), self.gate.mask._version, False

    def _state(self) -> object:
        """What tells delta and scaling from others: which tensor it is, where its numbers lie, how often it changed."""
        place = None if hasattr(self.delta, "to_local") else self.delta.data_ptr()
        return id(self.delta), place, self.delta._version, self.scaling

    def _is_ready(self) -> bool:
        """Whether the base's weight holds the entries as they are now; they are written if they may be."""
        note = self._written
        changed = note.delta != self._state()
        if not changed and note.mask == self.gate.mask._version and (note.followed or not note.touched):
            return True
        if note.weight is None:
            note.weight = self.base.weight  # type: ignore[assignment]
        if note.weight is not self.base.weight:
            return False
        # DDP writes the same mask anew at every forward, and most backwards are followed by no unseen step: then what
        # is written is what is there, and graphs that hold it may go on.
        self._write([self], quietly=not changed)
        return True

    @classmethod
    def refresh(cls, group: Sequence[Adapter], followed: bool | None = None) -> None:
        mine = [adapter for adapter in group if isinstance(adapter, WrittenEntries)]
        cls._write(mine)
        if followed is not None:
            for adapter in mine:
                adapter._written.followed = followed

    @staticmethod
    @torch.no_grad()
    def _write(group: Sequence[WrittenEntries], quietly: bool = False) -> None:
        kinds: dict[object, list[WrittenEntries]] = {}
        for adapter in group:
            kinds.setdefault((adapter.original.dtype, adapter.delta.dtype, adapter.delta.device), []).append(adapter)
        for alike in kinds.values():
            for part in batches([len(adapter.indices) for adapter in alike]):
                few = alike[part]
                delta = _joined([adapter.delta.reshape(-1) for adapter in few])
                value = _joined(
                    [spread(adapter.value(), adapter.delta).expand_as(adapter.delta).reshape(-1) for adapter in few]
                )
                original = _joined([adapter.original for adapter in few])
                update = delta * value
                # What is not changed keeps its very bits, the sign of a zero as well.
                entries = torch.where(update != 0, (original + update).to(original.dtype), original)
                for adapter, own in zip(few, entries.split([len(adapter.indices) for adapter in few]), strict=True):
                    adapter._written.write(adapter.base.weight, adapter.indices, own, quietly)  # type: ignore[arg-type]
                    adapter._note()

    @torch.no_grad()
    def restore_base(self) -> None:
        # Quietly: a look at the base after a backward is no change. Between a forward and its backward there is none.
        self._written.write(self.base.weight, self.indices, self.original, quietly=True)  # type: ignore[arg-type]
        self._written.delta = None

    def _is_plain(self) -> bool:
        """Whether nobody has to see through what is computed, and delta is itself."""
        if _is_watched():
            self._written.touched = True
            return False
        return type(self.delta) is nn.Parameter and self.gate.drawn is None

    # What becomes of it.

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WrittenEntries:
        before = self.delta.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        wide = torch.promote_types(weight.dtype, torch.float32)
        if self.delta.dtype != wide:
            known = self.delta.data if before.is_meta else before.to(self.delta.device)
            gradient, self.delta.grad = self.delta.grad, None
            self.delta.data = known.to(wide)
            self.delta.grad = None if gradient is None else gradient.to(wide)
        self._written = Written(weight)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self._is_plain():
            self._is_ready()  # what is saved of the base is what acts
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        given = state_dict.get(f"{prefix}indices")
        if isinstance(given, Tensor) and given.shape == self.indices.shape and not given.is_meta:
            fault = index_fault(given, self._matrix[0] * self._matrix[1])
            if fault is not None:
                error_msgs.append(f"{prefix}indices are no positions in the layer's weight: {fault}.")
                return
        was = state_dict.get(f"{prefix}original")
        if (given is None) != (was is None):
            missing = "original" if was is None else "indices"
            error_msgs.append(
                f"{prefix}indices and {prefix}original go together, and {prefix}{missing} is not there: without both "
                "the base could not be had back."
            )
            return
        self.restore_base()  # the entries that it had may not be those that it gets
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        if local_metadata.get("assign_to_params_buffers", False):
            self._written.weight = None
        elif (
            isinstance(was, Tensor) and was.dtype != self.base.weight.dtype and f"{prefix}base.weight" not in state_dict
        ):
            with torch.no_grad():
                self.original.copy_(self._read())  # the base's own numbers, where the file has them rounded


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
