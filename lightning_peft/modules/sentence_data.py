"""Sentences from text files as numbers of words, for a variational autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_peft.modules.batching import Sized
from lightning_peft.modules.planned_data import NEEDED, PlannedData
from lightning_peft.modules.pretrained import padding_of
from lightning_peft.modules.sentences import Cut, Sentences
from lightning_peft.modules.text_data import Pad, Tokens
from lightning_peft.modules.text_files import read_dataset, read_texts
from lightning_peft.modules.vocabulary import PAD, Vocabulary

_LONGEST = 512  # subwords of a sentence that a pretrained encoder reads


class SentenceBatch(TypedDict, total=False):
    """A batch of sentences.

    ``tokens`` (batch, length): start, words, end, filling. ``lengths`` (batch,): words and the end, which is what is
    predicted. ``position`` (batch,): place in the set, in evaluation. For a pretrained encoder also ``input_ids`` and
    ``attention_mask``, (batch, length of its own).
    """

    tokens: Tensor
    lengths: Tensor
    position: Tensor
    input_ids: Tensor
    attention_mask: Tensor


class Row(TypedDict, total=False):
    """One sentence; ``subwords`` are a pretrained encoder's."""

    tokens: Tensor
    subwords: Tensor
    position: int


class Rows(Dataset[Row]):
    """Sentences as numbers, in one flat tensor.

    Args:
        sentences: words of each.
        vocabulary: numbers of words.
        tokenizer: a pretrained encoder's; ``None`` for none.
    """

    def __init__(self, sentences: Sequence[Sequence[str]], vocabulary: Vocabulary, tokenizer: Any) -> None:
        rows = [vocabulary.encode(words) for words in sentences]
        self.lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        self._ids = torch.tensor([i for row in rows for i in row], dtype=torch.int32)
        self._ends = self.lengths.cumsum(0)
        self._subwords: Tokens | None = None
        if tokenizer is not None:
            texts = [" ".join(words) for words in sentences]
            longest = min(tokenizer.model_max_length, _LONGEST)  # a tokenizer that has no limit says 10^30
            self._subwords = Tokens(tokenizer, texts, [0] * len(texts), longest)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Row:
        end = int(self._ends[index])
        row: Row = {"tokens": self._ids[end - int(self.lengths[index]) : end]}
        if self._subwords is not None:
            row["subwords"] = self._subwords[index][0]
        return row


class Placed(Dataset[Row]):
    """The same sentences, each with its place, by which one that only fills a last batch up is known again.

    Args:
        rows: the sentences.
    """

    def __init__(self, rows: Sized) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        row: Row = self._rows[index]
        return {**row, "position": index}


class Collate:
    """Fills sentences up to the longest of them.

    Args:
        subwords: fills a pretrained encoder's numbers up; ``None`` if there are none.
    """

    def __init__(self, subwords: Pad | None) -> None:
        self._subwords = subwords

    def __call__(self, rows: list[Row]) -> SentenceBatch:
        tokens = [row["tokens"].long() for row in rows]
        batch: SentenceBatch = {
            "tokens": torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PAD),
            "lengths": torch.tensor([len(row) - 1 for row in tokens]),
        }
        if "position" in rows[0]:
            batch["position"] = torch.tensor([row["position"] for row in rows])
        if self._subwords is not None:
            own = self._subwords([(row["subwords"], 0) for row in rows])
            batch["input_ids"], batch["attention_mask"] = own["input_ids"], own["attention_mask"]
        return batch


class SentenceData(PlannedData):
    """Sentences of txt, csv, tsv, jsonl and Orange `.tab` files, or of a `datasets` name, as numbers of words.

    The vocabulary is that of the training set, validation sentences left out. The order of batches depends on the seed
    and the epoch alone, and a run that is stopped inside an epoch and resumed sees exactly the batches that remain, in
    their order. Sentences held out are whole texts, so that no text is on both sides.

    Args:
        train: training file; with `dataset`, the name of a split.
        val: file or split to validate on; without it, `val_share` of the training texts are held out.
        test: file or split to test on, and to predict.
        dataset: a `datasets` name, of which train, val and test are splits (needs the package `datasets`).
        text: column of the text; by default "text", or the first string column of a `.tab` file.
        cut: makes sentences of a text: `Sentences` if not given, `Pieces`, or a function of yours.
        vocabulary_size: words at most, the four special ones included.
        tokenizer: hub name or folder of a pretrained encoder, which then gets its own numbers; ``None`` for none.
        batch_size: sentences per batch and process.
        val_share: share of the training texts held out when `val` is not given; 0 holds out none.
        most: sentences that are taken of each file at most, drawn by the seed; ``None`` for all.
        window: batches sorted by length together, see `LengthGrouped`.
        seed: decides the order of batches, the held-out texts, and which sentences `most` leaves.
        num_workers: processes that make batches; 0 is fast enough, the sentences are numbers already.
    Raises:
        ValueError: a file, column or tokenizer that cannot be found; a file in which `cut` finds no sentence.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        dataset: str | None = None,
        text: str | None = None,
        cut: Cut | None = None,
        vocabulary_size: int = 10_000,
        tokenizer: str | None = None,
        batch_size: int = 32,
        val_share: float = 0.1,
        most: int | None = None,
        window: int = 20,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        sources = {"train": train, "val": val, "test": test, "predict": test}
        super().__init__(sources, tokenizer or "", batch_size, val_share, window, seed, num_workers)
        if most is not None and most < 1:
            raise ValueError(f"most={most}: at least 1 sentence is read of each file; leave it out for all.")
        # A function cannot be in a checkpoint of tensors and numbers.
        self.save_hyperparameters(ignore=["cut"])
        self.dataset, self.text, self.cut, self.most = dataset, text, cut or Sentences(), most
        self.vocabulary_size = vocabulary_size
        self._vocabulary: Vocabulary | None = None

    @property
    def vocabulary(self) -> Vocabulary:
        """The words, read from the training set when they are first asked for."""
        if self._vocabulary is None:
            self._read_train()
        assert self._vocabulary is not None
        return self._vocabulary

    def read(self, stage: str) -> None:
        """Read what the stage needs, once."""
        self.vocabulary  # noqa: B018  # the numbers of words come from the training set, whatever the stage
        for split in NEEDED[stage]:
            source = self.sources[split]
            if split not in self._splits and source is not None:
                self._splits[split] = self._rows(self._sentences(self._texts(source), source))

    def lengths(self, rows: Rows) -> Tensor:
        """Words per sentence, start and end included."""
        return rows.lengths

    def collate(self) -> Collate:
        """Fills sentences up to the longest of them."""
        if not self.tokenizer:
            return Collate(None)
        return Collate(Pad(padding_of(self.load_tokenizer())))

    def by_length(self, rows: Rows) -> Placed:
        """Sentences for evaluation, from short to long, each with its place."""
        return Placed(super().by_length(rows))

    def _texts(self, source: str) -> list[str]:
        if self.dataset is not None:
            return [row.text for row in read_dataset(self.dataset, source, self.text)]
        return read_texts(source, self.text)

    def _sentences(self, texts: Sequence[str], source: str) -> list[list[str]]:
        found = [words for text in texts for words in self.cut(text)]
        if not found:
            raise ValueError(
                f"{source!r} has no sentence that cut={self.cut!r} takes, in {len(texts)} text(s). Give other texts, "
                "or another cut: Pieces(words=...) is for texts without punctuation."
            )
        if self.most is None or self.most >= len(found):
            return found
        chosen = torch.randperm(len(found), generator=torch.Generator().manual_seed(self.seed))[: self.most]
        return [found[i] for i in chosen.sort().values.tolist()]

    def _read_train(self) -> None:
        source = self.sources["train"]
        assert source is not None
        parts = self._divided(self._texts(source), source, "text(s)")
        sentences = self._sentences(parts["train"], source)
        self._vocabulary = Vocabulary.build(sentences, self.vocabulary_size)
        self._splits["train"] = self._rows(sentences)
        if "val" in parts:
            self._splits["val"] = self._rows(self._sentences(parts["val"], source))

    def _rows(self, sentences: Sequence[Sequence[str]]) -> Rows:
        return Rows(sentences, self.vocabulary, self.load_tokenizer() if self.tokenizer else None)
