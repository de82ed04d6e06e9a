"""Regularizer: a scalar added to the loss where it still is a loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.arguments import require_number
from lightning_peft.rank.schedule import share_of
from lightning_peft.regularizers.counted import told_by
from lightning_peft.regularizers.everyone import Everyone

BESIDE_MODEL = ("peft_terms", "peft_masks")
"""Children that our callbacks add to a LightningModule: what is trained beside the model, and is no part of it."""
Weight = float | Callable[[int, int], float]
"""A term's weight: a number, or a function of (step, total), optimizer steps counted from 1."""


@dataclass(frozen=True)
class UntilTail:
    """A weight that is `value` until the frozen tail begins, and exactly 0 in it.

    Args:
        value: the weight before the tail: a number, or another schedule.
        tail: share of the run that the tail takes, as in :class:`~lightning_peft.rank.Schedule`.

    Example:
        >>> UntilTail(0.3, tail=0.5)(50, 100), UntilTail(0.3, tail=0.5)(51, 100)
        (0.3, 0.0)
    """

    value: Weight
    tail: float

    def __call__(self, step: int, total: int) -> float:
        return weight_at(self.value, step, total) if step <= total - share_of(self.tail, total) else 0.0


@dataclass(frozen=True)
class Warmup:
    """A weight that grows along a line and reaches `value` at the end of the first `share` of the run.

        w_t = value * min(1, t / floor(share * T))

    It is above 0 from the first step on.

    Args:
        value: the weight after the warm-up: a number, or another schedule.
        share: of the run; 0 for no warm-up.

    Raises:
        ValueError: share is not in [0, 1].

    Example:
        >>> warmup = Warmup(UntilTail(0.4, tail=0.5), share=0.1)
        >>> warmup(5, 100), warmup(10, 100), warmup(51, 100)
        (0.2, 0.4, 0.0)
    """

    value: Weight
    share: float = 0.1

    def __post_init__(self) -> None:
        require_number("share", self.share)
        if not 0 <= self.share <= 1:
            raise ValueError(f"share is the part of the run that warms up, from 0 to 1. Got {self.share}.")

    def __call__(self, step: int, total: int) -> float:
        length = share_of(self.share, total)
        grown = weight_at(self.value, step, total)
        return grown * min(1.0, step / length) if length else grown


def weight_at(weight: Weight, step: int, total: int) -> float:
    """A weight at an optimizer step, counted from 1, of `total`."""
    return weight(step, total) if callable(weight) else weight


class Regularizer(nn.Module, ABC):
    """A term of the loss: `forward(module, batch, outputs) -> scalar`, times its weight.

    It may own parameters; the callback registers it on the LightningModule, so that optimizer, sync and checkpoint come
    for free.

    Args:
        weight: what the term is multiplied by: a number, or a function of (step, total).
    """

    counts_examples: bool = False
    """Whether every fit is to tell it how many examples its training set has, in `examples`."""
    perturbs: ClassVar[bool] = False
    """Whether the model runs with the term's own parameters in it."""
    examples: int | None = None
    """How many examples the training set has, over all processes; given, or read from the Trainer's data."""
    everyone: Everyone = Everyone()
    """The processes that train together; this one alone outside of a fit."""
    seed: int = 0
    """Of the term's own random numbers."""
    draws: int = 0
    """How often :meth:`next_generator` was asked, since the start of the run that a fit goes on with."""

    def __init__(self, weight: Weight = 1.0) -> None:
        super().__init__()
        self.weight = weight

    @abstractmethod
    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        """The term's value for this batch: a scalar."""

    def before_adapters(self, module: nn.Module) -> None:
        """See the module before adapters are put in, or with those that it has; for every entry point, repeatedly."""

    def attach(self, module: nn.Module) -> None:
        """Make own parameters, of a module that has its adapters; for every entry point, repeatedly.

        It comes before the strategy wraps the module and before its optimizer is made.
        """

    def begin(self, module: nn.Module) -> None:
        """A fit begins: the module has its adapters; its checkpoint is restored, or will be before the first step."""

    def end(self) -> None:
        """A fit has ended: leave the module alone."""

    def apart(self) -> Iterable[nn.Parameter]:
        """Own parameters that the term trains itself: they are frozen for the module's optimizer, and in checkpoints.

        See :class:`lightning_peft.Auxiliary`.
        """
        return ()

    def companions(self) -> Iterable[nn.Module]:
        """Modules that the term runs beside the model and does not train; the callback moves and casts them alike.

        They are not the term's children: no optimizer, wrapper or checkpoint takes them for the model's.
        """
        return ()

    def prepare(self, module: nn.Module, batch: Any, step: int, total: int) -> None:
        """Be told of the training step to come, also where the term's weight is 0.

        Args:
            module: the module.
            batch: the step's batch.
            step: the optimizer step that it belongs to, counted from 1.
            total: how many there are; 0 if that is not known.
        """

    def watching(self, module: nn.Module) -> AbstractContextManager[None]:
        """Around the training step, at steps at which the term's weight is not 0: what it is to see of it."""
        return nullcontext()

    def recomputing(self, module: nn.Module) -> AbstractContextManager[None]:
        """Around the backward pass: what activation checkpointing computes again is to see what the step has seen."""
        return nullcontext()

    def resting(self) -> Iterable[nn.Parameter]:
        """Own parameters that the optimizer step to come leaves as they are."""
        return ()

    def next_generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """Random numbers of the term's own, for one draw, other ones at every call.

        They are alike on all processes: draw for the whole global batch, and take the rows of
        :meth:`Everyone.mine`. They depend on the seed, the term's class and the number of draws, which
        is saved and restored: a resumed run draws what an uninterrupted one does.
        """
        text = f"lightning_peft/regularizer/v1|{type(self).__name__}|{self.seed}|{self.draws}"
        self.draws += 1
        return told_by(text, device)

    def progress(self) -> dict[str, Any]:
        """Where the term stands, beside its parameters and buffers: plain values and tensors, for a checkpoint."""
        return {"draws": self.draws}

    def go_on(self, progress: Mapping[str, Any]) -> None:
        """Go on from where :meth:`progress` was asked; also before the module is on its device."""
        self.draws = int(progress["draws"])

    def figures(self) -> Mapping[str, Tensor]:
        """What else is to be logged of its last value, as `<its name>/<figure>`; scalars."""
        return {}

    def weight_at(self, step: int, total: int) -> float:
        """The weight at an optimizer step, counted from 1."""
        return weight_at(self.weight, step, total)


def low_rank(module: nn.Module) -> list[LowRank]:
    """The low-rank adapters of a module, in its order."""
    return [child for child in module.modules() if isinstance(child, LowRank)]


def regularized(loss: Tensor, terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """loss + sum_i weight_i term_i, in float32 or the loss's own dtype where that is wider.

    Args:
        loss: the task's loss, a scalar.
        terms: values of the terms, by name.
        weights: their weights, by name; a term of weight 0 is not in `terms`.
    """
    total = loss.to(torch.promote_types(loss.dtype, torch.float32))
    for name, term in terms.items():
        total = total + weights[name] * term
    return total
