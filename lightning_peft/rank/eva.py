"""EVA, explained variance adaptation (Paischer et al., 2024): ranks and A from an SVD of the layers' inputs.

In the paper's order: the incremental SVD (functional/incremental_svd.py), its convergence, the ranks, and the start.
The paper is known here by its abstract and by PEFT's implementation; where this says "PEFT", it was read there.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from math import floor

import torch
from torch import Tensor

from lightning_peft.arguments import require_number
from lightning_peft.functional.incremental_svd import Sketch, join, sketch
from lightning_peft.rank.allocation import open_best
from lightning_peft.rank.budget import RankBudget
from lightning_peft.rank.probe import Probe, Processes, first_open, require_untrained


class EVA(Probe):
    """Rank goes to the layers whose inputs vary in few directions, and A starts as these directions.

        X_l = U S V^T  (inputs of layer l, centred)      A_l <- V_1..n      B_l stays 0
        rank_l = how many of the L r largest of all  S_li^2 / |X_l|^2  are of layer l

    Layers that are called with the same tensor share one SVD. A layer is listened to until the directions that it would
    be given have stopped turning, |cos| >= tau between two batches, so most layers are done after a few. The cap of a
    layer's rank is the rank that its adapter was built with: rho r for the paper's redistribution, r for none.

    The scale of the update is that of the adapter, alpha' / n for n components at the start, whatever stays open. PEFT
    scales alpha by rank_l / r, which keeps alpha / r in every layer: built with alpha' = alpha n / r, so does this.

    Layers whose input is never seen (embeddings; weights that are read and not multiplied by, as in attentions) keep
    their start and floor(r) components, as do those that PEFT does not support.

    Args:
        rank: r, the average rank that is kept.
        tau: how still a direction is when it counts as found; in [0, 1].

    Raises:
        ValueError: rank is not positive, or tau is not in [0, 1].

    Reference:
        Paischer et al., EVA, 2024, arXiv 2410.07170; PEFT 0.21, tuners/lora/eva.py. Departures: the sign of a direction
        says nothing, so convergence takes |cos|; a batch of fewer positions than components is used, not skipped;
        several processes exchange their 2 n strongest directions per batch, not their inputs; ties go to earlier
        layers, the first of those that share an input before the others; what has not converged when the batches end
        is taken as it is.
    """

    reads = "inputs"

    def __init__(self, rank: float = 8, tau: float = 0.99) -> None:
        require_number("rank", rank)
        require_number("tau", tau)
        if not rank > 0:
            raise ValueError(f"rank is the average number of components per layer, above 0. Got {rank}.")
        if not 0 <= tau <= 1:
            raise ValueError(f"tau is a cosine, in [0, 1]. Got {tau}.")
        self.rank = rank
        self.tau = tau
        self._start(RankBudget({}))

    def _start(self, budget: RankBudget) -> None:
        self._budget = budget
        self._cap = max((len(site.gate) for site in budget.values()), default=0)
        self._leader: dict[str, str] = {}  # layer -> the one that was called with its input first
        self._agreed = False
        self._inputs: dict[int, tuple[weakref.ref[Tensor], str]] = {}  # of this batch, by identity
        self._sketches: dict[str, Sketch] = {}
        self._parts: dict[str, Sketch] = {}  # of this batch and process
        self._still: dict[str, Tensor] = {}  # leader -> (k,) bool, directions that have stopped turning
        self._masks: dict[str, Tensor] = {}

    def begin(self, budget: RankBudget, processes: Processes) -> None:
        require_untrained(budget, "EVA")
        self._start(budget)
        self._processes = processes

    def wanted(self) -> Collection[str]:
        if not self._masks:
            return list(self._budget)
        open_ = {name for name in self._masks if not self._converged(name)}
        if not open_:
            return []
        followers = {name for name, leader in self._leader.items() if name != leader}
        seen = {self._leader[name] for name in open_}
        return [name for name in self._budget if name in seen or name not in {*self._leader, *followers}]

    def _converged(self, name: str) -> bool:
        return bool(self._still[self._leader[name]][: int(self._masks[name].sum())].all())

    def see(self, layer: str, x: Tensor, rows: Callable[[], Tensor], gradient: Callable[[], Tensor] | None) -> None:
        if not x.is_floating_point():
            return  # an embedding's indices
        if not self._agreed:
            self._follow(layer, x)
        if self._leader.get(layer) != layer:
            return
        part = sketch(rows())
        if self._processes.count == 1:
            self._update(layer, [part])
        else:
            # As many directions as PEFT's randomised SVD looks for; what is exchanged does not grow with the batch.
            both = join(self._parts[layer], part) if layer in self._parts else part
            self._parts[layer] = both.truncated(2 * self._cap)

    def _follow(self, layer: str, x: Tensor) -> None:
        """Note whose input this layer has. No reference is kept: a tensor that is gone is nobody's input any more."""
        known = self._inputs.get(id(x))
        if known is None or known[0]() is not x:
            known = self._inputs[id(x)] = weakref.ref(x), layer
        self._leader.setdefault(layer, known[1])

    def _update(self, layer: str, parts: list[Sketch]) -> None:
        before = self._sketches.get(layer)
        after = join(*parts) if before is None else join(before, *parts)
        after = after.truncated(min(self._cap, after.V.shape[1]))
        still = torch.zeros(self._cap, dtype=torch.bool)
        if before is not None:
            both = min(len(before.S), len(after.S))
            cosines = (before.V[:both] * after.V[:both]).sum(1).abs()
            still[:both] = (cosines >= self.tau).cpu()
        self._sketches[layer], self._still[layer] = after, still

    def fold(self) -> None:
        if not self._agreed:
            # Who shares an input is one answer for all; a process may not have called a layer that another has.
            for others in self._processes.gather(self._leader):
                for name, leader in others.items():
                    self._leader.setdefault(name, leader)
            self._leader = {name: self._leader[name] for name in self._budget if name in self._leader}
            self._agreed = bool(self._leader)
            self._inputs.clear()
        if self._processes.count > 1:
            wanted = set(self.wanted())
            for name in dict.fromkeys(self._leader.values()):
                if name in wanted:
                    parts = self._gathered(name)
                    if any(part.count for part in parts):
                        self._update(name, parts)
            self._parts.clear()
        if self._sketches:
            self._masks = self._ranked()

    def _gathered(self, name: str) -> list[Sketch]:
        """Every process's directions of this batch, one message: rows of [S | V], then the mean, count and energy."""
        site = self._budget[name]
        A: Tensor = site.adapter.A
        d = A.shape[1]
        mine = self._parts.get(name)
        if mine is None:
            mine = sketch(A.new_zeros(0, d))
        rows = min(2 * self._cap, d)
        packed = mine.V.new_zeros(rows + 1, d + 2)
        packed[: len(mine.S), 0], packed[: len(mine.S), 2:] = mine.S, mine.V
        packed[rows, 0], packed[rows, 1], packed[rows, 2:] = mine.count, mine.energy, mine.mean
        return [
            Sketch(each[:rows, 0], each[:rows, 2:], each[rows, 2:], each[rows, 1], int(each[rows, 0]))
            for each in self._processes.gather(packed)
        ]

    def _ranked(self) -> dict[str, Tensor]:
        """The components that the layers seen so far would be given."""
        groups: dict[str, list[str]] = {}
        for name, leader in self._leader.items():
            if leader in self._sketches:
                groups.setdefault(leader, []).append(name)
        order = [names[0] for names in groups.values()] + [name for names in groups.values() for name in names[1:]]
        explained = {leader: self._sketches[leader].explained() for leader in groups}
        return explained_ranks({n: explained[self._leader[n]] for n in order}, self._sizes(order), self.rank)

    def _sizes(self, names: list[str]) -> dict[str, int]:
        return {name: len(self._budget[name].gate) for name in names}

    @torch.no_grad()
    def act(self) -> dict[str, Tensor]:
        masks = {}
        for name, site in self._budget.items():
            if name not in self._masks:
                masks[name] = first_open(site, floor(self.rank))
                continue
            A: Tensor = site.adapter.A
            V = self._sketches[self._leader[name]].V[: len(site.gate)]
            A[: len(V)] = V.to(A)
            masks[name] = self._masks[name]
        return masks

    def unseen(self) -> list[str]:
        return [name for name in self._budget if name not in self._masks]

    def report(self) -> str:
        converged = sum(map(self._converged, self._masks))
        return f"EVA: the directions of {converged} of {len(self._masks)} layers have converged."


def explained_ranks(explained: Mapping[str, Tensor], caps: Mapping[str, int], rank: float) -> dict[str, Tensor]:
    """The components that layers are given by their inputs' explained variance: the highest shares, L r in all.

    Args:
        explained: layer -> (k,) descending shares of the variance of its input; ties go to earlier layers.
        caps: layer -> n, how many components it has.
        rank: r, the average that is given.

    Returns:
        layer -> (n,) bool on the CPU, the first ones True.
    """
    scores = {}
    for name, shares in explained.items():
        some = shares[: caps[name]]
        # Directions that no data have shown yet are worth least.
        scores[name] = torch.cat([some, some.new_full((caps[name] - len(some),), -1.0)])
    return open_best(scores, dict.fromkeys(scores, 1), floor(len(scores) * rank + 1e-9))
