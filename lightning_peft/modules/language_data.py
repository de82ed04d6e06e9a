"""Texts from files or a named data set as blocks of tokens, for a model that predicts the next one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_peft.modules.planned_data import NEEDED, PlannedData
from lightning_peft.modules.text_files import read_dataset, read_texts

_CHUNK = 256  # texts tokenised at a time: bounds the memory of the tokenizer's own lists


class LanguageBatch(TypedDict):
    """A batch: ``input_ids`` (batch, length), and the same tokens as ``labels``, which the model itself shifts."""

    input_ids: Tensor
    labels: Tensor


class Blocks(Dataset[Tensor]):
    """Texts one after the other as one row of tokens, cut into blocks of one length; what is left over is dropped.

    Args:
        ids: (n,) int32, the tokens.
        size: tokens per block.
        chosen: numbers of the blocks that belong to this set; ``None`` for all.
    """

    def __init__(self, ids: Tensor, size: int, chosen: Tensor | None = None) -> None:
        self.ids = ids[: len(ids) // size * size].view(-1, size)
        self.chosen = torch.arange(len(self.ids)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> Tensor:
        return self.ids[self.chosen[index]]


def stack(rows: list[Tensor]) -> LanguageBatch:
    """A batch of blocks."""
    ids = torch.stack(rows).long()
    return {"input_ids": ids, "labels": ids}


class LanguageData(PlannedData):
    """Blocks of text for a causal language model, from txt, csv, tsv, jsonl and Orange `.tab` files, or a data set.

    The texts follow each other, each closed by the tokenizer's end-of-text token, and are cut into blocks of one
    length, so nothing is padded; labels in the files are not looked at. The order of batches depends on the seed and
    the epoch alone, and a run that is stopped inside an epoch and resumed sees exactly the batches that remain, in
    their order.

    Args:
        train: training file; with `dataset`, the name of a split.
        tokenizer: hub name or folder; the same as the model's backbone.
        val: file or split to validate on; without it, `val_share` of the training blocks are held out.
        test: file or split to test on.
        dataset: a `datasets` name, of which train, val and test are splits (needs the package `datasets`).
        text: column of the text; by default "text", or the first string column of a `.tab` file.
        block_size: tokens per block.
        batch_size: blocks per batch and process.
        val_share: share of the training blocks held out when `val` is not given; 0 holds out none.
        seed: decides the order of batches and the held-out blocks.
        num_workers: processes that make batches; 0 is fast enough, the texts are tokenised already.
    Raises:
        ValueError: a file, column or tokenizer that cannot be found; a text shorter than one block.
    """

    def __init__(
        self,
        train: str,
        tokenizer: str,
        val: str | None = None,
        test: str | None = None,
        dataset: str | None = None,
        text: str | None = None,
        block_size: int = 256,
        batch_size: int = 8,
        val_share: float = 0.1,
        seed: int = 0,
        num_workers: int = 0,
    ) -> None:
        sources = {"train": train, "val": val, "test": test, "predict": None}
        super().__init__(sources, tokenizer, batch_size, val_share, 20, seed, num_workers)
        if block_size < 2:
            raise ValueError(f"block_size={block_size}: a block needs at least 2 tokens, one to predict the next from.")
        self.save_hyperparameters()
        self.dataset, self.text, self.block_size = dataset, text, block_size

    def read(self, stage: str) -> None:
        """Read and tokenise what the stage needs, once."""
        for split in NEEDED[stage]:
            source = self.sources[split]
            if split in self._splits:
                continue
            if split == "train" or (split == "val" and source is None and self.val_share > 0):
                self._read_train()
            elif source is not None:
                self._splits[split] = Blocks(self._tokens(source), self.block_size)

    def lengths(self, rows: Blocks) -> Tensor:
        """All of one length."""
        return torch.full((len(rows),), self.block_size)

    def collate(self) -> Any:
        """Stacks blocks."""
        return stack

    def _read_train(self) -> None:
        source = self.sources["train"]
        assert source is not None
        blocks = Blocks(self._tokens(source), self.block_size)
        self._splits["train"] = blocks
        if self.sources["val"] is not None or self.val_share == 0:
            return
        held = round(self.val_share * len(blocks))
        if not 0 < held < len(blocks):
            raise ValueError(
                f"{source!r} has {len(blocks)} blocks of {self.block_size} tokens, too few to hold out a share of "
                f"{self.val_share}. Give more text, a file val=..., or val_share=0."
            )
        order = torch.randperm(len(blocks), generator=torch.Generator().manual_seed(self.seed))
        for split, chosen in (("val", order[:held]), ("train", order[held:])):
            self._splits[split] = Blocks(blocks.ids.flatten(), self.block_size, chosen.sort().values)

    def _tokens(self, source: str) -> Tensor:
        if self.dataset is not None:
            texts: Sequence[str] = [row.text for row in read_dataset(self.dataset, source, self.text)]
        else:
            texts = read_texts(source, self.text)
        tokenizer = self.load_tokenizer()
        end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
        pieces: list[Tensor] = []
        for start in range(0, len(texts), _CHUNK):
            # verbose: a text longer than the model's window is cut into blocks, and no reason for a warning
            found = tokenizer(list(texts[start : start + _CHUNK]), add_special_tokens=False, verbose=False)
            ids = [i for row in found["input_ids"] if row for i in (*row, *end)]
            pieces.append(torch.tensor(ids, dtype=torch.int32))
        tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int32)
        if len(tokens) < self.block_size:
            raise ValueError(
                f"{source!r} has {len(tokens)} tokens, less than one block of {self.block_size}. Give more text, or a "
                "smaller block_size."
            )
        return tokens
