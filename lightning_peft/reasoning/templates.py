"""The prompts, as text with places for what changes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_peft.reasoning.extraction import last_place, until_answer
from lightning_peft.reasoning.result import Example


@dataclass(frozen=True)
class Templates:
    """What the model is told. The words are ours: no prompt of the paper could be found.

    Args:
        marker: what stands before an answer.
        heading: what stands before the solution of the question that was asked, where a text also solves others.
        direct: asks for the answer alone; with {question} and {marker}.
        cot: asks for a solution step by step; with {question} and {marker}.
        integrated: asks for {n} other problems with solutions, and then for this one's; with {heading} too.
        similar: asks for {n} problems like {question}, without solutions.
        example: one solved question before a question; with {question}, {solution}, {answer} and {marker}.
    Raises:
        ValueError: a template lacks a place, or an empty marker or heading.
    """

    marker: str = "The answer is"
    heading: str = "Solution of the original problem:"
    direct: str = 'Q: {question}\nReply with "{marker}" and the answer alone.\nA:'
    cot: str = 'Q: {question}\nThink step by step, and end with "{marker}" and the answer.\nA:'
    integrated: str = (
        "Original problem: {question}\n\n"
        "First write {n} different problems of the same kind, with other numbers. Solve each step by step, and end "
        'each solution with "{marker}" and its answer. Then write "{heading}", solve the original problem step by '
        'step, and end with "{marker}" and the answer.'
    )
    similar: str = (
        "Problem: {question}\n\n"
        "Write {n} different problems of the same kind, with other numbers. Number them, one problem on each line, and "
        "do not solve them."
    )
    example: str = "Q: {question}\nA: {solution} {marker} {answer}."

    def __post_init__(self) -> None:
        for name in ("marker", "heading"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty; it is how an answer is found in a text.")
        for name, places in _PLACES.items():
            for place in places:
                if f"{{{place}}}" not in getattr(self, name):
                    raise ValueError(f"the template {name!r} has no place {{{place}}}. Got {getattr(self, name)!r}.")

    def ask_direct(self, question: str) -> str:
        """A prompt for the answer alone."""
        return _filled(self.direct, question=question, marker=self.marker)

    def ask_cot(self, question: str, examples: Sequence[Example] = ()) -> str:
        """A prompt for a solution step by step, behind solved examples if there are any."""
        solved = [
            _filled(
                self.example, question=each.question, solution=each.solution, answer=each.answer, marker=self.marker
            )
            for each in examples
        ]
        return "\n\n".join([*solved, _filled(self.cot, question=question, marker=self.marker)])

    def ask_integrated(self, question: str, n: int) -> str:
        """A prompt for n other problems with solutions, and for the solution of this one."""
        return _filled(self.integrated, question=question, n=str(n), marker=self.marker, heading=self.heading)

    def ask_similar(self, question: str, n: int) -> str:
        """A prompt for n other problems."""
        return _filled(self.similar, question=question, n=str(n))

    def target_section(self, text: str) -> str | None:
        """What follows the last heading, up to the first answer there; ``None`` if there is no heading.

        Behind that answer may stand one more example.
        """
        heading = last_place(text, self.heading)
        return None if heading is None else until_answer(text[heading.end() :], self.marker)

    def before_marker(self, text: str) -> str:
        """A solution without its last sentence, which gives the answer."""
        marker = last_place(text, self.marker)
        return (text if marker is None else text[: marker.start()]).strip()


_PLACES = {
    "direct": ("question",),
    "cot": ("question",),
    "integrated": ("question", "n", "heading"),
    "similar": ("question", "n"),
    "example": ("question", "solution", "answer"),
}


def _filled(template: str, **values: str) -> str:
    """Put values in; braces in a question or a solution stay what they are."""
    return re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), template)
