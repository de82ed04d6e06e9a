"""RankAllocation: PEFT's own AdaLoRA, driven as it has to be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_peft.arguments import require_number
from lightning_peft.callbacks.order import callbacks_of, require_before, require_one
from lightning_peft.callbacks.peft_losses import PeftLosses
from lightning_peft.callbacks.placement import AdapterPlacement
from lightning_peft.callbacks.preflight import Preflight
from lightning_peft.callbacks.pruning import RankPruning
from lightning_peft.callbacks.steps import TakenSteps
from lightning_peft.interop.losses import tuners
from lightning_peft.rank.schedule import share_of
from lightning_peft.seams import when_built
from lightning_peft.strategies import is_sharded

_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


class RankAllocation(Preflight):
    """Call `update_and_allocate` of PEFT's AdaLoRA: once per optimizer step, with its number, and resumably.

    PEFT allocates as it does by itself, from the gradients of the step and the weights after it. This callback sees to
    what PEFT leaves to its user, where a mistake says nothing: the calls; their number, of optimizer steps that were
    taken, counted from 1, whatever is accumulated or skipped; `total_step`, which is the Trainer's; the orthogonality
    penalty, in the training loss exactly once, also of a module that computes its own loss, and never at evaluation;
    and the allocator's averages and rank pattern in the checkpoint, so that a run resumes exactly, in its last phase
    too. For other policies than AdaLoRA's own, adopt the model and use RankPruning instead.

    Args:
        warmup: share of the run before the first cut, `tinit`; ``None`` takes the number in the config.
        tail: share of the run after the last one, `tfinal`; ``None`` takes the number in the config.
        losses: add the penalty, and other PEFT losses; see :class:`~lightning_peft.Adoption`.

    Raises:
        ValueError: a share is not in [0, 1).
        MisconfigurationException: there is no AdaLoRA to drive or more than one, its config does not fit the number of
            optimizer steps, target_r leaves nothing to cut, or RankPruning is there as well.

    Reference:
        Zhang et al., AdaLoRA, ICLR 2023, arXiv 2303.10512, as PEFT has it.
    """

    def __init__(self, warmup: float | None = None, tail: float | None = None, losses: bool = True) -> None:
        for name, share in (("warmup", warmup), ("tail", tail)):
            if share is not None:
                require_number(name, share)
                if not 0 <= share < 1:
                    raise ValueError(f"{name} is a share of the run, in [0, 1). Got {share}.")
        self.warmup = warmup
        self.tail = tail
        self.losses = losses
        self.total_steps = 0
        self._tuner: Any = None
        self._seen = 0
        self._steps = TakenSteps()
        self._losses = PeftLosses()
        self._restored: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = None  # of a run that failed before it started
        super().setup(trainer, pl_module, stage)
        require_one(trainer, RankAllocation, "one drives the model's AdaLoRA")
        require_before(trainer, self, AdapterPlacement)
        if any(isinstance(other, RankPruning) for other in callbacks_of(trainer)):
            raise MisconfigurationException(
                "RankAllocation lets PEFT's AdaLoRA allocate ranks, and RankPruning closes components by its own "
                "policy: the two would undo each other. Keep one."
            )
        if is_sharded(trainer.strategy):
            raise MisconfigurationException(
                f"PEFT's AdaLoRA reads whole gradients, and {type(trainer.strategy).__name__} shards parameters. Use "
                "one device or DDP, or adopt the model and use RankPruning."
            )
        self._losses.remove()
        if self.losses:
            when_built(pl_module, lambda module: self._losses.add(trainer, module, stage))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._tuner = _find(pl_module)
        self._fit_schedule(trainer)
        self._steps, self._seen = TakenSteps(), 0
        allocator = self._tuner.rankallocator
        allocator.reset_ipt()
        self._config.rank_pattern = None

    @property
    def _config(self) -> Any:
        return self._tuner.peft_config[self._tuner.trainable_adapter_name]

    def _fit_schedule(self, trainer: Trainer) -> None:
        """Bring the config's numbers of steps to the Trainer's, or say that they do not fit."""
        config, total = self._config, trainer.estimated_stepping_batches
        if total == float("inf") or total < 1:
            raise MisconfigurationException(
                f"AdaLoRA needs the number of optimizer steps, and the Trainer expects {total}. Set max_steps, or "
                "max_epochs together with a data loader whose length is known."
            )
        self.total_steps = total = int(total)
        tinit = config.tinit if self.warmup is None else share_of(self.warmup, total)
        tfinal = config.tfinal if self.tail is None else share_of(self.tail, total)
        if config.total_step != total and (self.warmup is None or self.tail is None):
            raise MisconfigurationException(
                f"the AdaLoraConfig was made for total_step={config.total_step} and the Trainer takes {total} "
                f"optimizer steps. Set total_step={total}, with tinit and tfinal to go with it, or give shares: "
                "RankAllocation(warmup=0.1, tail=0.3)."
            )
        if tinit >= total - tfinal:
            raise MisconfigurationException(
                f"AdaLoRA's warm-up of {tinit} and tail of {tfinal} steps leave nothing of the {total} steps to cut "
                "ranks in. Make them shorter."
            )
        allocator = self._tuner.rankallocator
        config.total_step, config.tinit, config.tfinal = total, tinit, tfinal
        allocator.peft_config = config
        allocator.set_total_step(total)
        if allocator.init_bgt <= allocator.target_bgt:
            raise MisconfigurationException(
                f"AdaLoRA starts with {allocator.init_bgt} components and is to end with {allocator.target_bgt}: "
                "nothing is cut. Set target_r below init_r, or train a plain LoRA."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._seen = trainer.global_step
        self._steps.watch(trainer, lambda overflow: None)
        if self._restored is None:
            return
        state, self._restored = self._restored, None
        if state["total_steps"] != self.total_steps:
            raise MisconfigurationException(
                f"this checkpoint's AdaLoRA was to take {state['total_steps']} optimizer steps and the Trainer now "
                f"plans {self.total_steps}. Keep max_epochs, max_steps, the batch size and accumulation as they were."
            )
        allocator = self._tuner.rankallocator
        for name in _AVERAGES:
            setattr(allocator, name, {n: t.to(pl_module.device) for n, t in state[name].items()})
        pattern = state["rank_pattern"]
        self._config.rank_pattern = None if pattern is None else {n: t.tolist() for n, t in pattern.items()}
        self._steps.load_state_dict(state["steps"], pl_module.device)
        self._seen = min(int(state["step"]), self._steps.taken(trainer.global_step))
        self._look(trainer, pl_module)  # the file may be from between the optimizer's step and our look at it

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._steps.begin(trainer, optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Gradients are still those of the step: Lightning sets them to zero before the next one's first backward.
        taken = self._steps.taken(trainer.global_step)
        self._steps.look()
        taken -= self._steps.settle()
        for step in range(self._seen + 1, taken + 1):
            self._allocate(step)
        self._seen = taken

    def _allocate(self, step: int) -> None:
        name = self._tuner.trainable_adapter_name
        # PEFT multiplies by the gradient of every parameter, and fails on one that took no part in the loss.
        idle = [p for n, p in self._tuner.named_parameters() if "lora_" in n and name in n and p.grad is None]
        for parameter in idle:
            parameter.grad = torch.zeros_like(parameter)
        self._tuner.update_and_allocate(step)
        for parameter in idle:
            parameter.grad = None

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._steps.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = None
        self._losses.remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._steps.release()
        self._losses.remove()

    def state_dict(self) -> dict[str, Any]:
        if self._restored is not None:
            return dict(self._restored)  # training has not started: others may save in on_exception
        if self._tuner is None:
            return {}
        allocator, pattern = self._tuner.rankallocator, self._config.rank_pattern
        averages: dict[str, dict[str, Tensor]] = {
            name: {n: t.detach().clone() for n, t in getattr(allocator, name).items()} for name in _AVERAGES
        }
        return {
            "total_steps": self.total_steps,
            "step": self._seen,
            "steps": self._steps.state_dict(),
            "rank_pattern": None if pattern is None else {n: torch.tensor(row) for n, row in pattern.items()},
            **averages,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None


def _find(module: nn.Module) -> Any:
    found = tuners(module, "AdaLoraModel")
    if len(found) != 1:
        there = f"{len(found)} of them" if found else "none"
        raise MisconfigurationException(
            f"RankAllocation drives one AdaLoRA of PEFT's and found {there} in {type(module).__name__}. Build one with "
            "get_peft_model(model, AdaLoraConfig(...)), or use RankPruning for other adapters."
        )
    if not hasattr(found[0], "rankallocator"):
        raise MisconfigurationException(
            "this AdaLoRA was loaded for inference, and does not train. Load it with is_trainable=True."
        )
    return found[0]
