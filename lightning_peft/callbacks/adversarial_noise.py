"""AdversarialNoise: embeddings move to where the loss is larger (FGM, FreeLB)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.callbacks.hooked_steps import HookedStep
from lightning_peft.callbacks.repeated_steps import (
    Reduction,
    Step,
    reduced,
    require_apart,
    require_reduction,
    settled,
    terms_follow,
    with_loss,
)
from lightning_peft.callbacks.steps import scaler_of
from lightning_peft.embeddings import Called
from lightning_peft.functional.adversarial import ascend
from lightning_peft.functional.embedding_noise import uniform_start


class AdversarialNoise(HookedStep):
    """Train on embeddings that are moved to where the loss is larger.

        delta_0     = start / sqrt(n d) U(-1, 1)
        delta_(t+1) = P( delta_t + step g_t / ||g_t|| ),    g_t = dL(E + delta_t) / d delta_t,    P: ||delta|| <= radius
        loss        = mean, or sum, over t < passes of L(E + delta_t)

    For every example by itself, over its tokens without padding. A pass serves twice: its gradient moves delta on, and
    trains.

        FGM      AdversarialNoise(step=1.0, passes=2, start=0.0, reduction="sum"), which is the default: the clean loss,
                 and that of one step away
        FreeLB   AdversarialNoise(step=0.1, passes=3, start=0.1, radius=0.5, reduction="mean")

    The hook, the random numbers of the start, checkpointing and several processes are as in
    :class:`~lightning_peft.callbacks.embedding_noise.EmbeddingNoise`.

    Args:
        step: length of a step, in the unit of embeddings: look at the norm of an example's.
        passes: how often the model is run for a step of the optimizer, at least 2.
        start: size of the random start; 0 for a clean first pass.
        radius: longest delta; ``None`` for no limit.
        reduction: "sum" or "mean" of the passes' losses.
        execution: "apart" takes the gradient of delta and that of what is trained at once, so that a pass costs one
            backward, and memory is for one pass, or two where terms of the loss look at the first. "together" keeps all
            passes for one backward, and needs one more for each delta: for parameters that are split over processes.
        embedding: patterns of the embedding layers' names; ``None`` to find that of the model's inputs.
        protect_ids: token ids to leave alone.
        seed: of the random start.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range; the embedding cannot be told.
        MisconfigurationException: the module optimizes by hand, another callback repeats the step too, or gradients
            cannot be taken "apart".
        RuntimeError: while training: the embedding was not called, or not as often in each pass.

    Reference:
        Miyato, Dai, Goodfellow, Adversarial training methods for semi-supervised text classification, ICLR 2017, arXiv
        1605.07725 (FGM); Zhu et al., FreeLB: Enhanced adversarial training for natural language understanding, ICLR
        2020, arXiv 1909.11764. Both remembered. Departures: embeddings are not normalised first, as in Miyato et al.;
        each pass has its own dropout, as in FreeLB without its shared one.
    """

    def __init__(
        self,
        step: float = 1.0,
        passes: int = 2,
        start: float = 0.0,
        radius: float | None = None,
        reduction: Reduction = "sum",
        execution: Literal["apart", "together"] = "apart",
        embedding: Sequence[str] | None = None,
        protect_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(embedding, protect_ids, "keep", seed)
        for name, value in (("step", step), ("start", start), ("radius", 1.0 if radius is None else radius)):
            require_number(name, value)
        require_integer("passes", passes)
        if not 0 < step < float("inf"):
            raise ValueError(f"step is the length of a step, positive and finite. Got {step}.")
        if not 0 <= start < float("inf"):
            raise ValueError(f"start is the size of a random start, at least 0 and finite. Got {start}.")
        if radius is not None and not radius > 0:
            raise ValueError(f"radius is the longest perturbation, positive, or None for no limit. Got {radius}.")
        if passes < 2:
            raise ValueError(f"passes={passes}: the first pass tells the direction, so there are at least 2.")
        require_reduction(reduction)
        if execution not in ("apart", "together"):
            raise ValueError(f"execution={execution!r}: choose 'apart' or 'together'.")
        self.step, self.passes, self.start, self.radius = step, passes, start, radius
        self.reduction, self.execution = reduction, execution
        self._deltas: dict[tuple[int, int], Tensor] = {}

    @property
    def repeats(self) -> bool:
        return True

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if self.execution == "apart":
            require_apart(trainer, pl_module, type(self).__name__)

    def run(self, step: Step) -> Any:
        first = self._take(step, self.passes)
        outputs: Any = None
        losses: list[Tensor] = []
        for number in range(first, first + self.passes):
            with self._changing(number):
                given = step.first() if number == first else step.again()
            if given is None:
                return None  # the user skips this batch
            outputs = given if number == first else outputs
            loss = self._hook.marked(step.loss(given), number)
            if number < first + self.passes - 1:
                loss = self._move(step, loss, number, keep=number == first and terms_follow(step))
            losses.append(loss)
        step.module.log("loss/adversarial", losses[-1].detach(), rank_zero_only=True)
        return with_loss(outputs, reduced(losses, self.reduction))

    def _move(self, step: Step, loss: Tensor, number: int, keep: bool) -> Tensor:
        """Have the next pass's perturbations; the loss to go on with."""
        calls = self._hook.calls(number)
        deltas = [self._deltas[number, called.call] for called in calls]
        if self.execution == "apart":
            loss, gradients = settled(step.module, loss, deltas, keep_graph=keep)
        else:
            scaler = scaler_of(step.module.trainer)
            scaled = loss if scaler is None else scaler.scale(loss)
            with torch.autocast(loss.device.type, enabled=False):
                gradients = torch.autograd.grad(scaled, deltas, retain_graph=True)
        for called, delta, gradient in zip(calls, deltas, gradients, strict=True):
            moved = ascend(delta, gradient, self.step, self.radius)
            self._deltas[number + 1, called.call] = moved.requires_grad_()
        return loss

    def changed(self, E: Tensor, called: Called) -> Tensor:
        tokens = self.tokens(E, called.ids, called)
        delta = self._deltas.get((called.passed, called.call))
        if delta is None:
            delta = torch.zeros(E.shape, device=E.device)
            if self.start:
                numbers = self.numbers(called, called.passed, E.device)
                delta = uniform_start(E, self.start, mask=tokens, generator=numbers.each(len(E)))
            self._deltas[called.passed, called.call] = delta.requires_grad_()
        elif delta.shape != E.shape:
            raise RuntimeError(
                f"the embedding {called.name!r} gives {tuple(E.shape)} in one pass and {tuple(delta.shape)} in another,"
                " so a perturbation cannot be carried on. Let training_step call it alike every time."
            )
        moved = delta if tokens is None else delta * tokens[..., None]
        return E + moved.to(E.dtype)

    def _forget(self) -> None:
        super()._forget()
        self._deltas = {}

    def end(self) -> None:
        super().end()
        self._deltas = {}
