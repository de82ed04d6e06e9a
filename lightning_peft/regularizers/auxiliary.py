"""Auxiliary: a term with a network of its own, which is trained ahead of the model or against it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.regularizers.base import Regularizer, Weight
from lightning_peft.regularizers.probes import Pool, Probes
from lightning_peft.regularizers.wide import Wide


class Auxiliary(Regularizer, Wide):
    """A term whose own parameters have another objective than the model: a bound's q, an adversary.

        inner_steps times:   phi <- Adam step on fitting( features detached; phi )
        then:                term = penalty( features; phi fixed )

    Both in every training step, on the features that the model has given in it: the inner steps come right after the
    forward pass, need no other one, and touch no gradient of the model; the term's own parameters get none from the
    loss. At steps at which the weight is 0, and where no gradients are taken, there is no inner step.

    The module's optimizer does not train them: they are frozen before it is made, and only thawed inside an inner
    step. So the Trainer's accumulation, clipping, loss scaling and schedules do not touch them. With accumulation
    there are inner steps for every micro-batch, of its examples; in float32 at least, also under mixed precision; a
    gradient that is not finite counts as zero. Adam's state is in the Trainer's checkpoints, and is resumed exactly.

    Several processes fit on the rows of all of them, and average gradients all the same, so that rounding cannot let
    them drift apart. FSDP keeps the parameters whole.

    To write one, give :meth:`build`, :meth:`features`, :meth:`fitting` and :meth:`penalty`; and :meth:`hears`, if it
    is of what layers give.

    Args:
        weight: what the term is multiplied by: a number, or a function of (step, total).
        inner_steps: how many steps its own parameters take before each of the model's.
        lr: their learning rate.
        clip: the largest norm of their gradient; ``None`` for no clipping.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a value is out of range.
        RuntimeError: while training: the term has no parameters of its own, or its features do not fit together.

    Reference:
        Two objectives with alternate steps, as in Cheng et al., CLUB, ICML 2020, arXiv 2006.12013 (its code).
        One step of Adam (1e-3), clipped at 1: our choice.
    """

    def __init__(self, weight: Weight = 1.0, inner_steps: int = 1, lr: float = 1e-3, clip: float | None = 1.0) -> None:
        super().__init__(weight)
        require_integer("inner_steps", inner_steps)
        if inner_steps < 1:
            raise ValueError(
                f"inner_steps={inner_steps}: {type(self).__name__} says something of the model only where its own "
                "network is fitted, and no other optimizer trains it. Give it one step at least."
            )
        for name, value in (("lr", lr), ("clip", clip)):
            if value is None:
                continue
            require_number(name, value)
            if not (value > 0 and isfinite(value)):
                raise ValueError(f"{name} must be positive and finite. Got {value!r}.")
        self.inner_steps, self.lr, self.clip = inner_steps, float(lr), clip
        self._optimizer: Optimizer | None = None
        self._restored: Mapping[str, Any] | None = None
        self._fit_loss: Tensor | None = None
        self._probes: Probes | None = None

    pool: Pool = "mean"
    """How positions of what is heard become one row, see :class:`~lightning_peft.regularizers.probes.Probes`."""

    @abstractmethod
    def build(self, module: nn.Module) -> None:
        """Make own parameters, anew, for a module that has its adapters."""

    @abstractmethod
    def features(self, module: nn.Module, batch: Any, outputs: Any) -> Sequence[Tensor]:
        """What the term is computed of: tensors with a row for every example of this process's batch."""

    @abstractmethod
    def fitting(self, *features: Tensor) -> Tensor:
        """What own parameters minimise, of detached features of all processes: a scalar."""

    @abstractmethod
    def penalty(self, *features: Tensor) -> Tensor:
        """The term's value, of features of all processes, with own parameters fixed: a scalar."""

    def require(self, *features: Tensor) -> None:
        """Raise an error about features of all processes that nothing can be fitted to; once before the inner steps."""

    def hears(self, module: nn.Module) -> Sequence[str]:
        """Names of layers to hear, as :func:`~lightning_peft.regularizers.probes.only_probed` gives them."""
        return ()

    def heard(self, batch: Any) -> dict[str, Tensor]:
        """What these layers have given in this step: (N, d) each, by name, in the order of :meth:`hears`."""
        return self._listening().heard_once(batch)

    def optimizer(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """What takes the inner steps; anew for every fit."""
        return Adam(parameters, lr=self.lr)

    def apart(self) -> Iterable[nn.Parameter]:
        return self.parameters()

    def attach(self, module: nn.Module) -> None:
        """Make own parameters of a module that was not seen before, and freeze them."""
        self._restored = None  # of an entry point that has ended
        mine = any(child is self for child in module.modules())
        if not (mine and any(True for _ in self.apart())):
            self.build(module)
            self._optimizer = None
        for parameter in self.apart():
            parameter.requires_grad_(False)

    def begin(self, module: nn.Module) -> None:
        """Begin with an optimizer without a state, or with the one that a checkpoint brings; hear layers."""
        self._optimizer = None
        self.end()
        self._probes = Probes(module, self.hears(module), self.pool)

    def end(self) -> None:
        """Hear no more."""
        if self._probes is not None:
            self._probes.detach()
        self._probes = None

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Hear what layers give."""
        with self._listening().listening():
            yield

    def _listening(self) -> Probes:
        if self._probes is None:
            raise RuntimeError(f"{type(self).__name__} hears no layer yet: begin(module) comes before a step.")
        return self._probes

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        rows = [self.everyone.gather(self._cast(tensor)) for tensor in self.features(module, batch, outputs)]
        counts = sorted({len(each) for each in rows})
        if len(counts) > 1:
            raise RuntimeError(
                f"{type(self).__name__} compares features example by example, and has {counts[0]} rows of one and "
                f"{counts[1]} of another. Name layers, or a part of the batch, with one row for every example."
            )
        with torch.autocast(rows[0].device.type, enabled=False):
            if torch.is_grad_enabled():
                self.require(*rows)
                self._fit([each.detach() for each in rows])
            return self.penalty(*rows)

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.computes_in(tensor)) if tensor.is_floating_point() else tensor

    def _fit(self, rows: Sequence[Tensor]) -> None:
        own = list(self.apart())
        if not own:
            raise RuntimeError(
                f"{type(self).__name__} has no parameters of its own, so there is nothing to fit: attach(module) makes "
                "them, by build(module), once adapters are in."
            )
        optimizer = self._ready(own)
        for parameter in own:
            parameter.requires_grad_(True)
        try:
            for _ in range(self.inner_steps):
                loss = self.fitting(*rows)
                gradients = torch.autograd.grad(loss, own, allow_unused=True, materialize_grads=True)
                for parameter, gradient in zip(own, gradients, strict=True):
                    parameter.grad = gradient
                self.everyone.average_gradients(own)
                self._tame(own)
                optimizer.step()
                self._fit_loss = loss.detach()
        finally:
            for parameter in own:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _tame(self, own: Sequence[nn.Parameter]) -> None:
        """Clip gradients, and make zeros of those that are not finite; nothing waits for the device."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in own if p.grad is not None])
        scale = torch.ones_like(norm) if self.clip is None else (self.clip / (norm + 1e-6)).clamp(max=1.0)
        for parameter in own:
            assert parameter.grad is not None
            parameter.grad = torch.where(norm.isfinite(), parameter.grad * scale, 0.0)

    def _ready(self, own: Sequence[nn.Parameter]) -> Optimizer:
        if self._optimizer is None:
            self._optimizer = self.optimizer(own)
            held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
            if held != {id(p) for p in own}:
                raise RuntimeError(
                    f"optimizer() of {type(self).__name__} holds {len(held)} of its {len(own)} own parameters, and "
                    "nothing else trains the others. Give it all of `parameters`, and no other."
                )
        if self._restored is not None:
            self._optimizer.load_state_dict(dict(self._restored))
            self._restored = None
        return self._optimizer

    def progress(self) -> dict[str, Any]:
        state = self._restored
        if state is None and self._optimizer is not None:
            state = self._optimizer.state_dict()
        return super().progress() | {"optimizer": state}

    def go_on(self, progress: Mapping[str, Any]) -> None:
        super().go_on(progress)
        # Taken up at the next inner step: by then parameters are where they are trained.
        self._optimizer, self._restored = None, progress["optimizer"]

    def figures(self) -> Mapping[str, Tensor]:
        """`fit`: what own parameters minimise, before the last inner step."""
        return {} if self._fit_loss is None else {"fit": self._fit_loss}
