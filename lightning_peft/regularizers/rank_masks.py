"""Terms of learned rank masks: what they spend beyond their budget, and what they keep out of order."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.functional.rank_masks import deviation, excess, misplaced, require_ratio
from lightning_peft.rank.budget import RankBudget, Site
from lightning_peft.rank.sampling import MaskSampler
from lightning_peft.regularizers.base import Regularizer, Weight


class BudgetPenalty(Regularizer):
    """How far the masks of a step exceed their budget.

        R = log( max(T(m), P) / P ),    T(m) = sum_l (d_in + d_out) sum_i m_li,    P = ratio sum_l d_in d_out

    Natural logarithm; 0 with a zero gradient within the budget. In the two-sided form max(T, P) / min(T, P) stands in
    it: the masks are drawn to the budget from below as well, where the one-sided form tends to undershoot it.

    Args:
        ratio: kept share of the parameters of the layers that are factorised.
        weight: lambda: a number, or a function of (step, total).
        sides: "one" is the paper's, "two" that of DISP-LLM's code, by the same first author.

    Raises:
        TypeError: ratio is no number.
        ValueError: ratio is not in (0, 1], or sides is unknown.

    Reference:
        Gao et al., Adaptive Rank Selections, NAACL 2024, eq. 8. The algorithm's listing has the arguments in another
        order, in which the penalty could not be met.
    """

    def __init__(self, ratio: float, weight: Weight = 16.0, sides: Literal["one", "two"] = "one") -> None:
        super().__init__(weight)
        require_ratio(ratio)
        if sides not in ("one", "two"):
            raise ValueError(f"sides={sides!r}: choose 'one' (as in the paper) or 'two'.")
        self.ratio, self.sides = ratio, sides

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        spent, dense = [], 0
        for sites, masks in _drawn(module):
            spent.append(masks.sum() * sites[0].gate.cost)
            dense += sum(site.adapter.dense_parameters for site in sites)
        distance = excess if self.sides == "one" else deviation
        return distance(torch.stack(spent).sum(), self.ratio * dense)


class MaskAlignment(Regularizer):
    """How much of a layer's energy its mask keeps at other places than the first ones; the mean over layers.

        R_align = (1/L) sum_l |m_l s_l - m'_l s_l|^2  [ / |s_l|^2 ],    m'_l the first sum_i m_li components

    Where it is 0, as many first components do what the mask does, and truncation costs nothing more.

    Args:
        weight: gamma: a number, or a function of (step, total).
        scale: "energy" divides by the layer's own energy, "raw" is the paper's.

    Raises:
        ValueError: scale is unknown.

    Reference:
        Gao et al., Adaptive Rank Selections, NAACL 2024, eq. 7. Departure: "energy", the default, makes gamma mean the
        same for every weighting of the decomposition, whose s differ by orders of magnitude.
    """

    def __init__(self, weight: Weight = 10.0, scale: Literal["energy", "raw"] = "energy") -> None:
        super().__init__(weight)
        if scale not in ("energy", "raw"):
            raise ValueError(
                f"scale={scale!r}: choose 'energy' (by the layer's own energy) or 'raw' (as in the paper)."
            )
        self.scale = scale

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        found = []
        for sites, masks in _drawn(module):
            gains = [site.gate.mask if site.gate.gain is None else site.gate.gain for site in sites]
            s = torch.stack([gain.detach() for gain in gains]).to(masks.dtype)
            terms = misplaced(masks, s)
            found.append(terms / s.square().sum(1).clamp_min(1e-30) if self.scale == "energy" else terms)
        return torch.cat(found).mean()


def _drawn(module: nn.Module) -> list[tuple[list[Site], Tensor]]:
    """The masks that are drawn for this step, (L, K), by number of components and what one of these costs.

    In a step that is only looked at, by a calibration, nothing is drawn, and the gates' own masks count.
    """
    # By cost too: numbers of the host need not be copied to the device at every step, which would wait for it.
    groups: dict[tuple[int, int], list[Site]] = {}
    for site in RankBudget.of(module).values():
        groups.setdefault((len(site.gate), site.gate.cost), []).append(site)
    if not groups:
        raise RuntimeError("no adapter is there for a mask to be drawn for: put AdapterInjection into the callbacks.")
    sites = [site for group in groups.values() for site in group]
    if any(site.gate.drawn is None for site in sites) and not any(isinstance(m, MaskSampler) for m in module.modules()):
        raise RuntimeError(
            f"no mask is drawn for layer {sites[0].name!r}, and this term is about masks that are: put RankSelection, "
            "which draws them, into the Trainer's callbacks."
        )
    return [(group, torch.stack([_mask(site) for site in group])) for group in groups.values()]


def _mask(site: Site) -> Tensor:
    return site.gate.mask.detach() if site.gate.drawn is None else site.gate.drawn
