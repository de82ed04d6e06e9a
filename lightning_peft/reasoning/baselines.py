"""What self-generated examples are compared with: without a chain, without examples, with given ones, by vote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from lightning_peft.reasoning.generation import Ask, Written, seed_of
from lightning_peft.reasoning.result import Example, Result
from lightning_peft.reasoning.solving import Prompted, require_at_least


class ZeroShot(Prompted):
    """The answer alone, greedily. Arguments are those of every solver, see `Prompted`."""

    def solve_batch(self, questions: Sequence[str]) -> list[Result]:
        """A result for each question, in their order."""
        asks = [Ask(self.templates.ask_direct(question)) for question in questions]
        found = [[each] for each in self.writer.write(asks, self.max_new_tokens)]
        return [self._voted(chains, self._read(chains)) for chains in found]


class ZeroShotCoT(Prompted):
    """A solution step by step without examples, greedily. Arguments are those of every solver, see `Prompted`.

    Reference:
        Kojima et al., 2022, arXiv 2205.11916 (remembered). Departure: one call that ends with a marked answer, where
        the paper asks a second time for the answer.
    """

    def solve_batch(self, questions: Sequence[str]) -> list[Result]:
        """A result for each question, in their order."""
        found = self._chains(questions, [()] * len(questions), votes=1)
        return [self._voted(chains, self._read(chains)) for chains in found]


class FewShotCoT(Prompted):
    """A solution step by step behind examples that somebody has written, the same for every question; greedily.

    Args:
        model: as for every solver, see `Prompted`.
        tokenizer: likewise.
        examples: questions with solutions and answers; none is about a question that is asked.
        options: the other arguments of every solver.
    Raises:
        ValueError: there is no example.
    Reference:
        Wei et al., 2022, arXiv 2201.11903 (remembered).
    """

    def __init__(self, model: nn.Module, tokenizer: Any, examples: Sequence[Example], **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        self.examples = tuple(Example(*each) for each in examples)
        if not self.examples:
            raise ValueError("few-shot solving needs at least one example; without any it is ZeroShotCoT.")

    def solve_batch(self, questions: Sequence[str]) -> list[Result]:
        """A result for each question, in their order."""
        found = self._chains(questions, [self.examples] * len(questions), votes=1)
        return [self._voted(chains, self._read(chains), examples=self.examples) for chains in found]


class SelfConsistency(Prompted):
    """Several sampled solutions without examples, and the answer of most.

    Args:
        model: as for every solver, see `Prompted`.
        tokenizer: likewise.
        chains: solutions of each question; ``None`` for as many as it takes to write what another solver has written
            for the same question, which is how `evaluate` compares at equal tokens.
        options: the other arguments of every solver.
    Raises:
        ValueError: chains is below 1.
    Reference:
        Wang et al., 2023, arXiv 2203.11171 (remembered).
    """

    def __init__(self, model: nn.Module, tokenizer: Any, chains: int | None = 5, **options: Any) -> None:
        super().__init__(model, tokenizer, **options)
        if chains is not None:
            require_at_least("chains", chains, 1)
        self.chains = chains

    def solve_batch(self, questions: Sequence[str]) -> list[Result]:
        """A result for each question, in their order.

        Raises:
            RuntimeError: the number of chains was left open.
        """
        if self.chains is None:
            raise RuntimeError("chains=None has no number of chains by itself; call solve_within(questions, budgets).")
        return self._solve(questions, [self.chains] * len(questions), None)

    def solve_within(self, questions: Sequence[str], budgets: Sequence[int]) -> list[Result]:
        """A result for each question, from solutions that are begun as long as fewer tokens are written than allowed.

        The last one is finished: there are never fewer tokens than `budgets` says, so the comparison is not in favour
        of the solver whose tokens they are.

        Args:
            questions: the questions.
            budgets: new tokens for each.
        """
        return self._solve(questions, [None] * len(questions), budgets)

    def _solve(
        self, questions: Sequence[str], chains: Sequence[int | None], budgets: Sequence[int] | None
    ) -> list[Result]:
        found: list[list[Written]] = [[] for _ in questions]
        spent = [0] * len(questions)
        while open_ := [
            i
            for i, count in enumerate(chains)
            if (len(found[i]) < count if count is not None else not found[i] or spent[i] < (budgets or [])[i])
        ]:
            asks = [
                Ask(self.templates.ask_cot(questions[i]), seed_of(self.seed, questions[i], "chain", len(found[i])))
                for i in open_
            ]
            for i, written in zip(open_, self.writer.write(asks, self.max_new_tokens), strict=True):
                found[i].append(written)
                spent[i] += max(1, written.n_new_tokens)  # an empty text must not be tried for ever
        return [self._voted(each, self._read(each)) for each in found]
