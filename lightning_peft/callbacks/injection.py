"""AdapterInjection: adapters are in place before the strategy wraps the module."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.callbacks.order import callbacks_of, require_before
from lightning_peft.rank.budget import RankBudget
from lightning_peft.seams import when_built
from lightning_peft.surgery import Injection, inject

# They copy the module in their setup and later meet it parameter by parameter. The second is not in every release.
COPIERS = tuple(
    vars(callbacks)[name] for name in ("StochasticWeightAveraging", "WeightAveraging") if hasattr(callbacks, name)
)


class AdapterInjection(Callback):
    """Inject adapters into any LightningModule, at the one safe moment, and say what was done.

    In `setup` if the module's layers exist by then, else right after its `setup` or `configure_model`: always before
    the strategy wraps the module and before `configure_optimizers`. For every entry point of the Trainer, and once: a
    module that has adapters is left as it is, so users may also call :func:`lightning_peft.inject` themselves.

    Args:
        adapter: builds an adapter around a layer: `partial(LoRA, rank=8)`.
        targets: patterns of the layers to adapt; see :func:`lightning_peft.inject`.
        train: patterns of what stays trainable beside the adapters; see :func:`lightning_peft.inject`.
        verbose: print what was adapted.

    Raises:
        MisconfigurationException: a callback that copies the module's weights comes before this one; or, at the start
            of fit, an adapter's parameter is in no optimizer.
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for other in callbacks_of(trainer):
            if isinstance(other, COPIERS):
                require_before(trainer, other, AdapterInjection)
        when_built(pl_module, self._inject)

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
        self._unchecked = True

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
