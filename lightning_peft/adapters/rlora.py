"""RLoRA, randomized Walsh-Hadamard low-rank adaptation (Lei, Qian, Cheung, Findings of ACL 2024).

In the order of what is known: the update, the scale of its projections, and which way they are applied. Of the paper
only the abstract could be read: a randomized Walsh-Hadamard transform makes LoRA's trained parameters far fewer. All
beyond it is a reconstruction, and said so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import isfinite, sqrt
from operator import index
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.layers import is_convolution, is_transformers_conv1d, matrix, why_not
from lightning_peft.adapters.low_rank import LowRankUpdate
from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional import draws
from lightning_peft.functional.hadamard import is_exact
from lightning_peft.functional.randomized import Update, randomized_linear
from lightning_peft.functional.srht import SRHT, Projection, has_small_factors
from lightning_peft.rank.gate import Gate

Mode = Literal["diag", "io", "core", "half"]
Scale = Literal["vera", "orthonormal"]
How = Literal["auto", "rows", "kron"]
_D_INITIAL = 0.1


class _Sources(NamedTuple):
    """What the projections of layers that share them are drawn from, and its digest."""

    into: SRHT
    out: SRHT | None
    digest: str


class RLoRA(LowRankUpdate):
    """Low-rank adaptation between frozen random projections, which are drawn from a seed and never stored.

        y = W x + bias + scaling * b * ( P_out^T M P_in (a * x) )
        P = c * S H_d D(e) / sqrt(d)          e: random signs; H_d: Hadamard, or cosines; S: r distinct rows

        mode     M            trained                        numbers per layer
        diag     D(g m)       g: (r,) and b: (d_out,)        r + d_out
        io       D(g m)       a: (d_in,) and b: (d_out,)     d_in + d_out
        core     R D(m)       R: (r, r)                      r^2
        half     D(m)         U: (d_out, r), in the place    r d_out
                              of b * P_out^T

    g starts at `d_initial` and b at zero; in "io" g is one and frozen, a starts at one; R and U start at zero: training
    starts from the base model. m: (r,), the gate's mask. W and bias are frozen.

    A component is a direction of the input, a row of P_in, with what becomes of it: in "core" a column of R, in "half"
    a column of U. In "diag" and "io" g is the gate's gain, so that a soft removal zeroes an entry of it; in "io"
    nothing trains it back. The price of a component is the d_in + d_out numbers that an exported one has.

    With r above d a projection is made of blocks with signs of their own, all but the last with every row: r = 1024 on
    d = 768, as VeRA's results have it.

    Args:
        base: Linear or transformers' Conv1D layer; frozen and kept. Also a MultiheadAttention's projections.
        rank: number of components r that are drawn; ``None`` for 1024 where both widths are at most that, else 256.
        mode: what is trained.
        scale: c. "vera" gives projections the variances that VeRA's have, c_in = sqrt 2 and c_out = sqrt(2 d_out / r),
            so that its learning rates can be taken over; "orthonormal" is 1.
        scaling: what multiplies the update.
        d_initial: start of g in "diag"; the other modes have none, and refuse another number than this.
        seed: what projections are drawn from, with a key.
        share_projection: whether layers of one shape have the same projections; else each has its own, from `key`.
        path: "rows" has projections as matrices of r d numbers, "kron" goes through small factors in d (A + B) steps
            whatever r is. "auto" is what was measured to be faster on a CPU, for the components that there are.
        key: names the projections that are not shared. Left empty, it is the layer's name when the adapter is put in;
            it stays, whatever the layer is called later.
        components: which of the r drawn components the adapter has, ascending; ``None`` for all. What compaction sets.

    Shape:
        x: (..., d_in) -> (..., d_out). In the place of `gate.gain`, a and b there may be (batch, n) tensors; see
        :class:`Adapter`.

    Raises:
        TypeError: the layer is of another kind.
        ValueError: an argument is out of range, or two do not go together.

    Reference:
        Lei, Qian, Cheung, Fast Randomized Low-Rank Adaptation of Pre-trained Language Models with PAC Regularization,
        Findings of ACL 2024, pp. 5236-5249. Only its abstract could be read. What is trained, the scale, the start and
        the defaults are our choice: those of VeRA (Kopiczko et al., 2024) as coded in HF PEFT; "io" is another reading,
        "core" is LoRA-XS and "half" LoRA-FA with a random basis (remembered). Projections are subsampled randomized
        Hadamard transforms, rows drawn without replacement; widths that are no power of two, of which the abstract says
        nothing, are :mod:`~lightning_peft.functional.hadamard`'s. Blocks for r > d are ours.

    Example:
        >>> RLoRA(nn.Linear(8, 4), rank=3).gate.gain
        Parameter containing:
        tensor([0.1000, 0.1000, 0.1000], requires_grad=True)
    """

    elementwise: ClassVar[tuple[str, ...]] = ("gate.gain", "a", "b")
    folds_lasting: ClassVar[bool] = True

    a: nn.Parameter | None
    b: nn.Parameter | None
    R: nn.Parameter | None
    U: nn.Parameter | None
    scaling: float

    def __init__(
        self,
        base: nn.Module,
        rank: int | None = None,
        mode: Mode = "diag",
        scale: Scale = "vera",
        scaling: float = 1.0,
        d_initial: float = _D_INITIAL,
        seed: int = 0,
        share_projection: bool = True,
        path: How = "auto",
        key: str = "",
        components: Sequence[int] | None = None,
    ) -> None:
        reason = why_not(base)
        if reason is None and (isinstance(base, nn.Embedding) or is_convolution(base)):
            reason = f"{type(base).__name__} is no linear layer; leave it out of the targets"
        if reason is not None:
            raise TypeError(f"RLoRA cannot adapt this layer: {reason}.")
        weight = matrix(base)
        d_out, d_in = weight.shape
        if rank is not None:
            require_integer("rank", rank)
            if rank < 1:
                raise ValueError(f"rank is the number of components, at least 1. Got {rank}.")
            # Drawn before any is chosen: a file that asks for a trillion and keeps one would take all memory.
            if rank > (most := max(1024, d_in * d_out)):
                raise ValueError(
                    f"rank={rank} is more than a layer of {d_in} inputs and {d_out} outputs can use: at most {most}."
                )
        for name, value, kind in (("mode", mode, Mode), ("scale", scale, Scale), ("path", path, How)):
            if value not in get_args(kind):
                raise ValueError(f"{name}={value!r}: choose {', '.join(map(repr, get_args(kind)))}.")
        for name, number in (("scaling", scaling), ("d_initial", d_initial)):
            require_number(name, number)
            if not (number > 0 and isfinite(number)):
                raise ValueError(f"{name} multiplies the update and must be positive and finite. Got {number}.")
        if mode != "diag" and d_initial != _D_INITIAL:
            raise ValueError(
                f"d_initial={d_initial} is where g starts in mode='diag', and mode={mode!r} has no such start: leave "
                "it out."
            )
        require_integer("seed", seed)
        if key and share_projection:
            raise ValueError(
                f"key={key!r} names projections of a layer's own, and share_projection=True gives it those of its "
                "shape: give share_projection=False, or no key."
            )
        widths = (d_in,) if mode == "half" else (d_in, d_out)
        if path == "kron" and not all(map(has_small_factors, widths)):
            raise ValueError(
                f"path='kron' is not possible on a layer of {d_in} inputs and {d_out} outputs: one of them has no "
                "small factors. Give path='rows', or 'auto', which takes it there."
            )
        drawn = default_rank(d_in, d_out) if rank is None else index(rank)
        k = drawn if components is None else len(_chosen(components, drawn))
        super().__init__(base)
        # Plain numbers, whatever a sweep hands over: they are written into checkpoints, which hold nothing else.
        self.rank = None if rank is None else index(rank)
        self.mode: Mode = mode
        self.scale: Scale = scale
        self.scaling = float(scaling)
        self.d_initial = float(d_initial)
        self.seed = index(seed)
        self.share_projection = bool(share_projection)
        self.path: How = path
        self.key = key
        self.components = None if components is None else [index(i) for i in components]
        self._drawn = drawn
        self._shape = d_out, d_in
        place: dict[str, Any] = {
            "dtype": torch.promote_types(weight.dtype, torch.float32),
            "device": weight.device,
        }
        shapes = {"a": (d_in,), "b": (d_out,), "R": (drawn, k), "U": (d_out, k)}
        trained = {"diag": "b", "io": "ab", "core": "R", "half": "U"}[mode]
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, **place)) if name in trained else None)
        gain = torch.empty(k, **place) if mode in ("diag", "io") else None
        self.gate = Gate(k, cost=d_in + d_out, gain=gain).to(weight.device)
        if self.gate.gain is not None:
            self.gate.gain.requires_grad_(mode == "diag")
        self.reset_parameters()
        self._sources: _Sources | None = None
        self._derive()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the vectors and matrices with their start."""
        for start, tensor in ((1.0, self.a), (0.0, self.b), (0.0, self.R), (0.0, self.U)):
            if tensor is not None:
                tensor.fill_(start)
        if self.gate.gain is not None:
            self.gate.gain.fill_(self.d_initial if self.mode == "diag" else 1.0)

    def _derive(self) -> None:
        """Make the projections where the parameters are and in their dtype; on the meta device there are none."""
        own = next(p for _, p in self.own_parameters())
        self._into: Projection | None = None
        self._out: Projection | None = None
        if own.is_meta:
            return
        with torch.device("cpu"):  # whatever the default device is: constants are drawn there
            into, out, _ = self._draws()
            self._into = into.at(own.device, own.dtype, self.path)
            self._out = None if out is None else out.at(own.device, own.dtype, self.path)

    def _draws(self) -> _Sources:
        """What the projections are, without their numbers; drawn once."""
        if self._sources is None:
            d_out, d_in = self._shape
            key = f"{d_in}x{d_out}" if self.share_projection else self.key
            into = SRHT(d_in, self._drawn, self.seed, key, "in", self.components)
            out = None
            if self.mode != "half":
                # In "core" a component is a column of R, whose rows are all there is of P_out.
                kept = None if self.mode == "core" else self.components
                out = SRHT(d_out, self._drawn, self.seed, key, "out", kept)
            drawn = (t for each in (into, out) if each is not None for t in (each.signs, each.index))
            self._sources = _Sources(into, out, draws.digest(*drawn))
        return self._sources

    def placed(self, name: str, others: Mapping[str, Adapter]) -> None:
        if not self.share_projection and not self.key:
            self.key = name
            self._sources = None
            self._derive()
            return
        for other in others.values():
            if isinstance(other, RLoRA) and other._identity() == self._identity():
                with torch.device("cpu"):  # on the meta device they are not drawn yet
                    self._sources = other._draws()  # and with them the projections' memory
                self._derive()
                return

    def _identity(self) -> tuple[object, ...]:
        """What the projections depend on."""
        kept = None if self.components is None else tuple(self.components)
        own = "" if self.share_projection else self.key
        return self._shape, self._drawn, self.seed, self.share_projection, own, kept, self.mode in ("half", "core")

    def digest(self) -> str:
        with torch.device("cpu"):
            return self._draws().digest

    @property
    def _c_in(self) -> float:
        return sqrt(2) if self.scale == "vera" else 1.0

    @property
    def _c_out(self) -> float:
        return sqrt(2 * self._shape[0] / self._drawn) if self.scale == "vera" else 1.0

    @property
    def A(self) -> Tensor:
        """What a component reads, P_in with a: (r, d_in)."""
        if self._into is None:
            return self._without_numbers(len(self.gate), self._shape[1])
        A = self._into.whole() * (self._c_in * self._into.unit)
        return A if self.a is None else A * self._of_all(self.a)

    @property
    def B(self) -> Tensor:
        """What a component writes, P_out with b, R or U: (d_out, r)."""
        if self.U is not None:
            return self.U
        if self._out is None:
            return self._without_numbers(self._shape[0], len(self.gate))
        B = self._out.whole().t() * (self._c_out * self._out.unit)
        if self.R is not None:
            return B @ self.R
        return B if self.b is None else B * self._of_all(self.b)[:, None]

    def _without_numbers(self, *shape: int) -> Tensor:
        own = next(p for _, p in self.own_parameters())
        return torch.empty(*shape, dtype=own.dtype, device="meta")

    def _of_all(self, vector: Tensor) -> Tensor:
        if vector.dim() > 1:
            raise RuntimeError(
                f"the layer's weight was asked for while {len(vector)} draws of RLoRA's vectors stand in for one, one "
                "per example: there is no one weight. An attention reads its projections' weights: leave these out of "
                "the targets, or draw one for all examples."
            )
        return vector

    @classmethod
    @torch.no_grad()
    def products(cls, group: Sequence[LowRankUpdate]) -> Tensor:
        adapters: list[Any] = list(group)
        first = adapters[0]
        if not all(adapter._has_orthogonal_components() for adapter in adapters):
            # Their parameters are of equal shapes, and their widths need not be.
            found: list[Any] = [None] * len(adapters)
            for shape in {adapter._shape: None for adapter in adapters}:
                places = [i for i, adapter in enumerate(adapters) if adapter._shape == shape]
                whole = super().products([adapters[i] for i in places])
                for i, each in zip(places, whole, strict=True):
                    found[i] = each
            return torch.stack(found)
        if first.mode == "diag":  # entries of P_out are all of one size
            b = torch.stack([adapter.b for adapter in adapters])
            squares = b.square().mean(1, keepdim=True, dtype=torch.promote_types(b.dtype, torch.float32))
            squares = squares.expand(-1, len(first.gate))
        else:
            matrices = torch.stack([adapter.R if adapter.U is None else adapter.U for adapter in adapters])
            squares = matrices.square().sum(1, dtype=torch.promote_types(matrices.dtype, torch.float32))
        scales = [a._c_in**2 * (a._c_out**2 if a.U is None else 1.0) for a in adapters]
        return squares * squares.new_tensor(scales)[:, None]

    def _has_orthogonal_components(self) -> bool:
        """Whether products of its components are zero, and their norms those of the vectors alone."""
        d_out, d_in = self._shape
        # Rows of a projection are orthonormal within a block, and a scales those of P_in apart.
        return self._drawn <= min(d_in, d_out) and self.mode != "io" and is_exact(d_out)

    def value(self) -> Tensor:
        return self._of_all(self.gate.value()) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        base: Any = self.base
        into, out = self._into, self._out
        if into is None:
            raise RuntimeError("RLoRA was called on the meta device, where there are no numbers: move the model first.")
        constant = self.scaling * self._c_in * into.unit * (1.0 if out is None else self._c_out * out.unit)
        own = next(t for t in (self.b, self.R, self.U) if t is not None)
        # A mask is float32: wider than that where the adapter is, and no wider than it in the end.
        value = (self.gate.value().to(torch.promote_types(own.dtype, torch.float32)) * constant).to(own.dtype)
        update = Update(value, self.a, self.b, self.R, self.U)
        heard = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        if heard or not (isinstance(base, nn.Linear) or is_transformers_conv1d(base)):
            # Somebody listens to the base layer, or it was wrapped (by FSDP1, which gathers the weight in the wrapper's
            # forward): call it.
            y: Tensor = base(x)
            return y + randomized_linear(x, None, None, into, out, update).to(y.dtype)
        return randomized_linear(x, matrix(base), base.bias, into, out, update)

    def lasting_parameters(self) -> Iterator[nn.Parameter]:
        return (p for p in (self.a, self.b) if p is not None)

    @torch.no_grad()
    def compacted(self, keep: Tensor | None = None) -> Adapter | None:
        keep = self.gate.open() if keep is None else keep
        kept = keep.nonzero().flatten().tolist()
        if not kept:
            return None
        chosen = kept if self.components is None else [self.components[i] for i in kept]
        small = type(self)(self.base, **self.arguments() | {"components": chosen})
        # New parameters, not copies into the new adapter's: the dtype is the one that this adapter was cast to.
        for name in ("a", "b", "R", "U"):
            own: nn.Parameter | None = getattr(self, name)
            if own is not None:
                setattr(small, name, nn.Parameter(own[:, keep] if own.dim() > 1 else own.detach().clone()))
        if self.gate.gain is not None:
            small.gate.gain = nn.Parameter(self.gate.gain[keep], requires_grad=self.gate.gain.requires_grad)
        small.gate.mask.copy_(self.gate.mask[keep])
        small._derive()
        return small.train(self.training)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RLoRA:
        # Not buffers: nothing sends or saves them, and what was built on the meta device gets them when it has memory.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._derive()
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        # With `assign=True` parameters come into memory, or into another dtype, and nothing is applied to them.
        super()._load_from_state_dict(*arguments)
        self._derive()

    def extra_repr(self) -> str:
        shared = "shared" if self.share_projection else repr(self.key)
        return f"r={len(self.gate)}, mode={self.mode!r}, scale={self.scale!r}, seed={self.seed}, projection={shared}"


def default_rank(d_in: int, d_out: int) -> int:
    """Components that are drawn where nothing is said: VeRA's numbers (remembered), by the larger width."""
    return 1024 if max(d_in, d_out) <= 1024 else 256


def _chosen(components: Sequence[int], drawn: int) -> list[int]:
    """The components that are kept, checked.

    Raises:
        TypeError: they are no whole numbers.
        ValueError: there is none, they are out of range, or not ascending.
    """
    if not isinstance(components, (list, tuple)):
        raise TypeError(f"components is a list of positions. Got {components!r}.")
    for each in components:
        require_integer("a component", each)
    found = [index(each) for each in components]
    if not found or sorted(set(found)) != found or found[0] < 0 or found[-1] >= drawn:
        raise ValueError(
            f"components says which of the {drawn} drawn ones are kept: distinct, ascending, from 0 to {drawn - 1}, at "
            f"least one. Got {found[:8]}{', ...' if len(found) > 8 else ''}."
        )
    return found
