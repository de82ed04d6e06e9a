"""Preflight: what all our callbacks check, so that a wrong set-up is told and not trained."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_peft.agreement import require_alike, require_equal
from lightning_peft.callbacks.order import callbacks_of
from lightning_peft.distributed import together
from lightning_peft.rank.budget import clean_name
from lightning_peft.strategies import (
    averaged,
    require_supported,
    require_synchronised,
    reshard,
)
from lightning_peft.surgery.layers import adapters, trained
from lightning_peft.surgery.rates import not_followed


class Preflight(Callback):
    """What each of our callbacks checks; where there are several, the first in the Trainer's list does it.

    When training starts: adapters are there on every process, each is in an optimizer, and the strategy keeps it the
    same everywhere. After the first step of every epoch: so it is, bit for bit. What fails on one process is raised on
    all of them, so that none waits for another.
    """

    averages_gradients: ClassVar[bool] = False
    """Whether this callback averages the gradients of what a sharded strategy leaves whole."""

    _compared: int | None = None
    """The step after which processes are compared again; ``None`` until the next epoch."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_other_package(trainer)
        require_supported(trainer.strategy)

    def before_adapters(self, module: LightningModule) -> None:
        """See the module before adapters are put in, or with those that it has; for every entry point, repeatedly."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._goes_first(trainer):
            together(lambda: _require_averaged(trainer, pl_module))
            together(lambda: require_synchronised(trainer.strategy, pl_module))
            require_alike(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._goes_first(trainer):
            together(lambda: require_trained(trainer, pl_module))
            together(lambda: _require_thawed(pl_module))
            together(lambda: require_synchronised(trainer.strategy, pl_module))
            _warn_of_untrained(trainer, pl_module)
            _warn_of_rates(trainer, pl_module)
            self._compared = trainer.global_step  # a run that goes on within an epoch has no start of one

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._goes_first(trainer):
            reshard(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._goes_first(trainer):
            reshard(pl_module)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._goes_first(trainer):
            self._compared = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._compared is not None and trainer.global_step > self._compared:
            # By now every other callback has done what it does when training or an epoch starts.
            self._compared = None
            together(lambda: require_trained(trainer, pl_module))
            together(lambda: require_synchronised(trainer.strategy, pl_module))
            require_equal(pl_module, f"after step {trainer.global_step}")

    def _goes_first(self, trainer: Trainer) -> bool:
        return next(c for c in callbacks_of(trainer) if isinstance(c, Preflight)) is self


def refuse_other_package(trainer: Trainer) -> None:
    """Refuse whatever comes from `pytorch_lightning`, whose classes `lightning.pytorch` knows only by half.

    Raises:
        MisconfigurationException: the Trainer, one of its callbacks or one of its loggers does.
    """
    for part in (trainer, *callbacks_of(trainer), *trainer.loggers):
        if any(kind.__module__.partition(".")[0] == "pytorch_lightning" for kind in type(part).__mro__):
            raise MisconfigurationException(
                f"{type(part).__name__} is from `pytorch_lightning`, and lightning_peft works with "
                "`lightning.pytorch`: import Trainer, LightningModule, callbacks and loggers from there, all of them."
            )


def require_trained(trainer: Trainer, module: LightningModule) -> None:
    """Check that what adapters train is in an optimizer.

    Raises:
        MisconfigurationException: it is not.
    """
    held = optimized(trainer)
    for name, adapter in adapters(module).items():
        for part, parameter in adapter.own_parameters():
            if parameter.requires_grad and id(parameter) not in held:
                raise MisconfigurationException(
                    f"{part!r} of the adapter at {name!r} is in no optimizer, so it would not be trained. Let "
                    "configure_optimizers take every parameter that requires grad, or add the adapters' to a group."
                )


def _require_thawed(module: LightningModule) -> None:
    # Only when training starts: later a user may rest the adapters for a while.
    found = {name: adapter for name, adapter in adapters(module).items() if adapter.trained}
    if found and not any(p.requires_grad for adapter in found.values() for _, p in adapter.own_parameters()):
        raise MisconfigurationException(
            f"the adapters of {type(module).__name__} are all frozen, so they would not be trained. Something froze "
            "them after they were injected (a freezing callback, freeze(), requires_grad_(False)): do that before, or "
            "leave it to AdapterInjection."
        )


def _warn_of_untrained(trainer: Trainer, module: LightningModule) -> None:
    """Warn of what was kept trainable beside the adapters and will not be trained."""
    found, held = adapters(module), optimized(trainer)
    if not found:
        return
    own = {id(p) for adapter in found.values() for _, p in adapter.own_parameters()}
    idle = [clean_name(n) for n, p in trained(module).items() if p.requires_grad and id(p) not in held | own]
    if idle:
        others = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
        rank_zero_warn(
            f"{idle[0]!r}{others} was left trainable beside the adapters and is in no optimizer, so it is not "
            "trained. Let configure_optimizers take every parameter that requires grad, or freeze it: train=[]."
        )


def _warn_of_rates(trainer: Trainer, module: LightningModule) -> None:
    """Warn of an adapter that asks for several rates, and has one for all it trains."""
    found = not_followed(module, [group for optimizer in trainer.optimizers for group in optimizer.param_groups])
    if found is not None:
        name, part, rate = found
        rank_zero_warn(
            f"the adapter at {name!r} asks for {rate:g} times the learning rate for its {part!r}, and the optimizer "
            "has one rate for all that it trains. Pass the groups of configure_optimizers through "
            "lightning_peft.surgery.split_by_rate(self, groups), or set the adapter's argument `rate` to 1."
        )


def _require_averaged(trainer: Trainer, module: LightningModule) -> None:
    if any(isinstance(c, Preflight) and c.averages_gradients for c in callbacks_of(trainer)):
        return
    if adapters(module) and averaged(trainer.strategy, module):
        raise MisconfigurationException(
            f"under {type(trainer.strategy).__name__} nobody averages the adapters' gradients. Put AdapterInjection "
            "first in the Trainer's callbacks; adapters that are there it leaves as they are."
        )


def optimized(trainer: Trainer) -> set[int]:
    """Ids of the parameters that an optimizer holds."""
    return {id(p) for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]}
