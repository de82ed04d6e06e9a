"""AdapterInjection: adapters are in place before the strategy wraps the module."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.callbacks.order import callbacks_of, require_before
from lightning_peft.distributed import average_gradients, broadcast
from lightning_peft.rank.budget import RankBudget
from lightning_peft.seams import when_built, wrap_method
from lightning_peft.strategies import (
    averaged,
    clip_by_norm,
    clip_by_value,
    is_sharded,
    keep_masks_wide,
    keep_whole,
    refuse_other_trainer,
    require_equal,
    require_supported,
    require_synchronised,
    small,
)
from lightning_peft.surgery import Injection, inject

# They copy the module in their setup and later meet it parameter by parameter. The second is not in every release.
_COPIERS = tuple(
    vars(callbacks)[name] for name in ("StochasticWeightAveraging", "WeightAveraging") if hasattr(callbacks, name)
)


class AdapterInjection(Callback):
    """Inject adapters into any LightningModule, at the one safe moment, and say what was done.

    In `setup` if the module's layers exist by then, else right after its `setup` or `configure_model`: always before
    the strategy wraps the module and before `configure_optimizers`. For every entry point of the Trainer, and once: a
    module that has adapters is left as it is, so users may also call :func:`lightning_peft.inject` themselves.

    Under FSDP1 and FSDP2 adapters, and what is trained beside them, stay whole on every process: the strategy is told
    so, their start is process 0's, and their gradients are averaged once per optimizer step. When training starts, and
    once more after the first step, it is checked that all of them are trained and the same everywhere.

    Args:
        adapter: builds an adapter around a layer: `partial(LoRA, rank=8)`.
        targets: patterns of the layers to adapt; see :func:`lightning_peft.inject`.
        train: patterns of what stays trainable beside the adapters; see :func:`lightning_peft.inject`.
        verbose: print what was adapted.

    Raises:
        MisconfigurationException: the strategy is not supported; a callback that copies the module's weights comes
            before this one, or the strategy shards them; or, at the start of fit, an adapter's parameter is in no
            optimizer or not synchronised.
        RuntimeError: after the first step, adapters are not the same on all processes.
    """

    def __init__(
        self,
        adapter: AdapterFactory,
        targets: Sequence[str] | None = None,
        train: Sequence[str] | None = None,
        verbose: bool = True,
    ) -> None:
        self.adapter = adapter
        self.targets = targets
        self.train = train
        self.verbose = verbose
        self.injection: Injection | None = None
        self._unchecked = False
        self._uncompared = False
        self._averaged: list[nn.Parameter] = []
        self._undo: list[Callable[[], object]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_other_trainer(trainer)
        require_supported(trainer.strategy)
        for other in callbacks_of(trainer):
            if isinstance(other, _COPIERS):
                require_before(trainer, other, AdapterInjection)
                if stage == "fit" and is_sharded(trainer.strategy):
                    raise MisconfigurationException(
                        f"{type(other).__name__} averages a copy of the whole module, and "
                        f"{type(trainer.strategy).__name__} shards it. Average on one device or under DDP."
                    )
        when_built(pl_module, self._inject)
        when_built(pl_module, lambda module: keep_whole(trainer.strategy, module))
        if is_sharded(trainer.strategy) and not self._undo:
            self._undo = [
                wrap_method(trainer.precision_plugin, "clip_grad_by_norm", clip_by_norm),
                wrap_method(trainer.precision_plugin, "clip_grad_by_value", clip_by_value),
                wrap_method(trainer.strategy, "setup", keep_masks_wide),
            ]

    def _inject(self, module: LightningModule) -> None:
        if any(isinstance(child, Adapter) for child in module.modules()):
            return
        self.injection = inject(module, self.adapter, self.targets, self.train)
        if self.verbose:
            rank_zero_info(str(self.injection))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        held = {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
        for name, site in RankBudget.of(pl_module).items():
            for part, parameter in site.adapter.own_parameters():
                if parameter.requires_grad and id(parameter) not in held:
                    raise MisconfigurationException(
                        f"{part!r} of the adapter at {name!r} is in no optimizer, so it would not be trained. Let "
                        "configure_optimizers take every parameter that requires grad, or add the adapters' to a group."
                    )
        self._averaged = averaged(trainer.strategy, pl_module)
        if self._averaged:
            broadcast(list(small(pl_module).values()))
        self._unchecked = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        require_synchronised(trainer.strategy, pl_module)
        self._uncompared = trainer.world_size > 1

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Before gradients are unscaled and looked at: an overflow on one process is then one on all.
        if self._averaged and not (pl_module.automatic_optimization and trainer.fit_loop._should_accumulate()):
            average_gradients(self._averaged)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._uncompared and trainer.global_step:
            self._uncompared = False
            require_equal(pl_module, "after the first step")

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
                "from them (it may hold the old layers elsewhere, or skip them): leave them out of the targets."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def _release(self) -> None:
        self._averaged = []
        while self._undo:
            self._undo.pop()()
