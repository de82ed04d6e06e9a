"""Weight decomposition with dynamic rank: the DoRA of Liu et al. (2024), whose update any rank policy may prune.

Not to be confused with the dynamic DoRA of Mao et al. (`lightning_peft.DynamicDoRA`), whose components it can have.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.adalora import AdaLoRA
from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.dynamic_dora import DynamicDoRA
from lightning_peft.adapters.layers import is_convolution, is_transformers_conv1d, matrix
from lightning_peft.adapters.lora import LoRA
from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.functional.weight_decomposition import decomposed_linear, rescaled, row_norms
from lightning_peft.rank.gate import Gate

Components = Literal["lora", "dynamic_dora", "adalora"]

# Whose gate and whose start the components have.
_METHODS: dict[str, type[LowRank]] = {"lora": LoRA, "dynamic_dora": DynamicDoRA, "adalora": AdaLoRA}


class Magnitude(nn.Module):
    """The length of every row of a weight, as a module of its own, so that a strategy may keep or wrap it whole.

        scale = magnitude / n

    Args:
        norms: (d_out,), the lengths to start with.

    Shape:
        n: (d_out,) norms of the rows as they are -> (d_out,) what multiplies them; 0 where a row is zero
    """

    def __init__(self, norms: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(norms)

    def forward(self, norms: Tensor) -> Tensor:
        # A row of zeros has no direction: its output is 0 whatever multiplies it, and 0 / 0 would make it NaN.
        return self.weight / norms.masked_fill(norms == 0, torch.inf)


def _whole(weight: Tensor) -> Tensor:
    """All of a weight, also where it is split over processes: each of them must call this."""
    whole: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return whole


class WeightDecomposed(LowRank):
    """Weight-decomposed low-rank adaptation: the update turns the rows of the weight, their lengths are trained apart.

        y = mu / n * (W x + (alpha / r) B diag(c m) A drop(x)) + b,     n = |W + (alpha / r) B diag(c m) A|_row

    mu: (d_out,), the magnitude, starts as the norms of W's rows, so that training starts from the base model.
    A, B, c: the components, which start as those of another method. m: (r,), the gate's mask.
    A, B, c and mu are trained, W and b are frozen; n is a constant for the gradient.

    n is the norm of what is open: closing a component leaves every row of the effective weight its length mu. It is
    computed in every forward from what is there, so it is right whatever was written into the tensors before. A layer
    without an open component still has its magnitude, and is not its base: `compacted` keeps one closed component. mu
    costs d_out parameters whatever the rank: budgets count components, and do not count it.

    Args:
        base: Linear, Conv1d, Conv2d, Conv3d, Embedding or transformers' Conv1D layer; frozen and kept. A row of a
            convolution's weight is the kernel of one output.
        rank: number of components r; at most min(d_in, d_out).
        alpha: update scale; the update is multiplied by alpha / r, with the rank given here.
        dropout: probability of dropout on the update's input, while training.
        components: "lora" for components that start as LoRA's, with no gain (hard policies); "dynamic_dora" or
            "adalora" for those of :class:`~lightning_peft.DynamicDoRA` or :class:`~lightning_peft.AdaLoRA`, with a gain
            c (every policy, soft ones too).

    Shape:
        x: (..., d_in) -> (..., d_out); for an embedding (...) indices -> (..., d_out)

    Raises:
        TypeError: the layer is of a kind that cannot be adapted.
        ValueError: rank, alpha, dropout or components is out of range.

    Reference:
        Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, ICML 2024, arXiv 2402.09353, eq. 5; the norm as a
        constant, section 4.3. Lengths are those of rows (d_out of them), as in HF PEFT, where the paper says columns of
        its transposed weight. Departures: dropout acts on the update's input alone; PEFT's code, where there is
        dropout, gives the dropped input to (mu / n - 1) W as well, a second product with W whose expectation is the
        same. A row of zeros stays one, where PEFT divides 0 by 0. The components' gains and mask are ours.

    Example:
        >>> layer = WeightDecomposed(nn.Linear(8, 4), rank=2)
        >>> torch.equal(layer.magnitude.weight, layer.base.weight.norm(dim=1))
        True
    """

    magnitude: Magnitude

    def __init__(
        self,
        base: nn.Module,
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        components: Components = "lora",
    ) -> None:
        if components not in _METHODS:
            raise ValueError(f"components={components!r}: choose {', '.join(map(repr, get_args(Components)))}.")
        self.components = components  # before the parts are built, which asks for it
        super().__init__(base, rank, alpha, dropout)
        self._held: Tensor | None = None
        self.magnitude = Magnitude(self._norms(_whole(matrix(base))))

    def _make_gate(self, d_in: int, d_out: int) -> Gate:
        return _METHODS[self.components]._make_gate(self, d_in, d_out)

    def reset_parameters(self) -> None:
        _METHODS[self.components].reset_parameters(self)
        if "magnitude" in self._modules:
            with torch.no_grad():
                self.magnitude.weight.copy_(self._norms(_whole(matrix(self.base))))

    def effective_weight(self) -> Tensor:
        weight = matrix(self.base)
        scale: Tensor = self.magnitude(self._norms(weight)).to(self.A.dtype)
        return scale[:, None] * (weight.to(self.A.dtype) + self.update())

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        value = self.value()
        p = self.dropout if self.training else 0.0
        heard = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if not heard and (isinstance(base, nn.Linear) or is_transformers_conv1d(base)):
            weight = matrix(base)
            scale = self.magnitude(self._norms(weight))
            return decomposed_linear(x, weight, base.bias, self.A, self.B, value, scale, p)
        y, norms, bias = self._called(x)
        if self._indexed:
            h = F.embedding(x, self.A.t(), base.padding_idx) * value.to(self.A.dtype)
            update = F.linear(h, self.B)
        else:
            update = self._added(x, p)
        scale = self.magnitude(norms)
        if self._kernel is not None:
            # A convolution's outputs are not the last dimension, but the first, or the second in a batch.
            shape = (-1, *[1] * (len(self._kernel) - 1))
            scale, bias = scale.view(shape), None if bias is None else bias.view(shape)
        return rescaled(y + update.to(y.dtype), bias, scale)

    def _norms(self, weight: Tensor) -> Tensor:
        """Norms of the rows of the base's weight with the update; a constant for the gradient."""
        return row_norms(weight, self.A, self.B, self.value()) if self._held is None else self._held

    def _called(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The base's output, because somebody listens to it or it was wrapped; and norms and bias, read on the way."""
        layer = next(
            m
            for m in self.base.modules()
            if isinstance(m, (nn.Linear, nn.Embedding)) or is_convolution(m) or is_transformers_conv1d(m)
        )
        read: list[tuple[Tensor, Tensor | None]] = []

        def look(layer: nn.Module, _: object) -> None:
            bias: Tensor | None = getattr(layer, "bias", None)
            read.append((self._norms(matrix(layer)), None if bias is None else bias.clone()))

        if layer is self.base and not hasattr(layer.weight, "full_tensor"):
            look(layer, None)
            return (self.base(x), *read[0])
        # Sharded: the layer's weight is whole inside its own forward alone, after the hooks that gather it.
        handle = layer.register_forward_pre_hook(look)
        try:
            y = self.base(x)
        finally:
            handle.remove()
        return (y, *read[0])

    def lengths(self) -> Tensor | None:
        return self.magnitude.weight

    def lasting_parameters(self) -> Iterator[nn.Parameter]:
        return self.magnitude.parameters()

    def kept(self, keep: Tensor) -> Tensor:
        # Without an open component there is still the magnitude, and a gate has one component at least.
        return keep if keep.any() else torch.arange(len(keep), device=keep.device) == 0

    @contextmanager
    def constants_held(self) -> Iterator[None]:
        self._held = self._norms(_whole(matrix(self.base)))
        try:
            yield
        finally:
            self._held = None

    @torch.no_grad()
    def compacted(self, keep: Tensor | None = None) -> Adapter | None:
        keep = self.gate.open() if keep is None else keep
        small = super().compacted(self.kept(keep))
        assert isinstance(small, WeightDecomposed)
        # A new parameter, as the others are; the constructor has made one of the base's own norms.
        small.magnitude = Magnitude(self.magnitude.weight.detach().clone())
        if not keep.any():
            small.gate.mask.zero_()
        return small
