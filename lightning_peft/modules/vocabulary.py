"""Words and their numbers, built from a training set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_peft.arguments import require_integer

PAD, START, END, UNKNOWN = 0, 1, 2, 3
"""Numbers of what is no word: filling, where a sentence begins and ends, and a word that is not in the vocabulary."""
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


class Vocabulary:
    """The most frequent words, by number.

    Args:
        words: all words, those of `SPECIAL` first.

    Raises:
        ValueError: they do not begin so, or a word is there twice.

    Example:
        >>> vocabulary = Vocabulary.build([["a", "sky"], ["a", "tree"]], size=6)
        >>> vocabulary.words
        ('<pad>', '<s>', '</s>', '<unk>', 'a', 'sky')
        >>> vocabulary.encode(["a", "tree"])
        [1, 4, 3, 2]
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        if self.words[: len(SPECIAL)] != SPECIAL:
            raise ValueError(f"a vocabulary begins with {', '.join(SPECIAL)}. Got {', '.join(self.words[:4])}.")
        self._numbers = {word: number for number, word in enumerate(self.words)}
        if len(self._numbers) < len(self.words):
            twice = next(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"the word {twice!r} is in the vocabulary more than once.")

    @classmethod
    def build(cls, sentences: Iterable[Sequence[str]], size: int) -> Vocabulary:
        """The most frequent words of a training set; of equally frequent ones those that come first in the alphabet.

        Args:
            sentences: words of each.
            size: how many there are at most, the special ones included.

        Raises:
            TypeError: size is no integer.
            ValueError: it leaves no room for a word.
        """
        require_integer("vocabulary_size", size)
        if size <= len(SPECIAL):
            raise ValueError(
                f"vocabulary_size={size}: {len(SPECIAL)} places are taken by {', '.join(SPECIAL)}; give more."
            )
        counts = Counter(word for sentence in sentences for word in sentence)
        frequent = sorted((word for word in counts if word not in SPECIAL), key=lambda word: (-counts[word], word))
        return cls([*SPECIAL, *frequent[: size - len(SPECIAL)]])

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, words: Sequence[str]) -> list[int]:
        """Numbers of a sentence, between those of its start and its end."""
        return [START, *(self._numbers.get(word, UNKNOWN) for word in words), END]

    def decode(self, ids: Tensor | Sequence[int]) -> str:
        """The sentence of these numbers, up to its end; filling and starts are left out.

        Shape:
            ids: (length,)
        """
        found: list[str] = []
        for number in ids.tolist() if isinstance(ids, Tensor) else ids:
            if number == END:
                break
            if number not in (PAD, START):
                found.append(self.words[number])
        return " ".join(found)
