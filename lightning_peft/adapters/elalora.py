"""ElaLoRA (Chang et al., 2025): rank that moves between layers at a fixed total, by pruning and growing at each event.

The update is AdaLoRA's, so :class:`~lightning_peft.AdaLoRA` is the adapter, built with room, and its triplets' worth is
:class:`~lightning_peft.TripletImportance`. Here is what moves: :class:`PruneAndGrow`, and `policy`, which sets it up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_peft.adapters.adalora import TripletImportance
from lightning_peft.adapters.increlora import layer_worth, masks_now, spent, wake
from lightning_peft.arguments import require_integer
from lightning_peft.rank.allocation import Compare, close_some, open_highest, weighed
from lightning_peft.rank.budget import Budget, RankBudget
from lightning_peft.rank.importance import Importance
from lightning_peft.rank.policy import BudgetPolicy
from lightning_peft.rank.schedule import Linear, Schedule


class PruneAndGrow(BudgetPolicy):
    """Close the components of lowest worth and open as many in the layers of highest worth, at a fixed total.

        budget(t) = final from the first event on, what is open before it
        moves(t)  = moves - schedule.cut(t, T, moves)

    At an event `moves(t)` components are closed, over all layers together, and as many opened: exactly, in components;
    in parameters the budget is never exceeded. No layer loses or gains more than `limit` at once, or exceeds the
    components that its adapter was built with. If what is open before the first event is not the budget, it becomes it
    there. A layer's importance is the highest of its open components'. What is open after the last event is final.

    What this policy has closed opens again with a gain of 1e-5, and so does what has a gain of zero: it counts from
    then on, and hardly moves the output. Where the adapter has no gain a component comes back as it was.

    Args:
        schedule: the window of events, its warm-up and its tail, and how the number of moves falls in it.
        importance: what a component is worth.
        final: what may be spent, at every event.
        interval: optimizer steps between two events; the last step of the window is always one.
        moves: components that are closed, and opened, at the first event.
        limit: components that one layer may lose, and gain, at an event.
        minimum: components that every layer keeps.
        compare: "worth", or "worth_per_cost" to divide worth by the parameters that a component costs.

    Raises:
        TypeError: an argument is of another class.
        ValueError: interval, moves or limit is below 1, minimum is negative, or compare is unknown or of no effect.
    """

    def __init__(
        self,
        schedule: Schedule,
        importance: Importance,
        final: Budget,
        interval: int = 10,
        moves: int = 4,
        limit: int = 2,
        minimum: int = 0,
        compare: Compare = "worth",
    ) -> None:
        super().__init__(schedule, importance, final, interval, compare)
        for name, value, least in (("moves", moves, 1), ("limit", limit, 1), ("minimum", minimum, 0)):
            require_integer(name, value)
            if value < least:
                raise ValueError(f"{name} is a number of components, at least {least}. Got {value}.")
        self.moves = moves
        self.limit = limit
        self.minimum = minimum
        self._start = self._final = 0
        self._closed: dict[str, Tensor] = {}  # what this policy has closed and not opened again

    @property
    def returning(self) -> str:
        return "what this policy closes there may open again"

    def track(self, budget: RankBudget) -> None:
        """Take on the adapters of `budget`.

        Raises:
            ValueError: the final budget does not fit them.
        """
        self._final = self.final.amount(budget, self.minimum)
        super().track(budget)
        masks = masks_now(budget)
        self._start = spent(budget, masks, self.unit)
        self._closed = {name: torch.zeros_like(mask) for name, mask in masks.items()}

    def follow(self, budget: RankBudget, kept: Mapping[str, Tensor]) -> None:
        super().follow(budget, kept)
        self._closed = {name: self._closed[name][kept[name].cpu()] for name in budget}

    def budget_at(self, step: int, total: int) -> int:
        """What may be spent after this step, in the final budget's unit."""
        return self._final if step >= max(1, self.schedule.window(total)[0]) else self._start

    def moves_at(self, step: int, total: int) -> int:
        """How many components move at an event after this step."""
        return self.moves - self.schedule.cut(step, total, self.moves)

    def decide(self, step: int, total: int) -> dict[str, Tensor]:
        """The components that are open after this step: layer -> (n,) bool. Equal inputs, equal masks."""
        self._warn_of_divergence()
        before = masks_now(self._budget)
        scores = self.importance.scores()
        scores = {name: scores[name].detach().cpu() for name in before}
        weights = weighed(scores, self._budget.sizes("parameters"), self.compare)
        worth = layer_worth(before, scores, self._budget, self.compare)
        sizes, budget = self._budget.sizes(self.unit), self.budget_at(step, total)
        room = sum(min(self.limit, int((~mask).sum())) for mask in before.values())
        masks = close_some(before, weights, min(self.moves_at(step, total), room), self.limit, self.minimum)
        excess = spent(self._budget, masks, self.unit) - budget
        while excess > 0:  # more was open before the first event
            fewest = -(-excess // max(sizes.values()))
            masks = close_some(masks, weights, fewest, minimum=self.minimum)
            excess = spent(self._budget, masks, self.unit) - budget
        # What was closed just now is no candidate: it would come back without its gain.
        taken = {name: masks[name] | before[name] for name in masks}
        grown = open_highest(taken, scores, worth, sizes, -excess, limit=self.limit)
        masks = {name: masks[name] | (grown[name] & ~taken[name]) for name in masks}
        left = budget - spent(self._budget, masks, self.unit)
        return open_highest(masks, scores, worth, sizes, left)

    def apply(self, masks: Mapping[str, Tensor], step: int, total: int) -> None:
        """Write the masks, and give what opens a gain."""
        before = masks_now(self._budget)
        for name, site in self._budget.items():
            opened = masks[name].cpu().bool()
            if site.gate.gain is not None:
                # Also what was closed at an event before: an optimizer's momentum has moved it since.
                site.gate.keep(~(self._closed[name] | (before[name] & ~opened)).to(site.gate.mask.device), soft=True)
            self._closed[name] = (self._closed[name] | before[name]) & ~opened
        wake(self._budget, masks)
        super().apply(masks, step, total)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"start": self._start, "closed": dict(self._closed)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._start = int(state["start"])
        self._closed = {name: mask.cpu().bool() for name, mask in state["closed"].items()}


def policy(
    final: Budget,
    warmup: float = 0.1,
    tail: float = 0.3,
    interval: int = 10,
    moves: int = 4,
    limit: int = 2,
    beta1: float = 0.85,
    beta2: float = 0.85,
    minimum: int = 0,
) -> PruneAndGrow:
    """The paper's policy in its three phases: warm-up, elastic ranks, and a tail in which they are stable.

    Args:
        final: what may be spent; `Budget(rank=r)` is the paper's.
        warmup: share of the run before ranks move.
        tail: share of the run after the last move.
        interval: optimizer steps between two events.
        moves: components that are closed, and opened, at the first event; b in the authors' scripts.
        limit: components that one layer may lose, and gain, at an event; k there.
        beta1: how much of the running sensitivity is kept at a step.
        beta2: how much of the running uncertainty is kept at a step.
        minimum: components that every layer keeps.

    Reference:
        Chang et al., ElaLoRA, 2025, arXiv 2504.00254: the abstract, and the list of settings in a copy of the authors'
        page (b components a round, at most k in one layer, b falling with time, which its scheduler switches on), with
        the values of its example on RTE. Neither text nor code was read. So these are our choice: how b falls (evenly,
        to 0 at the last event), a layer's importance (of its best open component), which components a layer opens,
        their gain when they open, and warm-up and tail as shares of the run.
    """
    importance = TripletImportance(beta1, beta2)
    return PruneAndGrow(Linear(warmup, tail), importance, final, interval, moves, limit, minimum)
