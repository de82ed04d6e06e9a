"""Hear what a module is called with and what it and modules inside it give, from the outside."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.rank.budget import clean_name
from lightning_peft.regularizers.base import BESIDE_MODEL

_IGNORED = -100  # the label that torch and transformers leave out


@dataclass
class Call:
    """One call of a module.

    Attributes:
        args: what it was given.
        kwargs: what it was given by name.
        output: what it returned.
        inside: what modules inside it returned meanwhile, by name, in order.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    inside: dict[str, list[Tensor]] = field(default_factory=dict)


class Calls:
    """The calls of a module while `on` is set, with what named modules inside it return.

    It hears by forward hooks, which are not compiled with the module, and which stay between steps, so that what is
    compiled need not be compiled again. Modules are looked up by name at every :meth:`attach`: one that has been
    replaced, as compaction does, is heard again.

    Args:
        root: the module.
        names: modules inside it, by the names that the user knows.

    Raises:
        ValueError: there is no module of that name.
    """

    def __init__(self, root: nn.Module, names: Sequence[str] = ()) -> None:
        self.on = False
        self._log: list[tuple[str | None, tuple[Any, ...], dict[str, Any], Any]] = []
        self.blind: set[str] = set()
        """Names of modules that ran without gradients, though training was heard: re-entrant checkpointing does so."""
        self.root = root
        self._paths = {name: path_of(root, name) for name in names}
        self._hooks: dict[str | None, tuple[nn.Module, RemovableHandle]] = {}

    def attach(self) -> None:
        """Hear from now on; idempotent."""
        for name, path in self._paths.items():
            module = self.root.get_submodule(path)
            if self._is_new(name, module):
                self._hooks[name] = module, module.register_forward_hook(_uncompiled(partial(self._hear_inside, name)))
        if self._is_new(None, self.root):
            self._hooks[None] = self.root, self.root.register_forward_hook(_uncompiled(self._hear), with_kwargs=True)

    def _is_new(self, name: str | None, module: nn.Module) -> bool:
        if name in self._hooks and self._hooks[name][0] is not module:
            self._hooks.pop(name)[1].remove()
        return name not in self._hooks

    def detach(self) -> None:
        """Hear no more; what was heard stays."""
        while self._hooks:
            self._hooks.popitem()[1][1].remove()

    def taken(self) -> list[Call]:
        """What was heard since this was asked last."""
        calls: list[Call] = []
        inside: dict[str, list[Tensor]] = {}
        for name, args, kwargs, output in self._log:
            if name is None:
                calls.append(Call(args, kwargs, output, inside))
                inside = {}
            elif (value := first_tensor(output)) is not None:
                inside.setdefault(name, []).append(value)
        self._log.clear()
        return calls

    def taken_inside(self) -> dict[str, list[Tensor]]:
        """What modules inside gave since this was asked last, by name, in order, whether the root was called or not."""
        inside: dict[str, list[Tensor]] = {}
        for name, _, _, output in self._log:
            if name is not None and (value := first_tensor(output)) is not None:
                inside.setdefault(name, []).append(value)
        self._log.clear()
        return inside

    def path(self, name: str) -> str:
        """Where the module of a name is, inside the root."""
        return self._paths[name]

    def _hear(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.on:
            self._log.append((None, args, kwargs, output))

    def _hear_inside(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.on:
            self._log.append((name, (), {}, output))
            if not torch.is_grad_enabled():
                self.blind.add(name)


def _uncompiled(hook: Callable[..., None]) -> Callable[..., None]:
    plain: Callable[..., None] = torch.compiler.disable(hook)
    return plain


def path_of(root: nn.Module, name: str) -> str:
    """The path of a module inside `root` by the name that the user knows; that of the wrapper, where it has one.

    Raises:
        ValueError: there is none of that name.
    """
    paths: list[str] = [path for path, _ in root.named_modules()]
    found = next((path for path in paths if clean_name(path) == name), None)
    if found is None:
        near = difflib.get_close_matches(name, [clean_name(path) for path in paths if path], n=3, cutoff=0.4)
        advice = f"; the nearest names are {', '.join(map(repr, near))}" if near else ""
        raise ValueError(f"there is no module {name!r} in {type(root).__name__}{advice}.")
    return found


def first_tensor(output: Any) -> Tensor | None:
    """What a layer gives on, of all that it returns: the tensor, the last hidden state, or the first tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = [output.get("last_hidden_state"), *output.values()]
    parts = output if isinstance(output, list | tuple) else ()
    return next((part for part in parts if isinstance(part, Tensor)), None)


def logits_of(output: Any, read: Callable[[Any], Tensor] | None, called: str, asks: str) -> Tensor:
    """The logits in what a module has returned: a tensor, what is called `logits` in it, or what `read` gets.

    Args:
        output: what it has returned.
        read: gets the logits from it; ``None`` to look.
        called: how the user calls the module, for the error.
        asks: who asks, for the error's advice.

    Raises:
        RuntimeError: there are none.
    """
    if read is not None:
        found: Any = read(output)
    elif isinstance(output, Mapping):
        found = output.get("logits")
    else:
        found = getattr(output, "logits", output)
    if not isinstance(found, Tensor) or found.dim() == 0:
        raise RuntimeError(
            f"no logits were found in the output of {called}, a {type(output).__name__}. Say how to get "
            f"them: {asks}(read=lambda output: output[0])."
        )
    return found


def shown_rows(mask: Any, outputs: Tensor) -> Tensor | None:
    """The rows of outputs that count: (batch, length) bool for outputs per position; ``None`` for all."""
    if isinstance(mask, Tensor) and mask.dim() == 2 and outputs.shape[:-1] == mask.shape:
        return mask.bool()
    return None


def counted_rows(model: nn.Module, call: Call, outputs: Tensor) -> Tensor | None:
    """The rows of logits that the loss counts: (batch, length) bool; ``None`` for all.

    By the `labels` that a transformers model was called with: those that are not -100, each one place earlier in a
    decoder, whose row t predicts label t + 1. Without such labels, those that :func:`shown_rows` gives.

    Args:
        model: what was called.
        call: of it.
        outputs: its logits, (batch, length, classes) or (batch, classes).
    """
    labels = call.kwargs.get("labels")
    if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape != outputs.shape[:-1]:
        return shown_rows(call.kwargs.get("attention_mask"), outputs)
    counted = labels != _IGNORED
    writes: Callable[[], bool] = getattr(model, "can_generate", lambda: False)
    if writes() and not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return F.pad(counted[:, 1:], (0, 1))
    return counted


def with_logits(root: nn.Module, of: str | None, asks: str) -> nn.Module:
    """The module inside `root` whose output has the logits.

    Args:
        root: a LightningModule.
        of: its name, "" for `root` itself; ``None`` for the only child that has parameters.
        asks: who asks, for the error's advice.

    Raises:
        ValueError: there is none of that name; or none is named, and there is not one child alone.
    """
    if of is not None:
        return root.get_submodule(path_of(root, of))
    children = {
        name: child
        for name, child in root.named_children()
        if name not in BESIDE_MODEL and next(child.parameters(), None) is not None
    }
    if len(children) != 1:
        raise ValueError(
            f"{type(root).__name__} has {len(children)} children with parameters"
            f"{', ' + ', '.join(children) if children else ''}, so there is no telling whose output has the logits. "
            f"Name it, {asks}(of='model'), or of='' for the module itself."
        )
    return next(iter(children.values()))
