"""AdaLoRA: adaptive budget allocation (Zhang et al., ICLR 2023).

In the paper's order: the triplets (eq. 3), their importance (eq. 7 to 9), the budget's schedule (eq. 12), and `policy`,
which puts them together. The regularizer (eq. 4) is `lightning_peft.Orthogonality(form="norm")`. The text, the authors'
code and HF PEFT's port of it do not agree everywhere: PEFT is followed, which users know, unless a line says otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.rank.budget import Budget, RankBudget, Site
from lightning_peft.rank.gate import Gate
from lightning_peft.rank.importance import Importance, by_shape, require_kept
from lightning_peft.rank.policy import RankPolicy
from lightning_peft.rank.schedule import Cubic

Mode = Literal["aligned", "peft"]


class AdaLoRA(LowRank):
    """Low-rank adaptation in the form of a singular value decomposition, whose singular values can be pruned.

        y = W x + b + (alpha / r) B diag(E m) A drop(x)

    A: (r, d_in), right singular vectors, and B: (d_out, r), left ones, both from N(0, 0.02^2). E: (r,), zero, the
    gate's gain, so that training starts from the base model. m: (r,), the gate's mask. A triplet is a row of A, an
    entry of E and a column of B. A, B and E are trained, W and b are frozen.

    Args:
        base: Linear, Conv1d, Conv2d, Conv3d, Embedding or transformers' Conv1D layer; frozen and kept.
        rank: number of triplets r at the start, PEFT's `init_r`; the paper takes 1.5 times the final average.
        alpha: update scale; the update is multiplied by alpha / r for the whole run, however many triplets are open.
        dropout: probability of dropout on the adapter's input, while training.

    Shape:
        x: (..., d_in) -> (..., d_out); for an embedding (...) indices -> (..., d_out);
        for a convolution ([N,] c_in, *places) -> ([N,] d_out, *places), with d_in = c_in / groups * prod(kernel)

    Raises:
        TypeError: the layer is of a kind that cannot be adapted.
        ValueError: rank, alpha or dropout is out of range.

    Reference:
        Zhang et al., AdaLoRA, ICLR 2023, arXiv 2303.10512, eq. 3. Start, scale and defaults are HF PEFT's.
        Departures: PEFT divides by r + 1e-5, which changes the update by a millionth; what is closed for good is closed
        by the mask, where PEFT sets E to zero again after every step: equal outputs, but its gradient no longer counts
        when gradients are clipped. Embeddings are ours: PEFT's AdaLoRA has none.

    Example:
        >>> AdaLoRA(nn.Linear(8, 4), rank=3).gate.gain
        Parameter containing:
        tensor([0., 0., 0.], requires_grad=True)
    """

    def __init__(self, base: nn.Module, rank: int = 12, alpha: float = 8.0, dropout: float = 0.0) -> None:
        super().__init__(base, rank, alpha, dropout)

    def _make_gate(self, d_in: int, d_out: int) -> Gate:
        # As an exported component counts: E is folded into B.
        return Gate(self.rank, cost=d_in + d_out, gain=torch.zeros_like(self.A[:, 0]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.A.normal_(0.0, 0.02)
        self.B.normal_(0.0, 0.02)
        if self.gate.gain is not None:
            self.gate.gain.zero_()


class TripletImportance(Importance):
    """Smoothed sensitivity of every entry times its uncertainty, summed over a triplet.

        I = |p dL/dp|                                        for every entry p of A, E and B
        Ibar <- beta1 Ibar + (1 - beta1) I
        Ubar <- beta2 Ubar + (1 - beta2) |I - Ibar|          with the new Ibar
        worth_k = s(E_k) + mean_j s(A_kj) + mean_j s(B_jk)   with s = Ibar Ubar

    Which gradient: that of the whole optimizer step, summed over its micro-batches, averaged over processes and without
    the scale of a gradient scaler. A parameter without one has sensitivity 0. A step is left out whole if a gradient in
    it is not finite, or if it was not taken: all layers have then seen the same steps.

    Two numbers per entry of A, B and E are kept until the last event, in float32 or wider, and go into checkpoints;
    then they are dropped. A step costs as many operations for a hundred layers as for one.

    Args:
        beta1: how much of the running sensitivity is kept at a step.
        beta2: how much of the running uncertainty is kept at a step.
        mode: "aligned" takes p as it was when the gradient was computed, before the optimizer's step and before
            clipping: I is then the first-order estimate that the paper speaks of. "peft" takes p after the step and the
            gradient as it is then, clipped, as the documented use of HF PEFT and the authors' training loop do.

    Raises:
        ValueError: a beta is not in [0, 1), or the mode is unknown.
        TypeError: when adapters are tracked, one has no A and B.

    Reference:
        Zhang et al., AdaLoRA, ICLR 2023, arXiv 2303.10512, eq. 7 to 11; means over a vector as there, where triplets
        of layers of all sizes are compared. The default is "aligned": it reads what the paper defines, does not depend
        on clipping, and works where gradients are cleared right after the step.
    """

    def __init__(self, beta1: float = 0.85, beta2: float = 0.85, mode: Mode = "aligned") -> None:
        require_kept("beta1", beta1)
        require_kept("beta2", beta2)
        if mode not in ("aligned", "peft"):
            raise ValueError(f"mode={mode!r}: choose 'aligned' (weights before the step) or 'peft' (after it).")
        super().__init__(beta1)
        self.beta1, self.beta2, self.mode = beta1, beta2, mode
        self.reads = "gradients" if mode == "aligned" else "weights"
        self._uncertainty: list[Tensor] = []
        self._asked = self._fed = False

    def track(self, budget: RankBudget) -> None:
        self._start(_pools(budget.values()))

    def forget(self) -> None:
        self._start([])

    def _start(self, pools: list[_Pool]) -> None:
        self._groups = [*pools]
        self._worth = [pool.zeros() for pool in pools]
        self._uncertainty = [pool.zeros() for pool in pools]
        self._odd = [torch.zeros(pool.tensors, dtype=torch.bool, device=pool.device) for pool in pools]
        self._asked = self._fed = False

    def measure(self, group: list[Site]) -> Tensor:
        """I of every entry of a pool, side by side, and behind them the largest I of every tensor."""
        assert isinstance(group, _Pool)
        parameters = group.parameters()
        gradients = [p.grad for p in parameters]
        self._asked = True
        self._fed = self._fed or any(gradient is not None for gradient in gradients)
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
        products = torch._foreach_mul(parameters, whole)
        largest = torch.stack(torch._foreach_norm(products, ord=torch.inf))
        return torch.cat([*group.side_by_side(products), largest]).abs_()

    @torch.no_grad()
    def fold(self, now: list[Tensor], expect_overflow: bool = False, skipped: Tensor | None = None) -> None:
        largest = [new[len(mean) :] for new, mean in zip(now, self._worth, strict=True)]
        broken = [each - each != 0 for each in largest]  # infinite, or not a number
        doubts = [each.any() for each in broken] + ([] if skipped is None else [skipped != 0])
        for i, new in enumerate(now):
            mean, uncertainty = self._worth[i], self._uncertainty[i]
            entries, leave = new[: len(mean)], doubts[i]
            for other in doubts[:i] + doubts[i + 1 :]:
                leave = leave | other.to(leave.device, non_blocking=True)
            if skipped is None and not expect_overflow:
                self._odd[i] |= broken[i]
            # I - Ibar_old. With the new Ibar it is beta1 times as much: I - Ibar = beta1 (I - Ibar_old).
            change = (entries - mean).masked_fill_(leave, 0.0)
            mean.add_(change, alpha=1 - self.beta1)
            uncertain = change.abs_().mul_(self.beta1).sub_(uncertainty).masked_fill_(leave, 0.0)
            uncertainty.add_(uncertain, alpha=1 - self.beta2)

    def scores(self) -> dict[str, Tensor]:
        """Worth by layer, from the statistics as they are now.

        Raises:
            RuntimeError: no adapter had a gradient at any step.
        """
        if self._asked and not self._fed:
            raise RuntimeError(
                f"TripletImportance(mode={self.mode!r}) has seen no gradient of an adapter at any step, so all "
                "triplets would count alike. With mode='peft' gradients are read after the optimizer's step, and a "
                "module that optimizes by hand may have cleared them by then: mode='aligned' reads them before it."
            )
        found: dict[str, Tensor] = {}
        for pool, mean, uncertainty in self._triples():
            found |= zip((site.name for site in pool), pool.worth(mean * uncertainty).unbind(), strict=True)
        return found

    def _triples(self) -> Iterator[tuple[_Pool, Tensor, Tensor]]:
        for pool, mean, uncertainty in zip(self._groups, self._worth, self._uncertainty, strict=True):
            assert isinstance(pool, _Pool)
            yield pool, mean, uncertainty

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """The smoothed sensitivity and its uncertainty of A, of E and of B by layer, a row per triplet; views."""
        found: dict[str, dict[str, Tensor]] = {}
        for pool, mean, uncertainty in self._triples():
            for key, flat in (("sensitivity", mean), ("uncertainty", uncertainty)):
                for part, rows in pool.rows(flat).items():
                    found.setdefault(f"{key}.{part}", {}).update(rows)
        return found

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state:  # else it was saved after the last event
            super().load_state_dict(state)
            self._fed = True


class _Pool(list[Site]):
    """Layers of equal rank, with the layout of one flat tensor that holds a number for each entry of their adapters.

        A: (r, sum d_in), side by side  |  B: (sum d_out, r), one below the other  |  E: (layers, r)

    So a step needs one operation for all layers of whatever shapes, and no view of any of them. Layers of one shape are
    neighbours, so that means over a vector need one for each shape.
    """

    def __init__(self, sites: Iterable[Site]) -> None:
        super().__init__(sites)
        self.factors = [_factors(site) for site in self]
        self.rank, self.device = len(self[0].gate), self.factors[0][0].device
        self.dtype = torch.promote_types(self.factors[0][0].dtype, torch.float32)
        self.gains = self[0].gate.gain is not None
        self.widths = [A.shape[1] for A, _ in self.factors]
        self.heights = [B.shape[0] for _, B in self.factors]
        self.tensors = len(self) * (3 if self.gains else 2)
        shapes = groupby(zip(self.widths, self.heights, strict=True))
        self.runs = [(d_in, d_out, len(list(run))) for (d_in, d_out), run in shapes]

    def zeros(self) -> Tensor:
        size = sum(self.widths) + sum(self.heights) + (len(self) if self.gains else 0)
        return torch.zeros(self.rank * size, dtype=self.dtype, device=self.device)

    def parameters(self) -> list[Tensor]:
        """All A, all B, and all E."""
        # Read anew: the module may have been moved, and its tensors replaced.
        factors = [_factors(site) for site in self]
        gains = [site.gate.gain for site in self if site.gate.gain is not None]
        return [A for A, _ in factors] + [B for _, B in factors] + gains

    def side_by_side(self, tensors: tuple[Tensor, ...] | list[Tensor]) -> list[Tensor]:
        """The flat tensor's three parts from tensors in the order of :meth:`parameters`."""
        n = len(self)
        parts = [torch.cat(tensors[:n], dim=1), torch.cat(tensors[n : 2 * n], dim=0)]
        if self.gains:
            parts.append(torch.stack(tensors[2 * n :]))
        return [part.view(-1).to(self.dtype) for part in parts]

    def _parts(self, flat: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        sizes = [self.rank * sum(self.widths), self.rank * sum(self.heights)]
        A, B, E = flat.split([*sizes, len(flat) - sum(sizes)])
        r = self.rank
        return A.view(r, -1), B.view(-1, r), E.view(-1, r) if self.gains else None

    def worth(self, score: Tensor) -> Tensor:
        """Scores of entries to scores of triplets: (layers, r)."""
        A, B, E = self._parts(score)
        right = A.split([d_in * count for d_in, _, count in self.runs], dim=1)
        left = B.split([d_out * count for _, d_out, count in self.runs], dim=0)
        worth = torch.cat(
            [
                a.reshape(self.rank, count, d_in).mean(2).t() + b.view(count, d_out, self.rank).mean(1)
                for a, b, (d_in, d_out, count) in zip(right, left, self.runs, strict=True)
            ]
        )
        return worth if E is None else worth + E

    def rows(self, flat: Tensor) -> dict[str, dict[str, Tensor]]:
        """Views of a flat tensor: "A", "B" or "gain" -> layer -> (r, ...)."""
        A, B, E = self._parts(flat)
        names = [site.name for site in self]
        found = {
            "A": dict(zip(names, A.split(self.widths, dim=1), strict=True)),
            "B": {name: rows.t() for name, rows in zip(names, B.split(self.heights, dim=0), strict=True)},
        }
        return found if E is None else found | {"gain": dict(zip(names, E, strict=True))}


def _pools(sites: Iterable[Site]) -> list[_Pool]:
    pools: dict[object, list[Site]] = {}
    for group in by_shape(sites):
        A, _ = _factors(group[0])
        key = (len(group[0].gate), group[0].gate.gain is None, A.dtype, A.device)
        pools.setdefault(key, []).extend(group)
    return [_Pool(pool) for pool in pools.values()]


def _factors(site: Site) -> tuple[Tensor, Tensor]:
    if not isinstance(site.adapter, LowRank):
        raise TypeError(
            f"TripletImportance scores the factors A and B of low-rank adapters, and the adapter at {site.name!r} is a "
            f"{type(site.adapter).__name__}. Use Taylor(), which needs a gate only."
        )
    return site.adapter.A, site.adapter.B


@dataclass(frozen=True)
class CubicBudget(Cubic):
    """Fast first, with HF PEFT's rounding and its events.

        budget(t) = int( (b(0) - b(T)) (1 - q)^3 + b(T) ),    q = (t - start) / (last - start), in float arithmetic

    Where :class:`~lightning_peft.Cubic` rounds the cut down, this rounds the budget down: they differ by one. Events
    are the multiples of the interval after the start, and the last step of the window. Importance takes in every step
    before that last one, the warm-up included.

    Reference:
        Zhang et al., AdaLoRA, ICLR 2023, arXiv 2303.10512, eq. 12; rounding and events as in HF PEFT.
    """

    def is_event(self, step: int, total: int, interval: int) -> bool:
        start, last = self.window(total)
        return start < step <= last and (step % interval == 0 or step == last)

    def observes(self, step: int, total: int) -> bool:
        return step < self.window(total)[1]

    def budget(self, step: int, total: int, start: int, end: int) -> int:
        first, last = self.window(total)
        if step <= first or start <= end:
            return start
        if step >= last:
            return end
        return int((start - end) * (1 - (step - first) / (last - first)) ** 3 + end)

    def cut(self, step: int, total: int, amount: int) -> int:
        return amount - self.budget(step, total, amount, 0)


def initial_rank(final_rank: float) -> int:
    """Triplets per layer at the start: ceil(1.5 r). Reference: section 4 of the paper (b(0) = 1.5 b(T))."""
    return ceil(1.5 * final_rank)


def policy(
    final: Budget,
    warmup: float = 0.15,
    tail: float = 0.5,
    interval: int = 10,
    beta1: float = 0.85,
    beta2: float = 0.85,
    mode: Mode = "aligned",
    minimum: int = 0,
) -> RankPolicy:
    """The paper's policy: triplets by sensitivity and uncertainty, fast-then-slow, soft until the tail begins.

        b(t) = b(T) + (b(0) - b(T)) (1 - q)^3,    q = (t - t_i) / (T - t_f - t_i)

    At an event E of the triplets of lowest worth is set to zero, from where training may bring it back; after the last
    one they are closed for good.

    Args:
        final: what may be spent at the end; `Budget(rank=r)` is the paper's.
        warmup: share t_i / T of the run before the first cut; PEFT's `tinit`.
        tail: share t_f / T of the run after the last one; PEFT's `tfinal`.
        interval: optimizer steps between two cuts; PEFT's `deltaT`.
        beta1: how much of the running sensitivity is kept at a step.
        beta2: how much of the running uncertainty is kept at a step.
        mode: which weights a step's gradient is multiplied by; see :class:`TripletImportance`.
        minimum: triplets that every layer keeps; 0 in the paper.

    Reference:
        Zhang et al., AdaLoRA, ICLR 2023, arXiv 2303.10512, eq. 12, algorithm 1. warmup, tail and interval are our
        choice, near the middle of what the authors use for GLUE (remembered: 9 to 15 % and 44 to 58 % of the run, 1 to
        100 steps); PEFT's defaults, 0, 0 and 1, leave no tail. Departure: exactly as many triplets are closed as the
        budget says, where PEFT closes all that tie with the threshold.
    """
    importance = TripletImportance(beta1, beta2, mode)
    return RankPolicy(CubicBudget(warmup, tail), importance, final, interval, soft=True, minimum=minimum)
