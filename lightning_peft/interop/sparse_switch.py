"""One of several sparse adapters at a time in a plain model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_peft.functional.sparse_arithmetic import SparseDelta
from lightning_peft.interop.sparse import SparseAdapter, named_weights, require_fitting
from lightning_peft.surgery.layers import adapters


class SparseSwitch:
    """One of several sparse adapters at a time in a plain model, at no cost when it is called; switching is O(k).

        W.flat[i] <- original,   then   W.flat[j] <- cast(original + delta_j)

    Originals are kept as they were, so that without an adapter every weight is the base's, bit for bit.

    Args:
        model: without adapters inside; its weights are changed in place.

    Raises:
        ValueError: it has adapters.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> switch, before = SparseSwitch(net), net.weight.clone()
        >>> switch.to(SparseAdapter({"weight": SparseDelta(torch.tensor([1]), torch.tensor([0.5]), (2, 2))}))
        >>> bool((net.weight != before).sum() == 1)
        True
        >>> switch.to(None)
        >>> torch.equal(net.weight, before)
        True
    """

    def __init__(self, model: nn.Module) -> None:
        if adapters(model):
            raise ValueError(
                f"SparseSwitch writes into plain weights, and {type(model).__name__} has adapters. Take them out "
                "first, with eject or merge."
            )
        self.model = model
        self._undo: list[tuple[str, SparseDelta | None, Tensor]] = []  # names: a cast or a copy has other tensors

    @torch.no_grad()
    def to(self, adapter: SparseAdapter | None) -> None:
        """Have this adapter in the model instead of the one before; ``None`` for the plain base.

        Raises:
            AdapterFileError: it is not of this model. The one before stays.
        """
        named = named_weights(self.model)
        if adapter is not None:
            require_fitting("the adapter", adapter, {n: tuple(p.shape) for n, p in named.items()})
        while self._undo:
            name, delta, before = self._undo.pop()
            tensor = named[name].detach()
            before = before.to(tensor)
            if delta is None:
                tensor.copy_(before)
            else:
                delta.put_back(tensor, before)
        for name, delta in () if adapter is None else adapter.items():
            self._undo.append((name, delta, delta.write(named[name])))
        for name, new in {} if adapter is None else adapter.head.items():
            tensor = named[name].detach()
            self._undo.append((name, None, tensor.clone()))
            tensor.copy_(new)
