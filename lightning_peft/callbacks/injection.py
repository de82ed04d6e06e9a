"""AdapterInjection: adapters are in place before the strategy wraps the module."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.callbacks.order import require_one
from lightning_peft.callbacks.placement import AdapterPlacement
from lightning_peft.surgery.injection import Injection, inject, require_factory
from lightning_peft.surgery.layers import adapters


class AdapterInjection(AdapterPlacement):
    """Inject adapters into any LightningModule, at the one safe moment, and say what was done.

    In `setup` if the module's layers exist by then, else right after its `setup` or `configure_model`: always before
    the strategy wraps the module and before `configure_optimizers`. For every entry point of the Trainer, and once: a
    module that has adapters is left as it is, so users may also call :func:`lightning_peft.inject` themselves.

    Under FSDP1 and FSDP2 adapters, and what is trained beside them, stay whole on every process: the strategy is told
    so, their start is process 0's, and their gradients are averaged once per optimizer step. When training starts, and
    after the first step of every epoch, it is checked that all of them are trained and the same everywhere.

    Args:
        adapter: builds an adapter around a layer: `partial(LoRA, rank=8)`.
        targets: patterns of the layers to adapt; see :func:`lightning_peft.inject`.
        train: patterns of what stays trainable beside the adapters; see :func:`lightning_peft.inject`.
        verbose: print what was adapted.

    Raises:
        TypeError: `adapter` builds nothing.
        MisconfigurationException: the strategy is not supported; a callback that copies the module's weights comes
            before this one, or the strategy shards them; or, when training starts, an adapter's parameter is in no
            optimizer or not synchronised.
        RuntimeError: after a step, adapters are not the same on all processes.
    """

    def __init__(
        self,
        adapter: AdapterFactory,
        targets: Sequence[str] | None = None,
        train: Sequence[str] | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        require_factory(adapter)
        self.adapter = adapter
        self.targets = targets
        self.train = train
        self.verbose = verbose
        self.injection: Injection | None = None

    def _require_alone(self, trainer: Trainer) -> None:
        require_one(trainer, AdapterInjection, "name all layers in one: AdapterInjection(adapter, targets=[...])")

    def _place(self, module: LightningModule) -> None:
        if adapters(module):
            return
        self.injection = inject(module, self.adapter, self.targets, self.train)
        if self.verbose:
            rank_zero_info(str(self.injection))
