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
from lightning_peft.presets.base import Preset, require_owner
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
    batches: int | None = None,
    regrow: float = 0.0,
    interval: int | None = None,
    warmup: float | None = None,
    tail: float | None = None,
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
        batches: so many batches are looked at before training, of start="gradient"; ``None`` for 16.
        regrow: share of the entries that move at an event, 0 for none; see :class:`~lightning_peft.DropAndRegrow`.
        interval: optimizer steps between two events at which entries move, of `regrow`; ``None`` for 20.
        warmup: share of the run before the first of them; ``None`` for 0.05.
        tail: share of the run after the last; ``None`` for 0.3.
        targets: layers to adapt; ``None`` for the value and output projections of every attention. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.

    Raises:
        TypeError: an argument is of another type.
        ValueError: more than one of density, sparsity and parameters is given, an argument is out of range, or it
            belongs to another one that is not given.

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
    if start != "gradient":
        require_owner(f"start='gradient', and start is {start!r}", batches=batches)
    if start != "random":
        callbacks.append(Calibration(EntrySelection(start), 16 if batches is None else batches))
    if regrow:
        schedule = Linear(0.05 if warmup is None else warmup, 0.3 if tail is None else tail)
        callbacks.append(RankPruning(DropAndRegrow(regrow, schedule, 20 if interval is None else interval)))
    else:
        require_owner("regrow, which is 0", interval=interval, warmup=warmup, tail=tail)
    return Preset([*callbacks, RankMonitor(), AdapterCheckpoint()])
