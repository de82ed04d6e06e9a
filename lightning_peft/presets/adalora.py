"""AdaLoRA as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from lightning.pytorch import Callback

from lightning_peft.adapters import adalora as paper
from lightning_peft.adapters.adalora import AdaLoRA, Mode
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor, RankPruning
from lightning_peft.presets.base import Preset, falling_rank, orthogonal
from lightning_peft.rank.budget import Budget


def adalora(
    final_rank: float | None = None,
    *,
    budget: Budget | None = None,
    initial_rank: int | None = None,
    alpha: float = 8.0,
    dropout: float = 0.0,
    warmup: float = 0.15,
    tail: float = 0.5,
    interval: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    mode: Mode = "aligned",
    orthogonality: float = 0.5,
    minimum: int = 0,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
    compact: Literal["never", "final"] = "never",
) -> Preset:
    """AdaLoRA: rank by the sensitivity of triplets. PEFT's target_r and init_r are final_rank and initial_rank here.

    Args:
        final_rank: average rank per layer at the end; 8 if neither it nor `budget` is given.
        budget: the end in another unit: parameters, share of capacity, or megabytes of adapter file.
        initial_rank: triplets per layer at the start; ceil(1.5 final_rank) if not given, which is 12 for 8.
        alpha: update scale; the update is multiplied by alpha / initial_rank.
        dropout: dropout on the adapters' input.
        warmup: share of the run before the first cut.
        tail: share of the run after the last one.
        interval: optimizer steps between two cuts.
        beta1: how much of the running sensitivity is kept at a step.
        beta2: how much of the running uncertainty is kept at a step.
        mode: "aligned" or "peft"; see :class:`~lightning_peft.TripletImportance`.
        orthogonality: weight of the penalty that keeps A and B orthonormal, in PEFT's form; 0 leaves the term out.
        minimum: triplets that every layer keeps.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.
        compact: "final" cuts closed triplets out of the tensors at the last cut, so that the tail is faster and
            smaller; see :class:`~lightning_peft.RankPruning`.

    Raises:
        ValueError: final_rank and budget are both given, a budget other than a rank comes without `initial_rank`, or
            the penalty's weight is negative.

    Reference:
        Zhang et al., AdaLoRA, ICLR 2023, arXiv 2303.10512.
    """
    penalty = orthogonal(orthogonality)
    final, initial_rank = falling_rank(final_rank, budget, initial_rank, paper.initial_rank)
    policy = paper.policy(final, warmup, tail, interval, beta1, beta2, mode, minimum)
    callbacks: list[Callback] = [
        AdapterInjection(partial(AdaLoRA, rank=initial_rank, alpha=alpha, dropout=dropout), targets, train),
        RankPruning(policy, compact),
    ]
    return Preset([*callbacks, *penalty, RankMonitor(), AdapterCheckpoint()])
