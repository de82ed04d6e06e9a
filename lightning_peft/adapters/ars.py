"""ARS, adaptive rank selections (Gao et al., NAACL 2024): a small network learns how many components each layer keeps.

In the paper's order: how a mask is drawn (eq. 9), the hypernetwork that draws one over the singular values of every
layer, two alternatives to it, and `policy`, which makes whole ranks of what was learned. The layer is
:class:`~lightning_peft.Factorized`, frozen; what the loss adds is :class:`~lightning_peft.MaskAlignment` (eq. 7) and
:class:`~lightning_peft.BudgetPenalty` (eq. 8).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from math import sqrt
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.learned_ranks import LearnedRanks, Price, Refill
from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional.rank_masks import gumbel, keep_probability, relaxed, straight_through
from lightning_peft.rank.sampling import MaskSampler

Masks = Literal["hypernetwork", "elements", "monotone"]


@contextmanager
def _own_random(seed: int) -> Iterator[None]:
    """Random numbers of a seed inside the block, on the CPU; no generator goes on otherwise than without it."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which seeds accelerators for good
        yield


class GumbelMasks(MaskSampler, ABC):
    """Masks that are drawn with Gumbel noise from logits, which a subclass has.

        y = sigmoid((o + g + b) / tau),     m = round(y), with the gradient of y

    One Gumbel sample per element, so that a component is kept with probability 1 - exp(-exp(o + b)). The noise depends
    on the seed and the step alone: all processes draw alike, and so does a resumed run.

    Args:
        layers: layer -> how many components it has.
        temperature: tau.
        shift: b; at 3 and o near 0 everything is kept, so that training starts at full rank.
        seed: of the noise.

    Raises:
        TypeError: an argument is of another type.
        ValueError: temperature is not positive.

    Reference:
        Gao et al., Adaptive Rank Selections, NAACL 2024, eq. 9.
    """

    def __init__(self, layers: Mapping[str, int], temperature: float = 0.4, shift: float = 3.0, seed: int = 0) -> None:
        super().__init__(layers)
        require_draws(temperature, shift, seed)
        self.temperature, self.shift, self.seed = temperature, shift, seed

    @abstractmethod
    def logits(self) -> Sequence[Tensor]:
        """o, by group: (L, K)."""

    def masks(self, step: int) -> list[Tensor]:
        logits = self.logits()
        noise = gumbel(sum(o.numel() for o in logits), self.seed, step, logits[0].device)
        parts = noise.split([o.numel() for o in logits])
        soft = [relaxed(o, g.view_as(o), self.temperature, self.shift) for o, g in zip(logits, parts, strict=True)]
        return [straight_through(y) for y in soft]

    def probabilities(self) -> list[Tensor]:
        return [keep_probability(o, self.shift) for o in self.logits()]


class Hypernetwork(GumbelMasks):
    """One small network for the masks of all layers, which therefore learn together.

        h = GELU(LayerNorm(BiGRU(z))),    o_l = H_l h_l

    z: (L, 32), normal, drawn once and not trained; its rows, the layers in the module's order, are the sequence.
    BiGRU: 32 -> 64 in each direction.  LayerNorm: 128.  H_l: (K_l, 128), without a bias; layers of equal K are one
    tensor (L, K, 128), and one batched product.

    Args:
        layers: layer -> how many components it has.
        temperature: tau.
        shift: b.
        seed: of z, of the weights' start, and of the noise.

    Reference:
        Gao et al., Adaptive Rank Selections, NAACL 2024, table A1. GELU after the norm, heads without a bias, and z
        are DISP-LLM's code's, by the same first author; ARS has none.

    Example:
        >>> sampler = Hypernetwork({"query": 8, "value": 8})
        >>> [mask.shape for mask in sampler.masks(step=0)]
        [torch.Size([2, 8])]
    """

    z: Tensor
    rows: Tensor

    def __init__(self, layers: Mapping[str, int], temperature: float = 0.4, shift: float = 3.0, seed: int = 0) -> None:
        super().__init__(layers, temperature, shift, seed)
        with _own_random(seed):
            self.register_buffer("z", torch.randn(len(layers), 32))
            self.gru = nn.GRU(32, 64, bidirectional=True)
            self.norm = nn.LayerNorm(128)
            # As nn.Linear starts: uniform in +-1/sqrt(128), so that logits are small beside b.
            heads = [torch.empty(len(names), n, 128).uniform_(-1, 1) / sqrt(128) for n, names in self.groups.items()]
            self.heads = nn.ParameterList(heads)
        order = {name: i for i, name in enumerate(layers)}
        rows = [order[name] for names in self.groups.values() for name in names]
        self.register_buffer("rows", torch.tensor(rows), persistent=False)  # a list would be copied at every step

    def logits(self) -> list[Tensor]:
        h, _ = self.gru(self.z)
        h = nn.functional.gelu(self.norm(h))[self.rows].unsqueeze(-1)
        parts = h.split([len(H) for H in self.heads])
        return [torch.bmm(H, part).squeeze(-1) for H, part in zip(self.heads, parts, strict=True)]

    def train(self, mode: bool = True) -> Hypernetwork:
        super().train(mode)
        self.gru.train()  # whatever the model does: cuDNN has no backward of a GRU in eval mode, and it does the same
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Hypernetwork:
        super()._apply(fn, recurse)
        self.gru.flatten_parameters()
        return self


class ElementMasks(GumbelMasks):
    """A free logit for every component: what is left of the hypernetwork in the paper's ablation "without HN".

        o = scale theta,     theta = 0 at the start

    A logit has to travel from 3 to about -0.4 before its component closes. An optimizer such as Adam moves theta by
    about its learning rate in a step, so `scale` makes 1e-3, which suits the hypernetwork, worth 0.1 here.

    Args:
        layers: layer -> how many components it has.
        temperature: tau.
        shift: b.
        seed: of the noise.
        scale: how much faster a logit moves than its parameter.

    Reference:
        Gao et al., Adaptive Rank Selections, NAACL 2024, the ablation. `scale` is our choice: at a learning rate of
        1e-3 free logits never leave full rank within the paper's 1000 steps.
    """

    def __init__(
        self,
        layers: Mapping[str, int],
        temperature: float = 0.4,
        shift: float = 3.0,
        seed: int = 0,
        scale: float = 100.0,
    ) -> None:
        super().__init__(layers, temperature, shift, seed)
        self.scale = scale
        self.theta = nn.ParameterList([torch.zeros(len(names), n) for n, names in self.groups.items()])

    def logits(self) -> list[Tensor]:
        return [self.scale * theta for theta in self.theta]


class MonotoneMasks(MaskSampler):
    """One number per layer, a soft rank: masks that are a prefix by construction, and need neither noise nor alignment.

        y_i = sigmoid((kappa - i - 1/2) / w),    m = round(y), with the gradient of y,    kappa = K (1 + theta)

    i = 0, ..., K - 1.  m keeps the first round(kappa) components.  theta = 0 at the start, full rank.  w = width K, at
    least 1: how many components around the edge the gradient of kappa comes from. Gradients are local, so a layer
    learns nothing of components far from its edge.

    Args:
        layers: layer -> how many components it has.
        width: w as a share of K.
        scale: how much faster theta moves than its parameter: with Adam at 1e-3 and 4, kappa crosses a layer in about
            250 steps.

    Reference:
        Our choice of form, after the staircase of ARA (arXiv 2510.19389) and the truncation point of Dobi-SVD; neither
        paper's method in full. As an alternative to compare with the hypernetwork.
    """

    def __init__(self, layers: Mapping[str, int], width: float = 0.02, scale: float = 4.0) -> None:
        super().__init__(layers)
        self.width, self.scale = width, scale
        self.theta = nn.ParameterList([torch.zeros(len(names)) for names in self.groups.values()])

    def _ranks(self) -> list[Tensor]:
        return [n * (1 + self.scale * theta) for n, theta in zip(self.groups, self.theta, strict=True)]

    def probabilities(self) -> list[Tensor]:
        """y: how far a component is from the edge. None is drawn, so they order components and no more."""
        soft = []
        for n, kappa in zip(self.groups, self._ranks(), strict=True):
            place = torch.arange(n, dtype=kappa.dtype, device=kappa.device) + 0.5
            soft.append(torch.sigmoid((kappa[:, None] - place) / max(1.0, self.width * n)))
        return soft

    def masks(self, step: int) -> list[Tensor]:
        return [straight_through(y) for y in self.probabilities()]

    def counts(self) -> list[Tensor]:
        return [kappa.clamp(0, n) for n, kappa in zip(self.groups, self._ranks(), strict=True)]


def require_draws(temperature: object, shift: object, seed: object) -> None:
    """Check what masks are drawn with.

    Raises:
        TypeError: an argument is of another type.
        ValueError: temperature is not positive.
    """
    require_number("temperature", temperature)
    require_number("shift", shift)
    require_integer("seed", seed)
    assert isinstance(temperature, int | float)
    if not temperature > 0:
        raise ValueError(f"temperature divides, and must be positive. Got {temperature}.")


def policy(
    ratio: float = 0.48,
    masks: Masks = "hypernetwork",
    tail: float = 0.0,
    interval: int = 10,
    minimum: int = 1,
    price: Price = "factors",
    refill: Refill = "spend",
    temperature: float = 0.4,
    shift: float = 3.0,
    seed: int = 0,
) -> LearnedRanks:
    """The paper's policy, for `RankSelection`: masks of the hypernetwork, or of an alternative, made whole ranks.

    Args:
        ratio: p, kept share of the parameters of the layers that are factorised; 0.48 and 0.33 in the paper.
        masks: "hypernetwork" is the paper's (:class:`Hypernetwork`), "elements" has a free logit for every component
            (:class:`ElementMasks`), "monotone" a soft rank for every layer (:class:`MonotoneMasks`).
        tail: share of the run after the ranks are final.
        interval: optimizer steps between two looks at what was learned so far.
        minimum: components that every layer keeps.
        price: what a layer counts at the end, "factors" or "cheapest"; see :class:`~lightning_peft.LearnedRanks`.
        refill: whether a budget that is not used up is spent, "spend" or "keep".
        temperature: tau of the draws; "monotone" draws nothing.
        shift: b of the draws.
        seed: of everything that is drawn.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range.

    Reference:
        Gao et al., Adaptive Rank Selections, NAACL 2024.
    """
    require_draws(temperature, shift, seed)
    samplers: dict[str, Callable[[Mapping[str, int]], MaskSampler]] = {
        "hypernetwork": partial(Hypernetwork, temperature=temperature, shift=shift, seed=seed),
        "elements": partial(ElementMasks, temperature=temperature, shift=shift, seed=seed),
        "monotone": MonotoneMasks,
    }
    if masks not in samplers:
        raise ValueError(f"masks={masks!r}: choose {', '.join(map(repr, samplers))}.")
    return LearnedRanks(ratio, samplers[masks], tail, interval, minimum, price, refill)
