"""SpaRTA as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch import Callback

from lightning_peft.adapters.entry_selection import EntrySelection
from lightning_peft.adapters.regrowth import DropAndRegrow
from lightning_peft.adapters.sparse_budget import SparseBudget
from lightning_peft.arguments import require_number
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, Calibration, RankMonitor, RankPruning
from lightning_peft.functional.sparse import Kernel
from lightning_peft.presets.base import Preset
from lightning_peft.rank.schedule import Linear

SPARSITY = 0.99


def sparta(
    density: float | None = None,
    *,
    sparsity: float | None = None,
    parameters: int | None = None,
    sampling: Literal["exact", "bernoulli"] = "exact",
    seed: int = 0,
    kernel: Kernel | Literal["auto"] = "auto",
    start: Literal["random", "magnitude", "gradient"] = "random",
    batches: int = 16,
    regrow: float = 0.0,
    interval: int = 20,
    warmup: float = 0.05,
    tail: float = 0.3,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
) -> Preset:
    """SpaRTA: some entries of the weights are trained, drawn at random, and are a part of the weights at once.

    How many is said in one of three ways, a sparsity of 0.99 if in none. Rates of learning lie between those of full
    fine-tuning and of LoRA, the higher the fewer entries: 2e-5 to 1e-4 at 1 % (the authors' code). No weight decay.

    Args:
        density: share of every target's entries that is trained.
        sparsity: share of the base's parameters that stay as they are, the head not counted.
        parameters: scalars to train in all, the head's not counted.
        sampling: "exact" draws as many entries as the density says, "bernoulli" each with that probability.
        seed: what entries are drawn from.
        kernel: how their gradient is computed: "auto", "sampled", "dense" or "chunked"; see
            :class:`~lightning_peft.SpaRTA`.
        start: "random" entries; or those of largest "magnitude" or "gradient", chosen before the first step, see
            :class:`~lightning_peft.EntrySelection`.
        batches: so many batches are looked at before training where entries are chosen by gradient.
        regrow: share of the entries that move at an event, 0 for none; see :class:`~lightning_peft.DropAndRegrow`.
        interval: optimizer steps between two events at which entries move.
        warmup: share of the run before the first of them.
        tail: share of the run after the last.
        targets: layers to adapt; ``None`` for the value and output projections of every attention. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.

    Raises:
        ValueError: more than one of density, sparsity and parameters is given, or an argument is out of range.

    Reference:
        Rios et al., SpaRTA, Findings of EMNLP 2025, arXiv 2502.15975: random entries, targets and sparsity as in the
        authors' code. Choosing and moving entries are not theirs.
    """
    require_number("regrow", regrow)
    if start not in ("random", "magnitude", "gradient"):
        raise ValueError(f"start={start!r}: choose 'random', 'magnitude' or 'gradient'.")
    if not 0 <= regrow <= 1:
        raise ValueError(f"regrow is the share of entries that move at an event, from 0 to 1. Got {regrow}.")
    if density is None and parameters is None and sparsity is None:
        sparsity = SPARSITY
    budget = SparseBudget(density, sparsity, parameters, sampling=sampling, seed=seed, kernel=kernel)
    callbacks: list[Callback] = [AdapterInjection(budget, targets, train)]
    if start != "random":
        callbacks.append(Calibration(EntrySelection(start), batches))
    if regrow:
        callbacks.append(RankPruning(DropAndRegrow(regrow, Linear(warmup, tail), interval)))
    return Preset([*callbacks, RankMonitor(), AdapterCheckpoint()])
