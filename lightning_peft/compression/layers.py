"""The layers that a compression will reach, before it begins: from a model without weights."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from math import ceil
from typing import Any

from torch import nn

from lightning_peft.adapters.factorized import Factorized
from lightning_peft.rank.budget import RankBudget
from lightning_peft.rank.weighted_svd import uniform_rank
from lightning_peft.surgery.injection import inject


def components(model: nn.Module, targets: Sequence[str] | None, ratio: float, alike: bool) -> dict[str, int]:
    """The layers that will be factorised, and how many components each has.

    Args:
        model: a transformers model, as :func:`lightning_peft.planning.skeleton.skeleton` builds it; it is changed.
        targets: patterns; see :func:`lightning_peft.inject`.
        ratio: kept share of their weights.
        alike: whether every layer is to keep this share, or all together.

    Raises:
        ValueError: the ratio does not pay for one component in every layer; or, alike, in one of them; or a layer's
            weight is tied to embeddings.
    """
    tied = _tied(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a weight is no longer tied: that is refused below
        inject(model, Factorized, targets, [])
    budget = RankBudget.of(model)
    if shared := [name for name in budget if name in tied]:
        raise ValueError(
            f"the layer {shared[0]!r} has the weight of the embeddings, which stay: compressed, it would come on top "
            "of them. Leave it out of the targets."
        )
    sizes = {name: len(site.gate) for name, site in budget.items()}
    dense = sum(K * (budget[name].gate.cost - K) for name, K in sizes.items())  # K is the smaller side
    least = sum(site.gate.cost for site in budget.values()) / dense
    if ratio < least:
        raise ValueError(
            f"ratio={ratio} cannot be reached: one component in each of {len(budget)} layers is {least:.4f} of their "
            "weights. Raise it, or name fewer layers in targets."
        )
    for name, K in sizes.items():
        cost = budget[name].gate.cost
        if alike and uniform_rank(cost - K, K, ratio) < 1:
            share = ceil(1e4 * cost / (K * (cost - K))) / 1e4  # rounded up, so that it is enough
            raise ValueError(
                f"ratio={ratio} leaves nothing of {name!r} where all layers keep the same share: one component is "
                f"{share:.4f} of its weights. Raise it to that, leave the layer out of the targets, or take a method "
                "that learns ranks."
            )
    return sizes


def _tied(model: Any) -> set[str]:
    """Names of layers whose weight is the input embeddings' too."""
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return set()
    output = model.get_output_embeddings()
    return {name for name, child in model.named_modules() if child is output}
