"""AdamW with linear warm-up and decay over the trainer's own number of steps."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.optim.lr_scheduler import LambdaLR

from lightning_peft.surgery.rates import split_by_rate

# Where PyTorch has a fused AdamW kernel. It matters with adapters: hundreds of small tensors, a dozen kernels each.
_FUSED_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu"})

Schedule = Literal["linear", "constant"]
"""What learning rates do after warm-up: fall to 0 linearly, or stay."""


def adamw(
    module: LightningModule,
    groups: list[dict[str, Any]],
    weight_decay: float,
    warmup: float,
    schedule: Schedule,
    advice: str,
) -> OptimizerLRSchedulerConfig:
    """What `configure_optimizers` returns: AdamW on the groups, each at its own peak rate.

    Where an adapter asks for another rate for some of its parameters, they are a group of their own.

    Args:
        module: attached to a trainer, which knows the number of steps.
        groups: parameter groups with their learning rates.
        weight_decay: AdamW's decoupled weight decay, for all groups.
        warmup: share of the optimizer steps in which the rates rise from 0.
        schedule: what they do then.
        advice: what else than adapters could be trained, for the error's sentence.

    Raises:
        MisconfigurationException: nothing is trainable, or the number of steps is not known.
    """
    name = type(module).__name__
    if not groups:
        raise MisconfigurationException(
            f"{name} has no trainable parameter: every parameter has requires_grad=False. "
            f"Add an AdapterInjection callback, or {advice}."
        )
    total = module.trainer.estimated_stepping_batches
    if total == float("inf"):
        raise MisconfigurationException(
            f"{name} needs the number of optimizer steps for its decay, and the trainer has no limit: "
            "set Trainer(max_epochs=...) or Trainer(max_steps=...)."
        )
    groups = split_by_rate(module, groups)
    devices = {p.device.type for group in groups for p in group["params"]}
    optimizer = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=devices <= _FUSED_DEVICES)
    # A fused kernel would take float16's scale out of gradients itself, and Lightning refuses to clip those in mixed
    # precision, bfloat16 too. Both the scaler and Lightning look at this flag of torch's: unscale before the step.
    optimizer._step_supports_amp_scaling = False
    rising, total = round(warmup * total), int(total)

    def share(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)  # not step / rising: a first step at rate 0 would be a wasted batch
        if schedule == "constant":
            return 1.0
        return max(0.0, (total - step) / max(1, total - rising))

    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": LambdaLR(optimizer, share), "interval": "step"},
    }


def require_schedule(warmup: float, schedule: Schedule) -> None:
    """Check how learning rates are to move.

    Raises:
        ValueError: warmup is outside [0, 1), or schedule is unknown.
    """
    if schedule not in get_args(Schedule):
        raise ValueError(f"schedule={schedule!r}: choose 'linear' (to 0) or 'constant'.")
    if not 0.0 <= warmup < 1.0:
        raise ValueError(f"warmup={warmup}: it is a share of the optimizer steps, at least 0 and below 1.")
