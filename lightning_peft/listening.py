"""Have a probe hear what adapted layers are called with: what the Calibration callback does, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_peft.adapters.rows import input_rows, output_rows
from lightning_peft.rank.budget import RankBudget, Site
from lightning_peft.rank.probe import Probe


def positions(batch: Any) -> Tensor | None:
    """Which positions of a batch of text count: (batch, length) bool; ``None`` for all.

    Where a batch, or a part of it, is a mapping with an `attention_mask` of two dimensions, those that it shows; and of
    these, if there are `labels` of the same shape, those whose label is not -100, as in PEFT.
    """
    parts = [batch, *batch] if isinstance(batch, list | tuple) else [batch]
    found = next((part for part in parts if isinstance(part, Mapping) and "attention_mask" in part), None)
    mask = None if found is None else found["attention_mask"]
    if found is None or not isinstance(mask, Tensor) or mask.dim() != 2:
        return None
    labels = found.get("labels")
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        return torch.logical_and(mask, labels != -100)
    return mask.bool()


@contextmanager
def heard(
    probe: Probe, budget: RankBudget, layers: Collection[str] | None = None, shown: Tensor | None = None
) -> Iterator[None]:
    """Have a probe hear every call of adapted layers, and of a probe of gradients their backward, inside the block.

    Args:
        probe: hears.
        budget: the adapters.
        layers: names of the layers that it is to hear; ``None`` for those that it wants.
        shown: (batch, length) bool, positions of a batch of text that count; see :func:`positions`.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from lightning_peft import EVA, LoRA, RankBudget, inject
        >>> from lightning_peft.rank.probe import Alone
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> _ = inject(net, partial(LoRA, rank=4), targets=["0"])
        >>> eva, budget = EVA(rank=2), RankBudget.of(net)
        >>> eva.begin(budget, Alone())
        >>> with heard(eva, budget):
        ...     _ = net(torch.randn(16, 8))
        >>> eva.fold()
        >>> budget.keep(eva.act())
        >>> budget.ranks()
        {'0': 2}
    """
    with ExitStack() as hooks:
        for name in probe.wanted() if layers is None else layers:
            listen = partial(_hear, probe, budget[name], shown)
            hook = budget[name].adapter.register_forward_hook(listen, with_kwargs=True)
            hooks.callback(hook.remove)
        yield


def _hear(
    probe: Probe, site: Site, shown: Tensor | None, adapter: Any, args: Any, kwargs: Mapping[str, Any], output: Any
) -> None:
    x = args[0] if args else next(iter(kwargs.values()))

    def rows(tensor: Tensor, of: Callable[[Any, Tensor], Tensor]) -> Tensor:
        tensor = tensor.detach()
        if shown is not None and tensor.dim() == 3 and tensor.shape[:2] == shown.shape:
            tensor = tensor[shown]
        return of(adapter.base, tensor)

    inputs = partial(rows, x, input_rows)
    if probe.reads == "inputs":
        probe.see(site.name, x, inputs, None)
    elif output.requires_grad:
        output.register_hook(lambda g: probe.see(site.name, x, inputs, partial(rows, g, output_rows)))
