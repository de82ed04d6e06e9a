"""Dynamic DoRA as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from lightning_peft.adapters import dynamic_dora as dora
from lightning_peft.adapters.dynamic_dora import DynamicDoRA
from lightning_peft.presets.base import Preset, falling_dora, falling_rank
from lightning_peft.rank.budget import Budget
from lightning_peft.regularizers.dem import Normalizer


def dynamic_dora(
    final_rank: float | None = None,
    *,
    budget: Budget | None = None,
    initial_rank: int | None = None,
    alpha: float = 8.0,
    dropout: float = 0.1,
    warmup: float = 0.15,
    tail: float = 0.5,
    interval: int = 10,
    beta: float = 0.9,
    dem_weight: float = 0.3,
    dem_normalizer: Normalizer = "code",
    minimum: int = 0,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
    compact: Literal["never", "final"] = "never",
) -> Preset:
    """Dynamic DoRA: rank that moves to where it is worth most, with the authors' settings.

    Args:
        final_rank: average rank per layer at the end; 8 if neither it nor `budget` is given.
        budget: the end in another unit: parameters, share of capacity, or megabytes of adapter file.
        initial_rank: components per layer at the start; ceil(1.5 final_rank) if not given.
        alpha: update scale; the update is multiplied by alpha / initial_rank.
        dropout: dropout on the adapters' input.
        warmup: share of the run before the first cut.
        tail: share of the run after the last one; DEM is off there.
        interval: optimizer steps between two cuts.
        beta: how much of the running average of the scores is kept.
        dem_weight: eta, the weight of DEM; 0 leaves the term out.
        dem_normalizer: "code" or "components"; see :class:`~lightning_peft.DEM`.
        minimum: components that every layer keeps.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.
        compact: "final" cuts closed components out of the tensors at the last cut, so that the tail is faster and
            smaller; see :class:`~lightning_peft.RankPruning`.

    Raises:
        ValueError: final_rank and budget are both given, or a budget other than a rank comes without `initial_rank`.

    Reference:
        Mao et al., DoRA, ACL 2024, arXiv 2405.17357.
    """
    final, initial_rank = falling_rank(final_rank, budget, initial_rank, dora.initial_rank)
    adapter = partial(DynamicDoRA, rank=initial_rank, alpha=alpha, dropout=dropout)
    policy = dora.policy(final, warmup, tail, interval, beta, minimum=minimum)
    return falling_dora(adapter, policy, tail, dem_weight, dem_normalizer, targets, train, compact)
