"""Deferred: a tensor that is computed where it is used, and not where somebody asks for its dtype."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

# What is known before: reading an attribute calls its getter.
_KNOWN = frozenset(
    {
        Tensor.dtype.__get__,  # type: ignore[attr-defined]
        Tensor.device.__get__,
        Tensor.shape.__get__,  # type: ignore[attr-defined]
        Tensor.ndim.__get__,  # type: ignore[attr-defined]
        Tensor.size,
        Tensor.dim,
        Tensor.numel,
        Tensor.is_floating_point,
    }
)


class Deferred(Tensor):
    """A tensor whose dtype, device and shape are known, and whose values are computed at every use.

    Any function of torch gets the computed tensor, whose gradient flows as if it had been there. T5 asks for the dtype
    of a layer's weight three times in every forward, and never for the weight.

    Args:
        like: has the dtype, the device and the shape.
        compute: gives the tensor.
    """

    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, like: Tensor, compute: Callable[[], Tensor]) -> Deferred:
        made: Deferred = Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=like.device)
        made._compute = compute
        return made

    def __init__(self, like: Tensor, compute: Callable[[], Tensor]) -> None:
        pass

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _KNOWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        args, kwargs = tree_map(_computed, (args, dict(kwargs or {})))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        # What comes by another way than torch's functions, such as an autograd Function.
        args, kwargs = tree_map(_computed, (args, dict(kwargs or {})))
        return func(*args, **kwargs)


def _computed(value: Any) -> Any:
    return value.__dict__["_compute"]() if isinstance(value, Deferred) else value
