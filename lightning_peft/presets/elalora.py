"""ElaLoRA as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil, floor
from typing import Literal

from lightning.pytorch import Callback

from lightning_peft.adapters import elalora as method
from lightning_peft.adapters.adalora import AdaLoRA
from lightning_peft.adapters.partly_open import PartlyOpen
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor, RankPruning
from lightning_peft.presets.base import Preset, final_budget, orthogonal
from lightning_peft.rank.budget import Budget


def elalora(
    final_rank: float | None = None,
    *,
    budget: Budget | None = None,
    start_rank: int | None = None,
    max_rank: int | None = None,
    alpha: float = 32.0,
    dropout: float = 0.0,
    warmup: float = 0.1,
    tail: float = 0.3,
    interval: int = 10,
    moves: int = 4,
    limit: int = 2,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality: float = 0.1,
    minimum: int = 0,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
    compact: Literal["never", "final"] = "never",
) -> Preset:
    """ElaLoRA: rank that moves from layer to layer at a fixed total.

    Args:
        final_rank: average rank per layer, from start to end; 8 if neither it nor `budget` is given.
        budget: the total in another unit: parameters, share of capacity, or megabytes of adapter file.
        start_rank: components per layer that are open at the start; the final rank, rounded down, if not given. The
            first event makes up the difference to the budget.
        max_rank: components that a layer may have at most, for which there is room from the start; twice the final rank
            if not given.
        alpha: update scale; the update is multiplied by alpha / max_rank for the whole run.
        dropout: dropout on the adapters' input.
        warmup: share of the run before ranks move.
        tail: share of the run after the last move.
        interval: optimizer steps between two events.
        moves: components that are closed, and opened, at the first event; fewer later, none at the last.
        limit: components that one layer may lose, and gain, at an event.
        beta1: how much of the running sensitivity is kept at a step.
        beta2: how much of the running uncertainty is kept at a step.
        orthogonality: weight of the penalty that keeps A and B orthonormal; 0 leaves the term out.
        minimum: components that every layer keeps.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.
        compact: "final" cuts closed components out of the tensors at the last event, so that the tail is faster and
            smaller; see :class:`~lightning_peft.RankPruning`.

    Raises:
        ValueError: final_rank and budget are both given, a budget other than a rank comes without `start_rank` and
            `max_rank`, or the penalty's weight is negative.

    Reference:
        Chang et al., ElaLoRA, 2025, arXiv 2504.00254.
    """
    final = final_budget(final_rank, budget)
    penalty = orthogonal(orthogonality)
    if start_rank is None or max_rank is None:
        if final.rank is None:
            raise ValueError(f"{final} does not say how many components a layer has; give start_rank and max_rank.")
        start_rank = floor(final.rank) if start_rank is None else start_rank
        max_rank = ceil(2 * final.rank) if max_rank is None else max_rank
    adapter = PartlyOpen(partial(AdaLoRA, rank=max_rank, alpha=alpha, dropout=dropout), start_rank)
    policy = method.policy(final, warmup, tail, interval, moves, limit, beta1, beta2, minimum)
    callbacks: list[Callback] = [AdapterInjection(adapter, targets, train), RankPruning(policy, compact)]
    return Preset([*callbacks, *penalty, RankMonitor(), AdapterCheckpoint()])
