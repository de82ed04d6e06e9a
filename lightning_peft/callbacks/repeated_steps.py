"""RepeatedStep: run training_step several times for one batch, and hand Lightning one loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.autograd.function import once_differentiable

from lightning_peft.callbacks.order import callbacks_of
from lightning_peft.callbacks.preflight import Preflight
from lightning_peft.callbacks.regularization import Regularization
from lightning_peft.callbacks.selection import RankSelection
from lightning_peft.callbacks.steps import scaler_of
from lightning_peft.callbacks.undisturbed import unheard
from lightning_peft.distributed import is_shard
from lightning_peft.rank.budget import clean_name
from lightning_peft.seams import wrap_method
from lightning_peft.surgery.layers import is_flattened

Reduction = Literal["sum", "mean"]
Execution = Literal["together", "apart", "batched"]


class Step:
    """One call of training_step, that can be made again.

    Every pass gets containers of its own, as a step may take things out of its batch (`batch.pop("labels")`).
    """

    def __init__(
        self, call: Callable[..., Any], module: LightningModule, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.call, self.module, self.args, self.kwargs = call, module, args, kwargs
        self._spare = _anew((args, kwargs))

    @property
    def batch(self) -> Any:
        """What the step is of."""
        args, kwargs = self._spare
        return args[0] if args else next(iter(kwargs.values()), None)

    def first(self) -> Any:
        """The step itself."""
        return self.call(*self.args, **self.kwargs)

    def again(self) -> Any:
        """The step once more: what it logs, and what it tells metrics, does not count."""
        args, kwargs = _anew(self._spare)
        with unheard(self.module):
            return self.call(*args, **kwargs)

    def loss(self, outputs: Any) -> Tensor:
        """The loss in what the step has returned.

        Raises:
            MisconfigurationException: there is none.
        """
        found = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if not isinstance(found, Tensor) or found.numel() != 1:
            kind = f"{type(outputs).__name__} of {', '.join(outputs)}" if isinstance(outputs, Mapping) else _kind(found)
            raise MisconfigurationException(
                f"training_step of {type(self.module).__name__} must return a scalar loss, or a dictionary with one "
                f"under 'loss', to be run several times. Got a {kind}."
            )
        return found


class RepeatedStep(Preflight, ABC):
    """What runs `training_step` several times, or otherwise than it would run by itself.

    It is a link next to the module's own `training_step`, inside of what `Regularization` adds to it: terms are added
    once, whatever the order of the callbacks, and see the outputs of the first pass. What other passes log is not
    logged, and metrics that are modules do not see them.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    @property
    @abstractmethod
    def repeats(self) -> bool:
        """Whether it runs the step more than once."""

    @abstractmethod
    def run(self, step: Step) -> Any:
        """Run the step; returns what it returns, with the loss of all passes."""

    def begin(self, trainer: Trainer, module: LightningModule) -> None:
        """Be ready for steps; before each, and idempotent: finders train before training starts."""

    def end(self) -> None:
        """Leave the module alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        several = [c for c in callbacks_of(trainer) if isinstance(c, RepeatedStep) and c.repeats]
        if len(several) > 1:
            first, second = (type(callback).__name__ for callback in several[:2])
            raise MisconfigurationException(
                f"{first} and {second} both run training_step several times for one batch, and there is no telling "
                "which passes are meant. Keep one; noise beside it can have mode='replace'."
            )
        if stage == "fit" and not self._undo:
            self._undo = [wrap_method(pl_module, "training_step", self._around, innermost=True)]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        name = type(self).__name__
        if self.repeats and not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes by hand (automatic_optimization=False), so {name} cannot bring "
                "several passes into one loss. Let Lightning optimize, or take the callback out."
            )
        if self.repeats and is_param_in_hook_signature(pl_module.training_step, "dataloader_iter", explicit=True):
            raise MisconfigurationException(
                f"training_step of {type(pl_module).__name__} takes a dataloader_iter, of which every pass of {name} "
                "would take another batch. Let training_step take the batch."
            )
        self.begin(trainer, pl_module)

    def _around(self, call: Callable[..., Any], module: LightningModule, *args: Any, **kwargs: Any) -> Any:
        if not (module.training and torch.is_grad_enabled()):
            return call(*args, **kwargs)  # somebody only looks: a calibration
        self.begin(module.trainer, module)
        return self.run(Step(call, module, args, kwargs))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()
        self.end()


def reduced(losses: Sequence[Tensor], reduction: Reduction) -> Tensor:
    """The sum of losses, in their order, or their mean."""
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total / len(losses) if reduction == "mean" else total


def require_reduction(reduction: str) -> None:
    """Check the name of a reduction.

    Raises:
        ValueError: it is unknown.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r}: choose 'sum' or 'mean'.")


def terms_follow(step: Step) -> bool:
    """Whether terms of the loss are computed from what the step returns."""
    return any(isinstance(callback, Regularization) for callback in callbacks_of(step.module.trainer))


def with_loss(outputs: Any, loss: Tensor) -> Any:
    """What a step has returned, with another loss."""
    return {**outputs, "loss": loss} if isinstance(outputs, Mapping) else loss


def require_apart(trainer: Trainer, module: LightningModule, name: str) -> None:
    """Check that gradients of a pass can be taken before those of the next.

    Raises:
        MisconfigurationException: what is trained is split over processes, or all passes share a part of their graph.
    """
    advice = f"Use {name}(execution='together')."
    for path, parameter in module.named_parameters():
        if parameter.requires_grad and (is_shard(parameter) or is_flattened(parameter)):
            raise MisconfigurationException(
                f"{clean_name(path)!r} is trained and split over processes, and execution='apart' takes gradients of "
                f"whole parameters. {advice}"
            )
    for callback in callbacks_of(trainer):
        terms = dict(callback.terms.items()) if isinstance(callback, Regularization) else {}
        shared = next((f"the term {n!r}" for n, term in terms.items() if getattr(term, "perturbs", False)), None)
        if isinstance(callback, RankSelection):
            shared = "RankSelection"
        if shared is not None:
            raise MisconfigurationException(
                f"{shared} draws what all passes of a step share, and execution='apart' is done with each pass before "
                f"the next begins. {advice}"
            )


def settled(
    module: LightningModule, loss: Tensor, beside: Sequence[Tensor] = (), keep_graph: bool = False
) -> tuple[Tensor, Sequence[Tensor]]:
    """Take the gradient of a loss now; in the loss that is returned it is a constant, and the graph is gone.

    Accumulation, gradient scaling and synchronisation come after `training_step`, and gradients that are there when it
    returns are set to zero: the gradient must ride along in the loss. What is trained gets it in the one backward pass
    that Lightning makes, where it is multiplied and averaged like any other.

    Args:
        module: what is trained in it, and masks that measure their worth, are leaves.
        loss: a scalar.
        beside: other leaves.
        keep_graph: for others who go on from what the pass has given.

    Returns:
        The loss; the gradients of `beside`, times a gradient scaler's scale.
    """
    leaves = [leaf for leaf in (*module.parameters(), *module.buffers()) if leaf.requires_grad]
    scaler = scaler_of(module.trainer)
    scaled = loss if scaler is None else scaler.scale(loss)
    with torch.autocast(loss.device.type, enabled=False):
        found = torch.autograd.grad(scaled, [*leaves, *beside], retain_graph=keep_graph, allow_unused=True)
    pairs = [(leaf, g) for leaf, g in zip(leaves, found[: len(leaves)], strict=True) if g is not None]
    others = [torch.zeros_like(x) if g is None else g for x, g in zip(beside, found[len(leaves) :], strict=True)]
    if not pairs:
        return loss.detach(), others
    gradients = [gradient for _, gradient in pairs]
    if scaler is not None:
        scale: Any = scaler.scale(loss.new_ones((), dtype=torch.float32))
        gradients = list(torch._foreach_div(gradients, scale))
    known: Tensor = _Known.apply(loss.detach(), gradients, *(leaf for leaf, _ in pairs))  # type: ignore[no-untyped-call]
    return known, others


class _Known(torch.autograd.Function):
    """A loss whose gradient is known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *leaves: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Any, ...]:
        return (None, None, *torch._foreach_mul(ctx.gradients, slope))


def _anew(data: Any) -> Any:
    return apply_to_collection(data, Tensor, lambda tensor: tensor)


def _kind(value: object) -> str:
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
