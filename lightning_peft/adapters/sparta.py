"""SpaRTA, sparse random parameter adaptation (Rios, Dognin, Luss, Natesan Ramamurthy, Findings of EMNLP 2025).

In the order of the method: which entries are trained, the weight with them in it, their gradient, and what others ask
of an adapter. What is drawn and how gradients are found is in :mod:`lightning_peft.functional.sparse`, when entries are
written into the weight in :mod:`lightning_peft.adapters.written_entries`.
"""

from __future__ import annotations

from math import isfinite
from operator import index
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.layers import is_convolution, is_transformers_conv1d, is_transposed, why_not_with_norms
from lightning_peft.adapters.written_entries import WrittenEntries
from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional.low_rank import linear_of_its_own
from lightning_peft.functional.sparse import (
    Kernel,
    draw_bernoulli,
    draw_indices,
    index_fault,
    require_density,
    require_kernel,
    share_of,
)
from lightning_peft.functional.sparse_layers import (
    Entries,
    embedding_entries,
    linear_entries,
    spread,
    weight_entries,
)

Sampling = Literal["exact", "bernoulli"]
_RANDOM_NUMBER = (
    "sampling='bernoulli' draws a random number of entries, so it goes neither with k nor with blocks: leave them out, "
    "or use sampling='exact'."
)


class SpaRTA(WrittenEntries):
    """Train a few entries of a weight, drawn at random, and leave all others as they are.

        W.flat[I] = cast( original + scaling * (m * delta) )        y = W x + bias

    I: (k,) flat positions in the weight as it is stored, ascending. original: (k,), the base's own values there. delta:
    (k,), trained, zero at the start. m: the gate's mask, one number for every `block` entries that follow each other in
    I, so for entries in neighbouring rows of the weight.

    The sum is written into the base's weight itself, whenever delta, the mask or scaling have changed: a forward costs
    what the base's does, and a backward finds the gradient of these k entries alone. What is written overwrites, so
    nothing drifts, and `eject` brings back every bit. While the adapter is there the base's weight therefore *is* the
    adapted one: in a full checkpoint, in `named_parameters`, and for whoever else has the same parameter. A checkpoint
    of adapters has I, original, delta and the mask.

    delta is in float32, or the base's dtype where that is wider, whatever the module is cast to: below half a step of a
    bfloat16 weight a change is not lost, it waits until it has become large enough to show.

    Compiled, under a transform, and while something stands in the place of delta (noise, a mask of the step), the
    weight is composed anew at every forward; that takes a copy of it.

    Args:
        base: any layer that can be adapted, embeddings and attention's projections included; and normalisations,
            where they are named.
        density: the share of the weight's entries that is trained.
        k: exactly so many entries, in the place of a share; a multiple of `block`.
        seed: what positions are drawn from, with a key.
        sampling: "exact" draws as many entries as the share says, rounded; "bernoulli" draws each one with that
            probability, as the authors do, so that their number is random.
        block: entries that the gate opens and closes together.
        kernel: how a linear layer finds the gradient of its entries, see
            :func:`~lightning_peft.functional.sparse.entry_gradient`; "auto" is what was measured to be fastest.
        scaling: what multiplies delta.
        key: names the weight, so that layers of one shape have other entries. Left empty, it is the layer's name when
            the adapter is put in; it stays, whatever the layer is called later.

    Shape:
        x: what the base takes -> what it gives.

    Raises:
        TypeError: the layer is of a kind that cannot be adapted.
        ValueError: an argument is out of range, or two do not go together.

    Reference:
        Rios et al., Sparsity May Be All You Need: Sparse Random Parameter Adaptation, Findings of EMNLP 2025, arXiv
        2502.15975; the abstract and the authors' two code bases. Departures: an exact number of entries by default;
        which ones depends on seed and name alone; delta in float32 and overwriting, as in their newer code; biases are
        not sampled; gradients by kernels of our own; the mask is ours.

    Example:
        >>> SpaRTA(nn.Linear(8, 4), density=0.25).delta.shape
        torch.Size([8])
    """

    def __init__(
        self,
        base: nn.Module,
        density: float = 0.01,
        k: int | None = None,
        seed: int = 0,
        sampling: Sampling = "exact",
        block: int = 1,
        kernel: Literal["auto"] | Kernel = "auto",
        scaling: float = 1.0,
        key: str = "",
    ) -> None:
        reason = self.why_not(base)
        if reason is not None:
            raise TypeError(f"SpaRTA cannot adapt this layer: {reason}.")
        weight: Tensor = base.weight  # type: ignore[assignment]
        numel = weight.numel()
        require_some(density)
        require_integer("block", block)
        if not 1 <= block <= numel:
            raise ValueError(f"block is a number of entries, from 1 to the {numel} of this weight. Got {block}.")
        require_arguments(seed, sampling, block, kernel, scaling)
        if k is not None:
            require_integer("k", k)
            if not 1 <= k <= numel or k % block:
                raise ValueError(
                    f"k={k} entries cannot be trained of a weight that has {numel}, in blocks of {block}: give a "
                    f"multiple of {block} from {block} to {numel // block * block}."
                )
        if sampling == "bernoulli" and k is not None:
            raise ValueError(_RANDOM_NUMBER)
        # Plain numbers, whatever a sweep hands over: they are written into checkpoints, which hold nothing else.
        super().__init__(base, float(scaling))
        self.density = float(density)
        self.k = None if k is None else index(k)
        self.seed = index(seed)
        self.sampling: Sampling = sampling
        self.block = index(block)
        self.kernel: Literal["auto"] | Kernel = kernel
        self.key = key
        self._begin()

    @classmethod
    def why_not(cls, layer: nn.Module) -> str | None:
        if isinstance(layer, nn.Embedding) and layer.scale_grad_by_freq:
            return "it scales gradients by how often a token is there (scale_grad_by_freq)"
        return why_not_with_norms(layer)

    # Which entries are trained.

    def _begin(self) -> None:
        """Draw the entries, and start them where the base is."""
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        numel = weight.numel()
        with torch.device("cpu"):  # whatever the default device is
            if self.sampling == "bernoulli":
                drawn = draw_bernoulli(numel, self.density, self.seed, self.key)
                if not len(drawn):
                    raise ValueError(f"density={self.density} has drawn no entry of {numel}: raise it.")
            else:
                k = share_of(numel, self.density, self.block) if self.k is None else self.k
                drawn = torch.empty(k, device="meta") if weight.is_meta else draw_indices(numel, k, self.seed, self.key)
                drawn = drawn.to(torch.int32 if numel < 2**31 else torch.int64)
        self._begin_at(drawn.to(weight.device), self.block)

    def placed(self, name: str, others: Any) -> None:
        for other, adapter in others.items():
            if isinstance(adapter, SpaRTA) and adapter.base.weight is self.base.weight:
                raise ValueError(
                    f"layer {name!r}: its weight is one parameter with that of {other!r}, and both would write into "
                    "it. Leave one of them out of the targets."
                )
        if not self.key:
            self.key = name
            self._begin()

    @torch.no_grad()
    def move(self, indices: Tensor) -> Tensor:
        """Train other entries, as many as there are: those that stay keep delta and mask, new ones begin where W is.

        Entries that are left get the base's own bits back. An optimizer's state is the caller's to move along.

        Args:
            indices: (k,) flat positions, ascending.

        Returns:
            (k,) int64: for each new entry where it was among the old ones; -1 where it was none of them.

        Raises:
            ValueError: there are not as many, they are no positions, or entries are gated in blocks.
        """
        if self.block != 1:
            raise ValueError(f"entries that are gated in blocks of {self.block} cannot move: use block=1.")
        numel = self._matrix[0] * self._matrix[1]
        if indices.shape != self.indices.shape:
            raise ValueError(f"move takes {len(self.indices)} positions, as many as there are. Got {len(indices)}.")
        fault = index_fault(indices, numel)
        if fault is not None:
            raise ValueError(f"move takes ascending positions in a weight of {numel} entries, and {fault}.")
        self.restore_base()
        new, old = indices.to(self.indices), self.indices.clone()
        at = torch.searchsorted(old, new).clamp_(max=len(old) - 1)
        before = torch.where(old[at] == new, at, -1)
        stays = before >= 0
        self.indices.copy_(new)
        self.original.copy_(self._read())
        self.delta.copy_(torch.where(stays, self.delta[at], 0))
        self.gate.mask.copy_(torch.where(stays, self.gate.mask[at], 1))
        return before

    # The weight with the entries in it.

    def entries(self) -> Tensor:
        """What the trained entries are, before they are rounded to the weight's dtype: (k,)."""
        update = self.delta * spread(self.value().to(self.delta.dtype), self.delta)
        return self.original.to(update.dtype) + update.reshape(-1)

    def _composed(self) -> Tensor:
        """The weight as it is stored, composed in the graph: whatever the base's weight holds at the entries."""
        weight: Tensor = self.base.weight.detach()  # type: ignore[operator]
        entries = self.entries().to(weight.dtype)
        return weight.reshape(-1).index_put((self.indices,), entries).view(weight.shape)

    def effective_weight(self) -> Tensor:
        weight = self._composed()
        if weight.dim() == 1:
            return weight
        return weight.t() if is_transposed(self.base) else weight.flatten(1)

    # What a forward computes, and what its backward finds.

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        if not (self._is_plain() and self._is_ready()):
            return self._with_weight(x, self._composed())
        entries = self._entries()
        if entries is None:
            y: Tensor = base(x)
            return y
        heard = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if heard and (isinstance(base, nn.Embedding | nn.Linear) or is_transformers_conv1d(base)):
            return self._heard(x, entries)
        if isinstance(base, nn.Embedding):
            return embedding_entries(base(x), x, entries, base.padding_idx, fresh=True)
        if isinstance(base, nn.Linear) or is_transformers_conv1d(base):
            y = linear_of_its_own(x, base.weight.t() if entries.transposed else base.weight, base.bias)
            return linear_entries(y, x, entries, fresh=True)
        return self._with_weight(x, weight_entries(base.weight, entries))

    def _heard(self, x: Tensor, entries: Entries) -> Tensor:
        """The base with others' hooks around it: entries belong to what it is given after theirs, and before."""
        base: Any = self.base

        def inside(base: Any, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            if isinstance(base, nn.Embedding):
                return embedding_entries(y, args[0], entries, base.padding_idx, fresh=False)
            return linear_entries(y, args[0], entries, fresh=False)

        handle = base.register_forward_hook(inside, prepend=True)  # which is told what pre-hooks have made of x
        try:
            y: Tensor = base(x)
        finally:
            handle.remove()
        return y

    def _entries(self) -> Entries | None:
        """What a backward needs, or nothing where there is none."""
        value = self.value()
        if not (torch.is_grad_enabled() and (self.delta.requires_grad or value.requires_grad)):
            return None
        pattern = self._written.pattern(self.indices, self._matrix)
        kernel = None if self.kernel == "auto" else self.kernel
        return Entries(self.delta, value, pattern, kernel, is_transposed(self.base), self._written.touch)

    def _with_weight(self, x: Tensor, weight: Tensor) -> Tensor:
        """The base with another weight in the place of its own."""
        base: Any = self.base
        if isinstance(base, nn.Embedding):
            return F.embedding(x, weight, base.padding_idx)
        if isinstance(base, nn.Linear) or is_transformers_conv1d(base):
            return F.linear(x, weight.t() if is_transposed(base) else weight, base.bias)
        if is_convolution(base):
            y: Tensor = base._conv_forward(x, weight, base.bias)
            return y
        y = functional_call(base, {"weight": weight}, (x,))
        return y

    def _stored_weight(self) -> Tensor:
        if not (self._is_plain() and self._is_ready()):
            return self._composed()
        weight: Tensor = self.base.weight  # type: ignore[assignment]
        entries = self._entries()
        return weight if entries is None else weight_entries(weight, entries)

    # What becomes of it.

    def reset_parameters(self) -> None:
        """Refuse: without this the base's own would answer, and draw its weight anew under the entries.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "SpaRTA keeps what its layer's entries were, so the layer can neither be drawn anew nor filled after it "
            "was built on the meta device. Give the model its weights before adapters are injected."
        )

    @torch.no_grad()
    def compacted(self, keep: Tensor | None = None) -> Adapter | None:
        keep = self.gate.open() if keep is None else keep
        kept = spread(keep, self.delta).expand_as(self.delta).reshape(-1)
        k = int(kept.sum())
        self.restore_base()
        if k == 0:
            return None
        arguments = self.arguments() | {"k": k, "sampling": "exact"}
        small = type(self)(self.base, **arguments)
        small.delta = nn.Parameter(self.delta[keep])
        small.gate.mask.copy_(self.gate.mask[keep])
        small.indices, small.original = self.indices[kept], self.original[kept]
        small._written.delta = None
        return small.train(self.training)

    def extra_repr(self) -> str:
        return f"k={len(self.indices)}, seed={self.seed}, block={self.block}, kernel={self.kernel!r}"


def require_some(density: float) -> None:
    """Check a share of entries to train.

    Raises:
        TypeError: it is no number.
        ValueError: it is not in (0, 1].
    """
    require_density(density)
    if not density > 0:
        raise ValueError(f"density={density} trains nothing: give a share above 0, or leave the layer out.")


def require_arguments(
    seed: int = 0,
    sampling: Sampling = "exact",
    block: int = 1,
    kernel: Literal["auto"] | Kernel = "auto",
    scaling: float = 1.0,
) -> None:
    """Check those of SpaRTA's arguments that are the same for every layer, as far as no weight is needed.

    Raises:
        TypeError: one is of another type.
        ValueError: one is out of range, or two do not go together.
    """
    require_integer("seed", seed)
    require_integer("block", block)
    require_number("scaling", scaling)
    if block < 1:
        raise ValueError(f"block is a number of entries, at least 1. Got {block}.")
    if sampling not in get_args(Sampling):
        raise ValueError(f"sampling={sampling!r}: choose {', '.join(map(repr, get_args(Sampling)))}.")
    if kernel != "auto":
        require_kernel(kernel)
    if not isfinite(scaling):
        raise ValueError(f"scaling multiplies delta and must be finite. Got {scaling}.")
    if sampling == "bernoulli" and block != 1:
        raise ValueError(_RANDOM_NUMBER)
