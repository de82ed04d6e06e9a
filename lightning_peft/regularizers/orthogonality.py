"""Orthogonality: keep the components of a low-rank adapter apart (AdaLoRA, Zhang et al., ICLR 2023, eq. 4)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_peft.regularizers.base import Regularizer, Weight, low_rank

Form = Literal["squared", "norm"]
_WIDE = (torch.float32, torch.float64)


def deviation(P: Tensor) -> Tensor:
    """Squared distance of the rows from an orthonormal set: (..., r, d) -> (...), |P P^T - I|_F^2."""
    gram = P @ P.mT
    eye = torch.eye(P.shape[-2], dtype=P.dtype, device=P.device)
    return (gram - eye).square().sum((-2, -1))


class _Deviation(torch.autograd.Function):
    """scale * sum over tensors of |P P^T - I|_F, or of its square; closed gradient, no graph over the layers.

        G = P P^T - I,     d|G|_F^2 / dP = 4 G P,     d|G|_F / dP = 2 G P / |G|_F, and 0 where G = 0

    P is a tensor of `rows`, and the transpose of one of columns.
    """

    @staticmethod
    def forward(ctx: Any, form: Form, scale: float, rows: tuple[bool, ...], *tensors: Tensor) -> Tensor:
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, t in enumerate(tensors):
            groups.setdefault((rows[i], t.shape, t.dtype, t.device), []).append(i)
        stacks: list[Tensor] = []
        grams: dict[tuple[Any, ...], list[Tensor]] = {}  # of equal size, to be treated together
        places: list[tuple[Any, ...]] = []
        eyes: dict[tuple[Any, ...], Tensor] = {}
        for (is_row, *_), members in groups.items():
            stack = torch.stack([tensors[i] for i in members])
            stack = stack if stack.dtype in _WIDE else stack.float()
            P = stack if is_row else stack.mT
            key = (P.shape[1], P.dtype, P.device)
            if key not in eyes:
                eyes[key] = torch.eye(P.shape[1], dtype=P.dtype, device=P.device)
            grams.setdefault(key, []).append(torch.baddbmm(eyes[key], P, P.mT if is_row else stack, beta=-1))
            places.append(key)
            stacks.append(stack)
        value: Tensor | None = None
        parts = {}
        for key, found in grams.items():
            gram = torch.cat(found)
            norm = torch.linalg.vector_norm(gram, dim=(1, 2), keepdim=True)
            total = (norm if form == "norm" else norm.square()).sum()
            # A layer may be on another device.
            value = total if value is None else value + total.to(value.device)
            if form == "norm":
                gram.div_(norm.clamp_min_(torch.finfo(norm.dtype).tiny))
            parts[key] = iter(gram.split([len(each) for each in found]))
        assert value is not None
        slopes = []
        for (is_row, *_), key, stack in zip(groups, places, stacks, strict=True):
            gram = next(parts[key])
            slopes.append(torch.bmm(gram, stack) if is_row else torch.bmm(stack, gram))
        ctx.groups, ctx.dtypes = list(groups.values()), [t.dtype for t in tensors]
        ctx.scale = scale * (2 if form == "norm" else 4)
        ctx.save_for_backward(*slopes)
        return value * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out: list[Tensor | None] = [None] * len(ctx.dtypes)
        slopes = list(ctx.saved_tensors)
        if len({slope.device for slope in slopes}) == 1:
            slopes = list(torch._foreach_mul(slopes, grad * ctx.scale))
        else:
            slopes = [slope * (grad * ctx.scale).to(slope.device) for slope in slopes]
        for members, slope in zip(ctx.groups, slopes, strict=True):
            for i, part in zip(members, slope.unbind(), strict=True):
                out[i] = part.to(ctx.dtypes[i])
        return (None, None, None, *out)


class Orthogonality(Regularizer):
    """How far the rows of A and the columns of B are from orthonormal.

        "squared":  mean over layers of |A A^T - I|_F^2 + |B^T B - I|_F^2
        "norm":     mean over all A and B of |A A^T - I|_F, |B^T B - I|_F

    A and B only: a gate's gain and mask do not enter, and closed components count as long as they are there: compaction
    takes them out. The gradient is the closed form, one batched pass per shape and no autograd graph over the layers.

    Args:
        weight: what the term is multiplied by; a number or a function of (step, total).
        form: "squared" is eq. 4 of the paper; "norm" is what the authors' code and HF PEFT compute, with weight 0.5
            there.

    Raises:
        ValueError: the form is unknown.
        RuntimeError: the module has no low-rank adapter.

    Reference:
        Zhang et al., AdaLoRA, ICLR 2023, arXiv 2303.10512, eq. 4. Departure: a mean, where eq. 4 is a sum over layers.
    """

    def __init__(self, weight: Weight = 0.1, form: Form = "squared") -> None:
        super().__init__(weight)
        if form not in ("squared", "norm"):
            raise ValueError(f"form must be 'squared' or 'norm'. Got {form!r}.")
        self.form: Form = form

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        adapters = low_rank(module)
        if not adapters:
            raise RuntimeError("Orthogonality found no low-rank adapter in the module; inject adapters first.")
        scale = 1 / len(adapters) if self.form == "squared" else 1 / (2 * len(adapters))
        tensors = [t for adapter in adapters for t in (adapter.A, adapter.B)]
        rows = (True, False) * len(adapters)
        value: Tensor = _Deviation.apply(self.form, scale, rows, *tensors)  # type: ignore[no-untyped-call]
        return value
