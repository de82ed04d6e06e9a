"""Trained adapters made smaller: each update is replaced by its best approximation of a lower rank."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from numbers import Integral, Real

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.lora import LoRA
from lightning_peft.adapters.low_rank import LowRankUpdate
from lightning_peft.export import own_random, require_whole
from lightning_peft.functional.product_svd import product_svd
from lightning_peft.rank.allocation import open_best
from lightning_peft.rank.budget import WHOLE, Budget, RankBudget
from lightning_peft.surgery.layers import adapters
from lightning_peft.surgery.removal import refuse_hosted, replace


@dataclass(frozen=True)
class Converted:
    """What became of one layer's adapter.

    Attributes:
        before: its open components.
        after: the rank it has now; 0 if the layer has its base back.
        norm: |U|_F, the norm of its update before, scaling included.
        error: |U - U_k|_F, the norm of what is gone.
    """

    before: int
    after: int
    norm: float
    error: float

    @property
    def kept(self) -> float:
        """The share of the update's energy that is left, 1 - error^2 / norm^2; 1 where there was none."""
        return 1 - (self.error / self.norm) ** 2 if self.norm else 1.0


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` did; print it.

    Attributes:
        layers: by the name of the layer.
        parameters: what the open components cost before and after, in parameters.
    """

    layers: dict[str, Converted]
    parameters: tuple[int, int]

    @property
    def error(self) -> float:
        """The norm of what is gone, over all layers together."""
        return sqrt(sum(layer.error**2 for layer in self.layers.values()))

    def __str__(self) -> str:
        norm = sqrt(sum(layer.norm**2 for layer in self.layers.values()))
        every = Converted(
            sum(layer.before for layer in self.layers.values()),
            sum(layer.after for layer in self.layers.values()),
            norm,
            self.error,
        )
        named = [*self.layers.items(), (f"{len(self.layers)} layers", every)]
        rows = [("layer", "rank", "energy kept", "error")]
        rows += [(name, f"{c.before} -> {c.after}", f"{c.kept:.2%}", f"{c.error:.3g}") for name, c in named]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}" for a, b, c, d in rows]
        rule = "-" * len(lines[0])
        before, after = self.parameters
        return "\n".join(
            [lines[0], rule, *lines[1:-1], rule, lines[-1], f"{before:,} adapter parameters are {after:,} now."]
        )


@torch.no_grad()
def convert(module: nn.Module, rank: int | float | Budget) -> Conversion:
    """Give every adapter a lower rank, in place: the best approximation of its update that has it.

        scaling B diag(value) A = U diag(S) V      ->      scaling B' A' = sum_{i <= k} S_i u_i v_i
        A' = sqrt(S / scaling) V,   B' = U sqrt(S / scaling)                    (the first k; factors of equal size)

    No other update of rank k is nearer in the Frobenius norm, and the distance is the norm of the singular values that
    are dropped (Eckart and Young). They are found from the factors, without a matrix of the layer's size.

    The result is :class:`~lightning_peft.LoRA` with the scaling and dropout of what it replaces, so it trains on,
    exports and merges. Closed components, and directions whose singular value is zero up to rounding, are left out; a
    layer for which nothing is left gets its base back, frozen as it was. New parameters take the place of old ones:
    build the optimizer anew afterwards. Nothing is changed if anything is refused.

    Args:
        module: has adapters inside; is not itself one.
        rank: how much is kept. An integer: so many components in every layer, or as many as it has. A number in (0, 1]:
            in every layer the fewest that hold this share of its update's energy, sum S^2. A :class:`Budget`: all
            layers compete for it with S^2, or S^2 per parameter where it counts parameters, and some may end at 0.

    Returns:
        Ranks before and after, and the error, of every layer.

    Raises:
        ValueError: there is no adapter, no update yet, rank is out of range, or the budget does not fit the adapters.
        TypeError: rank is none of the three, or an adapter is more than a low-rank change of its layer's weight.
        RuntimeError: the base is split over processes.

    Reference:
        The rule for a share is that of PEFT 0.21's `convert_to_lora`. Departures: from factors; the scaling is kept,
        not folded in; the factors are of equal size, where there B has all of S; a budget over all layers.
    """
    wanted = _plain(rank)
    if isinstance(module, Adapter):
        raise ValueError(
            f"convert replaces adapters inside a module and got a single {type(module).__name__}; call it on the "
            "module that holds it."
        )
    found = adapters(module)
    if not found:
        raise ValueError(f"convert found no adapter in {type(module).__name__}; inject puts them in.")
    refuse_hosted(module, "convert")
    require_whole(module, "convert")
    low = {name: _low_rank(name, adapter) for name, adapter in found.items()}
    budget = RankBudget(dict(RankBudget.of(module)))  # what is there, without what was cut out before
    ranks, spent = budget.ranks(), budget.spent_parameters
    svds = {name: _decomposed(adapter) for name, adapter in low.items()}
    if not any(len(S) for _, S, _ in svds.values()):
        raise ValueError(
            f"no adapter of {type(module).__name__} has an update: its factors are as they started. Train them first."
        )
    kept = _kept({name: S for name, (_, S, _) in svds.items()}, wanted, budget)
    new: dict[int, nn.Module] = {}
    done: dict[str, Converted] = {}
    with own_random(module):  # building an adapter draws its start, which is overwritten
        for name, adapter in low.items():
            U, S, V = svds[name]
            k = kept[name]
            new[id(adapter)] = adapter.base if k == 0 else _built(adapter, U[:, :k], S[:k], V[:k])
            done[name] = Converted(ranks[name], k, float(S.norm()), float(S[k:].norm()))
    replace(module, new)
    for owner in module.modules():
        owner.__dict__.pop(WHOLE, None)  # what earlier adapters were is nothing to these
    return Conversion(done, (spent, RankBudget.of(module).spent_parameters))


def _plain(rank: object) -> int | float | Budget:
    """How much is kept, as one of the three; numpy's numbers are Python's from here on."""
    if isinstance(rank, Budget):
        return rank
    if isinstance(rank, bool) or not isinstance(rank, Real):
        raise TypeError(
            f"rank is a number of components (8), a share of each update's energy (0.9), or a Budget. Got {rank!r}."
        )
    if isinstance(rank, Integral):
        if int(rank) < 1:
            raise ValueError(f"rank is how many components a layer keeps, at least 1. Got {rank}.")
        return int(rank)
    if not 0 < float(rank) <= 1:
        raise ValueError(
            f"rank={rank} is no whole number, so it is a share of each update's energy, in (0, 1]. For a number of "
            "components give an int; for an average of them, Budget(rank=...)."
        )
    return float(rank)


def _low_rank(name: str, adapter: Adapter) -> LowRankUpdate:
    """The adapter, if its weight is its base's plus the product of its factors."""
    if not isinstance(adapter, LowRankUpdate):
        raise TypeError(
            f"layer {name!r}: {type(adapter).__name__} is not low-rank, so it has no components to choose from. "
            "Nothing was changed."
        )
    kind = type(adapter)
    if kind.effective_weight is not LowRankUpdate.effective_weight or kind.update is not LowRankUpdate.update:
        raise TypeError(
            f"layer {name!r}: the weight of {kind.__name__} is not its base's plus a low-rank update, so a smaller "
            "update would not be the nearest weight. Merge it, or export it as it is. Nothing was changed."
        )
    return adapter


def _decomposed(adapter: LowRankUpdate) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V of an adapter's update, without directions that are only rounding."""
    A, B = adapter.factors()
    U, S, V = product_svd(B * adapter.scaling, A)
    rounding = torch.finfo(B.dtype).eps * max(A.shape[1], B.shape[0])
    n = int((rounding * S[:1] < S).sum())
    return U[:, :n], S[:n], V[:n]


def _kept(values: dict[str, Tensor], rank: int | float | Budget, budget: RankBudget) -> dict[str, int]:
    """How many singular values of each layer are kept."""
    if isinstance(rank, Budget):
        sizes = budget.sizes(rank.unit)
        worth = {name: S.square() / sizes[name] for name, S in values.items() if len(S)}
        masks = open_best(worth, sizes, rank.amount(budget))
        return {name: int(masks[name].sum()) if name in masks else 0 for name in values}
    if isinstance(rank, int):
        return {name: min(rank, len(S)) for name, S in values.items()}
    return {name: _enough(S, rank) for name, S in values.items()}


def _enough(S: Tensor, share: float) -> int:
    """The smallest k with sum_{i <= k} S_i^2 >= share sum S_i^2."""
    if not len(S):
        return 0
    energy = S.square().cumsum(0)
    return int(torch.searchsorted(energy, share * energy[-1])) + 1


def _built(adapter: LowRankUpdate, U: Tensor, S: Tensor, V: Tensor) -> LoRA:
    k = len(S)
    small = LoRA(adapter.base, rank=k, alpha=adapter.scaling * k, dropout=getattr(adapter, "dropout", 0.0))
    root = (S / adapter.scaling).sqrt()
    # New parameters, not copies into the new adapter's: the dtype is the one that the old adapter was cast to.
    small.A = nn.Parameter((root[:, None] * V).to(adapter.A))
    small.B = nn.Parameter((U * root).to(adapter.B))
    padding = getattr(adapter.base, "padding_idx", None)
    if padding is not None:
        small.A[:, padding] = 0  # a padding vector has no update, not even one of rounding
    wanted = {part: parameter.requires_grad for part, parameter in adapter.own_parameters()}
    for part, parameter in small.own_parameters():
        parameter.requires_grad_(wanted.get(part, True))
    return small.train(adapter.training)
