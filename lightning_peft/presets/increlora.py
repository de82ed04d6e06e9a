"""IncreLoRA as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Literal

from lightning.pytorch import Callback

from lightning_peft.adapters import increlora as method
from lightning_peft.adapters.adalora import AdaLoRA
from lightning_peft.adapters.partly_open import PartlyOpen
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor, RankPruning
from lightning_peft.presets.base import Preset, final_budget, orthogonal
from lightning_peft.rank.budget import Budget


def increlora(
    final_rank: float | None = None,
    *,
    budget: Budget | None = None,
    start_rank: int = 1,
    max_rank: int | None = None,
    alpha: float = 32.0,
    dropout: float = 0.0,
    warmup: float = 0.1,
    tail: float = 0.5,
    interval: int = 10,
    each: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    orthogonality: float = 0.1,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
    compact: Literal["never", "final"] = "never",
) -> Preset:
    """IncreLoRA: rank that grows where a layer's score is highest, from one component per layer.

    Args:
        final_rank: average rank per layer at the end; 8 if neither it nor `budget` is given.
        budget: the end in another unit: parameters, share of capacity, or megabytes of adapter file.
        start_rank: components per layer that are open at the start.
        max_rank: components that a layer may have at most, for which there is room from the start; twice the final rank
            if not given.
        alpha: update scale; the update is multiplied by alpha / max_rank for the whole run. 32 with the default
            `max_rank` is the authors' 16 / rank in a layer of average rank.
        dropout: dropout on the adapters' input.
        warmup: share of the run before the first layer grows.
        tail: share of the run after the last one has grown.
        interval: optimizer steps between two events.
        each: components that a chosen layer gets.
        beta1: how much of the running sensitivity is kept at a step.
        beta2: how much of the running uncertainty is kept at a step.
        orthogonality: weight of the penalty that keeps A and B orthonormal, 0.1 in the authors' scripts; 0 leaves the
            term out. It sees closed components too, and trains their vectors to be.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.
        compact: "final" cuts closed components out of the tensors at the last event, so that the tail is faster and
            smaller; see :class:`~lightning_peft.RankPruning`.

    Raises:
        ValueError: final_rank and budget are both given, a budget other than a rank comes without `max_rank`, or the
            penalty's weight is negative.

    Reference:
        Zhang et al., IncreLoRA, 2023, arXiv 2308.12043.
    """
    final = final_budget(final_rank, budget)
    penalty = orthogonal(orthogonality)
    if max_rank is None:
        if final.rank is None:
            raise ValueError(f"{final} does not say how many components a layer may have; give max_rank as well.")
        max_rank = ceil(2 * final.rank)
    adapter = PartlyOpen(partial(AdaLoRA, rank=max_rank, alpha=alpha, dropout=dropout), start_rank)
    policy = method.policy(final, warmup, tail, interval, each, beta1, beta2)
    callbacks: list[Callback] = [AdapterInjection(adapter, targets, train), RankPruning(policy, compact)]
    return Preset([*callbacks, *penalty, RankMonitor(), AdapterCheckpoint()])
