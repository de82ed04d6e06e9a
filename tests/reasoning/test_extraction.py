"""Answers out of texts."""

from __future__ import annotations

import pytest

from lightning_peft.reasoning import letter, number, same_answer
from lightning_peft.reasoning.similarity import is_fit, listed


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is 1,234.", "1234"),
        ("The answer is $5.00", "5"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is −2", "-2"),
        ("The answer is -$3", "-3"),
        (r"so \boxed{7} it is", "7"),
        (r"The answer is \boxed{\frac{6}{8}}.", "3/4"),
        ("no number", None),
        ("", None),
        ("The answer is unknown. I had 5.", "5"),
        ("We have 3. The answer is unclear.", None),
        ("The answer is 12 %.", "12"),
        ("The answer is 3 + 4 = 7.\nNext, 9", "7"),
        ("The answer is 1. No. The answer is 2.", "2"),
        ("5 - 3 is 2", "2"),
        ("x2 is 4th", "4"),
        ("first 3, then 8 apples", "8"),
        ("The answer is 1/0.", None),
        ("The answer is .5", "1/2"),
        ("The answer is: 10-4=6", "6"),
        ("So the answer is 7.\nThere were 3 at first.", "7"),
    ],
)
def test_property_7_numbers(text: str, answer: str | None) -> None:
    assert number(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The answer is (C).", "C"), ("A or B? The answer is B because A", "B"), ("The answer is Dogs", None),
        ("C", None), ("The answer is I'm", None),
    ],
)  # fmt: skip
def test_letters(text: str, answer: str | None) -> None:
    assert letter(text) == answer


def test_answers_are_compared_as_numbers() -> None:
    assert same_answer("1234", "1,234.0")
    assert same_answer("1/3", "0.3333333")
    assert not same_answer("1/3", "0.333")
    assert same_answer("1000000000", "1000000001", tolerance=1e-6)
    assert not same_answer("7", "C")
    assert same_answer(" c", "C")
    assert not same_answer(None, "1")


def test_property_6_repeated_and_copied_questions_are_rejected() -> None:
    asked = "Tom has 3 apples and buys 4 more. How many apples has he?"
    kept = ["Ann has 5 pens and loses 2. How many pens has she?"]
    assert is_fit("Ben has 7 cars and sells 5. How many are left?", asked, kept)
    for candidate in (
        "", "?!", asked, asked.upper().replace(".", "!"),  # nearly the same
        "There were 3 birds on a roof, and 4 came. How many are there?",  # the numbers of the question
    ):  # fmt: skip
        assert not is_fit(candidate, asked, kept), candidate
    assert not is_fit(kept[0] + " Please.", asked, kept)


def test_lists_are_read_in_several_forms() -> None:
    assert listed("Here:\n1. one\n 2) two\nProblem 3: three\nQ4. four\nnot this\n5 nor this\n") == [
        "one", "two", "three", "four",
    ]  # fmt: skip
