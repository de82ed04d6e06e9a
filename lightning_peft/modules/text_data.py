"""Texts from files or a named data set, tokenised once, in batches of like length."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_peft.modules.planned_data import NEEDED, PlannedData
from lightning_peft.modules.pretrained import padding_of
from lightning_peft.modules.text_files import Row, read_dataset, read_file

if TYPE_CHECKING:
    from lightning_peft.modules.text_classifier import TextBatch

_CHUNK = 1024  # texts tokenised at a time: bounds the memory of the tokenizer's own lists
_NO_LABEL = -1


class Tokens(Dataset[tuple[Tensor, int]]):
    """Token ids of many texts in one flat tensor, and their label indices (-1: none).

    Args:
        tokenizer: a transformers tokenizer.
        texts: the texts.
        labels: label index per text.
        max_length: longer texts are cut.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], labels: Sequence[int], max_length: int) -> None:
        pieces: list[Tensor] = []
        lengths: list[int] = []
        for start in range(0, len(texts), _CHUNK):
            ids = tokenizer(list(texts[start : start + _CHUNK]), truncation=True, max_length=max_length)["input_ids"]
            lengths.extend(map(len, ids))
            pieces.append(torch.tensor([i for row in ids for i in row], dtype=torch.int32))
        self.lengths = torch.tensor(lengths, dtype=torch.int64)
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self._ids = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
        self._ends = self.lengths.cumsum(0)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        end = int(self._ends[index])
        return self._ids[end - int(self.lengths[index]) : end], int(self.labels[index])


class Pad:
    """Makes a batch, padded to its own longest row; `labels` only if all rows have one.

    Args:
        pad_id: token id that fills up.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: list[tuple[Tensor, int]]) -> TextBatch:
        lengths = torch.tensor([len(ids) for ids, _ in rows])
        ids = torch.full((len(rows), int(lengths.max())), self.pad_id, dtype=torch.int64)
        for target, (source, _) in zip(ids, rows, strict=True):
            target[: len(source)] = source
        batch: TextBatch = {
            "input_ids": ids,
            "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long(),
        }
        labels = [label for _, label in rows]
        if _NO_LABEL not in labels:
            batch["labels"] = torch.tensor(labels)
        return batch


class TextData(PlannedData):
    """Labelled texts for a classifier, from csv, tsv, jsonl and Orange `.tab` files, or from a `datasets` name.

    Rows with an empty label are dropped, except for prediction. Labels are numbered in sorted order over the training
    set. The order of batches depends on the seed and the epoch alone, and a run that is stopped inside an epoch and
    resumed sees exactly the batches that remain, in their order.

    Args:
        train: training file; with `dataset`, the name of a split.
        tokenizer: hub name or folder; the same as the classifier's backbone.
        val: file or split to validate on; without it, `val_share` of the training rows are held out.
        test: file or split to test on.
        predict: file or split to predict, labels not needed; the test set if not given.
        dataset: a `datasets` name, of which train, val and test are splits (needs the package `datasets`).
        text: column of the text; by default "text", or the first string column of a `.tab` file.
        label: column of the label; by default "label", or the class column of a `.tab` file.
        max_length: longer texts are cut to this many tokens.
        batch_size: rows per batch and process.
        val_share: share of each class of the training rows held out when `val` is not given; 0 holds out none.
        window: batches sorted by length together, see `LengthGrouped`.
        seed: decides the order of batches and the held-out rows.
        num_workers: processes that make batches; 0 is fast enough, the texts are tokenised already.
        label_names: all labels in the order of their numbers, for a model that was trained with another order, or with
            more labels than the training set has; ``None`` for those of the training set, sorted.
    Raises:
        ValueError: a file, column or tokenizer that cannot be found; a label that is not in the training set, or not
            among `label_names`.
    """

    def __init__(
        self,
        train: str,
        tokenizer: str,
        val: str | None = None,
        test: str | None = None,
        predict: str | None = None,
        dataset: str | None = None,
        text: str | None = None,
        label: str | None = None,
        max_length: int = 64,
        batch_size: int = 32,
        val_share: float = 0.1,
        window: int = 20,
        seed: int = 0,
        num_workers: int = 0,
        label_names: Sequence[str] | None = None,
    ) -> None:
        sources = {"train": train, "val": val, "test": test, "predict": predict or test}
        super().__init__(sources, tokenizer, batch_size, val_share, window, seed, num_workers)
        self.save_hyperparameters()
        self.dataset, self.text, self.label, self.max_length = dataset, text, label, max_length
        self._given_names = None if label_names is None else [str(name) for name in label_names]
        self._label_names: list[str] | None = None

    @property
    def label_names(self) -> list[str]:
        """Label names in the order of their numbers."""
        if self._label_names is None:
            self._read_train()
        assert self._label_names is not None
        return self._label_names

    @property
    def num_labels(self) -> int:
        """Number of classes."""
        return len(self.label_names)

    def read(self, stage: str) -> None:
        """Read and tokenise what the stage needs, once."""
        self.label_names  # noqa: B018  # the numbers of labels come from the training set, whatever the stage
        for split in NEEDED[stage]:
            source = self.sources[split]
            if split not in self._splits and source is not None:
                self._splits[split] = self._number(self._read(source), source, keep_all=split == "predict")

    def lengths(self, rows: Tokens) -> Tensor:
        """Tokens per row."""
        return rows.lengths

    def collate(self) -> Pad:
        """Pads rows to the longest of them."""
        return Pad(padding_of(self.load_tokenizer()))

    def _read(self, source: str) -> list[Row]:
        if self.dataset is not None:
            return read_dataset(self.dataset, source, self.text, self.label)
        return read_file(source, self.text, self.label)

    def _read_train(self) -> None:
        source = self.sources["train"]
        assert source is not None
        rows = [row for row in self._read(source) if row.label]
        names = {row.label for row in rows}
        if len(names) < 2:
            raise ValueError(
                f"{source!r} has {len(names)} class(es) in {len(rows)} labelled rows; it needs at least 2."
            )
        numbers = all(name.lstrip("-").isdigit() for name in names)
        ordered = sorted(names, key=int) if numbers else sorted(names)  # "10" comes after "9"
        if self._given_names is not None and (unknown := [name for name in ordered if name not in self._given_names]):
            raise ValueError(
                f"{source!r} has labels that are not among label_names: {', '.join(map(repr, unknown[:5]))}. "
                f"Known: {', '.join(map(repr, self._given_names[:10]))}."
            )
        self._label_names = ordered if self._given_names is None else self._given_names
        if self._holds_out:
            held = self._held_out(rows)
            self._splits["val"] = self._number([row for i, row in enumerate(rows) if i in held], source)
            rows = [row for i, row in enumerate(rows) if i not in held]
        self._splits["train"] = self._number(rows, source)

    def _held_out(self, rows: Sequence[Row]) -> set[int]:
        """The same share of each class, by the seed; a class never loses its last row."""
        generator = torch.Generator().manual_seed(self.seed)
        members: defaultdict[str, list[int]] = defaultdict(list)
        for index, row in enumerate(rows):
            members[row.label].append(index)
        held: set[int] = set()
        for name in self.label_names:
            order = torch.randperm(len(members[name]), generator=generator).tolist()
            count = max(0, min(round(self.val_share * len(order)), len(order) - 1))
            held.update(members[name][i] for i in islice(order, count))
        return held

    def _number(self, rows: Sequence[Row], source: str, keep_all: bool = False) -> Tokens:
        numbers = {name: number for number, name in enumerate(self.label_names)}
        if keep_all:
            labels = [numbers.get(row.label, _NO_LABEL) for row in rows]
        else:
            rows = [row for row in rows if row.label]
            if unknown := sorted({row.label for row in rows} - numbers.keys()):
                raise ValueError(
                    f"{source!r} has labels that the training set {self.sources['train']!r} does not have: "
                    f"{', '.join(map(repr, unknown[:5]))}. Known: {', '.join(map(repr, self.label_names[:10]))}."
                )
            labels = [numbers[row.label] for row in rows]
        return Tokens(self.load_tokenizer(), [row.text for row in rows], labels, self.max_length)
