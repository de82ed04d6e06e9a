"""IncreLoRA (Zhang et al., 2023): rank that grows, from one component per layer, where the layer's score is highest.

In the paper's order: the score of a module, the growth of ranks, and `policy`, which puts them together. The update is
AdaLoRA's, so :class:`~lightning_peft.AdaLoRA` is the adapter, built with room: `PartlyOpen(partial(AdaLoRA, rank=R))`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.arguments import require_integer
from lightning_peft.rank.allocation import Compare, open_highest
from lightning_peft.rank.budget import Budget, RankBudget, Site, Unit
from lightning_peft.rank.importance import Importance, require_kept
from lightning_peft.rank.policy import BudgetPolicy
from lightning_peft.rank.schedule import Linear, Schedule


class ModuleSensitivity(Importance):
    """Smoothed sensitivity of a whole layer times its uncertainty; every component of the layer has the same.

        I = sum |w dL/dw| / sqrt(numel)                      over the adapter's components: A, B and gain
        Ibar <- beta1 Ibar + (1 - beta1) I
        Ubar <- beta2 Ubar + (1 - beta2) |I - Ibar|          with the new Ibar
        worth = Ibar Ubar

    numel counts all entries of the adapter, open or closed, so that it is a layer's own constant. What is closed has no
    gradient and adds nothing. Gradients are those of the whole optimizer step, before clipping.

    Args:
        beta1: how much of the running sensitivity is kept at a step.
        beta2: how much of the running uncertainty is kept at a step.

    Raises:
        ValueError: a beta is not in [0, 1).

    Reference:
        Zhang et al., IncreLoRA, 2023, arXiv 2308.12043, with the authors' code. Departure: there W is the product of
        the factors, a matrix of the layer's size whose gradient a backward hook catches; here it is the factors, whose
        gradients are there anyway.
    """

    reads = "gradients"

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85) -> None:
        require_kept("beta1", beta1)
        require_kept("beta2", beta2)
        super().__init__(beta1)
        self.beta1, self.beta2 = beta1, beta2
        self._uncertainty: list[Tensor] = []

    def track(self, budget: RankBudget) -> None:
        super().track(budget)
        self._uncertainty = [torch.zeros_like(worth) for worth in self._worth]

    def measure(self, group: list[Site]) -> Tensor:
        parameters = [_of_components(site) for site in group]
        flat = [p.detach() for row in parameters for p in row]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for row in parameters for p in row]
        sums: Tensor = torch.stack(torch._foreach_norm(torch._foreach_mul(flat, gradients), ord=1))
        whole = sums.view(len(group), -1).float().sum(1) / sum(p.numel() for p in parameters[0]) ** 0.5
        rows: Tensor = whole[:, None].repeat(1, len(group[0].gate))
        return rows

    @torch.no_grad()
    def fold(self, now: list[Tensor], expect_overflow: bool = False, skipped: Tensor | None = None) -> None:
        super().fold(now, expect_overflow, skipped)
        for mean, uncertainty, new in zip(self._worth, self._uncertainty, now, strict=True):
            leave = ~new.isfinite()
            if skipped is not None:
                leave |= (skipped != 0).to(leave.device, non_blocking=True)
            uncertainty.lerp_(torch.where(leave, uncertainty, (new - mean).abs()), 1 - self.beta2)

    def scores(self) -> dict[str, Tensor]:
        return self._rows(
            [mean * uncertainty for mean, uncertainty in zip(self._worth, self._uncertainty, strict=True)]
        )

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        return {"sensitivity": self._rows(self._worth), "uncertainty": self._rows(self._uncertainty)}

    def _rows(self, groups: Sequence[Tensor]) -> dict[str, Tensor]:
        return {
            site.name: row
            for group, rows in zip(self._groups, groups, strict=True)
            for site, row in zip(group, rows, strict=True)
        }


def _of_components(site: Site) -> list[nn.Parameter]:
    """Parameters that belong to components: not a magnitude, say, which is the layer's whatever its rank."""
    lasting = {id(p) for p in site.adapter.lasting_parameters()}
    return [p for _, p in site.adapter.own_parameters() if id(p) not in lasting]


class Growth(BudgetPolicy):
    """Open components on schedule, in the layers of highest worth.

        budget(t) = start + schedule.cut(t, T, final - start),    start: what is open when training starts

    At an event the layers of highest importance open `each` components, in turn, until the budget is spent exactly: in
    components, that is; in parameters it is never exceeded, and what is left is less than one component. A layer's
    importance is the highest of its open components'. No layer exceeds the components that its adapter was built with.
    What is open after the last event is final. Nothing that is open is ever closed.

    A component whose gain is zero opens with a gain of 1e-5: it counts from then on, and hardly moves the output.

    Args:
        schedule: how fast the budget rises, with its warm-up and its tail.
        importance: what a component is worth.
        final: what may be spent at the end.
        interval: optimizer steps between two events; the last step of the window is always one.
        each: components that a layer opens in its turn.
        compare: "worth", or "worth_per_cost" to divide a layer's worth by the parameters that its component costs.

    Raises:
        TypeError: an argument is of another class.
        ValueError: interval or each is below 1, or compare is unknown or of no effect.
    """

    def __init__(
        self,
        schedule: Schedule,
        importance: Importance,
        final: Budget,
        interval: int = 10,
        each: int = 1,
        compare: Compare = "worth",
    ) -> None:
        super().__init__(schedule, importance, final, interval, compare)
        require_integer("each", each)
        if each < 1:
            raise ValueError(f"each is how many components a layer opens in its turn, at least 1. Got {each}.")
        self.each = each
        self._start = self._final = 0

    @property
    def returning(self) -> str:
        return "this policy opens there what is closed"

    def track(self, budget: RankBudget) -> None:
        """Take on the adapters of `budget`; growth starts from what is open.

        Raises:
            ValueError: the final budget does not fit them, or is less than what is open.
        """
        self._final = self.final.amount(budget)
        super().track(budget)
        self._start = spent(budget, masks_now(budget), self.unit)
        if self._start > self._final:
            raise ValueError(
                f"growth starts with {self._start:,} {self.unit} open, more than the {self._final:,} of {self.final}. "
                "Start with fewer, AdapterInjection(PartlyOpen(adapter, rank=1)), or raise the budget."
            )

    def budget_at(self, step: int, total: int) -> int:
        """What may be spent after this step, in the final budget's unit; it never falls."""
        return self._start + self.schedule.cut(step, total, self._final - self._start)

    def decide(self, step: int, total: int) -> dict[str, Tensor]:
        """The components that are open after this step: layer -> (n,) bool. Equal inputs, equal masks."""
        self._warn_of_divergence()
        masks = masks_now(self._budget)
        scores = self.importance.scores()
        scores = {name: scores[name].detach().cpu() for name in masks}
        worth = layer_worth(masks, scores, self._budget, self.compare)
        amount = self.budget_at(step, total) - spent(self._budget, masks, self.unit)
        return open_highest(masks, scores, worth, self._budget.sizes(self.unit), amount, self.each)

    def apply(self, masks: Mapping[str, Tensor], step: int, total: int) -> None:
        """Write the masks, and give what opens a gain."""
        wake(self._budget, masks)
        super().apply(masks, step, total)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._start = int(state["start"])


def masks_now(budget: RankBudget) -> dict[str, Tensor]:
    """layer -> (n,) bool on the CPU, what the masks have open; in one transfer, in the module's order."""
    if not budget:
        return {}
    gates = [site.gate for site in budget.values()]
    flat = torch.cat([gate.mask.detach() for gate in gates]).cpu() != 0
    return dict(zip(budget, flat.split([len(gate) for gate in gates]), strict=True))


def spent(budget: RankBudget, masks: Mapping[str, Tensor], unit: Unit) -> int:
    """What the components that masks have open cost together."""
    sizes = budget.sizes(unit)
    return sum(sizes[name] * int(mask.sum()) for name, mask in masks.items())


@torch.no_grad()
def wake(budget: RankBudget, masks: Mapping[str, Tensor], gain: float = 1e-5) -> None:
    """Give the components that masks open, and whose gain is zero, a small one; 1e-5 in IncreLoRA's code."""
    for name, site in budget.items():
        mask, own = site.gate.mask.detach(), site.gate.gain
        if own is not None:
            own.masked_fill_((mask == 0) & (masks[name].to(mask.device) != 0) & (own == 0), gain)


def layer_worth(
    masks: Mapping[str, Tensor], scores: Mapping[str, Tensor], budget: RankBudget, compare: Compare
) -> dict[str, float]:
    """A layer's worth: the highest score of its open components, 0 if it has none, as `compare` weighs it."""
    costs = budget.sizes("parameters") if compare == "worth_per_cost" else dict.fromkeys(masks, 1)
    return {name: float(scores[name][mask].max()) / costs[name] if mask.any() else 0.0 for name, mask in masks.items()}


def policy(
    final: Budget,
    warmup: float = 0.1,
    tail: float = 0.5,
    interval: int = 10,
    each: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
) -> Growth:
    """The paper's policy: one more component for the layers of highest score, until the final budget is reached.

    Args:
        final: what may be spent at the end; `Budget(rank=r)` is the paper's.
        warmup: share of the run before the first layer grows.
        tail: share of the run after the last one has grown.
        interval: optimizer steps between two events.
        each: components that a chosen layer gets; the authors' code takes half the final average rank.
        beta1: how much of the running sensitivity is kept at a step.
        beta2: how much of the running uncertainty is kept at a step.

    Reference:
        Zhang et al., IncreLoRA, 2023, arXiv 2308.12043, with the authors' code, which was read. Departures: there top_h
        modules grow at each event until the target is reached, here the budget rises evenly from the warm-up to the
        tail, so that top_h follows from the length of the run, and the target is met exactly (in the code it is when
        top_h times the ranks added divides what is missing); warm-up and tail are shares (our choice), in the code
        steps that a script gives for each task. The code keeps a component of each layer in reserve, whose E is 1e-5
        and whose vectors are trained before it is counted (`advance_learn`, which can be switched off there); here a
        component has E = 1e-5 from the moment it opens, and not before, so that what is closed changes nothing.
    """
    return Growth(Linear(warmup, tail), ModuleSensitivity(beta1, beta2), final, interval, each)
