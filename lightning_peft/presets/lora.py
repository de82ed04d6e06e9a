"""LoRA as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lightning_peft.adapters.lora import LoRA
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor
from lightning_peft.presets.base import Preset


def lora(
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
) -> Preset:
    """LoRA of one rank everywhere, with adapter-only checkpoints.

    Args:
        rank: components per layer.
        alpha: update scale; the update is multiplied by alpha / rank.
        dropout: dropout on the adapters' input.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.

    Reference:
        Hu et al., LoRA, 2021, arXiv 2106.09685.
    """
    adapter = partial(LoRA, rank=rank, alpha=alpha, dropout=dropout)
    return Preset([AdapterInjection(adapter, targets, train), RankMonitor(), AdapterCheckpoint()])
