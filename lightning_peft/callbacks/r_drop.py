"""RDrop: two passes through dropout that are to agree (Wu et al., 2021)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_peft.arguments import require_number
from lightning_peft.callbacks.repeated_steps import Reduction, RepeatedStep, Step, reduced, require_reduction, with_loss
from lightning_peft.functional.r_drop import symmetric_kl
from lightning_peft.regularizers.calls import Call, Calls, counted_rows, logits_of, with_logits

_LOOKS = 5
"""Steps with equal predictions before it is said: dropout in an adapter that starts at zero shows after its first."""


class RDrop(RepeatedStep):
    """Run every batch twice, each time with dropout of its own, and have both predictions agree.

        loss = L_1 + L_2 + alpha / 2 [ KL(P_1 || P_2) + KL(P_2 || P_1) ]

    or with the mean of L_1 and L_2. The divergence is the mean over rows of the outputs of one module, on every call
    that `training_step` makes of it. Of outputs for every token those count that have a label, where the model is given
    `labels` and they are not -100; without them, those that a 2-d `attention_mask` shows. Both passes are kept for one
    backward. Logged as `loss/r_drop`, without alpha.

    Dropout draws from the global generators, as it would without this callback: two processes have other numbers than
    one.

    Args:
        alpha: weight of the divergence.
        reduction: "sum" or "mean" of the two losses.
        of: name of the module inside whose output has the logits; "" for the whole module, where `training_step` calls
            `self(...)`. ``None`` for the only child that has parameters.
        read: gets the logits from its output; ``None`` for the output itself, or its `logits`.

    Raises:
        TypeError: alpha is no number.
        ValueError: it is not positive, the reduction is unknown, or there is no module of that name.
        MisconfigurationException: the module optimizes by hand, or another callback repeats the step too.
        RuntimeError: while training: the module was not called, or has no logits.

    Reference:
        Wu et al., R-Drop: Regularized dropout for neural networks, NeurIPS 2021, arXiv 2106.14448, eq. 4 (remembered).

    Example:
        >>> RDrop(alpha=1.0).reduction
        'sum'
    """

    def __init__(
        self,
        alpha: float = 1.0,
        reduction: Reduction = "sum",
        of: str | None = None,
        read: Callable[[Any], Tensor] | None = None,
    ) -> None:
        super().__init__()
        require_number("alpha", alpha)
        if not 0 < alpha < float("inf"):
            raise ValueError(f"alpha is the weight of the divergence, positive and finite. Got {alpha}.")
        require_reduction(reduction)
        self.alpha, self.reduction, self.of, self.read = alpha, reduction, of, read
        self._calls: Calls | None = None
        self._equal: set[int] | None = None  # steps whose passes were equal; None to look at no more

    @property
    def repeats(self) -> bool:
        return True

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        if self._calls is None:
            self._calls = Calls(with_logits(module, self.of, "RDrop"))
            self._calls.attach()
            self._equal = set()

    def end(self) -> None:
        if self._calls is not None:
            self._calls.detach()
            self._calls = None

    def run(self, step: Step) -> Any:
        outputs, heard = self._heard(step.first)
        if outputs is None:
            return None  # the user skips this batch
        again, others = self._heard(step.again)
        if not heard or len(heard) != len(others):
            name = "the module itself" if self.of == "" else f"{self.of or 'its only child'!r}"
            raise RuntimeError(
                f"training_step called {name} {len(heard)} times in one pass and {len(others)} times in the other, so "
                "there are no two predictions to compare. Name what it calls: RDrop(of='model')."
            )
        losses = [step.loss(outputs), step.loss(again)]
        with torch.autocast(losses[0].device.type, enabled=False):
            pairs = zip(heard, others, strict=True)
            divergence = torch.stack([self._divergence(one, other) for one, other in pairs]).mean()
        self._look(divergence, step.module.trainer.global_step)
        step.module.log("loss/r_drop", divergence.detach(), rank_zero_only=True)
        return with_loss(outputs, reduced(losses, self.reduction) + self.alpha * divergence)

    def _look(self, divergence: Tensor, updates: int) -> None:
        """Warn where both passes give the same in the first steps: to look waits for the device, so no more often."""
        if self._equal is None or updates in self._equal:
            return
        if float(divergence.detach()) != 0:
            self._equal = None
            return
        self._equal.add(updates)
        if len(self._equal) == _LOOKS:
            self._equal = None
            rank_zero_warn(
                f"both passes of RDrop gave the same predictions in {_LOOKS} steps, so it only costs time: the model "
                "has no dropout, or is in eval mode. Give it some (hidden_dropout_prob, LoRA's dropout), or take RDrop "
                "out."
            )

    def _heard(self, run: Callable[[], Any]) -> tuple[Any, list[Call]]:
        assert self._calls is not None
        self._calls.taken()
        self._calls.on = True
        try:
            return run(), self._calls.taken()
        finally:
            self._calls.on = False

    def _divergence(self, one: Call, other: Call) -> Tensor:
        assert self._calls is not None
        first, second = (logits_of(call.output, self.read, "the module", "RDrop") for call in (one, other))
        return symmetric_kl(first, second, counted_rows(self._calls.root, one, first))
