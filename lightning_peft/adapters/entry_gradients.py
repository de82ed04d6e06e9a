"""Gradients of whole weights, heard at sparse adapters; and what those of an optimizer step say of single entries."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from math import floor

import torch
from torch import Tensor, nn

from lightning_peft.adapters.layers import matrix, stored
from lightning_peft.adapters.sparse import require_sparse
from lightning_peft.listening import heard
from lightning_peft.rank.budget import RankBudget, Site
from lightning_peft.rank.importance import Importance
from lightning_peft.rank.probe import Probe, Processes


class GradientSums(Probe):
    """Sums of whole weights' gradients, by layer: (d_out, d_in) in float32."""

    reads = "gradients"
    weights = True

    def __init__(self, budget: Mapping[str, Site], hears: bool = False) -> None:
        self.budget = budget
        self.hears = hears
        self.sums: dict[str, Tensor] = {}

    def begin(self, budget: RankBudget, processes: Processes) -> None:
        self.budget, self.sums = budget, {}

    def wanted(self) -> Collection[str]:
        # An embedding's gradient is no product of rows, and a vector's no matrix.
        return [
            name
            for name, site in self.budget.items()
            if not isinstance(site.adapter.base, nn.Embedding) and site.adapter.base.weight.dim() > 1  # type: ignore[operator]
        ]

    @torch.no_grad()
    def see(self, layer: str, x: Tensor, rows: Callable[[], Tensor], gradient: Callable[[], Tensor] | None) -> None:
        if gradient is not None and x.is_floating_point():
            self.of(self.budget[layer]).addmm_(gradient().float().mT, rows().float())

    def of(self, site: Site) -> Tensor:
        """The sum so far; zeros where nothing was heard."""
        if site.name not in self.sums:
            weight = matrix(site.adapter.base)
            device = require_sparse(site, "a sum of gradients").delta.device
            self.sums[site.name] = torch.zeros(weight.shape, dtype=torch.float32, device=device)
        return self.sums[site.name]

    def act(self) -> dict[str, Tensor]:
        return {}

    def unseen(self) -> list[str]:
        return [name for name in self.budget if name not in self.sums]


class EntryGradients(Importance):
    """What drop-and-regrow goes by: how far entries have moved, and where the gradient of the others is largest.

        worth of a component = mean |delta_j| over its entries
        candidates           = the c_l entries of largest |dL/dW_l| among those that are not trained

    The gradient is that of one optimizer step, over all its micro-batches and processes, heard at the layers: what they
    are called with and the loss's gradient by what they give, for one float32 number per adapted weight. It is kept
    from a step's first batch until the step, and of it only the candidates.

    Args:
        share: c_l is this share of a layer's entries.
    """

    reads = "gradients"

    def __init__(self, share: float) -> None:
        super().__init__(beta=0.0)
        self.share = share
        self._sites: list[Site] = []
        self._places: list[Tensor] = []
        self._strength: list[Tensor] = []
        self._sums = GradientSums({})
        self._hooks = ExitStack()

    def track(self, budget: RankBudget) -> None:
        super().track(budget)
        self._sites = list(budget.values())
        deltas = [require_sparse(site, "DropAndRegrow").delta for site in self._sites]
        counts = [floor(self.share * delta.numel()) for delta in deltas]
        self._places = [torch.zeros(c, dtype=torch.int64, device=d.device) for c, d in zip(counts, deltas, strict=True)]
        self._strength = [torch.zeros(c, device=d.device) for c, d in zip(counts, deltas, strict=True)]
        self.release()

    def cut(self, budget: RankBudget, kept: Mapping[str, Tensor]) -> None:
        rows = {name: row[kept[name].to(row.device)] for name, row in self.scores().items() if name in budget}
        self.track(budget)  # candidates are of one step
        for name, row in self.scores().items():
            row.copy_(rows[name])

    def listen(self) -> None:
        """Hear the gradient of every weight from the next forward pass on, until the step that it is for."""
        if not self._sums.hears:
            budget = RankBudget({site.name: site for site in self._sites})
            self._sums = GradientSums(budget, hears=True)
            self._hooks.enter_context(heard(self._sums, budget))

    def release(self) -> None:
        self._hooks.close()
        self._sums = GradientSums({})

    def gradients(self) -> list[Tensor]:
        return [self._sums.of(site).view(-1) for site in self._sites] if self._sums.hears else []

    def measure(self, group: list[Site]) -> Tensor:
        deltas: list[Tensor] = [require_sparse(site, "DropAndRegrow").delta for site in group]
        grads = [torch.zeros_like(delta) if delta.grad is None else delta.grad for delta in deltas]
        # A step that is not finite counts for nothing: 0 where the gradient is finite.
        now = torch.stack(deltas).detach().float().abs() + (torch.stack(grads).float() * 0)
        return now if now.dim() == 2 else now.mean(2)

    @torch.no_grad()
    def worth_now(self) -> list[Tensor]:
        found = super().worth_now()
        for site, places in zip(self._sites, self._places, strict=True):
            if self._sums.hears:
                adapter = require_sparse(site, "DropAndRegrow")
                worth = stored(adapter.base, self._sums.of(site)).reshape(-1).abs()
                worth[adapter.indices.long()] = 0
                best, strength = largest(worth, len(places))
                found += [best, strength]
            else:
                found += [torch.zeros_like(places), torch.zeros(len(places), device=places.device)]
        self.release()
        return found

    @torch.no_grad()
    def fold(self, now: list[Tensor], expect_overflow: bool = False, skipped: Tensor | None = None) -> None:
        groups = len(self._groups)
        super().fold(now[:groups], expect_overflow, skipped)
        pairs = zip(now[groups::2], now[groups + 1 :: 2], self._places, self._strength, strict=True)
        for best, new, places, strength in pairs:
            fine = new.isfinite().all()
            if skipped is not None:
                fine = fine & (skipped == 0).to(fine.device, non_blocking=True)
            places.copy_(torch.where(fine, best, places))
            strength.copy_(torch.where(fine, new, strength))

    def candidates(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Entries to grow by layer, the best first, and their gradients' sizes; 0 where there is none."""
        rows = zip(self._sites, self._places, self._strength, strict=True)
        return {site.name: (places, strength) for site, places, strength in rows}

    def spend(self) -> None:
        """Forget the candidates: they were of one step."""
        for strength in self._strength:
            strength.zero_()

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        names = [site.name for site in self._sites]
        return super().statistics() | {
            "places": dict(zip(names, self._places, strict=True)),
            "strength": dict(zip(names, self._strength, strict=True)),
        }


def largest(worth: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions of the entries of largest size, the best first, and their sizes; among equals the first positions.

    What is no number counts as infinitely large.
    """
    size = worth.abs().float().nan_to_num(nan=torch.inf, posinf=torch.inf)  # as many, whatever there is
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=worth.device), size[:0]
    # `topk` leaves open which of equal ones it takes; a stable sort of those at least as large does not.
    least = size.kthvalue(size.numel() - count + 1).values
    among = (size >= least).nonzero().flatten()
    best = among[size[among].argsort(descending=True, stable=True)][:count]
    return best, size[best]
