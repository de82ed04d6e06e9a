"""Self-generated in-context chains of thought."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import nn

from lightning_peft.reasoning.extraction import same_answer
from lightning_peft.reasoning.generation import Ask, Written, seed_of
from lightning_peft.reasoning.result import Example, Result
from lightning_peft.reasoning.similarity import is_fit, jaccard, listed
from lightning_peft.reasoning.solving import Prompted, majority, require_at_least

Mode = Literal["integrated", "staged"]
"""One text with examples and solution, or questions, their solutions and the solution one after the other."""


class SelfGeneratedCoT(Prompted):
    """The model writes problems that are like the one it is asked, solves them, and then the one that it was asked.

    Nothing is trained and nobody tells it whether it is right. In mode ``"integrated"`` this is one text, and the
    answer is the first behind the heading of the original problem. In mode ``"staged"``:

    1. it writes `n_examples` questions (sampled); those that are empty, cut off, repeated, too long to be solved in the
       context, or the question itself are dropped;
    2. it solves each (greedily); those without an answer, or cut off before it, are dropped. With `filter_k` as many
       further solutions are sampled, and an example stays if at least `agreement` of all its solutions have the answer
       of most;
    3. examples are put in the order of their likeness to the question, the nearest last; the farthest are left out
       until the prompt fits into the context. If none is left, it is asked without examples, and the result says so;
    4. it solves the question behind them: greedily, or by the votes of sampled solutions.

    What is sampled depends on the seed and the question: not on the batch, the order, or the process.

    Args:
        model: anything with transformers' `generate`, with adapters or without.
        tokenizer: the model's; where it has a chat template, prompts are a user's turns.
        n_examples: problems that it writes; 0 is zero-shot CoT.
        mode: "integrated" or "staged".
        votes: solutions of the question; 1 is greedy, more are sampled, and of equally frequent answers the first wins.
        filter_k: further solutions of each example in mode "staged"; 0 keeps all examples with an answer.
        agreement: share of an example's solutions that must agree.
        integrated_tokens: of the whole text in mode "integrated", at most.
        known: examples by question that are there already, such as those of earlier results: in mode "staged" a
            question among them is answered behind these, and none are written.
        options: templates, extractor, max_new_tokens (of one solution), seed, max_context_tokens, temperature, top_p,
            batch_size, stop, progress: as for every solver, see `Prompted`.
    Raises:
        TypeError: a count is no integer.
        ValueError: an unknown mode, a count that is too small, or agreement outside (0, 1].
    Reference:
        A reconstruction. Of "Self-Adaptive In-Context Chains-of-Thought for Enhanced Mathematical Reasoning" only a
        description in one line could be read: no prompts, numbers or code. Procedure, prompts and defaults are our
        choices, after analogical prompting (Yasunaga et al., 2024, arXiv 2310.01714) and Self-ICL (Chen et al., 2023,
        arXiv 2305.15035). Content adapts to the question by construction, the number of examples to the context.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        n_examples: int = 3,
        mode: Mode = "integrated",
        votes: int = 1,
        filter_k: int = 0,
        agreement: float = 0.6,
        integrated_tokens: int = 1024,
        known: Mapping[str, Sequence[Example]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, tokenizer, **options)
        for name, value, least in (
            ("n_examples", n_examples, 0), ("votes", votes, 1), ("filter_k", filter_k, 0),
            ("integrated_tokens", integrated_tokens, 1),
        ):  # fmt: skip
            require_at_least(name, value, least)
        if mode not in get_args(Mode):
            raise ValueError(f"mode={mode!r}: choose 'integrated' or 'staged'.")
        if not 0 < agreement <= 1:
            raise ValueError(f"agreement={agreement}: it is a share of an example's solutions, above 0 and at most 1.")
        if filter_k and mode == "integrated":
            raise ValueError(f"filter_k={filter_k} is for mode='staged': an integrated text is not taken apart.")
        if known and mode == "integrated":
            raise ValueError("known examples are for mode='staged': an integrated text has its own.")
        self.known = {question: tuple(Example(*each) for each in found) for question, found in (known or {}).items()}
        self.n_examples, self.mode, self.votes = n_examples, mode, votes
        self.filter_k, self.agreement, self.integrated_tokens = filter_k, agreement, integrated_tokens

    def solve_batch(self, questions: Sequence[str]) -> list[Result]:
        """A result for each question, in their order."""
        if self.n_examples == 0:
            return self._finish(questions, [()] * len(questions))
        return self._integrated(questions) if self.mode == "integrated" else self._staged(questions)

    def _integrated(self, questions: Sequence[str]) -> list[Result]:
        asks = [
            Ask(
                self.templates.ask_integrated(question, self.n_examples),
                None if self.votes == 1 else seed_of(self.seed, question, "vote", k),
            )
            for question in questions
            for k in range(self.votes)
        ]
        # Nothing stops it: what begins another question elsewhere may begin an example here.
        written = self.writer.write(asks, self.integrated_tokens, stop=())
        found = [written[at : at + self.votes] for at in range(0, len(written), self.votes)]
        return [self._voted(texts, [self._own_answer(each.text) for each in texts]) for texts in found]

    def _own_answer(self, text: str) -> str | None:
        """The answer of the original problem, and not one of an example before or behind its solution."""
        section = self.templates.target_section(text)
        return None if section is None else self.extractor(section)

    def _staged(self, questions: Sequence[str]) -> list[Result]:
        fresh = [question for question in questions if question not in self.known]
        asks = [
            Ask(self.templates.ask_similar(question, self.n_examples), seed_of(self.seed, question, "similar"))
            for question in fresh
        ]
        lists = self.writer.write(asks, self.max_new_tokens, stop=())
        candidates = [self._fit(text, question) for text, question in zip(lists, fresh, strict=True)]
        solved, spent = self._solved(fresh, candidates)
        made = iter([(examples, [first, *costs]) for examples, first, costs in zip(solved, lists, spent, strict=True)])
        rows: list[tuple[Sequence[Example], list[Written]]] = [
            (self.known[question], []) if question in self.known else next(made) for question in questions
        ]
        contexts = [self._in_context(q, examples) for q, (examples, _) in zip(questions, rows, strict=True)]
        results = self._finish(questions, contexts)
        return [
            replace(
                result,
                n_calls=result.n_calls + len(costs),
                n_prompt_tokens=result.n_prompt_tokens + sum(each.n_prompt_tokens for each in costs),
                n_new_tokens=result.n_new_tokens + sum(each.n_new_tokens for each in costs),
                fallback=not result.examples,
            )
            for result, (_, costs) in zip(results, rows, strict=True)
        ]

    def _cut_off(self, text: Written) -> bool:
        return text.n_new_tokens >= self.max_new_tokens

    def _fit(self, text: Written, question: str) -> list[str]:
        """The questions of a list that can be examples, at most as many as were asked for."""
        kept: list[str] = []
        found = listed(text.text)
        for candidate in found[:-1] if self._cut_off(text) else found:
            fit = len(kept) < self.n_examples and is_fit(candidate, question, kept)
            if fit and self.writer.fits(self.templates.ask_cot(candidate), self.max_new_tokens):
                kept.append(candidate)
        return kept

    def _solved(
        self, questions: Sequence[str], candidates: Sequence[Sequence[str]]
    ) -> tuple[list[list[Example]], list[list[Written]]]:
        """Each candidate with a solution that is trusted, and all that was written on the way, by question."""
        owners = [(i, candidate) for i, found in enumerate(candidates) for candidate in found]
        asks = [
            Ask(
                self.templates.ask_cot(candidate),
                None if k == 0 else seed_of(self.seed, questions[i], "filter", candidate, k),
            )
            for i, candidate in owners
            for k in range(1 + self.filter_k)
        ]
        written = iter(self.writer.write(asks, self.max_new_tokens) if asks else [])
        solved: defaultdict[int, list[Example]] = defaultdict(list)
        spent: defaultdict[int, list[Written]] = defaultdict(list)
        for i, candidate in owners:
            chains = [next(written) for _ in range(1 + self.filter_k)]
            spent[i] += chains
            # Of a solution without its end the last number is any number.
            answers = [None if self._cut_off(each) else self.extractor(each.text) for each in chains]
            chosen = majority(answers)
            if chosen is None:
                continue
            answer = answers[chosen]
            assert answer is not None
            agreeing = sum(same_answer(answer, other) for other in answers)
            if agreeing >= self.agreement * len(answers):
                solution = self.templates.before_marker(chains[chosen].text)
                solved[i].append(Example(candidate, solution, answer))
        return [solved[i] for i in range(len(questions))], [spent[i] for i in range(len(questions))]

    def _in_context(self, question: str, examples: Sequence[Example]) -> tuple[Example, ...]:
        """The examples from far to near, without the farthest where the context has no room for them."""
        kept = sorted(examples, key=lambda each: jaccard(each.question, question))
        while kept and not self.writer.fits(self.templates.ask_cot(question, kept), self.max_new_tokens):
            del kept[0]
        return tuple(kept)

    def _finish(self, questions: Sequence[str], contexts: Sequence[tuple[Example, ...]]) -> list[Result]:
        found = self._chains(questions, contexts, self.votes)
        return [
            self._voted(chains, self._read(chains), examples=context)
            for chains, context in zip(found, contexts, strict=True)
        ]
