"""RankDyna as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lightning_peft.adapters import rankdyna as paper
from lightning_peft.adapters.factorized import Factorized, Rank
from lightning_peft.adapters.rankdyna import Aggregation, Score
from lightning_peft.arguments import require_instance
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor, RankPruning
from lightning_peft.callbacks.pruning import Compact
from lightning_peft.presets.base import Preset
from lightning_peft.rank.budget import Budget


def rankdyna(
    ratio: float | None = None,
    *,
    budget: Budget | None = None,
    initial_rank: Rank = None,
    warmup: float = 0.1,
    tail: float = 0.3,
    interval: int = 50,
    beta: float = 0.85,
    aggregation: Aggregation = "group",
    uncertainty: bool = False,
    minimum: int = 1,
    score: Score = "worth",
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = (".*",),
    compact: Compact = "never",
) -> Preset:
    """RankDyna: the model's own layers, factorised, fine-tuned and cut to a share of their size in one run.

    Args:
        ratio: share of the dense layers' parameters that is kept; 0.5 if neither it nor `budget` is given.
        budget: the end in another unit: `Budget(parameters=...)`, or an average rank.
        initial_rank: groups per layer at the start; ``None`` for all of them, which leaves the model as it was, or
            "breakeven" for no more parameters than the dense layer's, which does not.
        warmup: share of the run before the first cut.
        tail: share of the run after the last one.
        interval: optimizer steps between two cuts; 1 % of the run is a good start.
        beta: how much of the running average of importance is kept.
        aggregation: "group", "taylor_sq", "elementwise_sum" or "elementwise_mean"; see
            :class:`~lightning_peft.GroupImportance`.
        uncertainty: whether importance is weighed by how much it varies.
        minimum: groups that every layer keeps.
        score: "worth" compares groups as they are, "per_cost" divides by what a group costs.
        targets: layers to factorise; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what is trained beside the factors; by default everything: biases, norms, embeddings and the head.
        compact: a number k cuts removed groups out of the tensors at every k-th event, on one device and under DDP, so
            that training gets faster as ranks fall; "final" at the last one. See :class:`~lightning_peft.RankPruning`.

    Raises:
        TypeError: budget is no Budget.
        ValueError: ratio and budget are both given, or a value is out of range.

    Reference:
        Hua et al., Findings of EMNLP 2023, DOI 10.18653/v1/2023.findings-emnlp.621; see
        :mod:`lightning_peft.adapters.rankdyna` for what of it is known.
    """
    if ratio is not None and budget is not None:
        raise ValueError(f"give ratio or budget, not both. Got ratio={ratio}, budget={budget}.")
    if budget is not None:
        require_instance("budget", budget, Budget, "Budget(parameters=20_000_000)")
    final = budget or Budget(dense_share=0.5 if ratio is None else ratio)
    policy = paper.policy(final, warmup, tail, interval, beta, aggregation, uncertainty, minimum, score)
    return Preset(
        [
            AdapterInjection(partial(Factorized, rank=initial_rank), targets, train),
            RankPruning(policy, compact),
            RankMonitor(),
            AdapterCheckpoint(),
        ]
    )
