"""Compaction under a Trainer: where it may happen, and what the strategy has to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from lightning_peft.callbacks.order import callbacks_of
from lightning_peft.callbacks.placement import COPIERS
from lightning_peft.callbacks.regularization import Regularization
from lightning_peft.compaction import compact_training
from lightning_peft.rank.budget import RankBudget
from lightning_peft.resizing import resized
from lightning_peft.strategies import can_resize, unwrapped


def require_compactable(trainer: Trainer, asked: str = "RankPruning(compact=...)") -> None:
    """Check that nothing in the Trainer holds on to the shapes of parameters.

    Args:
        trainer: the Trainer.
        asked: who wants to change them.

    Raises:
        MisconfigurationException: the strategy shards or wraps parameters in a way of its own, a callback keeps a copy
            of the weights, or checkpoints would be written that nobody can load.
    """
    from lightning_peft.callbacks.checkpoint import AdapterCheckpoint  # which needs `fitting`

    strategy = trainer.strategy
    if not can_resize(strategy):
        raise MisconfigurationException(
            f"{asked} cuts parameters while training, and {type(strategy).__name__} has them sharded "
            "or wrapped in a way that does not allow it. Use compact='never': compaction happens at export there "
            "(lightning_peft.compact, to_hf_peft)."
        )
    others = callbacks_of(trainer)
    for other in others:
        if isinstance(other, COPIERS):
            raise MisconfigurationException(
                f"{asked} changes the shapes of parameters, and {type(other).__name__} keeps a copy "
                "of the weights in their old shapes. Use compact='never', or remove the callback."
            )
        if isinstance(other, Regularization):
            noisy = next((name for name, term in other.terms.items() if term.perturbs), None)
            if noisy is not None:
                raise MisconfigurationException(
                    f"{asked} cuts parameters while training, and the term {noisy!r} has a posterior over all of them: "
                    "the divergence counts closed components too. Use compact='never', and cut after training "
                    "(lightning_peft.compact, to_hf_peft)."
                )
    if trainer.checkpoint_callbacks and not any(isinstance(other, AdapterCheckpoint) for other in others):
        raise MisconfigurationException(
            f"{asked} changes the shapes of parameters, and without AdapterCheckpoint a checkpoint "
            "does not say so: it could not be loaded again. Add AdapterCheckpoint() to the callbacks, or give the "
            "Trainer enable_checkpointing=False."
        )


def require_own(budget: RankBudget) -> None:
    """Check that the adapters' tensors are ours to cut.

    Raises:
        MisconfigurationException: they live in another library's layers.
    """
    if any(site.adapter.hosted for site in budget.values()):
        raise MisconfigurationException(
            "RankPruning(compact=...) cuts parameters while training, and those of an adopted PEFT model are PEFT's "
            "and stay. Use compact='never': to_hf_peft(model, folder, mode='compact') writes them at their true ranks."
        )


def compact_in_training(trainer: Trainer) -> bool:
    """Cut closed components out of the module and its optimizers, right after an optimizer step.

    Under DDP every rank does it at the same step with the same masks.

    Returns:
        Whether there was anything to cut.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    budget = RankBudget.of(module)
    size = _parameters(module)
    masks = torch.cat([site.gate.mask.detach() for site in budget.values()]) != 0
    if bool(masks.all()):
        return False
    if not bool(masks.any()):
        # Not a reason to break a run off, maybe at its last step: with the masks it can be saved.
        rank_zero_info(f"Nothing was cut at step {trainer.global_step}: every component of every adapter is closed.")
        return False
    with unwrapped(strategy):
        compact_training(module, trainer.optimizers)
    rank_zero_info(
        f"Compacted at step {trainer.global_step}: {size:,} adapter parameters are {_parameters(module):,} now."
    )
    return True


def fitting(module: LightningModule, checkpoint: Mapping[str, Any], source: str) -> AbstractContextManager[None]:
    """Bring the adapters to the sizes in a checkpoint, where the strategy loads it while shapes can still change."""
    if module.trainer.strategy.restore_checkpoint_after_setup:
        return nullcontext()  # sharded by now: sizes that differ are told by what checks the checkpoint
    return resized(module, checkpoint, source)


def _parameters(module: LightningModule) -> int:
    return sum(p.numel() for site in RankBudget.of(module).values() for _, p in site.adapter.own_parameters())
