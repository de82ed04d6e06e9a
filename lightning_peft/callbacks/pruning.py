"""RankPruning: the rank budget follows its schedule while the Trainer trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.arguments import require_instance
from lightning_peft.callbacks.injection import AdapterInjection
from lightning_peft.callbacks.order import require_before
from lightning_peft.callbacks.preflight import Preflight
from lightning_peft.distributed import gather_objects
from lightning_peft.rank.budget import RankBudget
from lightning_peft.rank.policy import RankPolicy
from lightning_peft.strategies import require_equal


class RankPruning(Preflight):
    """Close components on schedule; the number of steps comes from the Trainer.

    Importance is updated once per optimizer step, gradients before the step and weights after it; components are chosen
    after the step at the policy's events. Accumulated micro-batches count for nothing.

    Args:
        policy: schedule, importance and final budget in one, as a method's `policy(...)` gives them.

    Raises:
        MisconfigurationException: no adapter is there, the callbacks are in the wrong order, or the Trainer cannot tell
            how many steps it will take.

    Example:
        >>> from lightning_peft import Budget, Cubic, RankPolicy, Taylor
        >>> pruning = RankPruning(RankPolicy(Cubic(warmup=0.1, tail=0.2), Taylor(), Budget(rank=4)))
    """

    def __init__(self, policy: RankPolicy) -> None:
        require_instance("policy", policy, RankPolicy, "RankPolicy(Cubic(), Taylor(), Budget(rank=8))")
        self.policy = policy
        self.total_steps = 0
        self.event_step = 0
        """The step of the last event, 0 before the first; equal to `trainer.global_step` right after an event."""
        self._seen = 0
        self._settled = False  # the mask is final
        self._restored: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require_before(trainer, self, AdapterInjection)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        budget = RankBudget.of(pl_module)
        if not budget:
            raise MisconfigurationException(
                "RankPruning found no adapter to prune. Put AdapterInjection before it in the Trainer's callbacks, or "
                "call inject() on the module first."
            )
        total = trainer.estimated_stepping_batches
        if not pl_module.automatic_optimization and trainer.max_steps == -1:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes by hand, so only it knows how many optimizer steps an epoch "
                "has, and the rank schedule would run at the wrong pace. Set max_steps, counted over all optimizers."
            )
        if trainer.limit_train_batches == 0:
            raise MisconfigurationException(
                "RankPruning has nothing to follow: limit_train_batches=0 leaves no optimizer step. "
                "Raise it, or take RankPruning out."
            )
        if total == float("inf") or total < 1:
            raise MisconfigurationException(
                f"RankPruning needs the number of optimizer steps, and the Trainer expects {total}. Set max_steps, or "
                "max_epochs together with a data loader whose length is known."
            )
        totals = gather_objects(int(total))
        if len(set(totals)) > 1:
            raise MisconfigurationException(
                f"the processes expect different numbers of optimizer steps, {', '.join(map(str, totals))}, so their "
                "rank schedules would part. Give each as many batches as the others: leave use_distributed_sampler on, "
                "or set max_steps."
            )
        self.total_steps = int(total)
        self._seen = 0
        self._settled = False
        self.event_step = 0
        self.policy.track(budget)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Loops are restored after on_fit_start, and global_step with them; under sharded strategies callbacks too.
        self._seen = trainer.global_step
        if self._restored is not None:
            state, self._restored = self._restored, None
            if state["total_steps"] != self.total_steps:
                rank_zero_warn(
                    f"This checkpoint's rank schedule was made for {state['total_steps']} optimizer steps and the "
                    f"Trainer now plans {self.total_steps}: the schedule follows the Trainer. Keep max_epochs, "
                    "max_steps, the batch size and accumulation as they were to resume exactly."
                )
            self.event_step, self._settled = int(state["event_step"]), bool(state["settled"])
            self.policy.load_state_dict(state["policy"])
            # The file may be from between the optimizer's step and our look at it, or of a plan that was longer.
            self._seen = min(int(state["step"]), trainer.global_step)
            self._look(trainer, pl_module)
        if not self._observes(self._seen + 1):
            self._release()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        importance = self.policy.importance
        if importance.reads != "gradients" or not self._observes(trainer.global_step + 1):
            return
        gradients = importance.gradients()
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None:
            # The optimizer's gradients are unscaled by now. `get_scale` would wait for the device.
            torch._foreach_div_(gradients, scaler.scale(torch.ones((), device=gradients[0].device)))
        if trainer.world_size > 1:
            flat = trainer.strategy.reduce(torch.cat(gradients), reduce_op="mean")
            torch._foreach_copy_(gradients, list(flat.split([part.numel() for part in gradients])))
        importance.update(skip_overflow=scaler is not None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take in the optimizer steps since the last look, and choose components if one of them was an event."""
        step = trainer.global_step
        # Not `==`: a plan that became shorter has its last event behind it.
        missed = self.policy.is_final(step, self.total_steps) and not self._settled
        if step == self._seen and not missed:
            return  # an accumulated micro-batch
        taken = range(self._seen + 1, step + 1)  # more than one if a module that optimizes by hand takes several
        self._seen = step
        if self.policy.importance.reads == "weights" and taken and self._observes(taken[0]):
            self.policy.importance.update()
        if missed or any(self.policy.is_event(each, self.total_steps) for each in taken):
            # Before masks are written: what has come apart must not be sealed.
            require_equal(pl_module, f"at the pruning event of step {step}")
            # Every rank decides alike; rank 0's word is final all the same.
            masks: dict[str, Tensor] = trainer.strategy.broadcast(self.policy.decide(step, self.total_steps))
            self.policy.apply(masks, step, self.total_steps)
            self.event_step = step
            self._settled = self.policy.is_final(step, self.total_steps)
            if self._settled:
                self._release()

    def _observes(self, step: int) -> bool:
        return self.policy.observes(step, self.total_steps)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tried = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        if self._seen and not tried and not self.policy.is_final(self._seen, self.total_steps):
            rank_zero_warn(
                f"Training stopped at step {self._seen} of {self.total_steps}, before the rank schedule's last cut at "
                f"step {self.policy.schedule.window(self.total_steps)[1]}: the final budget is not reached. Resume "
                "from a checkpoint, or train on."
            )
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._restored = None
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = None  # validation of a checkpoint loads it as well; a later fit is not its continuation

    def _release(self) -> None:
        self.policy.importance.release()

    def budget_now(self) -> int:
        """What may be spent after the last step that was taken, in the unit of the final budget."""
        return self.policy.budget_at(self._seen, self.total_steps)

    def state_dict(self) -> dict[str, Any]:
        if not self.total_steps:
            return {}
        return {
            "total_steps": self.total_steps,
            "step": self._seen,
            "settled": self._settled,
            "event_step": self.event_step,
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Callbacks are restored before or after on_fit_start, as the strategy has it: kept until training starts.
        self._restored = state_dict or None
