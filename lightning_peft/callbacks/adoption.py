"""Adoption: a module's PEFT model gets gates before the strategy wraps it."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.callbacks.order import require_one
from lightning_peft.callbacks.peft_losses import PeftLosses
from lightning_peft.callbacks.placement import AdapterPlacement
from lightning_peft.interop.adoption import AdoptionReport, adopt, release
from lightning_peft.seams import when_built
from lightning_peft.surgery.layers import adapters


class Adoption(AdapterPlacement):
    """Adopt the PEFT model inside any LightningModule; stands where AdapterInjection would in the Trainer's callbacks.

    A module that was adopted already is left as it is. See :func:`lightning_peft.adopt` for what adoption does, and
    :class:`~lightning_peft.callbacks.placement.AdapterPlacement` for when.

    Args:
        adapter_name: the PEFT adapter that gets gates; ``None`` for the active one.
        losses: add the losses of PEFT's methods to the training loss, each once and logged as `loss/<name>`: KaSA's,
            MonteCLoRA's, AdaLoRA's orthogonality. Turn it off where `training_step` adds them itself.
        release: fold the masks into PEFT's tensors and take the gates off when a fit has ended.
        verbose: print what was adopted.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`lightning_peft.adopt` does.
        MisconfigurationException: there is a second such callback, or AdapterInjection; or what
            :class:`~lightning_peft.AdapterInjection` refuses.
    """

    def __init__(
        self, adapter_name: str | None = None, losses: bool = True, release: bool = False, verbose: bool = True
    ) -> None:
        super().__init__()
        self.adapter_name = adapter_name
        self.losses = losses
        self.release = release
        self.verbose = verbose
        self.report: AdoptionReport | None = None
        self._losses = PeftLosses()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._losses.remove()  # of a run that failed before it started
        if self.losses:
            when_built(pl_module, lambda module: self._losses.add(trainer, module, stage))

    def _require_alone(self, trainer: Trainer) -> None:
        require_one(trainer, Adoption, "one adopts the whole module")

    def _place(self, module: LightningModule) -> None:
        found = adapters(module)
        if found and all(adapter.hosted for adapter in found.values()):
            return
        self.report = adopt(module, self.adapter_name)
        if self.verbose:
            rank_zero_info(str(self.report))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._losses.remove()
        if self.release and stage == "fit":
            release(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._losses.remove()
