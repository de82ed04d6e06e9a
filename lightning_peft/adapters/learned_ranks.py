"""Learned ranks: masks are drawn and trained, and in the end each layer keeps as many first components as they kept."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from math import floor
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.arguments import require_integer
from lightning_peft.default_dtype import float32_by_default
from lightning_peft.functional.rank_masks import require_ratio, select_ranks, whole_ranks
from lightning_peft.rank.budget import RankBudget, Unit
from lightning_peft.rank.sampling import KeepProbability, MaskSampler, SamplingPolicy
from lightning_peft.rank.schedule import Constant

Price = Literal["factors", "cheapest"]
Refill = Literal["spend", "keep"]
SamplerFactory = Callable[[Mapping[str, int]], MaskSampler]


class LearnedRanks(SamplingPolicy):
    """Learn masks over the singular values of every layer, and make whole ranks of them.

        k_l = round(sum_i P_li),     P_li how often draws keep component i of layer l

    Until its last event it writes what draws keep on average, as masks of first components: that is what validation
    sees, and what `rank/spent` shows on its way to `rank/budget`. At its last event the ranks are brought into the
    budget, which is a share of the dense layers' weights: the layer whose last component is kept least often gives it
    up until sum_l k_l (d_in + d_out) <= ratio T, and what is left goes to those whose next one is kept most often.

    Args:
        ratio: kept share of the parameters of the layers that are factorised, T = sum_l d_in d_out.
        sampler: makes what draws the masks, from layer -> number of components.
        tail: share of the run after the last event; whatever else is trained has it to adapt to the final ranks.
        interval: optimizer steps between two events; the last is at the end of the run, or where the tail begins.
        minimum: components that every layer keeps.
        price: what a layer counts in the budget at the end: "factors" is k (d_in + d_out), as in the paper; "cheapest"
            is that or d_in d_out, whichever is less, and a layer that is as cheap dense keeps all its components.
        refill: what becomes of a budget that is not used up: "spend" or "keep".

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range.

    Reference:
        Gao et al., Adaptive Rank Selections, NAACL 2024. "The top 1'm ranks" does not say which sample of m: the
        average over samples here. The budget at the end, and the refill, are our choice: the paper's penalty alone
        neither guarantees the budget nor uses it up.
    """

    def __init__(
        self,
        ratio: float,
        sampler: SamplerFactory,
        tail: float = 0.0,
        interval: int = 10,
        minimum: int = 1,
        price: Price = "factors",
        refill: Refill = "spend",
    ) -> None:
        require_ratio(ratio)
        if not callable(sampler) or isinstance(sampler, nn.Module):
            raise TypeError(
                "sampler makes what draws the masks, once the layers are known: give a subclass of MaskSampler, or a "
                f"function that returns one. Got {sampler!r}."
            )
        if price not in ("factors", "cheapest"):
            raise ValueError(f"price={price!r}: choose 'factors' or 'cheapest'.")
        if refill not in ("spend", "keep"):
            raise ValueError(f"refill={refill!r}: choose 'spend' or 'keep'.")
        require_integer("minimum", minimum)
        if minimum < 1:
            raise ValueError(
                f"minimum is a number of components, at least 1: a layer has no weight but them. Got {minimum}."
            )
        self._kept = KeepProbability()
        super().__init__(Constant(0.0, tail), self._kept, interval)
        self.ratio, self.minimum = ratio, minimum
        self.price, self.refill = price, refill
        self._new = sampler

    @property
    def unit(self) -> Unit:
        return "parameters"

    @property
    def returning(self) -> str:
        return "this policy draws masks anew at every step"

    @property
    def sampler(self) -> MaskSampler | None:
        return self._kept.sampler

    def settings(self) -> dict[str, str]:
        kind = "" if self.sampler is None else type(self.sampler).__name__
        return {"budget": f"ratio {self.ratio:g}", "masks": kind, **super().settings()}

    def build(self, budget: RankBudget) -> MaskSampler:
        for name, site in budget.items():
            if site.gate.gain is None:
                raise ValueError(
                    f"ranks are learned by masks over singular values, and the adapter at {name!r}, a "
                    f"{type(site.adapter).__name__}, has none. Factorise the layers: "
                    "AdapterInjection(partial(Factorized, trained=False))."
                )
        layers = {name: len(site.gate) for name, site in budget.items()}
        sampler, gates = self._kept.sampler, [site.gate for site in budget.values()]
        # Those of another model have learned something else, though they be as many and as long.
        if sampler is None or sampler.layers != layers or gates != [site.gate for site in self._budget.values()]:
            with float32_by_default(), torch.device("cpu"):  # whatever `configure_model` runs with
                sampler = self._kept.sampler = self._new(layers)
            if budget:
                sampler.to(next(iter(budget.values())).gate.mask.device)
        self._budget = budget
        return sampler

    def track(self, budget: RankBudget) -> None:
        """Take on the adapters of `budget`.

        Raises:
            ValueError: the ratio does not pay for the minimum.
        """
        super().track(budget)
        costs, amount = budget.sizes("parameters"), self.budget_at(0, 0)
        least = sum(min(self.minimum, len(site.gate)) * costs[name] for name, site in budget.items())
        whole = budget.dense_parameters
        if least > amount:
            raise ValueError(
                f"ratio={self.ratio:g} keeps {amount:,} of the {whole:,} parameters of {len(budget)} layers, and the "
                f"least that they can keep (minimum={self.minimum}) has {least:,}. The ratio must be at least "
                f"{least / whole:.3g}."
            )

    def budget_at(self, step: int, total: int) -> int:
        """What may be spent at the end, ratio T; the penalty demands it from the first step on."""
        return floor(self.ratio * self._budget.dense_parameters + 1e-6)

    def draw(self, step: int) -> None:
        sampler = self.sampler
        assert sampler is not None  # `build` is called first
        if {name: len(site.gate) for name, site in self._budget.items()} != sampler.layers:
            raise RuntimeError(
                "the adapters were changed after masks began to be learned for them: other layers are adapted, or "
                "components were cut out. Cut them before the fit, or after the last event (compact='final')."
            )
        if not self._budget:
            return
        device = next(iter(self._budget.values())).gate.mask.device.type
        with torch.autocast(device, enabled=False):
            rows = sampler.by_layer(sampler.masks(step))
        for name, site in self._budget.items():
            site.gate.drawn = rows[name]

    def decide(self, step: int, total: int) -> dict[str, Tensor]:
        """Masks of first components: what draws keep on average; at the last event within the budget.

        Raises:
            RuntimeError: the masks have diverged.
        """
        if not self._budget:
            return {}
        sampler, sizes = self.build(self._budget), {name: len(site.gate) for name, site in self._budget.items()}
        with torch.no_grad():
            kept, sums = (sampler.by_layer(each) for each in (sampler.probabilities(), sampler.counts()))
        # One transfer for all layers.
        flat = torch.cat([*kept.values(), torch.stack(list(sums.values()))]).cpu().double()
        *rows, counts = flat.split([*sizes.values(), len(sizes)])
        probabilities = dict(zip(sizes, rows, strict=True))
        odd = [name for name, row in probabilities.items() if not bool(row.isfinite().all())]
        if odd:
            raise RuntimeError(
                f"the masks of {', '.join(odd[:5])} have diverged: how often components are kept is no longer finite. "
                "Lower the learning rate, or clip gradients, and go on from an earlier checkpoint."
            )
        counted = dict(zip(sizes, counts.tolist(), strict=True))
        ranks = whole_ranks(counted, sizes, self.minimum)
        if self.is_final(step, total):
            amount = self.budget_at(step, total)
            self._warn_of_excess(counted, amount)
            costs, dense = self._budget.sizes("parameters"), self._dense()
            ranks = select_ranks(ranks, probabilities, costs, amount, self.minimum, dense, self.refill == "spend")
        return {name: torch.arange(len(row)) < ranks[name] for name, row in probabilities.items()}

    def spent(self, ranks: Mapping[str, float]) -> float:
        sizes, dense = self._budget.sizes("parameters"), self._dense()
        prices = {name: rank * sizes[name] for name, rank in ranks.items()}
        return sum(prices.values() if dense is None else (min(price, dense[name]) for name, price in prices.items()))

    def _dense(self) -> dict[str, int] | None:
        """layer -> what it counts as one matrix; ``None`` if that does not matter."""
        if self.price == "factors":
            return None
        return {name: site.adapter.dense_parameters for name, site in self._budget.items()}

    def _warn_of_excess(self, counts: Mapping[str, float], amount: int) -> None:
        learned = self.spent(counts)
        if learned > 1.02 * amount:
            warnings.warn(
                f"masks have learned to keep {learned:,.0f} parameters, and the budget is {amount:,}: ranks were cut "
                "to it all the same, but by no more than how often components are kept. Train for more steps, raise "
                "the learning rate, or raise the weight of the budget's penalty.",
                stacklevel=4,
            )
