"""How alike two questions are, and which self-written ones are fit to be examples."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise

_WORD = re.compile(r"\d[\d.,]*\d|\w+")
_NUMBER = re.compile(r"\d[\d.,]*\d|\d")
_ITEM = re.compile(r"^\s*(?:(?:problem|question|q)\s*)?\d+\s*[.):]\s*(.+?)\s*$", re.IGNORECASE | re.MULTILINE)


def words_of(text: str) -> list[str]:
    """Words and numbers in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def jaccard(a: str, b: str) -> float:
    """The share of words and pairs of neighbours that two texts have in common.

    Example:
        >>> jaccard("two red cars", "Two red cars.")
        1.0
    """
    first, second = _grams(a), _grams(b)
    return len(first & second) / len(first | second) if first | second else 1.0


def listed(text: str) -> list[str]:
    r"""The items of a numbered list, one on each line.

    Example:
        >>> listed("Sure:\n1. What is 2 + 3?\n2) What is 4 + 5?")
        ['What is 2 + 3?', 'What is 4 + 5?']
    """
    return _ITEM.findall(text)


def is_fit(candidate: str, question: str, others: Sequence[str], most: float = 0.8) -> bool:
    """Whether a self-written question can be an example.

    It is not if it is empty, nearly the same as the one that was asked or as another one, or has the numbers of the one
    that was asked: that would be the question itself in other words.

    Args:
        candidate: the question.
        question: the one that was asked.
        others: those that are examples already.
        most: likeness above which two are the same.
    """
    if not words_of(candidate) or any(jaccard(candidate, other) > most for other in (question, *others)):
        return False
    numbers = _NUMBER.findall(candidate)
    return not numbers or numbers != _NUMBER.findall(question)


def _grams(text: str) -> set[tuple[str, ...]]:
    words = words_of(text)
    return {(word,) for word in words} | set(pairwise(words))
