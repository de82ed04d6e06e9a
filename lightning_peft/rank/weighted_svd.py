"""WeightedSVD: factorised layers are decomposed anew, by what their inputs are worth to the loss or carry.

One class for a family of papers that differ in one statistic: FWSVD (Fisher), IWSVD (first-order Taylor), ASVD
(activations) and SVD-LLM (whitening). The mathematics is in functional/weighted_svd.py; here, when what is summed up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from math import floor
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional.weighted_svd import (
    scale,
    squared_gradient_entries,
    squared_gradients,
    weighted_svd,
    whitened_svd,
)
from lightning_peft.rank.budget import RankBudget, Site
from lightning_peft.rank.probe import Alone, Probe, Processes, first_open

Weighting = Literal["none", "fisher", "taylor", "activation", "whiten"]


class WeightedSVD(Probe):
    """Fill factorised layers with a decomposition whose first components matter most to the task.

        W = U diag(s) Vh,  with  W S = U diag(s) (Vh S)  the singular value decomposition        S: (d_in, d_in)

        none         S = 1                                   the plain decomposition; no data are looked at
        fisher       S = diag(f^alpha)      f_i = mean over samples of  sum_o (dL_s/dW_oi)^2               FWSVD
        taylor       S = diag(t^alpha)      t_i = mean over samples of  sum_o (dL_s/dW_oi W_oi)^2          IWSVD
        activation   S = diag(a^alpha)      a_i = mean over positions of |x_i|                             ASVD
        whiten       S S^T = mean over positions of x x^T                                                  SVD-LLM

    At full rank the layer's function is what it was, whatever S. All components of all layers are filled; a layer that
    the batches have shown nothing of gets the plain decomposition. So `Factorized(start="exact")` is all that has to
    come before. Either all stay open, for
    methods that choose among them, or every layer keeps its first ones: the same share of its parameters (`ratio`), or
    the same number of components (`rank`).

    Gradients are those of single samples: the square of a batch's mean is too small, since samples cancel. A loss that
    is the mean over a batch of B gives every sample 1 / B of its own gradient, which `reduction` undoes; without it
    small batches would count for more. A sample's gradient is the sum over all its positions, and over all calls of a
    layer that is called several times. What a mean over tokens gives to samples of unequal length, they keep.

    What is kept until the end, and the cost beside forward and backward:

        fisher       d_in float64 per layer             B T (T (d_in + d_out)), or B T d_in d_out where that is less
        taylor       d_in d_out float32 per layer       B T d_in d_out, as the weight's gradient
        activation   d_in float64 per layer             nothing to speak of
        whiten       d_in^2 float32 per layer           B T d_in^2; for 3072 inputs 38 MB

    Second moments are summed in float32: what rounding does to them is below the jitter that is added anyway.

    With several processes, statistics and counts are summed over all; each process then decomposes its share of the
    layers, and all get its result, the same bits.

    Args:
        weighting: what an input is worth.
        ratio: share of a layer's parameters that it keeps, in (0, 1): r = floor(ratio d_in d_out / (d_in + d_out)).
        rank: components that every layer keeps, or all where it has fewer; give `ratio`, `rank` or neither.
        alpha: power of the diagonal weightings; ``None`` for 1/2, the root.
        reduction: how the loss sums up a batch's samples, for "fisher" and "taylor".

    Raises:
        TypeError: ratio, rank or alpha is no number.
        ValueError: weighting or reduction is unknown, ratio or rank is out of range, both are given, or alpha is given
            to a weighting that has none.
        RuntimeError: when it begins, an adapter is not factorised, is compressed already, or is too small for `ratio`
            to leave a component; when it acts, a statistic is not finite, or the loss depends on no layer.

    Reference:
        Hsu et al., FWSVD, ICLR 2022, arXiv 2207.00112; Yuan et al., ASVD, 2023, arXiv 2312.05821; Wang et al., SVD-LLM,
        2024, arXiv 2403.07378 (all remembered); Gao et al., ARS, NAACL 2024, appendix D, for fisher and taylor. Our
        choices: the root for taylor too, and its gradients of single samples; floors relative to the mean, 1e-6.

    Example:
        >>> probe = WeightedSVD("whiten", ratio=0.5)
    """

    weights = True

    def __init__(
        self,
        weighting: Weighting = "fisher",
        ratio: float | None = None,
        rank: int | None = None,
        alpha: float | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> None:
        if weighting not in get_args(Weighting):
            raise ValueError(f"weighting={weighting!r}: choose {', '.join(map(repr, get_args(Weighting)))}.")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction={reduction!r}: choose 'mean' or 'sum', as the loss sums up a batch's samples.")
        if ratio is not None and rank is not None:
            raise ValueError(f"ratio and rank both say what is kept; give one. Got ratio={ratio} and rank={rank}.")
        if ratio is not None:
            require_number("ratio", ratio)
            if not 0 < ratio < 1:
                raise ValueError(f"ratio is the share of a layer's parameters that is kept, in (0, 1). Got {ratio}.")
        if rank is not None:
            require_integer("rank", rank)
            if rank < 1:
                raise ValueError(f"rank is how many components every layer keeps, at least 1. Got {rank}.")
        if alpha is not None:
            require_number("alpha", alpha)
            if weighting in ("none", "whiten"):
                raise ValueError(
                    f"alpha is a power of the diagonal weightings, and {weighting!r} is none. Leave it out."
                )
            if not alpha > 0:
                raise ValueError(f"alpha is a power, above 0. Got {alpha}.")
        self.weighting: Weighting = weighting
        self.ratio = ratio
        self.rank = rank
        self.alpha = alpha
        self.reduction = reduction
        self.reads = "samples" if weighting in ("fisher", "taylor") else "inputs"
        self._release()
        self._shapes: dict[str, tuple[int, int]] = {}
        self._ranks: dict[str, int] = {}
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._unseen: list[str] = []

    def begin(self, budget: RankBudget, processes: Processes) -> None:
        for name, site in budget.items():
            _require_whole(name, site, self.weighting)
        self._shapes = {name: _shape(site) for name, site in budget.items()}
        self._ranks = {name: self._rank(name, site) for name, site in budget.items()}
        self._budget, self._processes = budget, processes
        self._sums, self._counts, self._unseen = {}, {}, []

    def _release(self) -> None:
        """Hold no adapter and no process: factors that are cut afterwards are as large as the model's weights."""
        self._budget = RankBudget({})
        self._processes = Alone()

    def _rank(self, name: str, site: Site) -> int:
        """How many components of a layer stay open."""
        if self.ratio is None:
            return len(site.gate) if self.rank is None else min(self.rank, len(site.gate))
        d_out, d_in = _shape(site)
        r = uniform_rank(d_out, d_in, self.ratio)
        if r < 1:
            raise RuntimeError(
                f"ratio={self.ratio} leaves no component at {name!r}: one of {d_in} inputs and {d_out} outputs costs "
                f"{(d_in + d_out) / (d_in * d_out):.3g} of its parameters. Raise the ratio to that, or leave the layer "
                "out of the targets."
            )
        return r

    def wanted(self) -> Collection[str]:
        return () if self.weighting == "none" else list(self._budget)

    def see(self, layer: str, x: Tensor, rows: Callable[[], Tensor], gradient: Callable[[], Tensor] | None) -> None:
        X = rows().float()
        if gradient is not None:
            G = gradient().float()
            if self.reduction == "mean":
                G = G * len(G)  # a sample's gradient of its own loss
            self._add(
                layer, (squared_gradients if self.weighting == "fisher" else squared_gradient_entries)(X, G), len(X)
            )
        else:
            self._add(layer, X.abs().sum(0) if self.weighting == "activation" else X.mT @ X, len(X))

    def _add(self, layer: str, part: Tensor, count: int) -> None:
        if not count:
            return  # no position of the batch counts
        part = part.to(_sum_dtype(part.dim(), part.device))
        if layer in self._sums:
            self._sums[layer] += part
            self._counts[layer] += count
        else:
            self._sums[layer], self._counts[layer] = part, count

    @torch.no_grad()
    def act(self) -> dict[str, Tensor]:
        seen, names = self._agreed(), list(self._budget)
        everyone = self._processes
        known = False
        for start in range(0, len(names), everyone.count):
            # As many layers as there are processes: each decomposes one of them.
            some = names[start : start + everyone.count]
            mine = None
            for turn, name in enumerate(some):
                W, statistic = self._brought_together(name, name in seen)
                known = known or (statistic is not None and bool(statistic.any()))
                if turn == everyone.rank:
                    mine = W, statistic
            parts = None if mine is None else self._decomposed(*mine)
            for turn, name in enumerate(some):
                self._fill(self._budget[name], parts if turn == everyone.rank else None)
        if seen and not known:
            raise RuntimeError(
                "the loss of the calibration batches has no gradient by any factorised layer, so nothing follows from "
                "it. Look at what training_step returns."
                if self.reads == "samples"
                else "the inputs of all factorised layers are zero, so nothing follows from them. Look at the data."
            )
        masks = {name: first_open(site, self._ranks[name]) for name, site in self._budget.items()}
        self._release()
        return masks

    def _agreed(self) -> set[str]:
        """The layers that a process has seen; on one that has not, its sum is zero."""
        found = {name for names in self._processes.gather(list(self._sums)) for name in names}
        self._unseen = [] if self.weighting == "none" else [name for name in self._budget if name not in found]
        return found

    def _brought_together(self, name: str, seen: bool) -> tuple[Callable[[], Tensor], Tensor | None]:
        """A layer's weight, whole but not computed yet, and the mean of what all processes have seen of it."""
        adapter, gate = self._budget[name].adapter, self._budget[name].gate
        U, Vh = self._processes.whole(adapter.U.detach()), self._processes.whole(adapter.Vh.detach())

        def W() -> Tensor:
            wide = torch.promote_types(U.dtype, torch.float32)
            return (U.to(wide) * gate.value().to(wide)) @ Vh.to(wide)

        if not seen:
            return W, None
        d_out, d_in = _shape(self._budget[name])
        shape = {"taylor": (d_out, d_in), "whiten": (d_in, d_in)}.get(self.weighting, (d_in,))
        part = self._sums.pop(name, None)
        if part is None:
            part = torch.zeros(shape, dtype=_sum_dtype(len(shape), U.device), device=U.device)
        mean = self._processes.sum(part) / sum(self._processes.gather(self._counts.get(name, 0)))
        if not bool(mean.isfinite().all()):
            raise RuntimeError(
                f"what was seen at {name!r} is not finite, so no decomposition can follow from it: a calibration batch "
                "has overflowed. Look at the data, or calibrate in float32."
            )
        return W, mean

    def _fill(self, site: Site, parts: tuple[Tensor, Tensor, Tensor] | None) -> None:
        """Fill on all processes what one has. The others add zeros, so that the sum is the one's bits."""
        adapter, gain, everyone = site.adapter, site.gate.gain, self._processes
        assert gain is not None
        n, (d_out, d_in) = len(gain), _shape(site)
        if parts is None:
            parts = gain.new_zeros(d_out, n), gain.new_zeros(n), gain.new_zeros(n, d_in)
        U, s, Vh = (everyone.sum(part.to(gain.dtype)) for part in (parts[0][:, :n], parts[1][:n], parts[2][:n]))
        U, Vh = (everyone.like(new.to(old.dtype), old) for new, old in ((U, adapter.U), (Vh, adapter.Vh)))
        adapter.fill(U, s, Vh)

    def _decomposed(self, weight: Callable[[], Tensor], statistic: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        W = weight()
        if statistic is None:
            return weighted_svd(W)
        if self.weighting == "whiten":
            return whitened_svd(W, statistic)
        if self.weighting == "taylor":
            statistic = (statistic * W.square()).sum(0)
        return weighted_svd(W, scale(statistic, 0.5 if self.alpha is None else self.alpha))

    def unseen(self) -> list[str]:
        return self._unseen

    def report(self) -> str:
        shapes = list(self._shapes.values())
        dense = sum(d_out * d_in for d_out, d_in in shapes)
        kept = sum(factored_parameters(*shape, rank) for shape, rank in zip(shapes, self._ranks.values(), strict=True))
        plain = f", of them {len(self._unseen)} without it" if self._unseen else ""
        return (
            f"WeightedSVD: {len(shapes)} layers decomposed, weighting {self.weighting!r}{plain}; "
            f"{kept:,} of their {dense:,} parameters are kept, {kept / max(dense, 1):.1%}."
        )


def uniform_rank(d_out: int, d_in: int, ratio: float) -> int:
    """Components that cost at most this share of a weight's parameters: floor(ratio d_in d_out / (d_in + d_out)).

    Example:
        >>> uniform_rank(768, 768, 0.5)
        192
    """
    return floor(ratio * d_out * d_in / (d_out + d_in) + 1e-9)


def factored_parameters(d_out: int, d_in: int, rank: int) -> int:
    """Parameters of a layer of this rank: min(r (d_in + d_out), d_in d_out), dense where factors would not be smaller.

    Example:
        >>> factored_parameters(768, 768, 192), factored_parameters(768, 768, 768)
        (294912, 589824)
    """
    return min(rank * (d_out + d_in), d_out * d_in)


def _shape(site: Site) -> tuple[int, int]:
    """(d_out, d_in)."""
    return site.adapter.U.shape[0], site.adapter.Vh.shape[1]


def _sum_dtype(dims: int, device: torch.device) -> torch.dtype:
    """A vector is summed in float64, where the device has it; for a matrix that would be twice the memory."""
    return torch.float64 if dims == 1 and device.type != "mps" else torch.float32


def _require_whole(name: str, site: Site, weighting: Weighting) -> None:
    adapter = site.adapter
    kind = type(adapter).__name__
    if not {"U", "Vh"} <= {part for part, _ in adapter.own_parameters()} or not hasattr(adapter, "fill"):
        raise RuntimeError(
            f"WeightedSVD fills the factors U and Vh of factorised layers, and {kind} at {name!r} has none. Inject "
            "Factorized, or leave the layer out."
        )
    n, most = len(site.gate), min(_shape(site))
    if not bool(site.gate.mask.all()):
        raise RuntimeError(
            f"the layer {name!r} is compressed already: {int(site.gate.open().sum())} of its {n} components are open, "
            "and a weighting cannot bring back what is closed. Take the calibration out."
        )
    if n < most and weighting != "none":
        raise RuntimeError(
            f"the layer {name!r} has {n} components of {most}: what a plain decomposition has cut off cannot be "
            "weighted any more. Inject Factorized(rank=None), and say here what is kept."
        )
