"""DePT as a list of callbacks: a shorter prompt, and offsets of a rank that is fixed or falls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from lightning_peft.adapters.prompts.base import PromptPosition
from lightning_peft.adapters.prompts.dept import DePT
from lightning_peft.adapters.prompts.starts import Start
from lightning_peft.functional.prompts import require_sizes
from lightning_peft.presets.base import Preset
from lightning_peft.presets.prompts import cubic_pruning, prompted


def dept(
    length: int | None = None,
    rank: int | None = None,
    *,
    parameters: int | None = None,
    reach: int = 256,
    final_rank: int | None = None,
    alpha: float | None = 8.0,
    rate: float | None = None,
    init: Start = "vocabulary",
    text_ids: Sequence[int] | None = None,
    align: Literal["tokens", "absolute"] = "tokens",
    warmup: float | None = None,
    tail: float | None = None,
    interval: int | None = None,
    prompt_position: PromptPosition = "start",
    init_from: str | None = None,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
    compact: Literal["never", "final"] = "never",
) -> Preset:
    """A short prompt and low-rank offsets of the text's embeddings, with adapter-only checkpoints.

    The authors train T5 at rates of 0.3 for the prompt and 5e-4 for the offsets, without weight decay; on other models
    both have one rate unless `rate` says so, to be searched from 1e-3 on. The rate that a module is given is the
    prompt's; the offsets' follows in the modules here, and in others with
    :func:`lightning_peft.surgery.split_by_rate`.

    Args:
        length: virtual tokens; 60 if neither it nor `parameters` is given.
        rank: components of the offsets; 30 if neither it nor `parameters` is given.
        parameters: trained numbers that prompt and offsets share, never one more; with `length`, the rest is the
            offsets', else six tenths are the prompt's.
        reach: places of a text that have an offset, such as the length that texts are cut to.
        final_rank: components at the end, the others closed on a cubic schedule by what the loss says they are worth;
            ``None`` to keep all.
        alpha: scale of the offsets; see :class:`~lightning_peft.DePT`, also for the next four.
        rate: what multiplies the learning rate for the offsets; ``None`` for what suits the model.
        init: where the prompt starts.
        text_ids: token ids of a text for init="text".
        align: "tokens" or "absolute".
        warmup: share of the run before the first cut, of `final_rank`; ``None`` for 0.1.
        tail: share of the run after the last one; ``None`` for 0.3.
        interval: optimizer steps between two cuts; ``None`` for 10.
        prompt_position: "start" or "after_cls".
        init_from: file or checkpoint of another task's prompt to start from; see
            :class:`~lightning_peft.InitialPrompt`.
        targets: patterns of the transformers model; ``None`` for the one that there is.
        train: what stays trainable beside it; ``None`` for the head.
        compact: "final" cuts closed components out of the tensors at the last cut of `final_rank`; see
            :class:`~lightning_peft.RankPruning`.

    Raises:
        TypeError: a size is no whole number.
        ValueError: rank and parameters are both given, a size is out of range, or an option of the schedule is given
            without `final_rank`.

    Reference:
        Shi and Lipani, ICLR 2024, arXiv 2309.05173. The schedule is ours.
    """
    if rank is not None and parameters is not None:
        raise ValueError(f"give rank or parameters, not both. Got rank={rank}, parameters={parameters}.")
    require_sizes(length=length, parameters=parameters, reach=reach)
    require_sizes(0, rank=rank)
    options = {
        "reach": reach,
        "alpha": alpha,
        "rate": rate,
        "init": init,
        "text_ids": text_ids,
        "align": align,
        "prompt_position": prompt_position,
    }
    if parameters is not None:
        adapter = partial(DePT.within, parameters=parameters, length=length, **options)  # type: ignore[arg-type]
    else:
        sizes = {"length": 60 if length is None else length, "rank": 30 if rank is None else rank}
        adapter = partial(DePT, **sizes, **options)  # type: ignore[arg-type]
    pruning = cubic_pruning(final_rank, warmup, tail, interval, compact)
    return prompted(adapter, init_from, targets, train, pruning)
