"""Weight decomposition as a list of callbacks: with a rank that is found, or with a fixed one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from lightning_peft.adapters import dynamic_dora as dora
from lightning_peft.adapters.weight_decomposed import WeightDecomposed
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor
from lightning_peft.presets.base import Preset, falling_dora, falling_rank
from lightning_peft.rank.budget import Budget
from lightning_peft.regularizers.dem import Normalizer


def weight_decomposed(
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
    """Weight decomposition whose rank moves to where it is worth most, by dynamic DoRA's policy and settings.

    The components, their scores, the schedule and DEM are those of :func:`lightning_peft.presets.dynamic_dora`; what is
    added is a trained length for every row of every adapted weight. For another policy, put the callbacks together
    yourself: :class:`~lightning_peft.WeightDecomposed` works with each.

    Args:
        final_rank: average rank per layer at the end; 8 if neither it nor `budget` is given.
        budget: the end in another unit: parameters, share of capacity, or megabytes of adapter file.
        initial_rank: components per layer at the start; ceil(1.5 final_rank) if not given.
        alpha: update scale; the update is multiplied by alpha / initial_rank.
        dropout: dropout on the updates' input.
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
        Liu et al., DoRA, ICML 2024, arXiv 2402.09353, for the layer; Mao et al., DoRA, ACL 2024, arXiv 2405.17357, for
        what its rank does. That the two are joined is ours.
    """
    final, initial_rank = falling_rank(final_rank, budget, initial_rank, dora.initial_rank)
    adapter = partial(WeightDecomposed, rank=initial_rank, alpha=alpha, dropout=dropout, components="dynamic_dora")
    policy = dora.policy(final, warmup, tail, interval, beta, minimum=minimum)
    return falling_dora(adapter, policy, tail, dem_weight, dem_normalizer, targets, train, compact)


def weight_decomposed_fixed(
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
) -> Preset:
    """Weight decomposition of one rank everywhere: the DoRA of Liu et al., with adapter-only checkpoints.

    Args:
        rank: components per layer.
        alpha: update scale; the update is multiplied by alpha / rank.
        dropout: dropout on the updates' input.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.

    Reference:
        Liu et al., DoRA, ICML 2024, arXiv 2402.09353.
    """
    adapter = partial(WeightDecomposed, rank=rank, alpha=alpha, dropout=dropout)
    return Preset([AdapterInjection(adapter, targets, train), RankMonitor(), AdapterCheckpoint()])
