"""Which entries a sparse adapter trains, where data or weights are asked: at the start, and as training goes on.

Of the sparse methods that SpaRTA's paper stands beside: a choice by magnitude or gradient before the first step, and
dropping and regrowing at events. Random entries need none of it; these are what they are compared with.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from math import floor
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.layers import matrix, stored
from lightning_peft.adapters.sparse import Sparse, require_sparse
from lightning_peft.arguments import require_number
from lightning_peft.listening import heard
from lightning_peft.rank.budget import RankBudget, Site
from lightning_peft.rank.importance import Importance
from lightning_peft.rank.policy import Policy
from lightning_peft.rank.probe import Alone, Probe, Processes
from lightning_peft.rank.schedule import Linear, Schedule


class EntrySelection(Probe):
    """Choose the entries that a sparse adapter trains by what the base's weights are, or by the loss's gradient.

        magnitude    the k_l entries of largest |W_l|
        gradient     the k_l entries of largest |dL/dW_l|, the mean over the batches

    As many in every tensor as were drawn at random, so that only the choice is another. By magnitude no batch is looked
    at. By gradient one float32 number per adapted weight is kept until the end: the memory of a full gradient of these
    layers, during calibration only. Entries of embeddings and of vectors are left as they were drawn.

    Args:
        by: "magnitude" or "gradient".

    Raises:
        ValueError: `by` is neither.
        RuntimeError: when it begins, an adapter is not sparse, or has been trained.

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
            if bool((require_sparse(site, "EntrySelection").delta.detach() != 0).any()):
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
        entries = sum(require_sparse(site, "").indices.numel() for site in self._budget.values())
        return f"EntrySelection: {entries:,} entries were chosen by {self.by}."


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


class DropAndRegrow(Policy):
    """Move entries of sparse adapters while they train: those that moved least go, where the gradient is largest, come.

        at an event, per layer:    n_t = floor(share k) (1 - done(t))
        drop the n_t entries of smallest |delta|;  grow the n_t of largest |dL/dW| that are not trained

    A dropped entry gets the base's value back, bit for bit; a grown one starts at delta 0, and an optimizer's averages
    of it at 0. Every layer keeps its number of entries, so no shape changes. The share falls with the schedule to 0 at
    the last event, from which on the entries stay.

    At an event the gradient of whole weights is computed, a product more per layer and one float32 number per adapted
    weight until the step; between events nothing is. Gradients are averaged over processes, so all move alike. Entries
    of embeddings and of vectors stay, and so do those of layers that took no part in the event's step.

    Args:
        share: of a layer's entries, at most so many move at an event, in (0, 1].
        schedule: the window of events, and how fast the share falls in it.
        interval: optimizer steps between two events.

    Raises:
        ValueError: share is out of range.
        TypeError: when it takes on adapters, one is not sparse.

    Reference:
        Ansell et al., SpIEL (sparse fine-tuning by accumulated gradients): criteria, a share of 0.2 that falls
        linearly, and events every 20 steps are remembered. Departures: the gradient is that of the event's own step;
        the exact largest are taken, where there candidates are gathered.
    """

    importance: EntryGradients

    def __init__(self, share: float = 0.2, schedule: Schedule | None = None, interval: int = 20) -> None:
        require_number("share", share)
        if not 0 < share <= 1:
            raise ValueError(f"share is how many of a layer's entries may move at an event, in (0, 1]. Got {share}.")
        schedule = Linear(warmup=0.05, tail=0.3) if schedule is None else schedule
        super().__init__(schedule, EntryGradients(share), interval)
        self.share = share
        self._moved: dict[nn.Parameter, Tensor] = {}

    @property
    def returning(self) -> str | None:
        return "drop-and-regrow moves entries between components there"

    def settings(self) -> dict[str, str]:
        return {"share": f"{self.share:g}", **super().settings()}

    def track(self, budget: RankBudget) -> None:
        for site in budget.values():
            require_sparse(site, "DropAndRegrow")
        super().track(budget)
        self._moved = {}

    def observes(self, step: int, total: int) -> bool:
        return self.is_event(step, total)

    def before_step(self, step: int, total: int) -> None:
        if self.is_event(step, total):
            self.importance.listen()

    def budget_at(self, step: int, total: int) -> int:
        return sum(int(site.gate.mask.sum()) for site in self._budget.values())

    def decide(self, step: int, total: int) -> dict[str, Tensor]:
        self._warn_of_divergence()
        return {name: site.gate.mask.detach() != 0 for name, site in self._budget.items()}

    @torch.no_grad()
    def apply(self, masks: Mapping[str, Tensor], step: int, total: int) -> None:
        super().apply(masks, step, total)
        heard_of = False
        for name, (places, strength) in self.importance.candidates().items():
            adapter = require_sparse(self._budget[name], "DropAndRegrow")
            heard_of |= bool((strength > 0).any())
            count = self.schedule.budget(step, total, len(places), 0)
            grown = places[:count][strength[:count] > 0]
            if len(grown):
                self._moved[adapter.delta] = replace_least(adapter, grown)
        if not heard_of and self.schedule.budget(step, total, 1000, 0):
            warnings.warn(
                f"drop-and-regrow moved nothing after step {step}: it heard no gradient of that step. A module that "
                "takes several optimizer steps in one batch, or that was compiled before, is not heard.",
                stacklevel=2,
            )
        self.importance.spend()

    def moved(self) -> Mapping[nn.Parameter, Tensor]:
        moved, self._moved = self._moved, {}
        return moved


def replace_least(adapter: Sparse, grown: Tensor) -> Tensor:
    """Let the entries that moved least go, and train these instead, from delta 0.

    Args:
        adapter: is changed.
        grown: (n,) positions in the flattened weight, none of which is trained yet.

    Returns:
        (k,) for every entry from now on its position among the old ones, -1 for a new one.
    """
    order = adapter.delta.detach().abs().argsort(stable=True)  # among equals the first goes
    left = adapter.indices[order[len(grown) :]].to(grown)
    return adapter.move(torch.cat([left, grown]).sort().values)


def largest(worth: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Positions of the entries of largest size, the best first, and their sizes; among equals the first positions."""
    size = worth.abs().float()
    if count == 0:
        return torch.zeros(0, dtype=torch.int64, device=worth.device), size[:0]
    # `topk` leaves open which of equal ones it takes; a stable sort of those at least as large does not.
    least = size.kthvalue(size.numel() - count + 1).values
    among = (size >= least).nonzero().flatten()
    best = among[size[among].argsort(descending=True, stable=True)][:count]
    return best, size[best]


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
