"""EVA as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, Calibration, RankMonitor
from lightning_peft.presets.base import Preset, capped_lora
from lightning_peft.rank.eva import EVA


def eva(
    rank: int = 8,
    *,
    rho: float = 2.0,
    tau: float = 0.99,
    alpha: float | None = None,
    dropout: float = 0.0,
    batches: int = 64,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
    compact: Literal["never", "at_once"] = "never",
) -> Preset:
    """EVA: LoRA whose ranks and first directions come from the layers' inputs, before training.

    Args:
        rank: r, average rank per layer.
        rho: a layer's rank is at most rho r; 1 gives every layer r, and only A is data-driven.
        tau: cosine between two batches above which a direction counts as found.
        alpha: update scale; the update is multiplied by alpha / rank in every layer, whatever its own rank. ``None``
            for rank / 16, the scale of the released example. EVA's directions have length 1 and lie where the inputs
            are largest, so at LoRA's scale a step moves the output many times as far: expect to need LoRA's alpha
            with a small learning rate, or this one with a large one, which did better here (docs/accuracy.md).
        dropout: dropout on the adapters' input.
        batches: at most so many batches are looked at before training.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.
        compact: "at_once" cuts closed components out before the first step, so that training has the size of `rank`
            and not of rho `rank`; see :class:`~lightning_peft.Calibration`.

    Raises:
        ValueError: rho is below 1.

    Reference:
        Paischer et al., EVA, 2024, arXiv 2410.07170.
    """
    if not rho >= 1:
        raise ValueError(f"rho says how far above the average a layer's rank may rise, at least 1. Got {rho}.")
    factory = capped_lora(rank, round(rho * rank), rank / 16 if alpha is None else alpha, dropout)
    calibration = Calibration(EVA(rank, tau), batches, compact=compact)
    return Preset([AdapterInjection(factory, targets, train), calibration, RankMonitor(), AdapterCheckpoint()])
