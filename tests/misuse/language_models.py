"""Mistakes with models that write, their data, and reasoning in context."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from misuse.setups import Rows
from tiny_models import save_decoder
from torch import nn

from lightning_peft import AdapterFileError
from lightning_peft.modules import CausalLM, LanguageData, Seq2Seq, Seq2SeqData
from lightning_peft.modules.packing import require_packable
from lightning_peft.reasoning import (
    Example,
    FewShotCoT,
    SelfConsistency,
    SelfGeneratedCoT,
    Templates,
    evaluate,
    load_solver,
)

SPOKEN = [{"role": "user", "content": "the sky"}, {"role": "assistant", "content": "blue"}]


class Config:
    """What a transformers config says of a model's attention."""

    model_type, _attn_implementation = "llama", "flash_attention_2"


class Byte:
    """A tokenizer of one token for each character."""

    eos_token_id = pad_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [*map(ord, text)]}


def solver(**options: Any) -> SelfGeneratedCoT:
    return SelfGeneratedCoT(nn.Linear(1, 1), Byte(), **options)


def rows(content: str, suffix: str = ".csv", **arguments: Any) -> Callable[[], object]:
    """Set up training on a file."""

    def wrong() -> object:
        Path(f"rows{suffix}").write_text(content)
        data = LanguageData(f"rows{suffix}", save_decoder(Path("decoder")), **{"val_share": 0.0, **arguments})
        return data.setup("fit")

    return wrong


def pairs(content: str, **arguments: Any) -> Callable[[], object]:
    def wrong() -> object:
        Path("rows.csv").write_text(content)
        return Seq2SeqData("rows.csv", save_decoder(Path("decoder")), **arguments).setup("fit")

    return wrong


def loaded() -> object:
    Path("solver.json").write_text('{"n_examples": 3}')
    return load_solver("solver.json", nn.Linear(1, 1), Byte())


ROWS: Rows = {
    "a language model that there is not": (lambda: CausalLM("no/such/folder"), ValueError),
    "prompts without the column of answers": (lambda: LanguageData("a.csv", "gpt2", prompt="question"), ValueError),
    "answers cut into blocks": (
        lambda: LanguageData("a.csv", "gpt2", prompt="question", answer="answer", packing="blocks"),
        ValueError,
    ),
    "plain texts in a chat template": (lambda: LanguageData("a.csv", "gpt2", template="chat"), ValueError),
    "a column of prompts of another name": (
        rows("q,a\nthe sky,blue\n", prompt="question", answer="answer"),
        ValueError,
    ),
    "a file of prompts that nobody has answered": (rows("q,a\nthe sky,\n", prompt="q", answer="a"), ValueError),
    "answers behind prompts that fill the block": (
        rows("q,a\nthe sky the sky,blue\nthe,red\n", prompt="q", answer="a", block_size=4),
        UserWarning,
    ),
    "texts shorter than a block": (rows("text\nthe sky\n"), ValueError),
    "a chat with a tokenizer that has no template": (
        rows(json.dumps({"turns": SPOKEN}), ".jsonl", messages="turns"),
        ValueError,
    ),
    "documents packed for flash attention": (lambda: require_packable(Config, None, 256), MisconfigurationException),
    "a text-to-text model that there is not": (lambda: Seq2Seq("no/such/folder"), ValueError),
    "a metric of texts that there is not": (lambda: Seq2Seq("t5-small", metrics=["meteor"]), ValueError),  # type: ignore[list-item]
    "several texts for one reference": (
        lambda: Seq2Seq("t5-small", generation={"num_beams": 4, "num_return_sequences": 4}),
        ValueError,
    ),
    "pairs without a target": (pairs("source,target\nthe sky,\n"), ValueError),
    "two pairs of which one is to be held out": (pairs("source,target\na,b\nc,d\n"), ValueError),
    "no question to reason about": (lambda: evaluate([], solver()), ValueError),
    "a mode of reasoning that there is not": (lambda: solver(mode="both"), ValueError),
    "a filter where nothing is taken apart": (lambda: solver(filter_k=3), ValueError),
    "known examples where the model writes its own": (
        lambda: solver(known={"2 + 2?": [Example("3 + 3?", "six", "6")]}),
        ValueError,
    ),
    "a question that fills the context": (lambda: solver(max_context_tokens=1200).solve("one " * 99), ValueError),
    "examples that nobody gives": (lambda: FewShotCoT(nn.Linear(1, 1), Byte(), []), ValueError),
    "a vote without a number of chains": (
        lambda: SelfConsistency(nn.Linear(1, 1), Byte(), chains=None).solve("2 + 2?"),
        RuntimeError,
    ),
    "a template without the question": (lambda: Templates(cot="Think step by step."), ValueError),
    "another file in the place of a solver's": (loaded, AdapterFileError),
}
