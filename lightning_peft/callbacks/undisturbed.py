"""Run a module's own training step without a trace: what it changes is put back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import nn
from torchmetrics import Metric

from lightning_peft.regularizers.base import Regularizer
from lightning_peft.resume import rng_state, set_rng_state
from lightning_peft.seams import wrap_method
from lightning_peft.strategies import reshard


@contextmanager
def undisturbed(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Put back, at the end, what training steps inside the block have changed.

    Random generators (torch, its accelerators, Python, NumPy), every module's train or eval mode, buffers, gradients,
    the states of metrics that are modules, what terms train by themselves and where they stand, and sharding; nothing
    reaches loggers or `self.log`. Other parameters and optimizers are not looked at: a step without an optimizer
    changes none. What a step writes elsewhere stays: a list, a file, an attribute that is neither buffer nor metric.
    """
    with ExitStack() as back:
        state = rng_state()
        back.callback(set_rng_state, state)
        back.callback(reshard, module)
        back.callback(wrap_method(module, "log", _say_nothing))
        loggers = trainer.loggers
        back.callback(setattr, trainer, "loggers", loggers)
        trainer.loggers = [DummyLogger()] if loggers else []
        for keep in (_modes, _buffers, _gradients, _metrics, _terms):
            back.callback(keep(module))
        yield


@contextmanager
def unheard(module: LightningModule) -> Iterator[None]:
    """Inside, nothing reaches `self.log`; metrics that are modules have, at the end, what they had before."""
    with ExitStack() as back:
        back.callback(wrap_method(module, "log", _say_nothing))
        back.callback(_metrics(module))
        yield


def _say_nothing(call: Callable[..., Any], module: LightningModule, *args: Any, **kwargs: Any) -> None:
    pass


def _modes(module: nn.Module) -> Callable[[], None]:
    modes = {child: child.training for child in module.modules()}

    def restore() -> None:
        for child, training in modes.items():
            child.training = training  # not `train`, which a module may have overridden to keep parts frozen

    return restore


def _buffers(module: nn.Module) -> Callable[[], None]:
    held = [
        (owner, name, buffer, None if buffer is None else buffer.detach().clone())
        for owner in module.modules()
        for name, buffer in owner._buffers.items()
    ]

    @torch.no_grad()
    def restore() -> None:
        for owner, name, buffer, value in held:
            owner._buffers[name] = buffer  # a step may have put another in its place
            if buffer is not None and value is not None:
                buffer.copy_(value)

    return restore


def _gradients(module: nn.Module) -> Callable[[], None]:
    # Masks are buffers, and have a gradient while an importance reads it.
    held = [(tensor, tensor.grad) for tensor in [*module.parameters(), *module.buffers()] if tensor.requires_grad]
    for tensor, _ in held:
        tensor.grad = None

    def restore() -> None:
        for tensor, gradient in held:
            tensor.grad = gradient

    return restore


def _metrics(module: nn.Module) -> Callable[[], None]:
    held = []
    for metric in module.modules():
        if isinstance(metric, Metric):
            states = {name: _copied(getattr(metric, name)) for name in metric._defaults}
            held.append((metric, states, metric._update_count, metric._computed))

    def restore() -> None:
        for metric, states, count, computed in held:
            metric.reset()  # what it keeps beside its states: caches, flags of synchronisation
            for name, value in states.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, computed

    return restore


def _terms(module: nn.Module) -> Callable[[], None]:
    held = [
        (term, copy.deepcopy(term.progress()), [(p, p.detach().clone()) for p in term.apart()])
        for term in module.modules()
        if isinstance(term, Regularizer)
    ]

    @torch.no_grad()
    def restore() -> None:
        for term, progress, parameters in held:
            term.go_on(progress)
            for parameter, value in parameters:
                parameter.copy_(value)

    return restore


def _copied(state: Any) -> Any:
    return [part.clone() for part in state] if isinstance(state, list) else state.clone()
