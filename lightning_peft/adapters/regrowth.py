"""Which entries a sparse adapter trains as training goes on: some are dropped and others grown, at events.

Of the sparse methods that SpaRTA's paper stands beside. Random entries need none of it; they are compared with it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.entry_gradients import EntryGradients
from lightning_peft.adapters.sparse import Sparse, require_movable, require_sparse
from lightning_peft.arguments import require_number
from lightning_peft.rank.budget import RankBudget
from lightning_peft.rank.policy import Policy
from lightning_peft.rank.schedule import Linear, Schedule


class DropAndRegrow(Policy):
    """Move entries of sparse adapters while they train: those that moved least go, where the gradient is largest, come.

        at an event, per layer:    n_t = floor(share k) (1 - done(t))
        drop the n_t entries of smallest |delta|;  grow the n_t of largest |dL/dW| that are not trained

    A dropped entry gets the base's value back, bit for bit; a grown one starts at delta 0. An optimizer's average of
    its gradient starts at 0, and that of its square at the mean of the entries that stay (ours): from 0 its first steps
    would be several times the rate, as the optimizer takes it for as old as the others. Every layer keeps its number of
    entries, so no shape changes. The share falls with the schedule to 0 at the last event, from which on the entries
    stay.

    At an event the gradient of whole weights is computed, a product more per layer and one float32 number per adapted
    weight until the step; between events nothing is. Gradients are averaged over processes, so all move alike. Entries
    of embeddings and of vectors stay, and so do those of layers that took no part in the event's step.

    Args:
        share: of a layer's entries, at most so many move at an event, in (0, 1].
        schedule: the window of events, and how fast the share falls in it.
        interval: optimizer steps between two events.

    Raises:
        ValueError: share is out of range; or, when it takes on adapters, entries are gated in blocks.
        TypeError: when it takes on adapters, one is not sparse.

    Reference:
        Ansell et al., SpIEL (sparse fine-tuning by accumulated gradients): criteria, a share of 0.2 that falls
        linearly, and events every 20 steps are remembered. Departures: the gradient is that of the event's own step;
        the exact largest are taken, where there candidates are gathered.
    """

    importance: EntryGradients
    moves_entries: ClassVar[bool] = True

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
            require_movable(site, "DropAndRegrow")
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
