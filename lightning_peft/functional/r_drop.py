"""How far two passes of one input through dropout lie apart: R-Drop (Wu et al., 2021)."""

from __future__ import annotations

from torch import Tensor

from lightning_peft.functional.distillation import softened_kl


def symmetric_kl(first: Tensor, second: Tensor, shown: Tensor | None = None) -> Tensor:
    """The divergence of two predictions, alike in both; each has its gradient.

        1/2 mean over rows of [ KL(P_1 || P_2) + KL(P_2 || P_1) ],     P_i = softmax(logits_i)

    Args:
        first: (..., classes) logits.
        second: (..., classes) logits.
        shown: (...) bool, rows that count; ``None`` for all.

    Returns:
        A scalar in float32, or the inputs' dtype where that is wider.

    Reference:
        Wu et al., R-Drop: Regularized dropout for neural networks, NeurIPS 2021, arXiv 2106.14448, eq. 2 (remembered).
    """
    return (softened_kl(first, second, shown=shown) + softened_kl(second, first, shown=shown)) / 2
