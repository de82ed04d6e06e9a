"""How often solvers are right, how sure that is, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from lightning_peft.reasoning.baselines import SelfConsistency
from lightning_peft.reasoning.extraction import same_answer
from lightning_peft.reasoning.result import Result, Solver
from lightning_peft.reasoning.statistics import mcnemar, wilson


@dataclass(frozen=True)
class Score:
    """One solver on a set of questions.

    Attributes:
        right: for each question whether its answer is right.
        accuracy: share of them.
        interval: Wilson's, 95 %.
        failures: share of questions without an answer that could be read; they count as wrong.
        fallbacks: share of questions that were asked without examples because none was fit.
        new_tokens: written per question, on average.
        prompt_tokens: read per question, on average.
        calls: texts per question, on average.
        results: all results.
    """

    right: tuple[bool, ...]
    accuracy: float
    interval: tuple[float, float]
    failures: float
    fallbacks: float
    new_tokens: float
    prompt_tokens: float
    calls: float
    results: tuple[Result, ...] = field(repr=False)


@dataclass(frozen=True)
class Comparison:
    """A solver and its baselines on the same questions.

    Attributes:
        score: the solver's.
        baselines: theirs, by name.
        p_values: by baseline, McNemar's exact probability of so large a difference by chance.
    """

    score: Score
    baselines: Mapping[str, Score]
    p_values: Mapping[str, float]

    def table(self, name: str = "solver") -> str:
        """All figures as text, one line each.

        Args:
            name: of the solver.
        """
        names = [name, *self.baselines]
        width = max(map(len, names))
        head = f"{'':{width}}  accuracy  95 % interval   no answer  new tokens  read tokens  calls  McNemar p"
        lines = [head]
        for each, score in zip(names, (self.score, *self.baselines.values()), strict=True):
            low, high = score.interval
            p = f"{self.p_values[each]:9.3f}" if each in self.p_values else f"{'':9}"
            lines.append(
                f"{each:{width}}  {score.accuracy:8.3f}  [{low:.3f}, {high:.3f}]  {score.failures:9.3f}  "
                f"{score.new_tokens:10.1f}  {score.prompt_tokens:11.1f}  {score.calls:5.1f}  {p}".rstrip()
            )
        return "\n".join(lines)


def evaluate(
    dataset: Sequence[tuple[str, str]],
    solver: Solver,
    baselines: Mapping[str, Solver] | None = None,
    same: Callable[[str | None, str | None], bool] = same_answer,
    report: Callable[[str], object] | None = None,
) -> Comparison:
    """Score a solver and baselines on questions whose answers are known. Solvers are given the questions alone.

    A :class:`~lightning_peft.reasoning.SelfConsistency` with ``chains=None`` writes at least as many tokens for each
    question as the solver has: what the same effort reaches without examples.

    Args:
        dataset: questions with their answers.
        solver: what is to be judged.
        baselines: what it is compared with, by name.
        same: whether two answers agree.
        report: told the name of each solver before it begins; "solver" for the first.

    Raises:
        ValueError: there is no question.
    """
    if not dataset:
        raise ValueError("the dataset is empty; give questions with their answers, [(question, answer), ...].")
    questions, answers = [question for question, _ in dataset], [answer for _, answer in dataset]
    tell = report or (lambda name: None)
    tell("solver")
    results = solver.solve_batch(questions)
    score = _score(results, answers, same)
    others: dict[str, Score] = {}
    for name, baseline in (baselines or {}).items():
        tell(name)
        if isinstance(baseline, SelfConsistency) and baseline.chains is None:
            found = baseline.solve_within(questions, [result.n_new_tokens for result in results])
        else:
            found = baseline.solve_batch(questions)
        others[name] = _score(found, answers, same)
    p_values = {
        name: mcnemar(
            sum(a and not b for a, b in zip(score.right, other.right, strict=True)),
            sum(b and not a for a, b in zip(score.right, other.right, strict=True)),
        )
        for name, other in others.items()
    }
    return Comparison(score, others, p_values)


def _score(results: Sequence[Result], answers: Sequence[str], same: Callable[[str | None, str | None], bool]) -> Score:
    right = tuple(same(result.answer, answer) for result, answer in zip(results, answers, strict=True))
    count = len(results)
    return Score(
        right=right,
        accuracy=sum(right) / count,
        interval=wilson(sum(right), count),
        failures=sum(result.answer is None for result in results) / count,
        fallbacks=sum(result.fallback for result in results) / count,
        new_tokens=sum(result.n_new_tokens for result in results) / count,
        prompt_tokens=sum(result.n_prompt_tokens for result in results) / count,
        calls=sum(result.n_calls for result in results) / count,
        results=tuple(results),
    )
