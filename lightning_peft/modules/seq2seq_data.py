"""Pairs of texts from files or a named data set, tokenised once, for a model that reads one and writes the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from lightning_peft.modules.batching import Sized
from lightning_peft.modules.documents import IGNORED
from lightning_peft.modules.pair_files import Pair, read_pairs
from lightning_peft.modules.planned_data import NEEDED, PlannedData
from lightning_peft.modules.pretrained import padding_of

_CHUNK = 256  # texts tokenised at a time: bounds the memory of the tokenizer's own lists


class Seq2SeqBatch(TypedDict, total=False):
    """A batch of pairs.

    ``input_ids`` and ``attention_mask`` (batch, length): the sources. ``labels`` (batch, length of its own): the
    targets, -100 where they are padded; the model makes the decoder's inputs of them. ``references``: the targets as
    they stand in the file, in evaluation. For prediction the sources alone.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    references: list[str]


class Row(TypedDict, total=False):
    """One pair: token numbers, and in evaluation what is wanted as text."""

    source: Tensor
    target: Tensor
    reference: str


class Pairs(Dataset[Row]):
    """Pairs as tokens.

    Args:
        sources: tokens of each.
        targets: and of what is to be written; ``None`` if it is not known.
    """

    def __init__(self, sources: Sequence[Sequence[int]], targets: Sequence[Sequence[int]] | None) -> None:
        self._sources = [torch.tensor(row, dtype=torch.int32) for row in sources]
        self._targets = None if targets is None else [torch.tensor(row, dtype=torch.int32) for row in targets]
        counts = [len(row) for row in sources]
        if targets is not None:
            counts = [count + len(row) for count, row in zip(counts, targets, strict=True)]
        self.lengths = torch.tensor(counts, dtype=torch.int64)

    def __len__(self) -> int:
        return len(self._sources)

    def __getitem__(self, index: int) -> Row:
        row: Row = {"source": self._sources[index]}
        if self._targets is not None:
            row["target"] = self._targets[index]
        return row


class WithReferences(Dataset[Row]):
    """The same pairs, each with its target as text: tokens may have lost some of it.

    Args:
        rows: the pairs.
        references: the texts.
    """

    def __init__(self, rows: Pairs, references: Sequence[str]) -> None:
        self._rows, self._references, self.lengths = rows, references, rows.lengths

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        return {**self._rows[index], "reference": self._references[index]}


class Collate:
    """Pads sources and targets to the longest of a batch.

    Args:
        pad_id: token that fills sources up.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: list[Row]) -> Seq2SeqBatch:
        sources = [row["source"].long() for row in rows]
        batch: Seq2SeqBatch = {
            "input_ids": pad_sequence(sources, batch_first=True, padding_value=self._pad_id),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in sources], batch_first=True),
        }
        if "target" in rows[0]:
            targets = [row["target"].long() for row in rows]
            batch["labels"] = pad_sequence(targets, batch_first=True, padding_value=IGNORED)
        if "reference" in rows[0]:
            batch["references"] = [row["reference"] for row in rows]
        return batch


class Seq2SeqData(PlannedData):
    """Text-to-text pairs for an encoder-decoder, from csv, tsv, jsonl and Orange `.tab` files, or a `datasets` name.

    Sources and targets get the tokens that the tokenizer frames them with. Rows with an empty target are left out,
    except for prediction. Batches hold pairs of like length, so that little is padded. The order of batches depends on
    the seed and the epoch alone, and a run that is stopped inside an epoch and resumed sees exactly the batches that
    remain, in their order.

    Args:
        train: training file; with `dataset`, the name of a split.
        tokenizer: hub name or folder; the same as the model's backbone.
        val: file or split to validate on; without it, `val_share` of the training rows are held out.
        test: file or split to test on.
        predict: file or split of sources, targets not needed; the test set if not given.
        dataset: a `datasets` name, of which train, val and test are splits (needs the package `datasets`).
        source: column of what the encoder reads.
        target: column of what is to be written.
        prefix: text before each source, as T5 is told its task: "translate English to German: ".
        max_source_length: longer sources are cut to this many tokens.
        max_target_length: and longer targets to this many.
        batch_size: pairs per batch and process.
        val_share: share of the training rows held out when `val` is not given; 0 holds out none.
        window: batches sorted by length together, see `LengthGrouped`.
        seed: decides the order of batches and the held-out rows.
        num_workers: processes that make batches; 0 is fast enough, the texts are tokenised already.
    Raises:
        ValueError: a file, column or tokenizer that cannot be found; a length below 1; a file without a target.
    """

    def __init__(
        self,
        train: str,
        tokenizer: str,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        dataset: str | None = None,
        source: str = "source",
        target: str = "target",
        prefix: str = "",
        max_source_length: int = 256,
        max_target_length: int = 64,
        batch_size: int = 16,
        val_share: float = 0.1,
        window: int = 20,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        sources = {"train": train, "val": val, "test": test, "predict": predict or test}
        super().__init__(sources, tokenizer, batch_size, val_share, window, seed, num_workers)
        for name, value in (("max_source_length", max_source_length), ("max_target_length", max_target_length)):
            if value < 1:
                raise ValueError(f"{name}={value}: it is a number of tokens, at least 1.")
        self.save_hyperparameters()
        self.dataset, self.source, self.target, self.prefix = dataset, source, target, prefix
        self.max_source_length, self.max_target_length = max_source_length, max_target_length

    def read(self, stage: str) -> None:
        """Read and tokenise what the stage needs, once."""
        for split in NEEDED[stage]:
            source = self.sources[split]
            if split in self._splits:
                continue
            if split == "train" or (split == "val" and self._holds_out):
                self._read_train()
            elif source is not None:
                pairs = self._pairs(source)
                self._splits[split] = (
                    Pairs(self._tokens([pair.source for pair in pairs]), None)
                    if split == "predict"
                    else self._evaluated(self._known(pairs, source))
                )

    def lengths(self, rows: Pairs | WithReferences) -> Tensor:
        """Tokens per row, of source and target together."""
        return rows.lengths

    def collate(self) -> Collate:
        """Pads sources and targets to the longest of a batch."""
        return Collate(padding_of(self.load_tokenizer()))

    def _read_train(self) -> None:
        source = self.sources["train"]
        assert source is not None
        parts = self._divided(self._known(self._pairs(source), source), source, "rows")
        self._splits["train"] = self._encoded(parts["train"])
        if "val" in parts:
            self._splits["val"] = self._evaluated(parts["val"])

    def _pairs(self, source: str) -> list[Pair]:
        return read_pairs(source, self.source, self.target, dataset=self.dataset)

    def _known(self, pairs: Sequence[Pair], source: str) -> list[Pair]:
        """The pairs with a target."""
        known = [pair for pair in pairs if pair.target]
        if not known:
            raise ValueError(
                f"{source!r} has no row with a target in column {self.target!r}. Name the column with target=..., or "
                "give the file as predict=..."
            )
        return known

    def _evaluated(self, pairs: Sequence[Pair]) -> Sized:
        return WithReferences(self._encoded(pairs), [pair.target for pair in pairs])

    def _encoded(self, pairs: Sequence[Pair]) -> Pairs:
        return Pairs(self._tokens([pair.source for pair in pairs]), self._tokens([p.target for p in pairs], True))

    def _tokens(self, texts: Sequence[str], targets: bool = False) -> list[list[int]]:
        tokenizer, found = self.load_tokenizer(), []
        limit = self.max_target_length if targets else self.max_source_length
        for start in range(0, len(texts), _CHUNK):
            part = list(texts[start : start + _CHUNK])
            given = {"text_target": part} if targets else {"text": [self.prefix + text for text in part]}
            found.extend(tokenizer(**given, truncation=True, max_length=limit)["input_ids"])
        return found
