"""Factorized: the layer's own weight as a sum of rank-one terms, for methods that compress it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import nan
from operator import index
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.layers import is_convolution, matrix, stored, why_not
from lightning_peft.adapters.thin import ThinLinear, thin_convolution, twin
from lightning_peft.arguments import require_integer
from lightning_peft.functional.convolution import low_rank_convolution_update
from lightning_peft.functional.factorized import factorized_linear
from lightning_peft.rank.gate import Gate

Rank = int | Literal["breakeven"] | None
Fold = Literal["both", "U"]
Start = Literal["svd", "exact"]


class Factorized(Adapter):
    """The layer's own weight as a sum of K rank-one terms, which a gate switches; the weight itself is gone.

        y = U diag(s m) Vh x + b,       W = U diag(s) Vh at the start, when all components are open

    U: (d_out, K) and Vh: (K, d_in), with orthonormal columns and rows at the start.  s: (K,), the gate's gain,
    descending and at least 0 at the start.  m: (K,), the gate's mask.  b: the layer's own bias, frozen unless it is
    named in `train` of :func:`lightning_peft.inject`. After a few steps of training the triplets are rank-one terms
    and no longer a singular value decomposition.

    With `start="exact"` nothing is decomposed: U = W, s = 1, Vh = I, or U = I, Vh = W where d_out < d_in. Components
    then have no order. It is for a :class:`~lightning_peft.WeightedSVD` that follows and decomposes every layer, and
    spares the first of two decompositions.

    U and Vh take the base's dtype and place: they are the layer's weight in another form, as large as it
    (K (d_in + d_out) numbers beside d_in d_out), so under FSDP2 they are sharded with the base, and s and m stay whole.
    s is float32, or wider where the base is, until the whole module is cast. The base lives on without a weight, for
    its sizes and its bias: an ejected adapter would leave nothing behind, so `eject` refuses it, and `merge` or
    :meth:`thin` ends its life.

    The start is equal to the base where every component of it is there (`rank=None`): up to rounding, and the weight
    bit for bit where it is "exact".

    Args:
        base: Linear, Conv1d, Conv2d, Conv3d or transformers' Conv1D layer. Its weight is not touched: the adapter's
            base is a copy that shares its bias, frozen, and has no weight.
        rank: number of components K that are kept, the largest ones; ``None`` for all min(d_in, d_out). "breakeven"
            for floor(d_in d_out / (d_in + d_out)), the most that costs no more parameters than the weight.
        trained: whether U, s and Vh are trained; what is frozen is moved by its mask alone.
        start: "svd" decomposes the weight; "exact" takes it as it is.

    Shape:
        x: (..., d_in) -> (..., d_out); for a convolution as it has it

    Raises:
        TypeError: the layer is an embedding, is of a kind that cannot be adapted, or has hooks that would never run.
        ValueError: start is unknown; rank is out of range, or given with "exact"; or the weight is not finite, or split
            over processes.

    Reference:
        The start of RankDyna (Hua et al., Findings of EMNLP 2023) and the layer of ARS (Gao et al., NAACL 2024, eqs. 2
        to 5), without a weighting; :meth:`fill` takes a weighted one.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> factorized = Factorized(layer)
        >>> torch.allclose(factorized.weight, layer.weight, atol=1e-6)
        True
    """

    identity_at_start = False
    releases_base = True
    leaves = ("pooler",)  # as FWSVD and ARS have it; a convention of the papers' group, remembered

    U: nn.Parameter
    Vh: nn.Parameter
    gate: Gate

    def __init__(self, base: nn.Module, rank: Rank = None, trained: bool = True, start: Start = "svd") -> None:
        if start not in get_args(Start):
            raise ValueError(f"start={start!r}: choose 'svd' or 'exact'.")
        if start == "exact" and rank is not None:
            raise ValueError(
                f"start='exact' has all components, in no order, and rank={rank!r} would cut some of them off. Leave "
                "rank out, and say what is kept where the layer is decomposed: WeightedSVD(..., ratio=0.5)."
            )
        reason = why_not(base)
        if isinstance(base, nn.Embedding):
            reason = "an embedding is looked up and not multiplied, so a product of two tables makes nothing faster"
        elif base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
            reason = "it has hooks, and it will never be called; register them on the adapter instead"
        if reason is not None:
            raise TypeError(f"Factorized cannot take this layer's place: {reason}.")
        weight = matrix(base)
        if hasattr(weight, "full_tensor"):
            raise ValueError(
                "the layer's weight is split over processes already, and it takes a whole one to factorise it: inject "
                "in configure_model, before fully_shard."
            )
        d_out, d_in = weight.shape
        K = components(rank, d_in, d_out)
        again = _is_released(base)  # built around another one's base, as when it is cut: a trained bias trains on
        bias_trained = again and base.bias is not None and base.bias.requires_grad
        super().__init__(base if again else _released(base))
        if bias_trained:
            self.base.bias.requires_grad_(True)
        self.rank = rank if rank is None or isinstance(rank, str) else index(rank)
        self.trained = trained
        self.start: Start = start
        self._kernel: torch.Size | None = base.weight.shape[1:] if is_convolution(base) else None  # type: ignore[assignment, index]
        place: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
        self.U = nn.Parameter(torch.zeros(d_out, K, **place), requires_grad=trained)
        self.Vh = nn.Parameter(torch.zeros(K, d_in, **place), requires_grad=trained)
        gain = torch.zeros(K, dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
        self.gate = Gate(K, cost=d_in + d_out, gain=gain)
        self.gate.gain.requires_grad_(trained)  # type: ignore[union-attr]
        if not (weight.is_meta or again):
            if not bool(weight.isfinite().all()):
                raise ValueError("the layer's weight has values that are not finite, so it has no decomposition.")
            (self._decompose if start == "svd" else self._take)(weight.detach())

    def _take(self, weight: Tensor) -> None:
        """Fill the factors with a whole weight, (d_out, d_in), and what leaves it as it is."""
        d_out, d_in = weight.shape
        one = torch.eye(len(self.gate), dtype=weight.dtype, device=weight.device)
        s = one.new_ones(len(one))
        self.fill(*((one, s, weight) if d_out < d_in else (weight, s, one)))

    def _decompose(self, weight: Tensor) -> None:
        """Fill the factors with the largest singular triplets of a whole weight, (d_out, d_in)."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        U, s, Vh = torch.linalg.svd(wide, full_matrices=False)
        K = len(self.gate)
        self.fill(U[:, :K], s[:K], Vh[:K])

    @classmethod
    def unfilled(cls, base: nn.Module, **arguments: Any) -> Adapter:
        return cls(_released(base), **arguments)

    @torch.no_grad()
    def fill(self, U: Tensor, s: Tensor, Vh: Tensor) -> None:
        """Write other factors in place, such as those of a weighted decomposition; the mask stays.

        Args:
            U: (d_out, K).
            s: (K,).
            Vh: (K, d_in).

        Raises:
            ValueError: one is of another shape; nothing is written.
        """
        gain = self.gate.gain
        assert gain is not None
        for name, value, own in (("U", U, self.U), ("s", s, gain), ("Vh", Vh, self.Vh)):
            if value.shape != own.shape:
                raise ValueError(f"fill: {name} must have shape {tuple(own.shape)}. Got {tuple(value.shape)}.")
        for value, own in ((U, self.U), (s, gain), (Vh, self.Vh)):
            own.copy_(value)

    def reset_parameters(self) -> None:
        """Refuse: without this the base's own would answer, which has no weight to draw.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "Factorized has the only copy of its layer's weight, so it can neither be drawn anew nor filled after it "
            "was built on the meta device. Give the model its weights before adapters are injected."
        )

    def large_parameters(self) -> Iterator[nn.Parameter]:
        return iter((self.U, self.Vh))

    def effective_weight(self) -> Tensor:
        return (self.U * self.gate.value().to(self.U.dtype)) @ self.Vh

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        value = self.gate.value()
        if self._kernel is None:
            return factorized_linear(x, self.U, self.Vh, value, base.bias)
        # The base's own way to move a kernel over its input: Vh's is padded as W's was, whatever the mode.
        y = low_rank_convolution_update(base._conv_forward, x, self._kernel, self.Vh, self.U, value, base.groups)
        bias: Tensor | None = base.bias
        return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * (len(self._kernel) - 1))

    def kept(self, keep: Tensor) -> Tensor:
        # A gate has one component at least, and there is no base to go back to: the layer's bias lives on.
        return keep if keep.any() else torch.arange(len(keep), device=keep.device) == 0

    @torch.no_grad()
    def compacted(self, keep: Tensor | None = None) -> Adapter | None:
        keep = self.gate.open() if keep is None else keep
        kept = self.kept(keep)
        assert self.gate.gain is not None
        small = type(self)(self.base, rank=int(kept.sum()), trained=self.trained)
        small.U = nn.Parameter(self.U[:, kept])
        small.Vh = nn.Parameter(self.Vh[kept])
        small.gate.gain = nn.Parameter(self.gate.gain[kept])
        small.gate.mask.copy_(self.gate.mask[kept])
        if not keep.any():
            small.gate.mask.zero_()
        return small.train(self.training)

    @torch.no_grad()
    def thin(self, fold: Fold = "both") -> nn.Module:
        """Plain layers that do the same without this library: two thin ones, or one that is dense.

        The open components make `down`, d_in -> k without a bias, and `up`, which has it. Where k (d_in + d_out) >=
        d_in d_out the pair would not be smaller than one dense layer of the base's kind, which is made instead; so it
        is for a convolution in groups. All parameters are new and require a gradient.

        Args:
            fold: where s goes: "both" for its root on either side, which keeps the two equally large, or "U".

        Raises:
            ValueError: fold is neither.
        """
        if fold not in ("both", "U"):
            raise ValueError(f"fold={fold!r}: choose 'both' or 'U'.")
        base: Any = self.base
        open_ = self.gate.open()
        kept = self.kept(open_)
        value = self.gate.value()[kept] * open_.any()  # without an open component: one of zeros
        d_out, d_in = self.U.shape[0], self.Vh.shape[1]
        if len(value) * (d_in + d_out) >= d_in * d_out or (self._kernel is not None and base.groups > 1):
            return self._dense()
        root = value.abs().sqrt() if fold == "both" else torch.ones_like(value)
        up = (self.U[:, kept] * (root.copysign(value) if fold == "both" else value)).to(self.U.dtype)
        down = (root[:, None] * self.Vh[kept]).to(self.Vh.dtype)
        if self._kernel is None:
            return ThinLinear(down, up, base.bias)
        return thin_convolution(base, down.view(-1, *self._kernel), up, base.bias)

    def _dense(self) -> nn.Module:
        layer: Any = twin(self.base)
        wide = torch.promote_types(self.U.dtype, torch.float32)
        product = (self.U.to(wide) * self.gate.value()) @ self.Vh.to(wide)
        layer.weight = nn.Parameter(stored(self.base, product).to(self.U.dtype).contiguous())
        if layer.bias is not None:
            layer.bias = nn.Parameter(layer.bias.clone())
        return layer.train(self.training)  # type: ignore[no-any-return]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factorized:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if _is_released(self.base):  # what stands for its weight is no tensor of the model, and follows by hand
            hole: Tensor = self.base.weight  # type: ignore[assignment]
            self.base.__dict__["weight"] = _hole(hole.shape, self.U, hole.requires_grad)
        return self

    def extra_repr(self) -> str:
        return f"rank={self.rank!r}, trained={self.trained}, start={self.start!r}"


def components(rank: Rank, d_in: int, d_out: int) -> int:
    """How many components a rank means on a layer of these sizes.

    Raises:
        TypeError: rank is neither a whole number, "breakeven" nor ``None``.
        ValueError: it is out of range.
    """
    most = min(d_in, d_out)
    if rank is None:
        return most
    if isinstance(rank, str):
        if rank != "breakeven":
            raise ValueError(f"rank={rank!r}: give a number of components, 'breakeven', or None for all of them.")
        return max(1, d_in * d_out // (d_in + d_out))
    require_integer("rank", rank)
    if not 1 <= rank <= most:
        raise ValueError(
            f"rank={rank} is not possible on a layer of {d_in} inputs and {d_out} outputs: give a rank from 1 to "
            f"{most}, or None for all of them."
        )
    return index(rank)


def _released(layer: nn.Module) -> nn.Module:
    """A copy of a layer that shares its bias and has no weight; the layer is as it was."""
    bare: nn.Module = twin(layer)
    weight: Tensor = layer.weight  # type: ignore[assignment]
    bare._parameters["weight"] = None  # its place in the order is kept for the way back
    bare.__dict__["weight"] = _hole(weight.shape, weight, weight.requires_grad)
    return bare


def _is_released(layer: nn.Module) -> bool:
    """Whether the layer is one that :func:`_released` has made, and has got no weight since."""
    return "weight" in layer.__dict__


def _hole(shape: torch.Size, like: Tensor, wants_gradient: bool) -> Tensor:
    """What a weight that is gone leaves behind: shape, dtype, device, whether it was trainable. One number in memory.

    NaN, so that whoever computes with it notices.
    """
    return torch.full((), nan, dtype=like.dtype, device=like.device).expand(shape).requires_grad_(wants_gradient)
