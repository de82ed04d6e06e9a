"""Who decides which components are open: what every policy shares, and RankPolicy, which closes them on schedule."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_peft.arguments import require_instance, require_integer
from lightning_peft.rank.allocation import Compare, close_lowest, weighed
from lightning_peft.rank.budget import Budget, RankBudget, Unit
from lightning_peft.rank.importance import Importance
from lightning_peft.rank.schedule import Schedule


class Policy(ABC):
    """Decide which components are open as training goes on: what `RankPruning` drives and `RankMonitor` shows.

        event(t) = start <= t <= last and ( (t - start) mod interval == 0  or  t == last )

    A subclass says what may be spent and which components are open; what is open after the last event is final. Steps
    are optimizer steps, counted from 1.

    Args:
        schedule: the window of events, and how fast the budget moves in it.
        importance: what a component is worth.
        interval: optimizer steps between two events; the last step of the window is always one.

    Raises:
        TypeError: an argument is of another class.
        ValueError: interval is below 1.
    """

    moves_entries: ClassVar[bool] = False
    """Whether components come to stand for something else while they train."""

    def __init__(self, schedule: Schedule, importance: Importance, interval: int) -> None:
        require_instance("schedule", schedule, Schedule, "Cubic()")
        require_instance("importance", importance, Importance, "Taylor()")
        require_integer("interval", interval)
        if interval < 1:
            raise ValueError(f"interval is a number of optimizer steps, at least 1. Got {interval}.")
        self.schedule = schedule
        self.importance = importance
        self.interval = interval
        self._budget = RankBudget({})

    @property
    def budget(self) -> RankBudget:
        """The adapters that are tracked, as they are now."""
        return self._budget

    @property
    def unit(self) -> Unit:
        """What :meth:`budget_at` counts."""
        return "components"

    @property
    def final_budget(self) -> Budget | None:
        """What may be spent at the end; ``None`` if the method leaves open how many components stay."""
        return None

    @property
    def returning(self) -> str | None:
        """How components that were closed before the last event may open again; ``None`` if they may be cut out."""
        return None

    def settings(self) -> dict[str, str]:
        """What distinguishes this policy, for tables of runs."""
        return {"schedule": str(self.schedule)}

    def track(self, budget: RankBudget) -> None:
        """Take on the adapters of `budget`; importance starts at zero."""
        self._budget = budget
        self.importance.track(budget)

    def follow(self, budget: RankBudget, kept: Mapping[str, Tensor]) -> None:
        """Go on with adapters that were cut since they were tracked: what was cut away counts as closed for good.

        Args:
            budget: the adapters as they are now.
            kept: layer -> (n,) bool, True for the components that are still there, in their old numbering.
        """
        self._budget = budget
        self.importance.cut(budget, kept)

    def is_event(self, step: int, total: int) -> bool:
        """Whether components are chosen after this step (counted from 1)."""
        return self.schedule.is_event(step, total, self.interval)

    def is_final(self, step: int, total: int) -> bool:
        """Whether the mask is final after this step."""
        return step >= self.schedule.window(total)[1]

    def observes(self, step: int, total: int) -> bool:
        """Whether importance still matters at this step; the schedule says."""
        return self.schedule.observes(step, total)

    def after_steps(  # noqa: B027  # most act at events alone
        self, count: int, step: int, total: int, skipped: Tensor | None = None
    ) -> None:
        """Act on the weights after optimizer steps, until the mask is final. No device sync.

        Args:
            count: how many were taken since this was called last; more than 1 where a module optimizes by hand.
            step: the last of them.
            total: optimizer steps in the whole run.
            skipped: a number on the device; if it is not 0 they were not taken after all.
        """

    def before_step(self, step: int, total: int) -> None:  # noqa: B027  # most read what a step leaves behind
        """A batch of this optimizer step is about to be run; called for each of them, until the mask is final.

        Args:
            step: the optimizer step, counted from 1; the first, where a module takes several in one batch.
            total: optimizer steps in the whole run.
        """

    @abstractmethod
    def budget_at(self, step: int, total: int) -> int:
        """What may be spent after this step, in :attr:`unit`."""

    @abstractmethod
    def decide(self, step: int, total: int) -> dict[str, Tensor]:
        """The components that are open after this step: layer -> (n,) bool. Equal inputs, equal masks."""

    def spent(self, ranks: Mapping[str, float]) -> float:
        """What layers of these ranks spend, in :attr:`unit`."""
        sizes = self._budget.sizes(self.unit)
        return sum(rank * sizes[name] for name, rank in ranks.items())

    def apply(self, masks: Mapping[str, Tensor], step: int, total: int) -> None:
        """Write the masks into the gates."""
        self._budget.keep(masks)

    def moved(self) -> Mapping[nn.Parameter, Tensor]:
        """Vectors whose entries the last :meth:`apply` has moved, so that an optimizer's state follows; told once.

        Returns:
            parameter (k,) -> (k,) for every entry its position before, -1 for one that starts anew; by default none.
        """
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The running importance. Masks are the model's state."""
        return {"importance": self.importance.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, after :meth:`track`."""
        self.importance.load_state_dict(state["importance"])

    def _warn_of_divergence(self) -> None:
        """Name the layers in which gradients or weights were not finite since the last event."""
        diverged = self.importance.diverged()
        if diverged:
            warnings.warn(
                f"training has diverged in {', '.join(diverged)}: a gradient or weight there was not finite, and "
                "importance keeps its last finite value. Lower the learning rate and go on from an earlier checkpoint; "
                "EarlyStopping(..., check_finite=True) ends such a run by itself.",
                stacklevel=3,
            )


def require_comparable(compare: Compare, final: Budget) -> None:
    """Check how components are to be compared.

    Raises:
        ValueError: it is unknown, or has no effect on this budget.
    """
    if compare not in ("worth", "worth_per_cost"):
        raise ValueError(f"compare={compare!r}: choose 'worth' or 'worth_per_cost'.")
    if compare == "worth_per_cost" and final.unit == "components":
        raise ValueError(
            f"compare='worth_per_cost' weighs components by their parameters, and {final} counts each as one. Give the "
            "budget in parameters, share or megabytes, or use compare='worth'."
        )


class BudgetPolicy(Policy):
    """A policy that is told what may be spent at the end, and how components are compared.

    Args:
        schedule: the window of events, and how fast the budget moves in it.
        importance: what a component is worth.
        final: what may be spent at the end; its unit is the policy's.
        interval: optimizer steps between two events; the last step of the window is always one.
        compare: "worth" compares components as they are, "worth_per_cost" divides by their parameters first.

    Raises:
        TypeError: an argument is of another class.
        ValueError: interval is below 1, or compare is unknown or of no effect.
    """

    def __init__(
        self, schedule: Schedule, importance: Importance, final: Budget, interval: int, compare: Compare
    ) -> None:
        super().__init__(schedule, importance, interval)
        require_instance("final", final, Budget, "Budget(rank=8)")
        require_comparable(compare, final)
        self.final = final
        self.compare: Compare = compare

    @property
    def unit(self) -> Unit:
        return self.final.unit

    @property
    def final_budget(self) -> Budget:
        return self.final

    def settings(self) -> dict[str, str]:
        return {"budget": str(self.final), **super().settings()}


class RankPolicy(BudgetPolicy):
    """Close components on schedule.

        budget(t) = capacity - schedule.cut(t, T, capacity - final)

    At an event the components of lowest importance are closed, exactly as many as the schedule says. Before the last
    event removal is soft or hard, as `soft` says; the last event is always hard, and the mask is final from then on.
    What is closed hard before it may be chosen again at a later event, unless `irreversible`.

    Args:
        schedule: how fast the budget falls, with its warm-up and its frozen tail.
        importance: what a component is worth.
        final: what may be spent at the end.
        interval: optimizer steps between two events; the last step of the window is always one.
        soft: removal before the last event only zeroes the gain, so that components may return.
        minimum: components that every layer keeps.
        irreversible: what is closed at an event takes no part in later ones, and its gain becomes zero.
        compare: "worth", the default, compares components as they are, as the papers do. "worth_per_cost" divides worth
            by a component's parameters first, so that a budget in parameters, share or megabytes goes further: many
            components of small layers can be worth more than few of large ones.

    Raises:
        TypeError: an argument is of another class.
        ValueError: interval is below 1, minimum is negative, compare is unknown or of no effect, or removal is to be
            soft and irreversible.
    """

    def __init__(
        self,
        schedule: Schedule,
        importance: Importance,
        final: Budget,
        interval: int = 10,
        soft: bool = False,
        minimum: int = 0,
        compare: Compare = "worth",
        irreversible: bool = False,
    ) -> None:
        super().__init__(schedule, importance, final, interval, compare)
        require_integer("minimum", minimum)
        if minimum < 0:
            raise ValueError(f"minimum is a number of components, at least 0. Got {minimum}.")
        if soft and irreversible:
            raise ValueError("soft=True lets components return, and irreversible=True does not: choose one of the two.")
        self.irreversible = irreversible
        self.soft = soft
        self.minimum = minimum
        self._sizes: dict[str, int] = {}
        self._capacity = 0
        self._final = 0
        self._gone: dict[str, Tensor] = {}
        self._lost = 0
        self._away = 0

    @property
    def returning(self) -> str | None:
        return "this policy removes softly there" if self.soft else None

    def track(self, budget: RankBudget) -> None:
        """Take on the adapters of `budget`; importance starts at zero.

        Components that an earlier fit has closed stay closed and are no part of this schedule's capacity.

        Raises:
            ValueError: the final budget does not fit them, or soft removal is asked of gates without a gain.
        """
        hard = [name for name, site in budget.items() if not site.gate.removes_softly]
        if self.soft and hard:
            raise ValueError(
                f"soft removal zeroes a component's gain, and the adapter at {hard[0]!r} has none; use soft=False."
            )
        self._sizes = budget.sizes(self.final.unit)
        self._final = self.final.amount(budget, self.minimum)
        super().track(budget)
        self._away = self._cut_away()
        self._exclude({name: site.gate.mask.detach() == 0 for name, site in budget.items()})

    def follow(self, budget: RankBudget, kept: Mapping[str, Tensor]) -> None:
        super().follow(budget, kept)
        self._away = self._cut_away()
        self._gone = {name: self._gone[name][kept[name].cpu()] for name in budget}

    def _cut_away(self) -> int:
        """What all components cost that the adapters no longer have."""
        whole = sum(self._sizes[name] * extent.components for name, extent in self._budget.extents.items())
        return whole - sum(self._sizes[name] * len(site.gate) for name, site in self._budget.items())

    def _exclude(self, gone: Mapping[str, Tensor], lost: int | None = None) -> None:
        """Leave components out for good, and count what the others may lose.

        Args:
            gone: layer -> (n,) bool, the components that are there and that an earlier fit has closed.
            lost: what all cost that earlier fits have closed; ``None`` if what was cut away was cut away by them.
        """
        self._gone = {name: mask.cpu() for name, mask in gone.items()}
        closed = sum(self._sizes[name] * int(mask.sum()) for name, mask in self._gone.items())
        self._lost = closed + self._away if lost is None else lost
        whole = sum(self._sizes[name] * extent.components for name, extent in self._budget.extents.items())
        self._capacity = whole - self._lost

    def budget_at(self, step: int, total: int) -> int:
        """What may be spent after this step, in the final budget's unit; it never rises."""
        return self.schedule.budget(step, total, self._capacity, self._final)

    def decide(self, step: int, total: int) -> dict[str, Tensor]:
        """The components that stay open after this step: layer -> (n,) bool. Equal inputs, equal masks.

        Layers in which gradients or weights were not finite since the last event are named in a warning; they are
        judged by the last worth that was.
        """
        self._warn_of_divergence()
        scores = self.importance.scores()
        ordered = {name: scores[name] for name in self._budget}  # module order, which is the order of ties
        ordered = weighed(ordered, self._budget.sizes("parameters"), self.compare)
        amount = self._capacity - self.budget_at(step, total)
        # What was cut away is closed already; that may be more than is asked for, by less than one component.
        amount = max(0, self._lost + amount - self._away)
        if not any(bool(mask.any()) for mask in self._gone.values()):
            return close_lowest(ordered, self._sizes, amount, self.minimum)
        # What is gone takes no part: it is neither closed again nor one of the components that a layer keeps.
        there = {name: ~gone for name, gone in self._gone.items()}
        amount -= sum(self._sizes[name] * int(gone.sum()) for name, gone in self._gone.items())
        rows = {name: row.cpu()[there[name]] for name, row in ordered.items()}
        masks = close_lowest(rows, self._sizes, max(0, amount), self.minimum)
        return {name: mask.masked_scatter(mask, masks[name]) for name, mask in there.items()}

    def apply(self, masks: Mapping[str, Tensor], step: int, total: int) -> None:
        """Write the masks into the gates: soft if the policy is soft, hard if it is not or the event is the last."""
        if self.soft:
            self._budget.keep(masks, soft=True)
        if not self.soft or self.is_final(step, total):
            self._budget.keep(masks)
        if self.irreversible:
            gains = {name: mask for name, mask in masks.items() if self._budget[name].gate.removes_softly}
            self._budget.keep(gains, soft=True)
            self._gone = {name: ~mask.cpu() for name, mask in masks.items()}

    def state_dict(self) -> dict[str, Any]:
        """The running importance, and what the schedule leaves out. Masks are the model's state."""
        state = {"importance": self.importance.state_dict(), "gone": dict(self._gone)}
        return state | {"lost": self._lost} if self._away or self.irreversible else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, after :meth:`track`."""
        self.importance.load_state_dict(state["importance"])
        self._exclude(state["gone"], state.get("lost"))
