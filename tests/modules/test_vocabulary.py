"""Words and their numbers."""

from __future__ import annotations

import pytest
import torch

from lightning_peft.modules.sentences import Pieces, Sentences, words_of
from lightning_peft.modules.vocabulary import SPECIAL, UNKNOWN, Vocabulary


def test_frequent_words_come_first_and_ties_by_alphabet() -> None:
    sentences = [["b", "c", "a"], ["c", "d"], ["c", "b"], ["<pad>"]]
    assert Vocabulary.build(sentences, 7).words == (*SPECIAL, "c", "b", "a")
    assert Vocabulary.build(reversed(sentences), 7).words == Vocabulary.build(sentences, 7).words


def test_a_sentence_survives_numbers() -> None:
    vocabulary = Vocabulary.build([["red", "sky"]], 10)
    ids = vocabulary.encode(["red", "moon", "sky"])
    assert ids == [1, 4, UNKNOWN, 5, 2]
    assert vocabulary.decode(torch.tensor([*ids, 4, 0])) == "red <unk> sky"  # nothing behind the end


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Vocabulary(["a"]), r"a vocabulary begins with <pad>, <s>, </s>, <unk>\. Got a\."),
        (lambda: Vocabulary([*SPECIAL, "a", "a"]), r"the word 'a' is in the vocabulary more than once"),
        (lambda: Vocabulary.build([["a"]], 4), r"vocabulary_size=4: 4 places are taken by .*; give more"),
        (lambda: Sentences(fewest=5, most=4), r"fewest=5, most=4: a sentence has 1 word or more"),
        (lambda: Pieces(words=0), r"words=0: a piece has 1 word or more"),
    ],
)
def test_bad_arguments(make: object, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()  # type: ignore[operator]


def test_sentences_end_at_marks_and_quotes() -> None:
    text = 'He said "Who is it?" Nobody knew. It is 3.14 at sea-level today!'
    assert Sentences(fewest=2)(text) == [
        ["he", "said", '"', "who", "is", "it", "?"],
        ["nobody", "knew", "."],
        ["it", "is", "3", ".", "14", "at", "sea-level", "today", "!"],
    ]
    assert Sentences(fewest=2, most=3)(text) == [["nobody", "knew", "."]]


def test_pieces_are_all_of_one_length() -> None:
    assert Pieces(3)("a b c d e f g") == [["a", "b", "c"], ["d", "e", "f"]]
    assert words_of("Don’t stop") == ["don’t", "stop"]
