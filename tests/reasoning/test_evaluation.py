"""Figures of an evaluation, on results that are made up and by scripted solvers."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import pytest

from lightning_peft.reasoning import Result, SelfConsistency, Templates, evaluate, mcnemar, wilson

QUESTIONS = [(f"q{i}", str(i)) for i in range(10)]


class Given:
    """Answers from a table."""

    def __init__(self, wrong: set[int], silent: set[int] = frozenset(), tokens: int = 5) -> None:  # type: ignore[assignment]
        self.wrong, self.silent, self.tokens = wrong, silent, tokens

    def solve_batch(self, questions: Sequence[str]) -> list[Result]:
        return [
            Result(
                None if i in self.silent else "-1" if i in self.wrong else f"{i}.0",
                "",
                n_calls=2,
                n_prompt_tokens=7,
                n_new_tokens=self.tokens + i,
                fallback=i == 0,
            )
            for i in (int(question[1:]) for question in questions)
        ]


def test_property_11_figures_on_a_toy_set() -> None:
    found = evaluate(QUESTIONS, Given({0}, {1}), {"worse": Given({0, 2, 3, 4, 5, 6, 7}), "equal": Given({0}, {1})})
    assert found.score.accuracy == 0.8
    assert found.score.interval == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert (found.score.failures, found.score.fallbacks) == (0.1, 0.1)
    assert (found.score.new_tokens, found.score.prompt_tokens, found.score.calls) == (9.5, 7.0, 2.0)
    assert found.baselines["worse"].accuracy == 0.3
    # 6 questions the solver alone has right, 1 the baseline alone
    assert found.p_values == {"worse": 2 * (1 + 7) / 2**7, "equal": 1.0}
    table = found.table("ours").splitlines()
    assert table[1].split() == ["ours", "0.800", "[0.490,", "0.943]", "0.100", "9.5", "7.0", "2.0"]
    assert table[2].split()[-1] == "0.125"


@pytest.mark.parametrize(("b", "c"), [(0, 0), (0, 5), (3, 3), (10, 2), (1, 30)])
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    chances = [comb(b + c, k) / 2 ** (b + c) for k in range(b + c + 1)]
    extreme = sum(chance for k, chance in enumerate(chances) if abs(k - (b + c) / 2) >= abs(b - c) / 2)
    assert mcnemar(b, c) == mcnemar(c, b) == pytest.approx(extreme)


def test_wilsons_interval_solves_its_equation() -> None:
    """Its bounds are the shares from which the observed one is z standard errors away."""
    for successes, trials in ((0, 7), (3, 7), (7, 7), (130, 400)):
        for bound in wilson(successes, trials):
            error = (bound * (1 - bound) / trials) ** 0.5
            assert abs(successes / trials - bound) == pytest.approx(1.959964 * error, abs=1e-6)
    with pytest.raises(ValueError, match=r"3 of 2 is no share"):
        wilson(3, 2)
    with pytest.raises(ValueError, match=r"0 of 0 is no share"):
        wilson(0, 0)


def test_self_consistency_gets_the_tokens_of_the_solver(scripted: Any, tokenizer: Any) -> None:
    model = scripted({f"q{i}?": "It is 7." for i in range(10)})
    templates = Templates(cot="{question}?")
    told: list[str] = []
    found = evaluate(
        QUESTIONS,
        Given(set(), tokens=20),
        {"vote": SelfConsistency(model, tokenizer, chains=None, templates=templates)},
        report=told.append,
    )
    assert told == ["solver", "vote"]
    assert [result.n_calls for result in found.baselines["vote"].results] == [-(-(20 + i) // 8) for i in range(10)]
    assert found.baselines["vote"].new_tokens >= found.score.new_tokens
    assert found.baselines["vote"].accuracy == 0.1


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the dataset is empty"):
        evaluate([], Given(set()))
