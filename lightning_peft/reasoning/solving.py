"""What all solvers share: a writer, templates, a reader of answers, and votes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from lightning_peft.arguments import require_integer
from lightning_peft.reasoning.extraction import Extractor, number, same_answer
from lightning_peft.reasoning.generation import Ask, Writer, Written, seed_of
from lightning_peft.reasoning.result import Example, Result
from lightning_peft.reasoning.templates import Templates


def majority(answers: Sequence[str | None]) -> int | None:
    """Where the answer of most stands first; of equally frequent ones the first. ``None`` if there is no answer.

    Example:
        >>> majority(["7", None, "5", "5.0", "7"])
        0
    """
    known = [i for i, answer in enumerate(answers) if answer is not None]
    if not known:
        return None
    return max(known, key=lambda i: (sum(same_answer(answers[i], answers[j]) for j in known), -i))


class Prompted(ABC):
    """A solver that asks a frozen model.

    Args:
        model: anything with transformers' `generate`, with adapters or without.
        tokenizer: the model's; where it has a chat template, prompts are a user's turns.
        templates: what the model is told.
        extractor: reads the answer from a text; by default the last number behind the templates' marker.
        max_new_tokens: of one solution, at most.
        seed: with the question, all there is to what is sampled.
        writing: of :class:`~lightning_peft.reasoning.generation.Writer`: max_context_tokens, temperature, top_p,
            batch_size, stop, progress.
    Raises:
        TypeError: max_new_tokens is no integer.
        ValueError: it is below 1, or the writer refuses an argument.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        templates: Templates | None = None,
        extractor: Extractor | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
        **writing: Any,
    ) -> None:
        require_at_least("max_new_tokens", max_new_tokens, 1)
        self.writer = Writer(model, tokenizer, **writing)
        self.templates = templates or Templates()
        self.extractor = extractor or partial(number, marker=self.templates.marker)
        self.max_new_tokens, self.seed = max_new_tokens, seed

    @abstractmethod
    def solve_batch(self, questions: Sequence[str]) -> list[Result]:
        """A result for each question, in their order."""

    def solve(self, question: str) -> Result:
        """The result for one question: what it is in any batch."""
        return self.solve_batch([question])[0]

    def _chains(
        self, questions: Sequence[str], contexts: Sequence[Sequence[Example]], votes: int
    ) -> list[list[Written]]:
        """Solutions of each question behind its examples: one greedy, or `votes` that are sampled."""
        asks = [
            Ask(self.templates.ask_cot(q, context), None if votes == 1 else seed_of(self.seed, q, "vote", k))
            for q, context in zip(questions, contexts, strict=True)
            for k in range(votes)
        ]
        written = self.writer.write(asks, self.max_new_tokens)
        return [written[at : at + votes] for at in range(0, len(written), votes)]

    def _voted(self, chains: Sequence[Written], answers: Sequence[str | None], **more: Any) -> Result:
        """The answer of most, with the cost of all."""
        chosen = majority(answers)
        return Result(
            answer=None if chosen is None else answers[chosen],
            text=chains[chosen or 0].text,
            n_calls=len(chains),
            n_prompt_tokens=sum(each.n_prompt_tokens for each in chains),
            n_new_tokens=sum(each.n_new_tokens for each in chains),
            **more,
        )

    def _read(self, chains: Sequence[Written]) -> list[str | None]:
        return [self.extractor(each.text) for each in chains]


def require_at_least(name: str, value: int, least: int) -> None:
    """Check that an argument is an integer and not too small."""
    require_integer(name, value)
    if value < least:
        raise ValueError(f"{name}={value}: it must be at least {least}.")
