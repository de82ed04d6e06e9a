"""Which optimizer steps were taken: the Trainer's count has those in it that were skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer


class TakenSteps:
    """Count the optimizer steps that were skipped, without a device sync per step.

        taken = trainer.global_step - skipped

    A step is skipped where a gradient scaler finds a gradient that is not finite, or where there is no gradient at all
    because `training_step` returned None. The Trainer counts both.

    A scaler does not call an optimizer whose step it skips. Only a fused optimizer is called all the same, and decides
    on the device: its skipped steps are counted there, and `taken` is an upper bound until :meth:`settle` reads them.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._open: int | None = None  # the Trainer's count when a step began that is not known to be taken
        self._on_device: Tensor | None = None  # skipped there and not read yet
        self._fresh: Tensor | None = None  # (2,): skipped there since the last look; 1 if none since was taken
        self._hooks: list[Any] = []

    def watch(self, trainer: Trainer, then: Callable[[Tensor | None], None]) -> None:
        """Watch the steps that a scaler may skip; `then(overflow)` is called right after each that it did not.

        `overflow` is None, or a number on the device that is not 0 if a fused optimizer skipped the step after all.
        """
        self.release()
        if scaler_of(trainer) is None:
            return

        def stepped(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            self._open = None
            overflow: Tensor | None = getattr(optimizer, "found_inf", None)
            if overflow is not None:
                overflow = (overflow != 0).float().reshape(())
                count, only = (0, 1) if self._fresh is None else self._fresh.unbind()
                self._fresh = torch.stack([count + overflow, only * overflow])
            then(overflow)

        self._hooks = [optimizer.register_step_post_hook(stepped) for optimizer in trainer.optimizers]

    def release(self) -> None:
        """Undo what :meth:`watch` did; the count stays."""
        while self._hooks:
            self._hooks.pop().remove()

    def begin(self, trainer: Trainer, optimizer: Optimizer) -> bool:
        """A step begins; False if it will be skipped because there is no gradient."""
        self._close(trainer.global_step)
        # With several processes Lightning refuses a training_step that returns None, and a rank of a sharded model may
        # hold no gradient of its own.
        idle = trainer.world_size == 1 and all(
            p.grad is None for group in optimizer.param_groups for p in group["params"]
        )
        self._open = trainer.global_step if idle or self._hooks else None
        return not idle

    def taken(self, global_step: int) -> int:
        """The steps taken when the Trainer has counted so many."""
        self._close(global_step)
        return max(0, global_step - self.skipped)

    def look(self) -> Tensor | None:
        """Not 0, on the device, if all steps since the last look were skipped there; None where there is no doubt."""
        if self._fresh is None:
            return None
        count, only = self._fresh.unbind()
        self._fresh = None
        self._on_device = count if self._on_device is None else self._on_device + count
        return only

    def settle(self) -> int:
        """Read how many steps were skipped on the device until the last look, beyond those known; waits for it."""
        if self._on_device is None:
            return 0
        skipped, self._on_device = int(self._on_device.item()), None
        self.skipped += skipped
        return skipped

    def _close(self, global_step: int) -> None:
        if self._open is not None and global_step > self._open:
            self.skipped, self._open = self.skipped + 1, None

    def state_dict(self) -> dict[str, Any]:
        """Numbers only, to be asked for after :meth:`settle`.

        `open` is the Trainer's count at the begin of a step that may yet be skipped, -1 for none; `fresh` is what was
        counted on the device since the last look.
        """
        fresh = None if self._fresh is None else self._fresh.tolist()
        return {"skipped": self.skipped, "open": -1 if self._open is None else self._open, "fresh": fresh}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Restore what :meth:`state_dict` gave."""
        self.skipped = int(state["skipped"])
        self._open = None if state["open"] < 0 else int(state["open"])
        self._fresh = None if state["fresh"] is None else torch.tensor(state["fresh"], device=device)


def scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    """The gradient scaler in use, if there is one."""
    scaler: torch.amp.GradScaler | None = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def unscales_itself(optimizer: Optimizer) -> bool:
    """Whether gradients still have the scaler's scale when the step begins: fused optimizers take it out themselves."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))
