"""SoRA as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from lightning_peft.adapters import sora as method
from lightning_peft.adapters.sora import SoRA
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor, RankPruning
from lightning_peft.presets.base import Preset


def sora(
    threshold: float = 3e-4,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    lowest: float | None = None,
    warmup: float = 0.0,
    tail: float = 0.0,
    interval: int = 10,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
    compact: Literal["never", "final"] = "never",
) -> Preset:
    """SoRA: gates that a soft threshold makes sparse; the rank is what is left.

    Args:
        threshold: how far a gate's entry shrinks in each optimizer step; see
            :class:`~lightning_peft.adapters.sora.SoftThreshold` on how to choose it.
        rank: components per layer at the start.
        alpha: update scale; the update is multiplied by alpha / rank.
        dropout: dropout on the adapters' input.
        lowest: where the threshold starts to rise from; ``None`` for the same one throughout.
        warmup: share of the run before entries shrink.
        tail: share of the run after the mask is final.
        interval: optimizer steps between two looks at the ranks.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.
        compact: "final" cuts closed components out of the tensors where the tail begins; see
            :class:`~lightning_peft.RankPruning`.

    Reference:
        Ding et al., SoRA, EMNLP 2023, arXiv 2311.11696.
    """
    return Preset(
        [
            AdapterInjection(partial(SoRA, rank=rank, alpha=alpha, dropout=dropout), targets, train),
            RankPruning(method.policy(threshold, lowest, warmup, tail, interval), compact),
            RankMonitor(),
            AdapterCheckpoint(),
        ]
    )
