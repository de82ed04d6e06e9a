"""Offsets by position, written into a model's own positions: what is left is a plain prompt."""

from __future__ import annotations

import torch
from torch import nn

from lightning_peft.adapters.prompts.dept import DePT
from lightning_peft.adapters.prompts.soft_prompt import SoftPrompt
from lightning_peft.adapters.prompts.text_model import TextModel
from lightning_peft.export import own_random, require_whole, trainability_kept
from lightning_peft.interop.prompt_files import only_prompt
from lightning_peft.surgery.removal import replace


def fold_offsets(module: nn.Module) -> nn.Module:
    """Turn DePT into a plain prompt on a model with learned positions, in place; outputs stay.

        row(first + m + p) <- row(first + m + p) + O[p]          p: a token's place in its text, m: prompt tokens

    BERT, RoBERTa and GPT-2 add a row of a table for every position to the tokens' embeddings, as DePT adds its offsets;
    the text begins behind the prompt, so the rows are the text's own. For models of relative or rotary positions there
    is no such table. It is for inference: the model's own table is another one from then on, also after `eject`.

    Args:
        module: with one DePT inside.

    Returns:
        The module, with a :class:`SoftPrompt` in DePT's place.

    Raises:
        TypeError: the model has no such table, or the prompt is no DePT.
        ValueError: there is no prompt or more than one; or offsets go by column, which padding moves.
        RuntimeError: the model is split over processes.
    """
    name, prompt = only_prompt(module, "fold_offsets")
    if not isinstance(prompt, DePT):
        raise TypeError(f"fold_offsets is for DePT, and at {name!r} is a {type(prompt).__name__}, without offsets.")
    require_whole(module, "fold_offsets")
    parts = TextModel.of(prompt.base)
    found = parts.position_table()
    if found is None or hasattr(found[0], "offset"):
        raise TypeError(
            "fold_offsets needs a table of learned positions as BERT, RoBERTa and GPT-2 have it, and "
            f"{type(parts.model).__name__} has none. Keep the prompt, or call save_prompt(module, path, folded=True)."
        )
    if prompt.align != "tokens":
        raise ValueError(
            "fold_offsets writes offsets to positions, which are counted without padding, and this DePT goes by "
            "columns (align='absolute'). Train with align='tokens'."
        )
    table, first = found
    with torch.no_grad(), own_random(module), trainability_kept(prompt.base):
        rows = table.weight.detach().to(torch.float64, copy=True)
        offsets = prompt.table().double()
        place = torch.arange(len(offsets), device=rows.device)
        # A first token before the prompt stays where it was.
        behind = prompt.length * (place > 0) if prompt.prompt_position == "after_cls" else prompt.length
        row = first + place + behind
        there = row < len(rows)  # no text is longer than the table
        rows.index_add_(0, row[there], offsets[there].to(rows.device))
        table.weight = nn.Parameter(rows.to(table.weight.dtype), requires_grad=False)
        plain = SoftPrompt(prompt.base, prompt.length, init="random", prompt_position=prompt.prompt_position)
        plain.P = nn.Parameter(prompt.P.clone())
    replace(module, {id(prompt): plain.train(prompt.training)})
    return module
