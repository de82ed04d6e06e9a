"""Adapters that write into their bases' weights: bring these up to date after a step, and back for a look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lightning_peft.adapters.base import Adapter


def refresh(module: nn.Module, followed: bool | None = None) -> None:
    """Write what adapters are now into the weights of their bases, where they do that; nothing for all others.

    An adapter notices by itself that it was changed, when it computes next. Call this where nothing can be noticed:
    under a sharding strategy, or after an optimizer that writes past autograd while nothing was computed. Not between
    a forward and its backward.

    Args:
        module: has the adapters inside.
        followed: whether this is called after every step of every optimizer from now on; ``None`` says nothing.
    """
    kinds: dict[type[Adapter], list[Adapter]] = {}
    for adapter in _writing(module):
        kinds.setdefault(type(adapter), []).append(adapter)
    for kind, group in kinds.items():
        kind.refresh(group, followed)


def follow(module: nn.Module, optimizers: Iterable[Optimizer]) -> Callable[[], None]:
    """Call :func:`refresh` after every step of every optimizer: once for all layers, and whatever the optimizer does.

    AdapterInjection does it for the Trainer's optimizers.

    Args:
        module: has the adapters inside.
        optimizers: all that train them.

    Returns:
        A function that undoes it.
    """
    if not any(True for _ in _writing(module)):
        return lambda: None

    def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        refresh(module, followed=True)

    handles = [optimizer.register_step_post_hook(stepped) for optimizer in optimizers]
    refresh(module, followed=True)
    return partial(_unfollow, module, handles)


def _unfollow(module: nn.Module, handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()
    refresh(module, followed=False)


@contextmanager
def bases_restored(module: nn.Module) -> Iterator[None]:
    """For a while, the weights of adapted layers are what they were before adapters wrote into them."""
    found = list(_writing(module))
    for adapter in found:
        adapter.restore_base()
    try:
        yield
    finally:
        if found:
            refresh(module)


def _writing(module: nn.Module) -> Iterator[Adapter]:
    return (adapter for adapter in module.modules() if isinstance(adapter, Adapter) and adapter.writes_base)
