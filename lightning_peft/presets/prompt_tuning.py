"""Prompt tuning as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from lightning_peft.adapters.prompts.base import PromptPosition
from lightning_peft.adapters.prompts.soft_prompt import SoftPrompt
from lightning_peft.adapters.prompts.starts import Start
from lightning_peft.functional.prompts import require_sizes
from lightning_peft.presets.base import Preset
from lightning_peft.presets.prompts import prompted


def prompt_tuning(
    length: int = 20,
    *,
    init: Start = "vocabulary",
    text_ids: Sequence[int] | None = None,
    prompt_position: PromptPosition = "start",
    init_from: str | None = None,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
) -> Preset:
    """A trained vector per virtual token in front of the text, with adapter-only checkpoints.

    The usual learning rate is 0.3 for T5, and between 1e-3 and 3e-2 for models whose embeddings are small.

    Args:
        length: virtual tokens; the papers on T5 have 100.
        init: where they start; see :class:`~lightning_peft.SoftPrompt`, also for the next two.
        text_ids: token ids of a text that says what the task is, for init="text".
        prompt_position: "start" or "after_cls".
        init_from: file or checkpoint of another task's prompt to start from; see
            :class:`~lightning_peft.InitialPrompt`.
        targets: patterns of the transformers model; ``None`` for the one that there is.
        train: what stays trainable beside it; ``None`` for the head.

    Raises:
        TypeError: length is no whole number.
        ValueError: it is below 1.

    Reference:
        Lester, Al-Rfou, Constant, 2021, arXiv 2104.08691.
    """
    require_sizes(length=length)
    adapter = partial(SoftPrompt, length=length, init=init, text_ids=text_ids, prompt_position=prompt_position)
    return prompted(adapter, init_from, targets, train)
