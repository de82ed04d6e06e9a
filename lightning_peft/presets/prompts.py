"""What presets of prompts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from lightning.pytorch import Callback

from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, InitialPrompt, RankMonitor, RankPruning
from lightning_peft.presets.base import Preset, require_owner
from lightning_peft.rank.budget import Budget
from lightning_peft.rank.importance import Taylor
from lightning_peft.rank.policy import RankPolicy
from lightning_peft.rank.schedule import Cubic


def prompted(
    adapter: AdapterFactory,
    init_from: str | None,
    targets: Sequence[str] | None,
    train: Sequence[str] | None,
    pruning: Sequence[Callback] = (),
) -> Preset:
    """The callbacks of a prompt, whatever adapter has it.

    Args:
        adapter: builds it.
        init_from: file or checkpoint of another task's prompt to start from.
        targets: patterns of the transformers model.
        train: what stays trainable beside it.
        pruning: what lets its rank fall.
    """
    started = [] if init_from is None else [InitialPrompt(init_from)]
    placed = AdapterInjection(adapter, targets, train)
    return Preset([placed, *started, *pruning, RankMonitor(), AdapterCheckpoint()])


def cubic_pruning(
    final_rank: int | None,
    warmup: float | None,
    tail: float | None,
    interval: int | None,
    compact: Literal["never", "final"],
) -> list[Callback]:
    """What closes components on schedule, down to `final_rank`; nothing without one.

    Raises:
        ValueError: there is none, and an option of the schedule is given.
    """
    if final_rank is None:
        cut = None if compact == "never" else compact
        require_owner("final_rank, which is not given", warmup=warmup, tail=tail, interval=interval, compact=cut)
        return []
    schedule = Cubic(0.1 if warmup is None else warmup, 0.3 if tail is None else tail)
    policy = RankPolicy(schedule, Taylor(), Budget(rank=final_rank), 10 if interval is None else interval)
    return [RankPruning(policy, compact)]
