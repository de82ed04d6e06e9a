"""Answers out of texts."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

Extractor = Callable[[str], str | None]
"""Reads an answer from a text; ``None`` if there is none."""

MARKER = "The answer is"
"""What stands before an answer, unless templates say otherwise."""
_NUMBER = re.compile(r"(?<![\w.])-?\$?\s?(\d[\d,]*(?:\.\d+)?|\.\d+)(?:\s?/\s?(\d[\d,]*))?")
_BOXED = re.compile(r"\\boxed\{([^{}]*(?:\{[^{}]*\}[^{}]*)*)\}")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?[\d.,]+)\}\{([\d.,]+)\}")
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-Z])\)?(?![A-Za-z'])")


def number(text: str, marker: str = MARKER) -> str | None:
    """The last number of the line behind the last marker; without a marker, of a box, or else of the whole text.

    A marker is found in capitals and in small letters.

    Thousands' commas, a dollar and a percent sign are left out, a fraction is a number, and a typographic minus is one.

    Args:
        text: what a model has written.
        marker: what stands before an answer.

    Returns:
        The number as an integer, or a fraction in lowest terms; ``None`` if there is none.

    Example:
        >>> number("3 of 4. The answer is $1,234.50.")
        '2469/2'
        >>> number("The answer is unknown.") is None
        True
    """
    text = text.replace("−", "-").replace("–", "-")
    place = last_place(text, marker)
    if place is not None:
        return _last(text[place.end() :].strip().partition("\n")[0])
    boxes = _BOXED.findall(text)
    return _last(boxes[-1] if boxes else text)


def letter(text: str, marker: str = MARKER) -> str | None:
    """The first capital letter that stands alone behind the last marker, as in a multiple choice; ``None`` without.

    Example:
        >>> letter("A is wrong. The answer is (C).")
        'C'
    """
    place = last_place(text, marker)
    match = _LETTER.search(text, place.end()) if place is not None else None
    return match[1] if match else None


def last_place(text: str, words: str) -> re.Match[str] | None:
    """Where words stand last in a text, in capitals or small letters; ``None`` if nowhere."""
    places = list(re.finditer(re.escape(words), text, re.IGNORECASE))
    return places[-1] if places else None


def until_answer(text: str, marker: str = MARKER) -> str:
    r"""A text up to the end of the line of its first answer, after a marker or in a box; all of it if there is none.

    Example:
        >>> until_answer("3 + 4 = 7. The answer is 7.\n\nProblem 4: 9 + 9. The answer is 18.")
        '3 + 4 = 7. The answer is 7.'
    """
    first = re.search(f"(?:{re.escape(marker)}|{_BOXED.pattern}).*", text, re.IGNORECASE)
    return text if first is None else text[: first.end()]


def same_answer(a: str | None, b: str | None, tolerance: float = 1e-6) -> bool:
    """Whether two answers agree: as numbers, within a share of the larger, or as texts without regard to case.

    Example:
        >>> same_answer("0.5", "1/2"), same_answer("C", "c"), same_answer(None, None)
        (True, True, False)
    """
    if a is None or b is None:
        return False
    first, second = _value(a), _value(b)
    if first is None or second is None:
        return a.strip().casefold() == b.strip().casefold()
    return abs(first - second) <= Fraction(tolerance) * max(Fraction(1), abs(first), abs(second))


def _last(text: str) -> str | None:
    text = _FRACTION.sub(r"\1/\2", text)
    found = [value for match in _NUMBER.finditer(text) if (value := _value(match[0])) is not None]
    return str(found[-1]) if found else None


def _value(text: str) -> Fraction | None:
    plain = re.sub(r"[,$%\s]", "", text.replace("−", "-"))
    above, slash, below = plain.partition("/")
    try:
        return Fraction(above) / (Fraction(below) if slash else 1)
    except (ValueError, ZeroDivisionError):
        return None
