"""What a student's outputs lose against a teacher's: mathematics of distillation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softened_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0, shown: Tensor | None = None) -> Tensor:
    """Divergence of softened distributions over classes, of the size that it has at temperature 1.

        T^2 mean over rows of KL( softmax(teacher / T) || softmax(student / T) )

    The gradient with respect to logits falls as 1 / T^2, which the factor makes up for: a weight found at one
    temperature serves at another.

    Args:
        student: (..., classes) logits.
        teacher: (..., classes) logits.
        temperature: T, positive; the larger, the more the unlikely classes count.
        shown: (...) bool, rows that count; ``None`` for all.

    Returns:
        A scalar in float32, or the inputs' dtype where that is wider; 0 if no row counts.

    Reference:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531, section 2 (remembered).
    """
    student, teacher = _wide(student) / temperature, _wide(teacher) / temperature
    rows = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    return _mean(rows, shown) * temperature**2


def mean_square(student: Tensor, teacher: Tensor, shown: Tensor | None = None) -> Tensor:
    """Mean square of the difference.

    Args:
        student: (..., d).
        teacher: (..., d).
        shown: (...) bool, rows that count; ``None`` for all.

    Returns:
        A scalar in float32, or the inputs' dtype where that is wider; 0 if no row counts.
    """
    return _mean((_wide(student) - _wide(teacher)).square().mean(-1), shown)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _mean(rows: Tensor, shown: Tensor | None) -> Tensor:
    if shown is None:
        return rows.mean()
    # Not rows[shown], whose size would have to be read from the device.
    return torch.where(shown, rows, 0.0).sum() / shown.sum().clamp(min=1)
