"""What a component is worth."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_peft.rank.budget import RankBudget, Site


def by_shape(sites: Iterable[Site]) -> list[list[Site]]:
    """Group sites whose adapters hold tensors of equal shapes, so that one batched call serves a group."""
    groups: dict[object, list[Site]] = {}
    for site in sites:
        key = tuple((name, tuple(p.shape), p.device) for name, p in site.adapter.own_parameters())
        groups.setdefault((type(site.adapter), len(site.gate), key), []).append(site)
    return list(groups.values())


def require_kept(name: str, share: float) -> None:
    """Check the share of a running average that is kept at a step.

    Raises:
        ValueError: it is not in [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"{name} is the share of the running average that is kept, in [0, 1). Got {share}.")


class Importance(ABC):
    """A running worth per component, updated once per optimizer step.

    `reads` says when: "gradients" before the step (averaged over ranks and unscaled), "weights" after it, "nothing" if
    worth is no running average but what :meth:`scores` finds when it is asked.
    The running average is kept in one tensor per group of equally shaped layers; :meth:`scores` gives it by layer. A
    method whose statistics are other than one number per component says so in :meth:`statistics`.

        worth <- beta worth + (1 - beta) now          (starts at 0, no bias correction: it would not change the order)

    Where `now` is not finite the average stays as it is: one infinite gradient, clipped before it reached a weight,
    would else decide all later choices. :meth:`diverged` tells where that was.

    Args:
        beta: how much of the running average is kept, in [0, 1).

    Raises:
        ValueError: beta is not in [0, 1).
    """

    reads: Literal["gradients", "weights", "nothing"]

    def __init__(self, beta: float) -> None:
        require_kept("beta", beta)
        self.beta = beta
        self._groups: list[list[Site]] = []
        self._worth: list[Tensor] = []
        self._odd: list[Tensor] = []  # per group, (..., L): something was not finite since `diverged` was asked

    @abstractmethod
    def measure(self, group: list[Site]) -> Tensor:
        """Worth now of L equally shaped layers: (L, n), float32, without a Python loop over components."""

    def track(self, budget: RankBudget) -> None:
        """Start at zero for the adapters of `budget`."""
        self._groups = by_shape(budget.values())
        self._worth = [
            torch.zeros(len(group), len(group[0].gate), device=group[0].gate.mask.device) for group in self._groups
        ]
        self._odd = [torch.zeros(len(worth), dtype=torch.bool, device=worth.device) for worth in self._worth]

    def cut(self, budget: RankBudget, kept: Mapping[str, Tensor]) -> None:
        """Go on with the running average of the components that are left after others were cut away.

        Args:
            budget: the adapters as they are now.
            kept: layer -> (n,) bool, True for the components that are still there, in their old numbering.
        """
        before = self.statistics()
        self.track(budget)
        for key, rows in self.statistics().items():
            if key in before:  # else it was forgotten
                for name, row in rows.items():
                    row.copy_(before[key][name][kept[name].to(row.device)])

    def release(self) -> None:  # noqa: B027  # most have nothing to undo
        """Undo what :meth:`track` did to the adapters; the running average stays."""

    def forget(self) -> None:  # noqa: B027  # one number per component is not worth it
        """Drop statistics that take memory: nothing will be chosen any more."""

    def gradients(self) -> list[Tensor]:
        """The gradients that :meth:`measure` reads at this step, to be unscaled and averaged over ranks in place."""
        return []

    @torch.no_grad()
    def worth_now(self) -> list[Tensor]:
        """Worth at this step, by group; see :meth:`measure`."""
        return [self.measure(group) for group in self._groups]

    @torch.no_grad()
    def fold(self, now: list[Tensor], expect_overflow: bool = False, skipped: Tensor | None = None) -> None:
        """Fold the worth of a step into the running average, where it is finite. No device sync.

        Args:
            now: what :meth:`worth_now` gave.
            expect_overflow: with a gradient scaler, what is not finite is no sign of divergence.
            skipped: a number on the device; if it is not 0 the step was not taken, and the average stays as it is.
        """
        for worth, odd, new in zip(self._worth, self._odd, now, strict=True):
            leave = ~new.isfinite()
            if skipped is not None:
                leave |= (skipped != 0).to(leave.device, non_blocking=True)
            elif not expect_overflow:
                odd |= leave.any(dim=1)
            worth.lerp_(torch.where(leave, worth, new), 1 - self.beta)

    def update(self) -> None:
        """Fold the worth at this step into the running average: :meth:`worth_now`, then :meth:`fold`."""
        self.fold(self.worth_now())

    def diverged(self) -> list[str]:
        """Layers in which worth was not finite at some step since this was asked last. Waits for the device."""
        found = [
            site.name
            for group, odd in zip(self._groups, self._odd, strict=True)
            for site, flags in zip(group, odd.view(-1, len(group)).t().tolist(), strict=True)
            if any(flags)
        ]
        for odd in self._odd:
            odd.zero_()
        return found

    def scores(self) -> dict[str, Tensor]:
        """Running worth by layer, in the order of the groups; views, not copies."""
        return {
            site.name: row
            for group, worth in zip(self._groups, self._worth, strict=True)
            for site, row in zip(group, worth, strict=True)
        }

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """What is remembered: name -> layer -> (n, ...), one row per component; views, not copies."""
        return {"worth": self.scores()}

    def statistics_bytes(self) -> int:
        """What the statistics take in memory, and as much again in a checkpoint."""
        return sum(row.numel() * row.element_size() for rows in self.statistics().values() for row in rows.values())

    def state_dict(self) -> dict[str, Any]:
        """The statistics by layer: tensors only."""
        return {key: {name: row.clone() for name, row in rows.items()} for key, rows in self.statistics().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, after :meth:`track`.

        Raises:
            ValueError: the layers, their numbers of components, or what is remembered of them differ.
        """
        own = self.statistics()
        if set(own) != set(state):
            raise ValueError(
                f"saved importance holds {', '.join(state) or 'nothing'}, and {type(self).__name__} remembers "
                f"{', '.join(own) or 'nothing'}: it is of another method or setting."
            )
        for key, rows in own.items():
            saved = state[key]
            if {n: tuple(t.shape) for n, t in saved.items()} != {n: tuple(t.shape) for n, t in rows.items()}:
                odd = sorted(set(saved) ^ set(rows)) or [n for n in rows if saved[n].shape != rows[n].shape]
                raise ValueError(
                    f"saved importance does not fit the adapters of this module; first difference at {odd[0]!r}."
                )
        for key, rows in own.items():
            for name, row in rows.items():
                row.copy_(state[key][name])


class Taylor(Importance):
    """First-order worth of a component: how much the loss would change if it were closed.

        worth_i = | dL / dmask_i |          ( = |<A_i, dL/dA_i>| = |gain_i dL/dgain_i| where the component is open )

    The mask measures it: while an importance tracks it, it requires grad, though it is a buffer and in no optimizer.
    One number per component, whatever the size and the storage of the weights; a closed component keeps a score.

    Args:
        beta: how much of the running average is kept.

    Reference:
        Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019, arXiv 1906.10771, eq. 8
        (remembered; the square there, the absolute value here).
    """

    reads = "gradients"

    def __init__(self, beta: float = 0.85) -> None:
        super().__init__(beta)

    def track(self, budget: RankBudget) -> None:
        super().track(budget)
        for site in budget.values():
            site.gate.mask.requires_grad_(True)
            site.gate.mask.grad = None

    def release(self) -> None:
        for group in self._groups:
            for site in group:
                site.gate.mask.requires_grad_(False)
                site.gate.mask.grad = None

    def gradients(self) -> list[Tensor]:
        return [_gradient(site) for group in self._groups for site in group]

    def measure(self, group: list[Site]) -> Tensor:
        now = torch.stack([_gradient(site) for site in group]).abs()
        for site in group:
            site.gate.mask.grad = None  # no optimizer clears it
        return now


def _gradient(site: Site) -> Tensor:
    """The mask's gradient; zeros, kept as such, where the layer took no part."""
    mask = site.gate.mask
    if mask.grad is None:
        mask.grad = torch.zeros_like(mask)
    return mask.grad
