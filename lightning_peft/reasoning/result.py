"""What solving a question brings, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol


class Example(NamedTuple):
    """A question, a solution of it step by step, and its answer."""

    question: str
    solution: str
    answer: str


@dataclass(frozen=True)
class Result:
    """One question solved.

    Attributes:
        answer: what was read from the text; ``None`` if nothing could be.
        text: what the model wrote at last, or the first text that came to the answer of most.
        examples: those that stood in the context.
        n_calls: texts that the model wrote for the question.
        n_prompt_tokens: tokens that it read for them, in all.
        n_new_tokens: tokens that it wrote, in all, those that only end a text aside.
        fallback: whether it was asked without examples because none was fit.
    """

    answer: str | None
    text: str
    examples: tuple[Example, ...] = ()
    n_calls: int = 0
    n_prompt_tokens: int = 0
    n_new_tokens: int = 0
    fallback: bool = False


class Solver(Protocol):
    """What answers questions; it is told the questions and nothing else."""

    def solve_batch(self, questions: Sequence[str]) -> list[Result]:
        """A result for each question, in their order."""
        ...
