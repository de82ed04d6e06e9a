"""The embedding layers that a model really calls, and hooks that change what they give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_peft.patterns import matches
from lightning_peft.rank.budget import layer_name
from lightning_peft.regularizers.base import BESIDE_MODEL
from lightning_peft.surgery.layers import adapter_paths

Embeddings = Mapping[str, nn.Module]
"""Embedding layers by the names that the user knows; an adapted one is its adapter, which is what is called."""


def find_embeddings(root: nn.Module, patterns: Sequence[str] | None = None) -> Embeddings:
    """The embedding layers of a model's inputs.

    Of a transformers model it is that of the tokens, and of an encoder-decoder that of the encoder: such a model has a
    shared one beside it that nobody calls. Of any other module it is the only `nn.Embedding`.

    Args:
        root: a LightningModule.
        patterns: regular expressions of names, which match the whole name or its end after a dot; ``None`` to search.

    Raises:
        ValueError: none is found, or several are and no pattern says which.
    """
    paths = adapter_paths(root)
    children: dict[str, nn.Module] = {}
    tables: list[str] = []
    for path, child in root.named_modules():
        name = layer_name(path, paths)
        if path and path.partition(".")[0] not in BESIDE_MODEL:
            children.setdefault(name, child)  # what is called: the adapter or wrapper, not what it holds
            if isinstance(child, nn.Embedding) and name not in tables:
                tables.append(name)
    known = f"its embeddings are {', '.join(map(repr, tables))}" if tables else "it has no nn.Embedding"
    if patterns is not None:
        named = {name: child for name, child in children.items() if matches(patterns, name)}
        if not named:
            raise ValueError(f"embedding={list(patterns)} matches nothing in {type(root).__name__}; {known}.")
        return named
    names = {id(child): name for name, child in children.items()}
    models = _transformers(root)
    layers = [layer for layer in map(_called, models) if layer is not None and id(layer) in names]
    found = {names[id(layer)]: layer for layer in layers}
    if not models:
        found = {name: children[name] for name in tables}
    if len(found) != 1:
        what = f"{len(found)} embeddings to choose from" if found else "no embedding that could be found"
        raise ValueError(
            f"{type(root).__name__} has {what}; {known}. Name the one that tokens go through: embedding=['tokens']."
        )
    return found


def is_causal(root: nn.Module) -> bool:
    """Whether some transformers model inside shows no token the later ones; of an encoder-decoder, its encoder.

    Attention says so itself, in most models. Of one without such a word (ALiBi, recurrences) the kind decides: what
    transformers knows as a decoder and not as a masked language model.
    """
    return any(_is_causal(model) for model in _transformers(root))


def _is_causal(model: Any) -> bool:
    said = [
        child.is_causal for child in _reader(model).modules() if isinstance(getattr(child, "is_causal", None), bool)
    ]
    if said or getattr(model.config, "is_encoder_decoder", False):
        return any(said)
    from transformers.models.auto.modeling_auto import (  # a model of this library is there, so the library is
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = getattr(model.config, "model_type", None)
    decodes = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    return decodes and getattr(model.config, "attn_type", None) != "bi"  # XLNet, which orders tokens by other means


def _transformers(root: nn.Module) -> list[Any]:
    """The outermost transformers models, known by what they can be asked: the library need not be there."""
    found: list[Any] = []
    waiting: list[nn.Module] = [child for name, child in root.named_children() if name not in BESIDE_MODEL]
    while waiting:
        child = waiting.pop(0)
        if callable(getattr(child, "get_input_embeddings", None)) and hasattr(child, "config"):
            found.append(child)
        else:
            waiting += child.children()
    return found


def _reader(model: Any) -> Any:
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else model


def _called(model: Any) -> nn.Module | None:
    try:
        layer: nn.Module | None = _reader(model).get_input_embeddings()
    except NotImplementedError:  # as transformers says that a model has none
        return None
    return layer


@dataclass(frozen=True, eq=False)
class Called:
    """One call of an embedding layer while a pass was open.

    Attributes:
        name: of the layer.
        ids: what it was called with, (B, L) integers as a rule.
        passed: number of the pass.
        call: number of the call within the pass.
    """

    name: str
    ids: Tensor | None
    passed: int
    call: int


class EmbeddingHook:
    """Change what embedding layers give, while a pass is open and nowhere else.

    What activation checkpointing computes again in the backward pass is changed alike, though no pass is open by then:
    see :meth:`marked`. For that the calls of a step are remembered until :meth:`forget`.

    Args:
        change: gets what the layer gives, and the call; returns what it is to give.
    """

    def __init__(self, change: Callable[[Tensor, Called], Tensor]) -> None:
        self._change = change
        self._open: int | None = None
        self._back: int | None = None  # the pass whose backward goes on
        self._calls: dict[int, list[Called]] = {}
        self._handles: list[RemovableHandle] = []

    @property
    def attached(self) -> bool:
        """Whether the layers are hooked."""
        return bool(self._handles)

    def attach(self, layers: Embeddings) -> None:
        """Hook these layers, and no others."""
        self.detach()
        for name, layer in layers.items():

            def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> Any:
                return self._hear(name, args, kwargs, output)  # a function: copies of the module share it

            hook = torch.compiler.disable(hook)
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))

    def detach(self) -> None:
        """Take the hooks off."""
        while self._handles:
            self._handles.pop().remove()
        self.forget()

    def forget(self) -> None:
        """Let go of the step's calls."""
        self._open = self._back = None
        self._calls = {}

    @contextmanager
    def passing(self, number: int) -> Iterator[None]:
        """Inside, what the layers give is changed; a number is used once in a step.

        Raises:
            RuntimeError: no layer was called.
        """
        self._open, self._calls[number] = number, []
        try:
            yield
        finally:
            self._open = None
        if not self._calls[number]:
            raise RuntimeError(
                "training_step did not call the embedding that was found, so there is nothing to put noise on. Name "
                "the one that it calls: embedding=['tokens']."
            )

    def calls(self, number: int) -> list[Called]:
        """The calls of a pass, in order."""
        return self._calls.get(number, [])

    def marked(self, loss: Tensor, number: int) -> Tensor:
        """The loss of a pass; when its gradient is computed, what is computed again belongs to that pass."""

        def begin() -> None:
            self._back = number

        marked: Tensor = _Marked.apply(loss, begin)  # type: ignore[no-untyped-call]
        return marked

    def _hear(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        again = torch._C._current_graph_task_id() != -1
        if not isinstance(output, Tensor) or (self._open is None and not again):
            return None
        given = args[0] if args else next(iter(kwargs.values()), None)
        ids = given if isinstance(given, Tensor) else None
        if again:
            called = self._recalled(name, ids)
            return None if called is None else self._change(output, called)
        assert self._open is not None
        calls = self._calls[self._open]
        called = Called(name, ids, self._open, len(calls))
        calls.append(called)
        return self._change(output, called)

    def _recalled(self, name: str, ids: Tensor | None) -> Called | None:
        # Backward inside an open pass, as where a module optimizes by hand, is that pass's.
        number = self._back if self._open is None else self._open
        if number is None:
            return None
        calls = [called for called in self._calls.get(number, ()) if called.name == name]
        if len(calls) > 1:
            calls = [called for called in calls if is_same(called.ids, ids)]
            if len(calls) != 1:
                raise RuntimeError(
                    f"the embedding {name!r} is called several times in a training_step, and activation checkpointing "
                    "computes it again: there is no telling which noise it had. Leave it out of what is checkpointed."
                )
        return calls[0] if calls else None


def is_same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are one: the same numbers in the same place."""
    if one is None or other is None:
        return False
    return (one.data_ptr(), one.shape, one.stride()) == (other.data_ptr(), other.shape, other.stride())


class _Marked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, begin: Callable[[], None]) -> Tensor:
        ctx.begin = begin
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        ctx.begin()
        return slope, None
