"""A module in the place of a head's last linear layer: built around it, described in checkpoints, folded at export."""

from __future__ import annotations

import difflib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from lightning_peft.heads import KEPT, find_head
from lightning_peft.patterns import matches
from lightning_peft.rank.budget import clean_name


class HeadModule(nn.Module, ABC):
    """Stands in the place of a linear layer of the head, which it replaces: nothing of that layer is left in it.

    It is a head wherever it stands: all of it is trained beside adapters, and none of it is adapted unless it is named.
    Every argument of its constructor but the layer is also an attribute of the same name and a plain value, so that a
    checkpoint can say how it is built again.
    """

    is_head: ClassVar[bool] = True

    @abstractmethod
    def plain(self) -> nn.Module:
        """What it does outside of training, as layers of torch that share its parameters."""

    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments but the layer."""
        names = list(inspect.signature(type(self)).parameters)[1:]
        return {name: getattr(self, name) for name in names}


def head_modules(module: nn.Module) -> dict[str, HeadModule]:
    """Those inside a module, by the names that the user knows."""
    return {clean_name(path): child for path, child in module.named_modules() if isinstance(child, HeadModule)}


def find_linear_head(module: nn.Module, pattern: str | None) -> tuple[str, nn.Linear]:
    """The linear layer of the head that a pattern names; without one, the last linear layer of the head.

    Raises:
        ValueError: there is none, or several match.
        TypeError: what matches is no linear layer.
    """
    named = {clean_name(path): child for path, child in module.named_modules()}
    if pattern is None:
        head = find_head(module)
        linear = [(name, child) for name, child in named.items() if type(child) is nn.Linear and head.holds(name)]
        if not linear:
            raise ValueError(
                f"{type(module).__name__} has no linear layer that is told from its backbone as the head. Name it: "
                "head='classifier'."
            )
        return linear[-1]
    found = {name: child for name, child in named.items() if name and matches([pattern], name)}
    if not found:
        linear_names = [name for name, child in named.items() if type(child) is nn.Linear]
        near = difflib.get_close_matches(pattern, linear_names, n=5, cutoff=0.4) or linear_names[-5:]
        raise ValueError(
            f"head={pattern!r} matches no module of {type(module).__name__}; the nearest linear layers are "
            f"{', '.join(map(repr, near)) or 'none'}."
        )
    if len(found) > 1:
        raise ValueError(
            f"head={pattern!r} matches {len(found)} modules, {', '.join(map(repr, list(found)[:3]))}; name one of them."
        )
    ((name, child),) = found.items()
    if type(child) is not nn.Linear:
        inside = [n for n, m in named.items() if n.startswith(f"{name}.") and type(m) is nn.Linear]
        advice = f"Name the linear layer in it: head={inside[-1]!r}." if inside else "Name an nn.Linear."
        raise TypeError(f"head={pattern!r} is a {type(child).__name__}, and a linear layer is replaced. {advice}")
    return name, child


def replace_head(module: nn.Module, name: str, build: Callable[[nn.Linear], HeadModule]) -> HeadModule:
    """Put a new head in the place of the linear layer `name`, in every parent that holds it."""
    layer = next(child for path, child in module.named_modules() if clean_name(path) == name)
    assert isinstance(layer, nn.Linear)
    new = build(layer).train(layer.training)
    _swap(module, layer, new)
    return new


def fold_heads(module: nn.Module) -> tuple[str, ...]:
    """Put plain layers in the place of every :class:`HeadModule`, in place: what only training needs is dropped.

    Outputs in eval mode stay as they are, bit for bit; parameters keep their values and whether they are trained. Build
    the optimizer anew afterwards. :func:`lightning_peft.merge` and :func:`lightning_peft.to_plain` do this as well.

    Returns:
        The names of what was folded.
    """
    found = head_modules(module)
    for head in found.values():
        _swap(module, head, head.plain().train(head.training))
    return tuple(found)


def refuse_head_modules(module: nn.Module, verb: str, advice: str) -> None:
    """Refuse to write a file for tools that could not build the head.

    Raises:
        ValueError: there is one.
    """
    name, head = next(iter(head_modules(module).items()), (None, None))
    if head is not None:
        raise ValueError(
            f"the head {name!r} is a {type(head).__name__}, several layers in the place of one, and who loads what "
            f"{verb} writes builds the model with a linear layer there. {advice}"
        )


def _swap(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for owner in module.modules():
        kept = owner.__dict__.get(KEPT)
        path = next((path for path, child in owner.named_modules() if child is old), None) if kept else None
        if kept and path is not None:
            place = clean_name(path)
            left = [name for name in kept if not name.startswith(f"{place}.")]
            if len(left) < len(kept):  # it was trained: so is what comes
                owner.__dict__[KEPT] = tuple(
                    sorted([*left, *(f"{place}.{name}" for name, _ in new.named_parameters())])
                )
    for parent in list(module.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
