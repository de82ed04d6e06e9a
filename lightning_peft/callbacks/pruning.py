"""RankPruning: the rank budget follows its schedule while the Trainer trains."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_peft.agreement import require_equal
from lightning_peft.arguments import require_instance
from lightning_peft.callbacks.compaction import compact_in_training, require_compactable, require_own
from lightning_peft.callbacks.order import callbacks_of, require_before
from lightning_peft.callbacks.placement import COPIERS, AdapterPlacement
from lightning_peft.callbacks.preflight import Preflight
from lightning_peft.callbacks.steps import TakenSteps, scaler_of, unscales_itself
from lightning_peft.compaction import follow_moves
from lightning_peft.distributed import agreed, gather_objects
from lightning_peft.rank.budget import RankBudget
from lightning_peft.rank.policy import Policy

Compact = Literal["never", "final"] | int
"""When closed components are cut out of the tensors: never, at the final mask, or there and at every k-th event."""


class RankPruning(Preflight):
    """Open and close components as a policy decides; the number of steps comes from the Trainer.

    Importance is updated once per optimizer step, gradients before the step and weights after it; components are chosen
    after the step at the policy's events. Accumulated micro-batches count for nothing, and so do steps that were
    skipped: by a gradient scaler, or because `training_step` returned None. The Trainer counts those; if they were so
    many that its last step comes before the schedule's last cut, the last cut is made then.

    Args:
        policy: schedule, importance and budget in one, as a method's `policy(...)` gives them.
        compact: when closed components are cut out of parameters and optimizer state, so that training goes on at the
            size of what is left. "never" leaves rank a mask to the end. "final" cuts once, at the final mask: the tail
            is faster and smaller, and trains what the mask would have (but an adapter that has gone draws no dropout,
            and a term that looks at closed components, such as Orthogonality, sees them no more). A number k cuts at
            every k-th event as well: what is closed then cannot return, which else it could at a later event. On one
            device and on DDP.

    Raises:
        MisconfigurationException: no adapter is there, the callbacks are in the wrong order, or the Trainer cannot tell
            how many steps it will take; or compaction is asked of a strategy or beside callbacks that forbid it.
        ValueError: compact is none of these, or a number though the policy may open again what it closes.

    Example:
        >>> from lightning_peft import Budget, Cubic, RankPolicy, Taylor
        >>> pruning = RankPruning(RankPolicy(Cubic(warmup=0.1, tail=0.2), Taylor(), Budget(rank=4)))
    """

    def __init__(self, policy: Policy, compact: Compact = "never") -> None:
        require_instance("policy", policy, Policy, "RankPolicy(Cubic(), Taylor(), Budget(rank=8))")
        known = compact in ("never", "final") if isinstance(compact, str) else type(compact) is int and compact >= 1
        if not known:
            raise ValueError(
                f"compact={compact!r}: choose 'never', 'final' (cut once, at the final mask), or a whole number k of "
                "at least 1 (cut at every k-th event as well)."
            )
        if policy.returning and not isinstance(compact, str):
            raise ValueError(
                f"compact={compact} would cut at events before the last, and {policy.returning}: nothing is closed for "
                "good until its last event. Use compact='final'."
            )
        self.policy = policy
        self.compact = compact
        self.total_steps = 0
        self.event_step = 0
        """The step of the last event, 0 before the first; equal to `trainer.global_step` right after an event."""
        self.event_scores: Mapping[str, Tensor] = {}
        """The importance that the last event went by, layer -> (n,), in the numbering before it cut anything."""
        self._steps = TakenSteps()
        self._seen = 0  # taken steps, which is where the schedule stands
        self._event_at = 0  # the same at the last event
        self._events = 0
        self._settled = False  # the mask is final
        self._uncut = False  # what is closed is to be cut out after the next step
        self._now: tuple[list[Tensor], Collection[str]] | None = None  # of a step that a gradient scaler may yet skip
        self._resting: set[str] | None = None  # layers that no step since the last look was of; None before any step
        self._restored: Mapping[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = None  # of a run that failed before it started
        if stage == "fit" and self.compact != "never":
            require_compactable(trainer, f"{type(self).__name__}(compact=...)")
        if stage == "fit" and self.policy.moves_entries:
            self._require_no_average(trainer)
        super().setup(trainer, pl_module, stage)
        require_before(trainer, self, AdapterPlacement)

    def _require_no_average(self, trainer: Trainer) -> None:
        """An average over time is of one entry only as long as an entry stays what it is."""
        for other in callbacks_of(trainer):
            if isinstance(other, COPIERS):
                raise MisconfigurationException(
                    f"{type(self.policy).__name__} moves entries, and {type(other).__name__} would average what is in "
                    "their old places with what is in the new ones. Leave the averaging out, or keep entries where "
                    "they are (regrow=0)."
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        budget = RankBudget.of(pl_module)
        if not budget:
            raise MisconfigurationException(
                f"{type(self).__name__} found no adapter to prune. Put AdapterInjection before it in the Trainer's "
                "callbacks, or call inject() on the module first."
            )
        if self.compact != "never":
            require_own(budget)
        self._count_steps(trainer, pl_module)
        self._steps = TakenSteps()
        self._seen = self._event_at = 0
        self._settled = False
        self._resting = None
        self.event_step = self._events = 0
        self.event_scores = {}
        self.policy.track(budget)

    def _count_steps(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        if not pl_module.automatic_optimization and trainer.max_steps == -1:
            raise MisconfigurationException(
                f"{type(pl_module).__name__} optimizes by hand, so only it knows how many optimizer steps an epoch "
                "has, and the rank schedule would run at the wrong pace. Set max_steps, counted over all optimizers."
            )
        if trainer.limit_train_batches == 0:
            raise MisconfigurationException(
                f"{type(self).__name__} has nothing to follow: limit_train_batches=0 leaves no optimizer step. "
                f"Raise it, or take {type(self).__name__} out."
            )
        if total == float("inf") or total < 1:
            raise MisconfigurationException(
                f"{type(self).__name__} needs the number of optimizer steps, and the Trainer expects {total}. Set "
                "max_steps, or max_epochs together with a data loader whose length is known."
            )
        totals = gather_objects(int(total))
        if len(set(totals)) > 1:
            raise MisconfigurationException(
                f"the processes expect different numbers of optimizer steps, {', '.join(map(str, totals))}, so their "
                "rank schedules would part. Give each as many batches as the others: leave use_distributed_sampler on, "
                "or set max_steps."
            )
        self.total_steps = int(total)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Learning-rate and batch-size finders train, and change the number of batches, after or before on_fit_start.
        self._count_steps(trainer, pl_module)
        for site in RankBudget.of(pl_module).values():
            site.gate.mask.grad = None
        # Loops are restored after on_fit_start, and global_step with them; under sharded strategies callbacks too.
        self._seen = trainer.global_step
        self._steps.watch(trainer, self._stepped)
        if self._restored is not None:
            state, self._restored = self._restored, None
            if state["step"] and state["total_steps"] != self.total_steps:
                rank_zero_warn(
                    f"This checkpoint's rank schedule was made for {state['total_steps']} optimizer steps and the "
                    f"Trainer now plans {self.total_steps}: the schedule follows the Trainer. Keep max_epochs, "
                    "max_steps, the batch size and accumulation as they were to resume exactly."
                )
            self.event_step, self._event_at = int(state["event_step"]), int(state["event_at"])
            self._settled, self._events = bool(state["settled"]), int(state["events"])
            self._steps.load_state_dict(state["steps"], pl_module.device)
            self._resting = set(state.get("resting", ())) or None
            self.policy.load_state_dict(state["policy"])
            # The file may be from between the optimizer's step and our look at it, or of a plan that was longer.
            self._seen = min(int(state["step"]), self._steps.taken(trainer.global_step))
            self._look(trainer, pl_module)
            # The file may be of a run that did not compact. Not at once: gradients of an open step are still to come.
            self._uncut = self._settled and self.compact != "never"
        if not self._observes(self._seen + 1):
            self._release()
            self._forget()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._settled:
            self.policy.before_step(self._seen + 1, self.total_steps)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        self._now = None
        importance = self.policy.importance
        if not self._steps.begin(trainer, optimizer):
            return
        resting = self._others(trainer, optimizer)
        self._resting = resting if self._resting is None else self._resting & resting
        if importance.reads != "gradients":
            return
        if not self._observes(self._steps.taken(trainer.global_step) + 1):
            return
        gradients = importance.gradients()
        scaler = scaler_of(trainer)
        if scaler is not None and gradients:
            # They are not the optimizer's, which are unscaled by now. `get_scale` would wait for the device.
            torch._foreach_div_(gradients, scaler.scale(torch.ones((), device=gradients[0].device)))
        if trainer.world_size > 1 and gradients:
            flat = trainer.strategy.reduce(torch.cat(gradients), reduce_op="mean")
            torch._foreach_copy_(gradients, list(flat.split([part.numel() for part in gradients])))
        now = importance.worth_now()
        if gradients:
            resting = set()  # what is not the optimizer's gathers from step to step, whoever takes it
        if scaler is not None and not gradients and unscales_itself(optimizer):
            # Worth was read off the optimizer's gradients, and it goes up with them as they are.
            torch._foreach_div_(now, scaler.scale(torch.ones((), device=now[0].device)))
        if scaler is None:
            self._fold(now, resting)
        else:
            self._now = now, resting  # until it is known whether the step is taken

    def _stepped(self, overflow: Tensor | None) -> None:
        step, self._now = self._now, None
        if step is not None:
            self._fold(*step, expect_overflow=True, skipped=overflow)

    def _others(self, trainer: Trainer, optimizer: Optimizer) -> set[str]:
        """Layers that other optimizers train: what their gradients hold now is of no step, or was counted at one."""
        if len(trainer.optimizers) < 2:
            return set()
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        sites = self.policy.budget.items()
        return {name for name, site in sites if not any(id(p) in own for _, p in site.adapter.own_parameters())}

    def _fold(self, now: list[Tensor], resting: Collection[str], **how: Any) -> None:
        """Take the worth of a step in; what is known of layers that the step was not of stays as it is."""
        importance = self.policy.importance
        if not resting:
            importance.fold(now, **how)
        elif len(resting) < len(self.policy.budget):
            views = [row for rows in importance.statistics().values() for name, row in rows.items() if name in resting]
            before = [row.clone() for row in views]
            importance.fold(now, **how)
            torch._foreach_copy_(views, before)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take in the optimizer steps since the last look, and choose components if one of them was an event."""
        importance, step = self.policy.importance, self._steps.taken(trainer.global_step)
        overflow = self._steps.look()
        fresh = step > self._seen  # else an accumulated micro-batch, or a step that was skipped
        if fresh and not self._settled:
            self.policy.after_steps(step - self._seen, step, self.total_steps, overflow)
        if fresh and importance.reads == "weights" and self._observes(self._seen + 1):
            self._fold(importance.worth_now(), self._resting or (), skipped=overflow)
        if fresh:
            self._resting = None
        ends = trainer.global_step >= self.total_steps  # the plan does, however many steps were skipped
        if self._due(step, ends):
            step -= self._steps.settle()
        due = self._due(step, ends)
        events = self._events_until(step)
        self._seen = step
        if fresh and self._uncut:
            self._uncut = False
            self._cut(trainer)
        if due:
            # Before masks are written: what has come apart must not be sealed.
            require_equal(pl_module, f"at the pruning event of step {trainer.global_step}")
            at = self.total_steps if ends else step
            # Every rank decides alike; rank 0's word is final all the same.
            masks = agreed(self.policy.decide(at, self.total_steps), trainer.strategy.root_device)
            self.policy.apply(masks, at, self.total_steps)
            follow_moves(trainer.optimizers, self.policy.moved())
            self.event_step, self._event_at = trainer.global_step, at
            self.event_scores = self.policy.importance.scores()
            before, self._events = self._events, self._events + max(1, events)
            self._settled = self.policy.is_final(at, self.total_steps)
            every = self.compact if isinstance(self.compact, int) else None
            if self._settled:
                self._release()
            if self.compact != "never" and (self._settled or (every and self._events // every > before // every)):
                self._cut(trainer)
            self._forget()

    def _cut(self, trainer: Trainer) -> None:
        """Cut what is closed out of parameters and optimizer state, and go on with what is left."""
        sites = self.policy.budget.items()
        kept = {name: site.adapter.kept(site.gate.mask.detach() != 0) for name, site in sites}
        if compact_in_training(trainer):
            self.policy.follow(RankBudget.of(trainer.lightning_module), kept)
            if self._settled:  # to follow is to track anew
                self._release()
                self._forget()

    def _due(self, step: int, ends: bool) -> bool:
        """Whether components are to be chosen now that so many steps were taken."""
        # Not `==`: a plan that became shorter has its last event behind it.
        if not self._settled and (ends or self.policy.is_final(step, self.total_steps)):
            return True
        return self._events_until(step) > 0

    def _events_until(self, step: int) -> int:
        """How many events the schedule has in the steps since the last look."""
        # More than one step if a module that optimizes by hand takes several.
        return sum(self.policy.is_event(each, self.total_steps) for each in range(self._seen + 1, step + 1))

    def _observes(self, step: int) -> bool:
        return self.policy.observes(step, self.total_steps)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        tried = trainer.fast_dev_run  # type: ignore[attr-defined]  # set by a connector
        if self._seen and not tried and not self._settled:
            rank_zero_warn(
                f"Training stopped at step {self._seen} of {self.total_steps}, before the rank schedule's last cut at "
                f"step {self.policy.schedule.window(self.total_steps)[1]}: the final budget is not reached. Resume "
                "from a checkpoint, or train on."
            )
        self._release()
        self._steps.release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()
        self._steps.release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._restored = None  # validation of a checkpoint loads it as well; a later fit is not its continuation

    def _release(self) -> None:
        self.policy.importance.release()

    def _forget(self) -> None:
        if self._settled:
            self.policy.importance.forget()

    def budget_now(self) -> int:
        """What may be spent after the last step that was taken, in the unit of the final budget."""
        return self.policy.budget_at(self.total_steps if self._settled else self._seen, self.total_steps)

    def budget_at_event(self) -> int:
        """What may be spent since the last event, in the unit of the final budget."""
        return self.policy.budget_at(self._event_at, self.total_steps)

    @property
    def settled(self) -> bool:
        """Whether the mask is final."""
        return self._settled

    def state_dict(self) -> dict[str, Any]:
        if self._restored is not None:
            return dict(self._restored)  # training has not started: others may save in on_exception
        if not self.total_steps:
            return {}
        self._seen -= self._steps.settle()
        resting = {"resting": sorted(self._resting)} if self._resting else {}
        return resting | {
            "total_steps": self.total_steps,
            "step": self._seen,
            "settled": self._settled,
            "event_step": self.event_step,
            "event_at": self._event_at,
            "events": self._events,
            "steps": self._steps.state_dict(),
            "policy": self.policy.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Callbacks are restored before or after on_fit_start, as the strategy has it: kept until training starts.
        self._restored = state_dict or None
