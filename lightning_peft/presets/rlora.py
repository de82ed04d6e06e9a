"""RLoRA as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lightning_peft.adapters.rlora import How, Mode, RLoRA, Scale
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor
from lightning_peft.presets.base import Preset


def rlora(
    rank: int | None = None,
    *,
    mode: Mode = "diag",
    scale: Scale = "vera",
    scaling: float = 1.0,
    d_initial: float = 0.1,
    seed: int = 0,
    share_projection: bool = True,
    path: How = "auto",
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
) -> Preset:
    """RLoRA: vectors trained between random projections that are drawn from a seed; checkpoints hold the vectors alone.

    The rate of learning is VeRA's, ten times LoRA's: 4e-3 to 1e-2 (remembered), without weight decay.

    Args:
        rank: components per layer; ``None`` for 1024 where both widths of a layer are at most that, else 256.
        mode: what is trained: "diag", "io", "core" or "half"; see :class:`~lightning_peft.RLoRA`.
        scale: "vera" or "orthonormal".
        scaling: what multiplies the update.
        d_initial: start of the vector between the projections.
        seed: what projections are drawn from.
        share_projection: whether layers of one shape have the same projections.
        path: how projections are applied: "auto", "rows" or "kron".
        targets: layers to adapt; ``None`` for all linear layers except the head, and convolutions, which it refuses.
            See :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.

    Reference:
        Lei, Qian, Cheung, Findings of ACL 2024, pp. 5236-5249; a reconstruction from its abstract, see
        :class:`~lightning_peft.RLoRA`.
    """
    adapter = partial(
        RLoRA,
        rank=rank,
        mode=mode,
        scale=scale,
        scaling=scaling,
        d_initial=d_initial,
        seed=seed,
        share_projection=share_projection,
        path=path,
    )
    return Preset([AdapterInjection(adapter, targets, train), RankMonitor(), AdapterCheckpoint()])
