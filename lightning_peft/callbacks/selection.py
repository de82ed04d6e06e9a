"""RankSelection: which components stay is learned, by masks that are drawn for every step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.arguments import require_instance
from lightning_peft.callbacks.order import callbacks_of
from lightning_peft.callbacks.preflight import optimized
from lightning_peft.callbacks.pruning import RankPruning
from lightning_peft.callbacks.reentrant import recomputes
from lightning_peft.rank.budget import RankBudget
from lightning_peft.rank.sampling import SamplingPolicy
from lightning_peft.seams import when_built, wrap_method
from lightning_peft.strategies import keep_whole


class RankSelection(RankPruning):
    """Learn which components stay, while the adapters themselves rest.

    Before the forward of every training step a mask is drawn for every layer, once per optimizer step: accumulated
    micro-batches have the same ones, and so has a forward that is computed again for activation checkpointing. The
    masks' gradients go to the module that draws them, which becomes a child of the LightningModule (`peft_masks`), so
    that optimizer, strategy and checkpoint have it. What keeps masks small is in the loss: see
    :class:`~lightning_peft.Regularization` with :class:`~lightning_peft.BudgetPenalty` and
    :class:`~lightning_peft.MaskAlignment`.

    At the policy's events what was learned so far is written as masks of first components, without noise: validation
    and tests see these, and :class:`~lightning_peft.RankMonitor` shows them. At its last event, by default the end of
    the run, they are brought into the budget and are final; in a tail the module that drew them rests.

    Args:
        policy: what draws, what a component is kept for, and the budget, as a method's `policy(...)` gives them.
        compact: "final" cuts closed components out at the final masks; see :class:`~lightning_peft.RankPruning`.
        mode: "eval" trains masks without dropout and with the running statistics of batch norms, as the model will be
            used; "train" leaves the modules' modes alone, which a model with recurrent layers needs on a GPU: cuDNN has
            no backward of these in eval mode. The final masks end it.

    Raises:
        TypeError: policy draws no masks.
        ValueError: compact or mode is unknown.
        MisconfigurationException: adapters are trained themselves, the module optimizes by hand, what draws is in no
            optimizer; or as :class:`~lightning_peft.RankPruning`.

    Reference:
        Gao et al., Adaptive Rank Selections, NAACL 2024, algorithm 1. One draw per step, and "eval", are our choice
        where the paper says nothing.
    """

    policy: SamplingPolicy

    def __init__(
        self,
        policy: SamplingPolicy,
        compact: Literal["never", "final"] = "never",
        mode: Literal["eval", "train"] = "eval",
    ) -> None:
        require_instance("policy", policy, SamplingPolicy, "a LearnedRanks")
        if mode not in ("eval", "train"):
            raise ValueError(f"mode={mode!r}: choose 'eval' (no dropout) or 'train'.")
        super().__init__(policy, compact)
        self.mode = mode
        self._remove: Callable[[], None] | None = None
        self._drawing = False  # training has started: a batch that is only looked at before has no draw
        self._unlooked = True  # whether the model checkpoints its activations in a way that we cannot serve
        self._modes: dict[nn.Module, bool] = {}  # of modules that evaluate while masks are learned

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._unlooked = True
        when_built(pl_module, partial(self._register, stage))
        when_built(pl_module, lambda module: keep_whole(trainer.strategy, module))
        if stage == "fit" and self._remove is None:
            self._remove = wrap_method(pl_module, "training_step", self._with_masks)

    def _register(self, stage: str, module: LightningModule) -> None:
        budget = RankBudget.of(module)
        there = stage != "fit" and "peft_masks" in module._modules  # as its checkpoints have it, also after a cut
        if budget and not there:  # without adapters `on_fit_start` says so
            module.add_module("peft_masks", self.policy.build(budget))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not pl_module.automatic_optimization:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes by hand (automatic_optimization=False), and masks are drawn for "
                "a training step that is one forward and one backward. Let Lightning optimize, or take RankSelection "
                "out."
            )
        for name, site in RankBudget.of(pl_module).items():
            for part, parameter in site.adapter.own_parameters():
                if parameter.requires_grad:
                    raise MisconfigurationException(
                        f"{part!r} of the adapter at {name!r} is trained, and RankSelection learns what of the "
                        "adapters stays as they are. Build them with trained=False, and train them afterwards."
                    )
        held = optimized(trainer)
        if not all(id(p) in held for p in self._parameters()):
            raise MisconfigurationException(
                "what draws the masks (`self.peft_masks`) is in no optimizer, so nothing would be learned. Let "
                "configure_optimizers take every parameter that requires grad, or add it to a group."
            )

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.policy.clear()  # of a finder's last step

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._drawing = True
        self.policy.clear()  # of a finder's last step
        if self.mode == "eval" and not self._settled:
            self._modes = {child: child.training for child in pl_module.modules()}
            pl_module.eval()

    def _parameters(self) -> list[nn.Parameter]:
        sampler = self.policy.sampler
        return [] if sampler is None else list(sampler.parameters())

    def _with_masks(self, call: Callable[..., Any], module: LightningModule, *args: Any, **kwargs: Any) -> Any:
        trainer = module.trainer
        # A learning-rate or batch-size finder trains before that, with callbacks of its own: it tries what is trained.
        if not self._drawing and any(other is self for other in callbacks_of(trainer)):
            return call(*args, **kwargs)
        if self._drawing and self._settled:
            return _with_zero(call(*args, **kwargs), self._parameters())
        self.policy.draw(trainer.global_step)
        outputs = call(*args, **kwargs)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if self._unlooked and isinstance(loss, Tensor):
            self._unlooked = False
            if recomputes(loss):
                raise MisconfigurationException(
                    "masks are drawn once for a whole step, and re-entrant activation checkpointing would go back to "
                    "them once for every part that it computes again. Set use_reentrant=False."
                )
        return outputs

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        if self._settled:
            for parameter in self._parameters():
                parameter.grad = None  # a zero would let momentum and weight decay go on

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.policy.clear()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._settled:
            self._restore_modes()

    def _cut(self, trainer: Trainer) -> None:
        self._restore_modes()  # an adapter that is cut takes its mode from the one before
        super()._cut(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._stop()
        self._unwrap()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._stop()
        self._unwrap()

    def _stop(self) -> None:
        self._drawing = False
        self.policy.clear()
        self._restore_modes()

    def _restore_modes(self) -> None:
        for child, training in self._modes.items():
            child.training = training  # not `train`, which a module may have overridden to keep parts frozen
        self._modes = {}

    def _unwrap(self) -> None:
        if self._remove is not None:
            self._remove()
            self._remove = None


def _with_zero(outputs: Any, parameters: list[nn.Parameter]) -> Any:
    """The same loss, in which these parameters have a part of 0: DDP wants a gradient of each at every step."""
    if outputs is None:
        return None
    zero = torch.stack([p.sum() for p in parameters]).sum() * 0
    if isinstance(outputs, Mapping):
        return {**outputs, "loss": outputs["loss"] + zero}
    return outputs + zero
