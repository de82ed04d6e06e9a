"""DPT as a list of callbacks: a prompt as a product, of a rank that is fixed or falls."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from lightning_peft.adapters.prompts.base import PromptPosition
from lightning_peft.adapters.prompts.dpt import DPT, Form
from lightning_peft.functional.prompts import require_sizes
from lightning_peft.presets.base import Preset
from lightning_peft.presets.prompts import cubic_pruning, prompted


def dpt(
    length: int = 100,
    rank: int | None = None,
    *,
    final_rank: int | None = None,
    parameters: int | None = None,
    init: Literal["uniform", "svd"] = "uniform",
    half_width: float | None = None,
    text_ids: Sequence[int] | None = None,
    form: Form = "product",
    warmup: float | None = None,
    tail: float | None = None,
    interval: int | None = None,
    prompt_position: PromptPosition = "start",
    init_from: str | None = None,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
    compact: Literal["never", "final"] = "never",
) -> Preset:
    """A prompt as a product of two thin factors, with adapter-only checkpoints.

    The authors train T5 at a rate of 0.3 with weight decay 1e-5. For models whose embeddings are small (about 0.02)
    rates between 1e-3 and 3e-2 are usual; factors start there so that the prompt is as large as the embeddings.

    Args:
        length: virtual tokens.
        rank: components at the start; 10 if neither it nor `parameters` is given.
        final_rank: components at the end, the others closed on a cubic schedule by what the loss says they are worth;
            ``None`` to keep all.
        parameters: as many components as so many trained numbers allow, never one more.
        init: where the prompt starts; see :class:`~lightning_peft.DPT`, also for the next three.
        half_width: of the uniform start; ``None`` for what suits the model.
        text_ids: token ids of a text for init="svd".
        form: "product" or "relu", in which training itself closes components.
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
        Xiao et al., Findings of EMNLP 2023, arXiv 2310.10094. The schedule is ours.
    """
    if rank is not None and parameters is not None:
        raise ValueError(f"give rank or parameters, not both. Got rank={rank}, parameters={parameters}.")
    require_sizes(length=length, rank=rank, parameters=parameters)
    options = {
        "length": length,
        "init": init,
        "half_width": half_width,
        "text_ids": text_ids,
        "form": form,
        "prompt_position": prompt_position,
    }
    adapter = partial(DPT, rank=10 if rank is None else rank, **options)  # type: ignore[arg-type]
    if parameters is not None:
        adapter = partial(DPT.within, parameters=parameters, **options)  # type: ignore[arg-type]
    pruning = cubic_pruning(final_rank, warmup, tail, interval, compact)
    return prompted(adapter, init_from, targets, train, pruning)
