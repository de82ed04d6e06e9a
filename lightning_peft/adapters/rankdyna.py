"""RankDyna: low rank that is found while fine-tuning (Hua et al., Findings of EMNLP 2023).

In the paper's order: the singular groups (:class:`~lightning_peft.Factorized`), what a group is worth, and `policy`,
which removes groups until a budget of parameters is met.

Of the paper its abstract, a summary by its authors' institute, the abstract of their patent application (US
2025/0029005 A1) and one line in a third party's survey could be read; no formula, no setting and no code. What these
say: SVD of the pretrained weights, groups of a singular value and its two vectors, importance that is followed while
all factors are fine-tuned, a budget of parameters met across layers in one round, groups that are removed for good, a
cubic schedule, a running average. All else here is inferred or our choice, and said to be.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_peft.adapters.factorized import Factorized
from lightning_peft.rank.allocation import Compare
from lightning_peft.rank.budget import Budget, RankBudget, Site
from lightning_peft.rank.importance import Importance, Taylor
from lightning_peft.rank.policy import RankPolicy
from lightning_peft.rank.schedule import Cubic

Aggregation = Literal["group", "taylor_sq", "elementwise_sum", "elementwise_mean"]
Score = Literal["worth", "per_cost"]


class GroupImportance(Taylor):
    """Smoothed first-order change of the loss when a singular group {u_k, s_k, v_k} is removed.

        group:      I_k = | s_k dL/ds_k |                      the whole triplet at once: to remove it is s_k -> 0
        taylor_sq:  I_k = ( s_k dL/ds_k )^2
        Ibar <- beta Ibar + (1 - beta) I,        worth = Ibar

    The forward is linear in each part of the triplet, so <u_k, dL/du_k> = s_k dL/ds_k = <v_k, dL/dv_k>, which is also
    the gradient of the gate's mask: n numbers per layer say it, whatever the size and the sharding of U and Vh.

        elementwise_sum:    I_k = |s_k dL/ds_k| + sum_j |U_jk dL/dU_jk| + sum_j |V_kj dL/dV_kj|
        elementwise_mean:   the same with means over j

    are other quantities, for comparison: they read all factors and their gradients at every step. With `uncertainty`,
    as in AdaLoRA and PLATON,

        Ubar <- beta Ubar + (1 - beta) | I - Ibar |            with the new Ibar,        worth = Ibar Ubar

    Gradients are those of the whole optimizer step, averaged over processes, unscaled and not clipped, and parameters
    those that they were computed with. A step that is not taken counts for nothing.

    Args:
        aggregation: how a triplet becomes one number.
        beta: how much of the running averages is kept.
        uncertainty: whether worth is weighed by how much it varies.

    Raises:
        ValueError: the aggregation is unknown, or beta is not in [0, 1).
        TypeError: when adapters are tracked, "elementwise" is asked of one that is not Factorized.
        RuntimeError: likewise, where FSDP1 has made flat slices of its factors.

    Reference:
        Hua et al., Findings of EMNLP 2023. That importance is the change of the loss when the group is removed, is
        theirs; which aggregation is their default could not be read, so "group" is our choice: it is that definition.
    """

    def __init__(self, aggregation: Aggregation = "group", beta: float = 0.85, uncertainty: bool = False) -> None:
        super().__init__(beta)
        if aggregation not in get_args(Aggregation):
            raise ValueError(f"aggregation={aggregation!r}: choose {', '.join(map(repr, get_args(Aggregation)))}.")
        self.aggregation: Aggregation = aggregation
        self.uncertainty = uncertainty
        self._uncertain: list[Tensor] = []

    @property
    def _entries(self) -> bool:
        """Whether the factors' own gradients are read, and not the mask's."""
        return self.aggregation.startswith("elementwise")

    def track(self, budget: RankBudget) -> None:
        if self._entries:
            for name, site in budget.items():
                if not isinstance(site.adapter, Factorized):
                    raise TypeError(
                        f"aggregation={self.aggregation!r} reads the factors of Factorized, and the adapter at "
                        f"{name!r} is a {type(site.adapter).__name__}. Use 'group', which needs a gate only."
                    )
                if getattr(site.adapter.U, "_fsdp_flattened", False):
                    raise RuntimeError(
                        f"aggregation={self.aggregation!r} reads the factors' gradients, which FSDP1 has in flat "
                        "slices. Use 'group', which needs a gate only."
                    )
            Importance.track(self, budget)
        else:
            super().track(budget)
        self._uncertain = [torch.zeros_like(worth) for worth in self._worth] if self.uncertainty else []

    def gradients(self) -> list[Tensor]:
        return [] if self._entries else super().gradients()

    def measure(self, group: list[Site]) -> Tensor:
        if not self._entries:
            now = super().measure(group)
            return now.square() if self.aggregation == "taylor_sq" else now
        adapters: list[Any] = [site.adapter for site in group]
        parts = [[adapter.gate.gain for adapter in adapters], [a.U for a in adapters], [a.Vh for a in adapters]]
        s, U, Vh = (_sensitivities(tensors) for tensors in parts)
        mean = self.aggregation == "elementwise_mean"
        rows = [u.mean(0) + v.mean(1) if mean else u.sum(0) + v.sum(1) for u, v in zip(U, Vh, strict=True)]
        return torch.stack(s).float() + torch.stack([_whole(row) for row in rows]).float()

    @torch.no_grad()
    def fold(self, now: list[Tensor], expect_overflow: bool = False, skipped: Tensor | None = None) -> None:
        super().fold(now, expect_overflow, skipped)
        if not self.uncertainty:
            return
        for worth, uncertain, new in zip(self._worth, self._uncertain, now, strict=True):
            leave = ~new.isfinite()
            if skipped is not None:
                leave |= (skipped != 0).to(leave.device, non_blocking=True)
            uncertain.lerp_(torch.where(leave, uncertain, (new - worth).abs()), 1 - self.beta)

    def scores(self) -> dict[str, Tensor]:
        if not self.uncertainty:
            return super().scores()
        return self._by_layer([worth * u for worth, u in zip(self._worth, self._uncertain, strict=True)])

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """What is remembered: the running worth, and the running uncertainty if there is one."""
        found = {"worth": self._by_layer(self._worth)}
        return found | {"uncertainty": self._by_layer(self._uncertain)} if self.uncertainty else found

    def _by_layer(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        return {
            site.name: row
            for group, rows in zip(self._groups, tensors, strict=True)
            for site, row in zip(group, rows, strict=True)
        }


def _sensitivities(parameters: list[Tensor]) -> list[Tensor]:
    """|p dL/dp| of every entry; zeros where a parameter has no gradient."""
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    return [product.abs() for product in torch._foreach_mul(parameters, gradients)]


def _whole(row: Tensor) -> Tensor:
    """A sum over rows that several processes share (FSDP2), in one piece."""
    whole: Tensor = row.full_tensor() if hasattr(row, "full_tensor") else row
    return whole


def policy(
    final: Budget,
    warmup: float = 0.1,
    tail: float = 0.3,
    interval: int = 50,
    beta: float = 0.85,
    aggregation: Aggregation = "group",
    uncertainty: bool = False,
    minimum: int = 1,
    score: Score = "worth",
) -> RankPolicy:
    """The paper's policy: groups of least importance, over all layers, are removed for good, fast first.

        b(t) = b(T) + (b(0) - b(T)) (1 - q)^3,    q = (t - t_i) / (T - t_f - t_i)
        after an event:   b(t) - max cost  <  parameters of the groups that are left  <=  b(t)

    b(0) is what the groups cost at the start, d_in + d_out each: 1.5 times the dense weights for the layers of
    BERT-base at full rank. What is left is the longest prefix of the groups by falling importance that b(t) pays for.

    Args:
        final: what may be spent at the end: `Budget(dense_share=0.5)` for half of what the dense layers have.
        warmup: share t_i / T of the run before the first cut.
        tail: share t_f / T of the run after the last one.
        interval: optimizer steps between two cuts.
        beta: how much of the running average of importance is kept.
        aggregation: see :class:`GroupImportance`.
        uncertainty: see :class:`GroupImportance`.
        minimum: groups that every layer keeps; with 0 a layer may be left with its bias alone.
        score: "worth" compares groups as they are, "per_cost" divides by what a group costs.

    Raises:
        ValueError: score is unknown.

    Reference:
        Hua et al., Findings of EMNLP 2023: a budget in parameters, removal for good, a cubic schedule, a running
        average. All numbers are our choice; so are warm-up, tail and the direction of the schedule.
    """
    compare: Mapping[str, Compare] = {"worth": "worth", "per_cost": "worth_per_cost"}
    if score not in compare:
        raise ValueError(f"score={score!r}: choose 'worth' or 'per_cost'.")
    importance = GroupImportance(aggregation, beta, uncertainty)
    return RankPolicy(
        Cubic(warmup, tail),
        importance,
        final,
        interval,
        minimum=minimum,
        compare=compare[score],
        irreversible=True,
    )
