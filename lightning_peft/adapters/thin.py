"""Two thin plain layers in the place of one: what a factorised layer leaves behind."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.deferred import Deferred
from lightning_peft.adapters.layers import is_convolution


class ThinLinear(nn.Sequential):
    """Two plain linear layers in the place of one: `up(down(x))`. What is left of :class:`Factorized` in the end.

    It answers for the layer whose place it takes: `weight` is the product of the two, computed where it is used, and
    not where somebody asks for its dtype, its device or its shape.

    Args:
        down: (k, d_in).
        up: (d_out, k).
        bias: (d_out,), or ``None``; copied.
    """

    def __init__(self, down: Tensor, up: Tensor, bias: Tensor | None = None) -> None:
        # Built on the meta device: nothing is allocated or drawn for weights that are replaced at once.
        first = nn.Linear(down.shape[1], down.shape[0], bias=False, device="meta")
        second = nn.Linear(up.shape[1], up.shape[0], bias=bias is not None, device="meta")
        first.weight, second.weight = nn.Parameter(down), nn.Parameter(up)
        if bias is not None:
            second.bias = nn.Parameter(bias.detach().clone())
        super().__init__(OrderedDict(down=first, up=second))

    @property
    def in_features(self) -> int:
        return self.down.in_features  # type: ignore[return-value, union-attr]

    @property
    def out_features(self) -> int:
        return self.up.out_features  # type: ignore[return-value, union-attr]

    @property
    def weight(self) -> Tensor:
        up: Tensor = self.up.weight  # type: ignore[assignment, union-attr]
        # Compiled, what nobody uses is not computed anyway.
        if torch.compiler.is_compiling():
            return self._product()
        return Deferred(up.detach()[:, :1].expand(self.out_features, self.in_features), self._product)

    def _product(self) -> Tensor:
        return self.up.weight @ self.down.weight  # type: ignore[operator, union-attr]

    @property
    def bias(self) -> Tensor | None:
        return self.up.bias  # type: ignore[return-value, union-attr]


def thin_convolution(base: Any, down: Tensor, up: Tensor, bias: Tensor | None) -> nn.Sequential:
    """The same of a convolution in one group: its kernel with k outputs, then one of a single place."""
    k, d_out = down.shape[0], up.shape[0]
    first = twin(base)
    first._parameters["bias"] = None
    first.out_channels, first.weight = k, nn.Parameter(down)
    second = type(base)(k, d_out, 1, bias=bias is not None, device="meta")
    second.weight = nn.Parameter(up.view(*up.shape, *[1] * (down.dim() - 2)))
    if bias is not None:
        second.bias = nn.Parameter(bias.detach().clone())
    return nn.Sequential(OrderedDict(down=first, up=second))


def is_thin_linear(module: nn.Module) -> bool:
    """Whether a module is a :class:`ThinLinear`, or one that a compressed model's own file of code has built."""
    return type(module).__name__ == ThinLinear.__name__ and list(module._modules) == ["down", "up"]


def is_thin_convolution(module: nn.Module) -> bool:
    """Whether a module is what :func:`thin_convolution` makes."""
    return (
        type(module) is nn.Sequential
        and list(module._modules) == ["down", "up"]
        and all(is_convolution(child) for child in module)
        and module.down.bias is None  # type: ignore[union-attr]
    )


def twin(layer: nn.Module) -> Any:
    """A layer with the same tensors and attributes, and tables of its own: of parameters, buffers and hooks."""
    twin = copy.copy(layer)
    twin.__dict__.update({name: value.copy() for name, value in vars(layer).items() if isinstance(value, dict)})
    return twin
