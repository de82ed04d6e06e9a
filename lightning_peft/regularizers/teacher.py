"""The dense model as its own teacher: a copy before adapters are put in, and how it is known again."""

from __future__ import annotations

import copy
import hashlib

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter

_SAMPLES = 8
"""Values of each of the teacher's tensors by which it is known again."""


def dense_copy(student: nn.Module) -> nn.Module | None:
    """A copy of a module that has no adapters yet; ``None`` if it has, or if its weights are not all here."""
    if any(isinstance(child, Adapter) for child in student.modules()) or any(map(_is_part, student.parameters())):
        return None
    return copy.deepcopy(getattr(student, "_orig_mod", student))  # what torch.compile has wrapped


def fingerprint(teacher: nn.Module) -> int:
    """A number other than 0 that tells a teacher by a few values of each of its tensors."""
    total = hashlib.sha256()
    for name, tensor in teacher.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.numel():
            picks = torch.linspace(0, tensor.numel() - 1, _SAMPLES, dtype=torch.float64).long()
            values = tensor.detach().reshape(-1)[picks.to(tensor.device)].cpu()
            total.update(f"{name}|{values.dtype}|".encode())
            total.update(values.view(torch.uint8).numpy().tobytes())
    return 1 + int.from_bytes(total.digest()[:7], "big")


def _is_part(parameter: nn.Parameter) -> bool:
    """Whether a process has only a slice of it (FSDP2, FSDP1), or nothing yet (the meta device)."""
    return hasattr(parameter, "full_tensor") or getattr(parameter, "_fsdp_flattened", False) or parameter.is_meta
