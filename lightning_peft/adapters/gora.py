"""GoRA, gradient-driven ranks and start (He et al., 2025): both from a short look at the base weights' gradients.

In the order of the abstract, which is all that is known of the paper here: the ranks by sensitivity, then the start of
B. What the abstract leaves open is our choice, and said so.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from math import floor, sqrt

import torch
from torch import Tensor

from lightning_peft.adapters.layers import matrix
from lightning_peft.arguments import require_integer, require_number
from lightning_peft.rank.allocation import open_best
from lightning_peft.rank.budget import RankBudget
from lightning_peft.rank.probe import Probe, Processes, first_open, require_untrained


class GoRA(Probe):
    """Rank goes to the layers whose weights the loss is most sensitive to, and B starts as a gradient step.

        G_l = dL/dW_l, the mean over the batches              s_l = mean |W_l * G_l|
        rank_l ~ s_l / cost_l,  at least `minimum`,           sum_l cost_l rank_l <= r sum_l cost_l
        B_l = -(eta / scaling_l) G_l A_l^+,                   so that scaling_l B_l A_l = -eta G_l A_l^+ A_l

    A keeps its random start; the update is then the best approximation of a gradient step -eta G that has A's row
    space. eta is one for all layers, chosen so that all updates together are `gamma` times as long as the weights that
    they change: sum |update|^2 = gamma^2 sum |W|^2. The model does not start as its base, but a step away from it.

    W is frozen and gets no gradient: G is the sum of the outer products of what the layers are called with and of the
    loss's gradient by what they give. One float32 number per adapted base weight is kept until the end: the memory of a
    full gradient of these layers, during calibration only.

    Args:
        rank: r, the average rank; the parameters that it would cost in every layer are the budget.
        minimum: components that every layer gets. The most that a layer can get is
            what its adapter was built with.
        gamma: length of the first update, relative to the weights.

    Raises:
        ValueError: an argument is out of range.
        RuntimeError: when it begins, an adapter has been trained, or has a gain, which would undo the start.

    Reference:
        He et al., GoRA, 2025, arXiv 2502.12171, abstract: ranks by sensitivity of the gradients of a small subset,
        B by the pseudo-inverse. Our choices: sensitivity is mean |W * G| (remembered); ranks are apportioned by
        d'Hondt's rule, so the budget is kept exactly; eta by `gamma`; the scale is alpha / r in every layer.
    """

    reads = "gradients"
    weights = True

    def __init__(self, rank: float = 8, minimum: int = 1, gamma: float = 1e-3) -> None:
        require_number("rank", rank)
        require_integer("minimum", minimum)
        require_number("gamma", gamma)
        if not rank > 0:
            raise ValueError(f"rank is the average number of components per layer, above 0. Got {rank}.")
        if not 0 <= minimum <= rank:
            raise ValueError(f"minimum is what every layer gets, from 0 to rank={rank}. Got {minimum}.")
        if not gamma > 0:
            raise ValueError(f"gamma is the relative length of the first update, above 0. Got {gamma}.")
        self.rank = rank
        self.minimum = minimum
        self.gamma = gamma
        self._budget = RankBudget({})
        self._unseen: list[str] = []
        self._gradients: dict[str, Tensor] = {}
        self._batches = 0
        self._step = 0.0

    def begin(self, budget: RankBudget, processes: Processes) -> None:
        require_untrained(budget, "GoRA")
        for name, site in budget.items():
            if site.gate.gain is not None:
                raise RuntimeError(
                    f"GoRA starts B as a gradient step, and at {name!r} {type(site.adapter).__name__} has a gain that "
                    "multiplies it and starts elsewhere. Use LoRA, or WeightDecomposed(components='lora')."
                )
        self._budget, self._processes = budget, processes
        self._gradients, self._batches, self._step, self._unseen = {}, 0, 0.0, []

    def wanted(self) -> Collection[str]:
        return list(self._budget)

    def see(self, layer: str, x: Tensor, rows: Callable[[], Tensor], gradient: Callable[[], Tensor] | None) -> None:
        if gradient is None or not x.is_floating_point():
            return  # an embedding's indices
        product = gradient().float().mT @ rows().float()
        if layer in self._gradients:
            self._gradients[layer] += product
        else:
            self._gradients[layer] = product

    def fold(self) -> None:
        self._batches += 1

    @torch.no_grad()
    def act(self) -> dict[str, Tensor]:
        seen = self._agreed()
        sensitivity, length = {}, 0.0
        for name in seen:
            # One layer at a time: a sharded base is gathered for it alone.
            G = self._gradients[name] = self._processes.mean(self._gradients[name].div_(self._batches))
            if not bool(G.isfinite().all()):
                raise RuntimeError(
                    f"the gradient at {name!r} is not finite, so neither rank nor start can follow from it: the loss "
                    "of a calibration batch has overflowed. Look at the data, or calibrate in float32."
                )
            W = self._processes.whole(matrix(self._budget[name].adapter.base).detach()).to(G)
            sensitivity[name] = float((W * G).abs().mean())
            length += float(W.square().sum(dtype=torch.float64 if W.device.type != "mps" else None))
        rest = {name: first_open(self._budget[name], floor(self.rank)) for name in self._unseen}
        if not seen:
            return rest
        if not any(sensitivity.values()):
            raise RuntimeError(
                "the loss of the calibration batches has no gradient by any adapted layer, so nothing follows from it. "
                "Look at what training_step returns."
            )
        costs = {name: self._budget[name].gate.cost for name in seen}
        caps = {name: len(self._budget[name].gate) for name in seen}
        masks = apportioned(sensitivity, costs, caps, self.rank, self.minimum)
        starts, reach = {}, 0.0
        for name in seen:
            adapter = self._budget[name].adapter
            A = adapter.A.detach()[masks[name].to(adapter.A.device)]
            B = starts[name] = gradient_start(self._gradients.pop(name), A, adapter.scaling)
            # |s B A|^2 from products of r x r, not from the update
            reach += adapter.scaling**2 * float(((B.mT @ B) * (A @ A.mT).to(B)).sum())
        self._step = self.gamma * sqrt(length / reach)
        for name, B in starts.items():
            adapter = self._budget[name].adapter
            adapter.B.zero_()
            adapter.B[:, masks[name].to(B.device)] = (self._step * B).to(adapter.B)
        return {name: (masks | rest)[name] for name in self._budget}

    def _agreed(self) -> list[str]:
        """The layers that a process has seen; on one that has not, its gradient is zero."""
        found = {name for names in self._processes.gather(list(self._gradients)) for name in names}
        self._unseen = [name for name in self._budget if name not in found]
        for name in found - self._gradients.keys():
            adapter = self._budget[name].adapter
            self._gradients[name] = adapter.A.new_zeros(len(adapter.B), adapter.A.shape[1], dtype=torch.float32)
        return [name for name in self._budget if name in found]

    def unseen(self) -> list[str]:
        return self._unseen

    def report(self) -> str:
        return f"GoRA: the first update is a gradient step of {self._step:.3g}, over {self._batches} batches a process."


def apportioned(
    sensitivity: Mapping[str, float], costs: Mapping[str, int], caps: Mapping[str, int], rank: float, minimum: int
) -> dict[str, Tensor]:
    """Components in proportion to sensitivity per cost, within a budget of parameters: d'Hondt's rule.

        the next component goes to the layer of highest  s_l / (cost_l (rank_l + 1))

    Without bounds the layers' parameters, cost_l rank_l, are then in the proportion of s_l up to rounding.

    Args:
        sensitivity: layer -> s.
        costs: layer -> parameters of one component.
        caps: layer -> the most components that it can have.
        rank: the budget is what so many components cost in every layer, on average.
        minimum: components that every layer gets.

    Returns:
        layer -> (cap,) bool on the CPU, the first ones True.
    """
    scores = {name: s / (costs[name] * torch.arange(1.0, caps[name] + 1)) for name, s in sensitivity.items()}
    return open_best(scores, costs, floor(rank * sum(costs.values()) + 1e-9), minimum)


def gradient_start(G: Tensor, A: Tensor, scaling: float) -> Tensor:
    """B for which the update is the best approximation of -G that has A's row space.

        min_B | scaling B A + G |_F      ->      B = -G A^+ / scaling,      A^+ = A^T (A A^T)^-1

    Setting the derivative 2 scaling (scaling B A + G) A^T to zero gives it; scaling B A = -G (A^+ A) then is the
    orthogonal projection of the gradient step on A's rows.

    Args:
        G: (d_out, d_in).
        A: (r, d_in).
        scaling: what multiplies B A.

    Returns:
        (d_out, r), in G's dtype.
    """
    wide = torch.float32 if A.device.type == "mps" else torch.float64
    B: Tensor = -(G @ torch.linalg.pinv(A.to(wide)).to(G)) / scaling
    return B
