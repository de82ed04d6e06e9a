"""Which entries a sparse adapter trains where weights or data are asked before the first step.

A choice by magnitude or gradient, of the sparse methods that SpaRTA's paper stands beside. Random entries need none of
it; these are what they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Literal

import torch
from torch import Tensor

from lightning_peft.adapters.entry_gradients import GradientSums, largest
from lightning_peft.adapters.layers import stored
from lightning_peft.adapters.sparse import require_movable, require_sparse
from lightning_peft.rank.budget import RankBudget
from lightning_peft.rank.probe import Alone, Probe, Processes


class EntrySelection(Probe):
    """Choose the entries that a sparse adapter trains by what the base's weights are, or by the loss's gradient.

        magnitude    the k_l entries of largest |W_l|
        gradient     the k_l entries of largest |dL/dW_l|, the mean over the batches

    As many in every tensor as were drawn at random, so that only the choice is another. By magnitude no batch is looked
    at. By gradient one float32 number per adapted weight is kept until the end: the memory of a full gradient of these
    layers, during calibration only, and entries of embeddings and of vectors are left as they were drawn.

    Args:
        by: "magnitude" or "gradient".

    Raises:
        TypeError: when it begins, an adapter is not sparse.
        ValueError: `by` is neither; or, when it begins, entries are gated in blocks.
        RuntimeError: when it begins, an adapter has been trained.

    Reference:
        By gradient: SIFT, which takes the top k of the first step's gradient in every tensor. By magnitude: one of the
        masks that SHiRA compares (remembered).
    """

    weights = True

    def __init__(self, by: Literal["magnitude", "gradient"]) -> None:
        if by not in ("magnitude", "gradient"):
            raise ValueError(f"by={by!r}: choose 'magnitude' or 'gradient'.")
        self.by = by
        self.reads = "inputs" if by == "magnitude" else "gradients"
        self._budget = RankBudget({})
        self._processes: Processes = Alone()
        self._sums = GradientSums({})
        self._unseen: list[str] = []

    def begin(self, budget: RankBudget, processes: Processes) -> None:
        for name, site in budget.items():
            if bool((require_movable(site, "EntrySelection").delta.detach() != 0).any()):
                raise RuntimeError(
                    f"the adapter at {name!r} has been trained, and to choose other entries would lose what it has "
                    "learned. Take the calibration out, or eject the adapters and inject new ones."
                )
        self._budget, self._processes, self._unseen = budget, processes, []
        self._sums = GradientSums(budget)

    def wanted(self) -> Collection[str]:
        return [] if self.by == "magnitude" else self._sums.wanted()

    def see(self, layer: str, x: Tensor, rows: Callable[[], Tensor], gradient: Callable[[], Tensor] | None) -> None:
        self._sums.see(layer, x, rows, gradient)

    @torch.no_grad()
    def act(self) -> dict[str, Tensor]:
        found = {name for names in self._processes.gather(list(self._sums.sums)) for name in names}
        for name, site in self._budget.items():
            if self.by == "gradient" and name not in found:
                self._unseen.append(name)
                continue
            # One layer at a time: a sharded base is gathered for it alone.
            if self.by == "gradient":
                worth = stored(site.adapter.base, self._processes.mean(self._sums.of(site)))
                self._sums.sums.pop(name, None)
            else:
                worth = self._processes.whole(site.adapter.base.weight).detach()  # type: ignore[arg-type]
            if not bool(worth.isfinite().all()):
                raise RuntimeError(
                    f"the {self.by} of the weight at {name!r} is not finite, so no entries can be chosen by it. Look "
                    "at the data and the base, or calibrate in float32."
                )
            adapter = require_sparse(site, "EntrySelection")
            adapter.move(largest(worth.reshape(-1), adapter.indices.numel())[0].sort().values)
        return {name: site.gate.mask.detach().cpu() != 0 for name, site in self._budget.items()}

    def unseen(self) -> list[str]:
        return self._unseen

    def report(self) -> str:
        chosen = [site for name, site in self._budget.items() if name not in self._unseen]
        entries = sum(require_sparse(site, "EntrySelection").indices.numel() for site in chosen)
        return f"EntrySelection: {entries:,} entries were chosen by {self.by}."
