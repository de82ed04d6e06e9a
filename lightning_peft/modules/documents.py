"""Texts, prompts with answers, and conversations as tokens, each token with whether it is to be learned."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_peft.modules.pair_files import Message, Pair

IGNORED = -100
"""Label of a token that the loss leaves out; transformers' own."""
_CHUNK = 256  # texts tokenised at a time: bounds the memory of the tokenizer's own lists


class Document(NamedTuple):
    """Tokens, and for each its own number where it is learned, or -100 where it is only read."""

    ids: list[int]
    labels: list[int]


class Documents(Dataset[tuple[Tensor, Tensor]]):
    """Documents in flat tensors. The first token of each is not predicted, since nothing stands before it.

    Args:
        documents: those with at least one token that is predicted; others have no loss.
    """

    def __init__(self, documents: Sequence[Document]) -> None:
        self.lengths = torch.tensor([len(each.ids) for each in documents], dtype=torch.int64)
        self.ends = self.lengths.cumsum(0)
        self._ids = torch.tensor([i for each in documents for i in each.ids], dtype=torch.int32)
        self._labels = torch.tensor([i for each in documents for i in each.labels], dtype=torch.int32)
        self._labels[self.ends - self.lengths] = IGNORED

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Token numbers and labels, (length,) int32 each."""
        where = slice(int(self.ends[index] - self.lengths[index]), int(self.ends[index]))
        return self._ids[where], self._labels[where]


def start_of(tokenizer: Any) -> list[int]:
    """The token that the tokenizer puts before a text, if it puts one."""
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and tokenizer("")["input_ids"][:1] == [begin] else []


def end_of(tokenizer: Any) -> list[int]:
    """The end-of-text token, if there is one."""
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def tokens_of(tokenizer: Any, texts: Sequence[str]) -> Iterator[list[int]]:
    """The tokens of each text, without any that frame it."""
    for start in range(0, len(texts), _CHUNK):
        # verbose: a text longer than the model's window is cut later, and no reason for a warning
        yield from tokenizer(list(texts[start : start + _CHUNK]), add_special_tokens=False, verbose=False)["input_ids"]


def whole_texts(tokenizer: Any, texts: Sequence[str]) -> Iterator[Document]:
    """Texts, all tokens of which are learned, with the tokens that begin and end one; empty texts are left out."""
    start, end = start_of(tokenizer), end_of(tokenizer)
    for row in tokens_of(tokenizer, texts):
        if row:
            ids = [*start, *row, *end]
            yield Document(ids, ids)


def answers(tokenizer: Any, pairs: Sequence[Pair], separator: str) -> Iterator[Document]:
    """Prompts with their answers, of which the answers and the token that ends them are learned.

    Prompt and answer are tokenised apart, so that an answer is learned behind the very tokens that a prompt alone has
    when the model is to answer it.
    """
    end = end_of(tokenizer)
    read = prompts(tokenizer, [pair.source for pair in pairs], separator)
    for before, answer in zip(read, tokens_of(tokenizer, [pair.target for pair in pairs]), strict=True):
        learned = [*answer, *end]
        yield Document([*before, *learned], [*[IGNORED] * len(before), *learned])


def prompts(tokenizer: Any, texts: Sequence[str], separator: str) -> Iterator[list[int]]:
    """The tokens of prompts that are to be answered."""
    start = start_of(tokenizer)
    for row in tokens_of(tokenizer, [text + separator for text in texts]):
        yield [*start, *row]


def fitted(documents: Iterable[Document], size: int, split: bool) -> tuple[list[Document], int, int]:
    """Documents of `size` tokens at most, each with something to predict.

    Args:
        documents: of any length.
        size: tokens at most.
        split: a longer one becomes several; otherwise it loses what is too much at its end.

    Returns:
        The documents, how many lost their end, and how many were left out because nothing of them is to be learned.
    """
    kept: list[Document] = []
    cut = lost = 0
    for ids, labels in documents:
        cut += len(ids) > size and not split
        for at in range(0, len(ids) if split else 1, size):
            piece = Document(ids[at : at + size], labels[at : at + size])
            if any(label != IGNORED for label in piece.labels[1:]):
                kept.append(piece)
            else:
                lost += not split  # the last token of a text, alone
    return kept, cut, lost


def as_messages(pair: Pair) -> list[Message]:
    """A prompt and, if there is one, its answer as turns of a conversation."""
    asked: list[Message] = [{"role": "user", "content": pair.source}]
    return [*asked, {"role": "assistant", "content": pair.target}] if pair.target else asked
