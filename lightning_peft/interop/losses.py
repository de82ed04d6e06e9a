"""Losses that PEFT's methods have beside the task's, as terms: KaSA's, MonteCLoRA's, AdaLoRA's orthogonality.

PEFT leaves the first two to the user, and adds the third to `outputs.loss` of a transformers model: also at evaluation,
and not at all where the module computes its own loss. As terms all three are in the training loss, once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.interop.masked import parameter_of
from lightning_peft.regularizers.base import Regularizer


def tuners(module: nn.Module, kind: str = "LoraModel") -> list[Any]:
    """PEFT's tuners of this class and its subclasses inside a module: "LoraModel", or "AdaLoraModel" alone."""
    # By name along the class's ancestors: nothing is imported for a module without PEFT.
    return [
        child
        for child in module.modules()
        if any(c.__name__ == kind and c.__module__.startswith("peft.") for c in type(child).__mro__)
    ]


class _PeftLoss(Regularizer):
    """A loss that PEFT computes; its coefficients are those of the PEFT config."""

    _method: str
    _marker: str

    def __init__(self) -> None:
        super().__init__(1.0)

    @classmethod
    def applies(cls, module: nn.Module) -> bool:
        """Whether an active adapter in the module has this loss."""
        return any(
            name in getattr(layer, cls._marker)
            for layer in module.modules()
            if isinstance(getattr(layer, cls._marker, None), nn.ModuleDict | nn.ParameterDict)
            for name in layer.active_adapters  # type: ignore[union-attr]
        )

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        if not self.applies(module):
            raise RuntimeError(f"{type(self).__name__} found no layer of an active PEFT adapter that has this loss.")
        values = [getattr(tuner, self._method)() for tuner in tuners(module)]
        return torch.stack([value for value in values if isinstance(value, Tensor)]).sum()


class KaSA(_PeftLoss):
    """PEFT's loss of KaSA: sum over layers of beta |diagonal|^2 + gamma ( |B^T B - I|_F + |A A^T - I|_F ).

    Raises:
        RuntimeError: no active adapter is one of KaSA.

    Reference:
        Wang et al., KaSA, 2024, arXiv 2412.06071, eq. 9 to 11, as PEFT has them (`LoraModel._get_kasa_loss`).
    """

    _method = "_get_kasa_loss"
    _marker = "lora_diag"


class MonteCLoRA(_PeftLoss):
    """PEFT's loss of MonteCLoRA: mean over layers of its weighted KL terms and its entropy.

    Raises:
        RuntimeError: no active adapter is one of MonteCLoRA.

    Reference:
        As PEFT has it (`LoraModel._get_monteclora_loss`).
    """

    _method = "_get_monteclora_loss"
    _marker = "lora_monteclora_sampler"


class AdaLoRAOrthogonality(Regularizer):
    """The penalty of PEFT's AdaLoRA: mean over all A and B of |A A^T - I|_F and |B^T B - I|_F, the norm not squared.

    Layers of equal shape are stacked, where PEFT takes one after the other.

    Args:
        weight: what it is multiplied by; ``None`` is the config's `orth_reg_weight`.

    Raises:
        RuntimeError: the module has no AdaLoRA of PEFT's that trains.
    """

    def __init__(self, weight: float | None = None) -> None:
        super().__init__(1.0)
        self.given = weight

    @classmethod
    def applies(cls, module: nn.Module) -> bool:
        """Whether the module has an AdaLoRA of PEFT's that trains."""
        return any(_trainable(tuner) for tuner in tuners(module, "AdaLoraModel"))

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        total: list[Tensor] = []
        for tuner in tuners(module, "AdaLoraModel"):
            if name := _trainable(tuner):
                weight = tuner.peft_config[name].orth_reg_weight if self.given is None else self.given
                groups: dict[object, list[Tensor]] = {}
                for P in _factors(tuner, name):
                    groups.setdefault((P.shape, P.dtype, P.device), []).append(P)
                stacks = [torch.stack(group) for group in groups.values()]
                norms = [torch.linalg.matrix_norm(P @ P.mT - _eye(P)).sum() for P in stacks]
                total.append(weight * torch.stack(norms).sum() / sum(len(P) for P in stacks))
        if not total:
            raise RuntimeError("AdaLoRAOrthogonality found no AdaLoRA of PEFT's that trains in the module.")
        return torch.stack(total).sum()


def _trainable(tuner: Any) -> str | None:
    name: str | None = getattr(tuner, "trainable_adapter_name", None)
    return name if name in tuner.peft_config else None


def _factors(tuner: Any, name: str) -> Iterator[Tensor]:
    """A and B^T of every layer: (r, d)."""
    for layer in tuner.model.modules():
        if isinstance(getattr(layer, "lora_E", None), nn.ParameterDict) and name in layer.lora_E:
            yield parameter_of(layer.lora_A, name)
            yield parameter_of(layer.lora_B, name).mT


def _eye(P: Tensor) -> Tensor:
    return torch.eye(P.shape[-2], dtype=P.dtype, device=P.device)
