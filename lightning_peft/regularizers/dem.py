"""DEM, the dimensional equilibrium modulator of DoRA (Mao et al., ACL 2024, eq. 10)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lightning_peft.regularizers.base import Regularizer, Weight, low_rank

Normalizer = Literal["code", "components"]


class _MeanVariance(torch.autograd.Function):
    """sum over vectors of their unbiased variance, times `scale`; closed gradient, no graph over the layers."""

    @staticmethod
    def forward(ctx: Any, scale: float, rows: tuple[bool, ...], *tensors: Tensor) -> Tensor:
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, t in enumerate(tensors):
            groups.setdefault((rows[i], t.shape, t.dtype, t.device), []).append(i)
        centred: list[Tensor] = []
        value = tensors[0].new_zeros((), dtype=torch.float32)
        for (is_row, *_), members in groups.items():
            stack = torch.stack([tensors[i] for i in members])
            stack = stack.to(torch.promote_types(stack.dtype, torch.float32))
            dim = -1 if is_row else -2
            stack -= stack.mean(dim, keepdim=True)
            share = scale / max(1, stack.shape[dim] - 1)  # a single entry has no variance: it is its own mean
            value = value + share * stack.flatten().dot(stack.flatten())
            # d value / d t = 2 scale (t - mean) / (d - 1): the mean's own gradient sums to zero.
            centred.append(stack.mul_(2 * share))
        ctx.groups = list(groups.values())
        ctx.dtypes = [t.dtype for t in tensors]
        ctx.save_for_backward(*centred)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        count = sum(len(members) for members in ctx.groups)
        out: list[Tensor | None] = [None] * count
        for members, stack in zip(ctx.groups, ctx.saved_tensors, strict=True):
            for i, part in zip(members, (stack * grad).unbind(), strict=True):
                out[i] = part.to(ctx.dtypes[i])
        return (None, None, *out)


class DEM(Regularizer):
    """Dimensional equilibrium modulator: the mean variance within the components.

        DEM = 1 / (2 N) sum_layers sum_i [ Var(a_i) + Var(b_i) ]          Var unbiased, N components in all
        dDEM/dA = (A - rowmean A) / (N (d_in - 1)),   dDEM/dB = (B - colmean B) / (N (d_out - 1))

    It flattens the entries of a component, so that closing it does not remove a few large ones. Closed ones count.
    The gradient is the closed form, one batched pass per shape and no autograd graph over the layers.

    Args:
        weight: eta; a number or a function of (step, total). The paper stops at the last cut:
            `UntilTail(0.3, tail=0.5)`.
        normalizer: "code" divides by 2 N as the authors' code does, "components" by N as eq. 10 is printed; eta of one
            is half of eta of the other.

    Raises:
        ValueError: the normalizer is unknown.
        RuntimeError: the module has no low-rank adapter.

    Reference:
        Mao et al., DoRA, ACL 2024, arXiv 2405.17357, eq. 10.
    """

    def __init__(self, weight: Weight = 0.3, normalizer: Normalizer = "code") -> None:
        super().__init__(weight)
        if normalizer not in ("code", "components"):
            raise ValueError(f"normalizer must be 'code' or 'components'. Got {normalizer!r}.")
        self.normalizer = normalizer

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        adapters = low_rank(module)
        if not adapters:
            raise RuntimeError("DEM found no low-rank adapter in the module; inject adapters first.")
        components = sum(len(adapter.gate) for adapter in adapters)
        scale = 1 / components if self.normalizer == "components" else 1 / (2 * components)
        tensors = [t for adapter in adapters for t in (adapter.A, adapter.B)]
        rows = (True, False) * len(adapters)
        value: Tensor = _MeanVariance.apply(scale, rows, *tensors)  # type: ignore[no-untyped-call]
        return value
