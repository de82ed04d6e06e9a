"""Texts as sentences, each a list of words."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from lightning_peft.arguments import require_integer

Cut = Callable[[str], list[list[str]]]
"""Makes the sentences of a text, as words."""

# A word may hold apostrophes and hyphens; any other mark is a word of its own.
_WORD = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
# Behind a full stop, question or exclamation mark, with quotes and brackets that close after it.
_END = re.compile(r"(?<=[.!?])[\"'’”)\]]*\s+")


def words_of(text: str) -> list[str]:
    """Words in lower case, and marks of punctuation.

    Example:
        >>> words_of("It's late, isn't it?")
        ["it's", 'late', ',', "isn't", 'it', '?']
    """
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class Sentences:
    """Sentences of a text with punctuation; those that are too short or too long are left out.

    A sentence ends with a full stop, a question mark or an exclamation mark before a space: also in "Mr. Smith".

    Args:
        fewest: words and marks that a sentence has at least.
        most: and at most.

    Raises:
        TypeError: one of them is no integer.
        ValueError: there is no such sentence.

    Example:
        >>> Sentences(fewest=3)("The sky is blue. Why? The tree is green!")
        [['the', 'sky', 'is', 'blue', '.'], ['the', 'tree', 'is', 'green', '!']]
    """

    fewest: int = 4
    most: int = 40

    def __post_init__(self) -> None:
        for name, value in (("fewest", self.fewest), ("most", self.most)):
            require_integer(name, value)
        if not 1 <= self.fewest <= self.most:
            raise ValueError(
                f"fewest={self.fewest}, most={self.most}: a sentence has 1 word or more, and fewest is not above most."
            )

    def __call__(self, text: str) -> list[list[str]]:
        found = (words_of(part) for part in _END.split(text))
        return [words for words in found if self.fewest <= len(words) <= self.most]


@dataclass(frozen=True)
class Pieces:
    """Pieces of equally many words of a text, for corpora whose punctuation is gone; what is left over is dropped.

    Args:
        words: of each piece.

    Raises:
        TypeError: words is no integer.
        ValueError: it is below 1.

    Example:
        >>> Pieces(words=2)("the sky is blue today")
        [['the', 'sky'], ['is', 'blue']]
    """

    words: int = 20

    def __post_init__(self) -> None:
        require_integer("words", self.words)
        if self.words < 1:
            raise ValueError(f"words={self.words}: a piece has 1 word or more.")

    def __call__(self, text: str) -> list[list[str]]:
        found = words_of(text)
        return [found[i : i + self.words] for i in range(0, len(found) - self.words + 1, self.words)]
