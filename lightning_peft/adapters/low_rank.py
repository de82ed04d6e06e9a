"""What low-rank adapters share: W + scaling * B diag(value) A, on every kind of layer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from operator import index
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.layers import is_convolution, is_transformers_conv1d, matrix, why_not
from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional.convolution import Convolve, low_rank_convolution, low_rank_convolution_update
from lightning_peft.functional.low_rank import low_rank_linear, low_rank_update
from lightning_peft.rank.gate import Gate


class LowRankUpdate(Adapter):
    """A frozen weight plus a sum of rank-one terms, wherever their factors come from.

        effective weight = W + scaling * B diag(value) A

    What exports, budgets and scores need of an adapter. A and B may be parameters, as :class:`LowRank` has them, or
    made when they are asked for.

    Attributes:
        A: (r, d_in).
        B: (d_out, r).
        gate: r components; its value multiplies them.
        scaling: what multiplies the update.
    """

    gate: Gate

    if TYPE_CHECKING:  # not at run time: a property of the class would hide a parameter of its name

        @property
        def A(self) -> Tensor: ...
        @property
        def B(self) -> Tensor: ...
        @property
        def scaling(self) -> float: ...

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The layer with its update, computed without that weight."""

    def value(self) -> Tensor:
        """What multiplies each component, scaling included: (r,)."""
        return self.gate.value() * self.scaling

    def update(self) -> Tensor:
        """The low-rank update alone: (d_out, d_in)."""
        B = self.B
        return (B * self.value().to(B.dtype)) @ self.A

    def effective_weight(self) -> Tensor:
        update = self.update()
        return matrix(self.base).to(update.dtype) + update

    @classmethod
    @torch.no_grad()
    def products(cls, group: Sequence[LowRankUpdate]) -> Tensor:
        """Products <b_i a_i^T, b_j a_j^T> of the components of L equally shaped adapters, in float32 or wider.

        (A A^T) * (B^T B): (L, r, r);  or its diagonal alone, (L, r), where components are orthogonal
        """
        A = torch.stack([adapter.A for adapter in group])
        B = torch.stack([adapter.B for adapter in group])
        wide = torch.promote_types(A.dtype, torch.float32)
        A, B = A.to(wide), B.to(wide)
        return (A @ A.mT) * (B.mT @ B)

    @torch.no_grad()
    def factors(self) -> tuple[Tensor, Tensor]:
        """The open components, the gain folded into B: (k, d_in) and (d_out, k); scaling * B A is the update."""
        open_, B = self.gate.open(), self.B
        value = self.gate.value()[open_].to(B.dtype)
        return self.A[open_].clone(), B[:, open_] * value


class LowRank(LowRankUpdate):
    """A sum of r rank-one terms added to a frozen weight.

        y = W x + b + scaling * B diag(value) A drop(x)

    A subclass fills A and B in `reset_parameters`, and that is all it must do. It may make a gate with the paper's gain
    in `_make_gate`, freeze a factor (`self.A.requires_grad_(False)`), and say what scaling is.

    A: (r, d_in).  B: (d_out, r).  value: (r,), the gate's gain times its mask.  All are float32, or the base's dtype
    where that is wider, whatever the dtype of the base.

    A convolution is the same product at every place of its output: W is its kernel as a matrix, d_in is
    c_in / groups * prod(kernel), and A's rows are kernels. See :mod:`lightning_peft.functional.convolution`.

    Args:
        base: Linear, Conv1d, Conv2d, Conv3d, Embedding or transformers' Conv1D layer; frozen and kept.
        rank: number of components r; at most min(d_in, d_out).
        alpha: update scale; see the subclass.
        dropout: probability of dropout on the adapter's input, while training. It acts where the layer is called; a
            layer whose weight is only read has no input to drop, and an embedding's input is an index.

    Raises:
        TypeError: the layer is of a kind that cannot be adapted.
        ValueError: rank, alpha or dropout is out of range.
    """

    A: nn.Parameter
    B: nn.Parameter
    gate: Gate

    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> None:
        reason = why_not(base)
        if reason is not None:
            raise TypeError(f"{type(self).__name__} cannot adapt this layer: {reason}.")
        weight = matrix(base)
        d_out, d_in = weight.shape
        require_integer("rank", rank)
        require_number("alpha", alpha)
        require_number("dropout", dropout)
        if not 1 <= rank <= min(d_in, d_out):
            raise ValueError(
                f"rank={rank} is not possible on a layer of {d_in} inputs and {d_out} outputs: "
                f"give a rank from 1 to {min(d_in, d_out)}, or leave the layer out of the targets."
            )
        if not alpha > 0:
            raise ValueError(f"alpha scales the update and must be positive. Got {alpha}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is a probability in [0, 1). Got {dropout}.")
        super().__init__(base)
        # Asked here: a wrapper around the base is neither an embedding nor a convolution.
        self._indexed = isinstance(base, nn.Embedding)
        stored_shape: torch.Size = base.weight.shape  # type: ignore[assignment]
        self._kernel = stored_shape[1:] if is_convolution(base) else None
        # Plain numbers, whatever a sweep hands over: they are written into checkpoints, which hold nothing else.
        self.rank = index(rank)
        self.alpha = float(alpha)
        self.dropout = float(dropout)
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.A = nn.Parameter(torch.empty(rank, d_in, dtype=dtype, device=weight.device))
        self.B = nn.Parameter(torch.empty(d_out, rank, dtype=dtype, device=weight.device))
        self.gate = self._make_gate(d_in, d_out)
        self.reset_parameters()
        if isinstance(base, nn.Embedding) and base.padding_idx is not None:
            # A padding vector is neither trained nor moved: it has no update, and `forward` gives it no gradient.
            with torch.no_grad():
                self.A[:, base.padding_idx] = 0

    def _make_gate(self, d_in: int, d_out: int) -> Gate:
        """The gate of `self.rank` components, by default without a gain; A and B are there, and not yet filled."""
        return Gate(self.rank, cost=d_in + d_out).to(self.A.device)

    @abstractmethod
    def reset_parameters(self) -> None:
        """Fill A, B and the gate's gain with the paper's start."""

    @property
    def scaling(self) -> float:
        """What multiplies the update: alpha / r, with the rank that the adapter was built with."""
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        if self._indexed:
            h = F.embedding(x, self.A.t(), base.padding_idx) * self.value().to(self.A.dtype)
            y: Tensor = base(x)
            return y + F.linear(h, self.B).to(y.dtype)
        p = self.dropout if self.training else 0.0
        heard = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if heard or not (isinstance(base, nn.Linear) or is_convolution(base) or is_transformers_conv1d(base)):
            # Somebody listens to the base layer, or it was wrapped (by FSDP1, which gathers the weight in the wrapper's
            # forward): call it.
            y = base(x)
            return y + self._added(x, p).to(y.dtype)
        if self._kernel is None:
            return low_rank_linear(x, matrix(base), base.bias, self.A, self.B, self.value(), p)
        # The base's own way to move a kernel over its input: A's is padded as W's is, whatever the mode.
        convolve: Convolve = base._conv_forward
        return low_rank_convolution(
            convolve, x, base.weight, base.bias, self.A, self.B, self.value(), base.groups, dropout=p
        )

    def _added(self, x: Tensor, dropout: float) -> Tensor:
        """What the adapter alone adds to the base's output, in its own dtype if that is wider."""
        if self._kernel is None:
            return low_rank_update(x, self.A, self.B, self.value(), dropout)
        base: Any = self.base  # or a wrapper, which answers for it
        return low_rank_convolution_update(
            base._conv_forward, x, self._kernel, self.A, self.B, self.value(), base.groups, dropout
        )

    @torch.no_grad()
    def compacted(self, keep: Tensor | None = None) -> Adapter | None:
        keep = self.gate.open() if keep is None else keep
        k = int(keep.sum())
        if k == 0:
            return None
        # scaling = alpha / rank belongs to the rank that the adapter was trained with: alpha follows the rank down.
        arguments = self.arguments() | {"rank": k, "alpha": self.alpha * k / self.rank}
        small = type(self)(self.base, **arguments)
        # New parameters, not copies into the new adapter's: the dtype is the one that this adapter was cast to.
        small.A = nn.Parameter(self.A[keep])
        small.B = nn.Parameter(self.B[:, keep])
        if self.gate.gain is not None:
            small.gate.gain = nn.Parameter(self.gate.gain[keep])
        small.gate.mask.copy_(self.gate.mask[keep])
        return small.train(self.training)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"
