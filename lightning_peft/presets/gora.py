"""GoRA as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_peft.adapters.gora import GoRA
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, Calibration, RankMonitor
from lightning_peft.presets.base import Preset, capped_lora


def gora(
    rank: int = 8,
    *,
    minimum: int | None = None,
    maximum: int | None = None,
    gamma: float = 1e-3,
    alpha: float = 16.0,
    dropout: float = 0.0,
    batches: int = 16,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
    compact: Literal["never", "at_once"] = "never",
) -> Preset:
    """GoRA-style: LoRA whose ranks and first update come from the base weights' gradients, before training.

    Args:
        rank: r; all layers together may have as many parameters as with r components each.
        minimum: components that every layer gets; half of `rank` if not given, but at least 1.
        maximum: the most components that a layer may get; 4 times `rank` if not given.
        gamma: length of the first update, relative to the weights that it changes.
        alpha: update scale; the update is multiplied by alpha / rank in every layer, whatever its own rank.
        dropout: dropout on the adapters' input.
        batches: so many batches are looked at before training.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.
        compact: "at_once" cuts closed components out before the first step, so that training has the size of the
            budget and not of `maximum`; see :class:`~lightning_peft.Calibration`.

    Raises:
        ValueError: maximum is below rank, or another argument is out of range.

    Reference:
        He et al., GoRA, 2025, arXiv 2502.12171. The bounds are remembered: 4 and 32 for rank 8.
    """
    maximum = 4 * rank if maximum is None else maximum
    if maximum < rank:
        raise ValueError(f"maximum is the most components a layer may get, at least rank={rank}. Got {maximum}.")
    probe = GoRA(rank, max(1, rank // 2) if minimum is None else minimum, gamma)
    factory = capped_lora(rank, maximum, alpha, dropout)
    calibration = Calibration(probe, batches, compact=compact)
    return Preset([AdapterInjection(factory, targets, train), calibration, RankMonitor(), AdapterCheckpoint()])
