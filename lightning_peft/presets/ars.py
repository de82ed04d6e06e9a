"""ARS, adaptive rank selections, as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from lightning_peft.adapters import ars as paper
from lightning_peft.adapters.ars import Masks
from lightning_peft.adapters.factorized import Factorized
from lightning_peft.adapters.learned_ranks import Price, Refill
from lightning_peft.callbacks import (
    AdapterCheckpoint,
    AdapterInjection,
    Calibration,
    RankMonitor,
    RankSelection,
    Regularization,
)
from lightning_peft.presets.base import Preset
from lightning_peft.rank.weighted_svd import WeightedSVD, Weighting
from lightning_peft.regularizers import BudgetPenalty, MaskAlignment, Regularizer, UntilTail


def ars(
    ratio: float = 0.48,
    *,
    weighting: Weighting = "fisher",
    batches: int = 64,
    masks: Masks = "hypernetwork",
    budget_weight: float = 16.0,
    align_weight: float = 10.0,
    sides: Literal["one", "two"] = "one",
    align: Literal["energy", "raw"] = "energy",
    tail: float = 0.0,
    interval: int = 10,
    minimum: int = 1,
    price: Price = "factors",
    refill: Refill = "spend",
    temperature: float = 0.4,
    shift: float = 3.0,
    seed: int = 0,
    mode: Literal["eval", "train"] = "eval",
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = (),
    compact: Literal["never", "final"] = "never",
) -> Preset:
    """ARS: the model's own layers, factorised and frozen, and a small network that learns how much of each to keep.

    The model is one that does its task already. What the optimizer gets is the small network: Adam, a constant learning
    rate of 1e-3 and no weight decay are the paper's.

    Args:
        ratio: p, kept share of the parameters of the layers that are factorised.
        weighting: what the inputs of a layer are worth, which the decomposition goes by: "fisher", "taylor",
            "activation", "whiten" or "none"; see :class:`~lightning_peft.WeightedSVD`.
        batches: at most so many batches are looked at for it, before training.
        masks: "hypernetwork" is the paper's; "elements" has a free logit for every component, "monotone" a soft rank
            for every layer.
        budget_weight: lambda, the weight of the penalty for what is kept beyond the ratio.
        align_weight: gamma, the weight of the penalty for what is kept out of order; 0 leaves the term out.
        sides: "one" penalizes more than the ratio, as in the paper, "two" less as well.
        align: "energy" measures what is out of order by the layer's own energy, "raw" as the paper does.
        tail: share of the run after the ranks are final, for what is trained beside (`train`).
        interval: optimizer steps between two looks at what was learned so far.
        minimum: components that every layer keeps.
        price: what a layer counts at the end: "factors" is what its factors have; "cheapest" that, or what it has as
            one matrix.
        refill: whether a budget that is not used up is spent, "spend" or "keep".
        temperature: tau of the draws.
        shift: b of the draws.
        seed: of everything that is drawn.
        mode: "eval" learns masks without dropout, "train" with it.
        targets: layers to factorise; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what is trained beside the masks; by default nothing, ``None`` for the head.
        compact: "final" cuts closed components out of the factors at the last event; see
            :class:`~lightning_peft.RankSelection`.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range.

    Reference:
        Gao et al., Adaptive Rank Selections for Low-Rank Approximation of Language Models, NAACL 2024.
    """
    for name, weight in (("budget_weight", budget_weight), ("align_weight", align_weight)):
        if not weight >= 0:
            raise ValueError(f"{name} is the weight of a penalty, at least 0. Got {weight}.")
    policy = paper.policy(ratio, masks, tail, interval, minimum, price, refill, temperature, shift, seed)
    terms: dict[str, Regularizer] = {"ars_budget": BudgetPenalty(ratio, UntilTail(budget_weight, tail), sides)}
    if align_weight:
        terms["ars_align"] = MaskAlignment(UntilTail(align_weight, tail), align)
    # The calibration decomposes every layer, so that nothing is decomposed twice.
    factory = partial(Factorized, trained=False, start="exact")
    return Preset(
        [
            AdapterInjection(factory, targets, None if train is None else list(train)),
            Calibration(WeightedSVD(weighting), batches),
            RankSelection(policy, compact, mode),
            Regularization(terms),
            RankMonitor(),
            AdapterCheckpoint(),
        ]
    )
