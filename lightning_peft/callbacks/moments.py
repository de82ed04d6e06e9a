"""MomentEstimation: how far losses lie apart for weights around those that training starts from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from lightning_peft.arguments import require_integer
from lightning_peft.callbacks.apart import training_batches
from lightning_peft.callbacks.order import require_before
from lightning_peft.callbacks.preflight import Preflight
from lightning_peft.callbacks.regularization import Regularization
from lightning_peft.callbacks.undisturbed import undisturbed
from lightning_peft.distributed import gather_objects
from lightning_peft.regularizers.pac_bayes import PACBayes
from lightning_peft.regularizers.pac_tuning import PACTuning
from lightning_peft.regularizers.posterior import Posterior


class MomentEstimation(Preflight):
    """Before the first step, measure K of :class:`~lightning_peft.regularizers.pac_tuning.PACTuning`.

    For each of eight widths, weights are drawn around the start, and the loss of every example is taken with each of
    these: from the logits that `training_step` returns and the batch's labels, or example by example. Without dropout
    and without a trace: training goes on as if it had not been. A run that is resumed does not measure again.

    Args:
        draws: weights drawn at each width.
        examples: how many examples are looked at, of all processes together.
        seed: of the draws.

    Raises:
        TypeError: an argument is no integer.
        ValueError: one is too small.
        MisconfigurationException: no term's objective is PACTuning, or the callbacks are in the wrong order.

    Reference:
        Liu et al., PAC-tuning, EMNLP 2023 (its code: ten draws, the whole training set of 100 examples).
    """

    def __init__(self, draws: int = 10, examples: int = 100, seed: int = 0) -> None:
        for name, value, least in (("draws", draws, 1), ("examples", examples, 2)):
            require_integer(name, value)
            if value < least:
                raise ValueError(f"{name} must be at least {least}. Got {value}.")
        require_integer("seed", seed)
        self.draws, self.examples, self.seed = draws, examples, seed

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require_before(trainer, self, Regularization)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if not list(_found(pl_module)):
            raise MisconfigurationException(
                "MomentEstimation measures for a term whose objective is PACTuning, and there is none. Add one: "
                "Regularization({'pac_tuning': PACBayes(PACTuning(), risk='loss', prior='per_tensor')})."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        for objective, posterior in _found(pl_module):
            if not objective.is_measured:
                objective.measured(self._losses(trainer, pl_module, objective.widths.tolist(), posterior))

    def _losses(self, trainer: Trainer, module: LightningModule, widths: list[float], posterior: Posterior) -> Tensor:
        """(widths, draws, examples)."""
        context = trainer.precision_plugin.train_step_context
        with undisturbed(trainer, module), torch.no_grad():
            module.eval()
            batches = list(self._batches(trainer, module))
            found = []
            for width in widths:
                # The same draws at every width, and on every process.
                device = posterior.offset.device
                generator = torch.Generator(device).manual_seed(self.seed)
                for _ in range(self.draws):
                    with posterior.widened(module, width, generator), context():
                        found.append(torch.cat([_each(module, batch, i) for i, batch in enumerate(batches)]).cpu())
        every = torch.cat(gather_objects(torch.stack(found)), 1)
        return every.view(len(widths), self.draws, -1)

    def _batches(self, trainer: Trainer, module: LightningModule) -> Iterator[Any]:
        """Batches of the first examples, as many on every process."""
        left = -(-self.examples // trainer.world_size)
        for batch in training_batches(trainer):
            count = min(left, _count(batch))
            count = min(gather_objects(count))
            if not count:
                return
            left -= count
            batch = tree_map(lambda leaf, n=count: leaf[:n] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)
            batch = trainer.precision_plugin.convert_input(batch)
            batch = module._on_before_batch_transfer(batch, dataloader_idx=0)
            yield trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _found(module: nn.Module) -> Iterator[tuple[PACTuning, Posterior]]:
    for child in module.modules():
        if isinstance(child, PACBayes) and isinstance(child.objective, PACTuning) and child.posterior is not None:
            yield child.objective, child.posterior


def _count(batch: Any) -> int:
    return next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 0)


def _each(module: LightningModule, batch: Any, index: int) -> Tensor:
    """The loss of every example of a batch: (examples,)."""
    outputs = _step(module, batch, index)
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
    if isinstance(logits, Tensor) and isinstance(labels, Tensor) and labels.shape == logits.shape[:1]:
        return nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    found = []
    for i in range(_count(batch)):
        row = tree_map(lambda leaf, i=i: leaf[i : i + 1] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)
        outputs = _step(module, row, index)
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        found.append(loss.float().reshape(()))
    return torch.stack(found)


def _step(module: LightningModule, batch: Any, index: int) -> Any:
    # The class's own: the one on the instance has the term's noise around it.
    step = type(module).training_step
    indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    return step(module, batch, index) if indexed else step(module, batch)
