"""Where PEFT's own losses enter a run: as terms of Regularization, each once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft.callbacks.order import callbacks_of
from lightning_peft.callbacks.placement import AdapterPlacement
from lightning_peft.callbacks.regularization import Regularization
from lightning_peft.interop.losses import AdaLoRAOrthogonality, KaSA, MonteCLoRA, tuners
from lightning_peft.regularizers.base import Regularizer
from lightning_peft.seams import wrap_method

_TERMS: dict[str, type[KaSA] | type[MonteCLoRA] | type[AdaLoRAOrthogonality]] = {
    "kasa": KaSA,
    "monteclora": MonteCLoRA,
    "adalora_orthogonality": AdaLoRAOrthogonality,
}


class PeftLosses:
    """Adds the losses of the PEFT adapters in a module to a run's terms, and takes them out again.

    They go to the Regularization callback that is there, or to a new one among the Trainer's callbacks. A loss that is
    among the terms already is left alone, so several callbacks may ask for it.

    AdaLoRA's is left out of PEFT's own forward meanwhile, which adds it to `outputs.loss`, at evaluation too.
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def add(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        """Add what the module, whose layers exist, has; for `stage` "fit" alone, but for AdaLoRA's own forward."""
        for tuner in tuners(module, "AdaLoraModel"):
            self._undo.append(wrap_method(tuner, "forward", _without_penalty))
        wanted = {name: kind for name, kind in _TERMS.items() if kind.applies(module)} if stage == "fit" else {}
        if not wanted:
            return
        there = next((each for each in callbacks_of(trainer) if isinstance(each, Regularization)), None)
        known = [] if there is None else list(there.terms.values())
        new: dict[str, Regularizer] = {
            name: kind() for name, kind in wanted.items() if not any(isinstance(term, kind) for term in known)
        }
        if there is None:
            there = Regularization(new)
            order: list[Any] = trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
            after = max((i for i, each in enumerate(order) if isinstance(each, AdapterPlacement)), default=-1)
            order.insert(after + 1, there)
        else:
            there.terms.update(new)
        # Lightning may be past its callbacks' setup, where the module builds its layers later; twice does no harm.
        there.setup(trainer, module, stage)
        for name in new:
            self._undo.append(partial(_take_out, there.terms, name))

    def remove(self) -> None:
        """Undo :meth:`add`."""
        while self._undo:
            self._undo.pop()()


def _take_out(terms: nn.ModuleDict, name: str) -> None:
    if name in terms:
        del terms[name]


def _without_penalty(call: Callable[..., Any], tuner: Any, *args: Any, **kwargs: Any) -> Any:
    return tuner.model.forward(*args, **kwargs)
