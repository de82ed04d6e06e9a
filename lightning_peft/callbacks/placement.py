"""AdapterPlacement: adapters are in place before the strategy wraps the module, whoever puts them there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_peft.agreement import constants, leave_constants, small
from lightning_peft.callbacks.order import callbacks_of, require_before
from lightning_peft.callbacks.preflight import Preflight
from lightning_peft.distributed import average_gradients, broadcast, world_size
from lightning_peft.rank.budget import RankBudget
from lightning_peft.regularizers.posterior import TRAINED
from lightning_peft.seams import when_built, wrap_method
from lightning_peft.strategies import (
    averaged,
    clip_by_norm,
    clip_by_value,
    flattens,
    is_sharded,
    keep_masks_wide,
    keep_whole,
)
from lightning_peft.surgery.layers import adapters, is_flattened
from lightning_peft.surgery.refresh import follow

# They copy the module in their setup and later meet it parameter by parameter. The second is not in every release.
COPIERS = tuple(
    vars(callbacks)[name] for name in ("StochasticWeightAveraging", "WeightAveraging") if hasattr(callbacks, name)
)


class AdapterPlacement(Preflight, ABC):
    """What has adapters in place at the one safe moment, and comes before all callbacks that look for them.

    In `setup` if the module's layers exist by then, else right after its `setup` or `configure_model`: always before
    the strategy wraps the module and before `configure_optimizers`, for every entry point of the Trainer.

    Under FSDP1 and FSDP2 adapters, and what is trained beside them, stay whole on every process: the strategy is told
    so, their start is process 0's, and their gradients are averaged once per optimizer step.
    """

    averages_gradients = True

    def __init__(self) -> None:
        self._unchecked = False
        self._averaged: list[nn.Parameter] = []
        self._undo: list[Callable[[], object]] = []

    @abstractmethod
    def _place(self, module: LightningModule) -> None:
        """Have the adapters in place; idempotent."""

    @abstractmethod
    def _require_alone(self, trainer: Trainer) -> None:
        """Refuse a second callback of the same kind."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._require_alone(trainer)
        for other in callbacks_of(trainer):
            if isinstance(other, AdapterPlacement) and type(other) is not type(self):
                raise MisconfigurationException(
                    f"{type(self).__name__} and {type(other).__name__} are both among the Trainer's callbacks: one "
                    "puts adapters in, the other takes on those that a PEFT model has. Keep one of the two."
                )
            if isinstance(other, COPIERS):
                require_before(trainer, other, AdapterPlacement)
                if stage == "fit" and is_sharded(trainer.strategy):
                    raise MisconfigurationException(
                        f"{type(other).__name__} averages a copy of the whole module, and "
                        f"{type(trainer.strategy).__name__} shards it. Average on one device or under DDP."
                    )
            if isinstance(other, callbacks.ModelPruning):
                raise MisconfigurationException(
                    "ModelPruning puts masked weights in place of those that adapters stand on, and the two cannot be "
                    "combined. Prune ranks with RankPruning, or call merge() after training and prune then."
                )
        when_built(pl_module, partial(self._place_unwrapped, callbacks_of(trainer)))
        when_built(pl_module, lambda module: keep_whole(trainer.strategy, module))
        when_built(pl_module, leave_constants)
        when_built(pl_module, partial(_require_weights, trainer))
        if is_sharded(trainer.strategy) and not self._undo:
            self._undo = [
                wrap_method(trainer.precision_plugin, "clip_grad_by_norm", clip_by_norm),
                wrap_method(trainer.precision_plugin, "clip_grad_by_value", clip_by_value),
                wrap_method(trainer.strategy, "setup", keep_masks_wide),
            ]

    def _place_unwrapped(self, others: Sequence[Callback], module: LightningModule) -> None:
        if not adapters(module) and any(map(is_flattened, module.parameters())):
            raise MisconfigurationException(
                f"configure_model of {type(module).__name__} has wrapped its layers in FSDP1, and adapters must be in "
                "before that. Leave the wrapping to FSDPStrategy, or call inject there first and wrap with "
                "ignored_states=small_parameters(self)."
            )
        for other in others:
            if isinstance(other, Preflight):
                other.before_adapters(module)
        self._place(module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._averaged = averaged(trainer.strategy, pl_module)
        if self._averaged:
            broadcast(list(small(pl_module).values()))
        if world_size() > 1 and (found := constants(pl_module)):
            broadcast(list(found.values()))
        self._undo.append(follow(pl_module, trainer.optimizers))
        self._unchecked = True

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before gradients are unscaled and looked at: an overflow on one process is then one on all.
        if self._averaged and not (pl_module.automatic_optimization and trainer.fit_loop._should_accumulate()):
            average_gradients(self._averaged)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Once: an adapter that took no part in the first loss stands where nobody calls it or reads its weight.
        if not self._unchecked or all(p.grad is None for p in pl_module.parameters()):
            return  # done, or there was no loss yet: training_step may return None
        self._unchecked = False
        idle = []
        for name, site in RankBudget.of(pl_module).items():
            trained = [p for _, p in site.adapter.own_parameters() if p.requires_grad]
            if trained and all(p.grad is None for p in trained):
                idle.append(name)
        if idle:
            rank_zero_warn(
                f"{len(idle)} adapters took no part in the first loss: {', '.join(idle[:5])}"
                f"{', ...' if len(idle) > 5 else ''}. The model neither calls these layers nor reads their weight "
                "from them (it may hold the old layers elsewhere, or skip them): leave them out of the targets. Or it "
                "recomputes them by re-entrant checkpointing, which gives no gradient: set use_reentrant=False."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()
        if trainer.state.fn == "fit" and trainer.global_step > 0:
            setattr(pl_module, TRAINED, True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not when training starts: what a learning-rate finder has trained is put back.
        setattr(pl_module, TRAINED, True)

    def _release(self) -> None:
        self._averaged = []
        while self._undo:
            self._undo.pop()()


def _require_weights(trainer: Trainer, module: LightningModule) -> None:
    """Refuse adapters that write into weights where there are none to write into.

    Raises:
        MisconfigurationException: the strategy makes flat slices of them.
    """
    name = next((name for name, adapter in adapters(module).items() if adapter.writes_base), None)
    if name is not None and flattens(trainer.strategy):
        raise MisconfigurationException(
            f"the adapter at {name!r} writes into its layer's weight, which {type(trainer.strategy).__name__} has in "
            "flat slices. Use strategy='ddp', or FSDP2: ModelParallelStrategy(data_parallel_size=<all processes>, "
            "tensor_parallel_size=1)."
        )
