"""What data modules of texts share: loaders over planned batches, and the place in them as a checkpoint's state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft.modules.batching import ByLength, LengthGrouped, PlannedLoader, Sized
from lightning_peft.modules.pretrained import tokenizer_from

NEEDED = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("predict",)}
"""Splits that each stage of a Trainer needs."""

Item = TypeVar("Item")


class PlannedData(LightningDataModule, ABC):
    """Training batches whose order depends on the seed and the epoch alone, and that go on where they were stopped.

    Args:
        sources: file or split by "train", "val", "test", "predict"; ``None`` for what there is not.
        tokenizer: hub name or folder.
        batch_size: rows per batch and process.
        val_share: share of the training rows held out when there is no "val"; 0 holds out none.
        window: batches sorted by length together, see `LengthGrouped`.
        seed: decides the order of batches and the held-out rows.
        num_workers: processes that make batches.
    Raises:
        ValueError: val_share is outside [0, 1).
    """

    def __init__(
        self,
        sources: dict[str, str | None],
        tokenizer: str,
        batch_size: int,
        val_share: float,
        window: int,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__()
        if not 0.0 <= val_share < 1.0:
            raise ValueError(f"val_share={val_share}: it is a share of the training rows, at least 0 and below 1.")
        self.sources, self.tokenizer = sources, tokenizer
        self.batch_size, self.val_share, self.window = batch_size, val_share, window
        self.seed, self.num_workers = seed, num_workers
        self._splits: dict[str, Any] = {}
        self._tokenize: Any = None
        self._loader: PlannedLoader | None = None
        self._position: dict[str, int] | None = None

    @abstractmethod
    def read(self, stage: str) -> None:
        """Read and tokenise what the stage needs into `_splits`, once."""

    @abstractmethod
    def lengths(self, rows: Any) -> Tensor:
        """The length of each row of a split."""

    @abstractmethod
    def collate(self) -> Callable[[list[Any]], Any]:
        """What makes a batch of a list of rows."""

    def setup(self, stage: str) -> None:
        """Read and tokenise what the stage needs, once."""
        if self.sources["val"] is None and self.val_share == 0:
            # To Lightning a method that is the base class's is one nobody wrote, and it does not validate. An empty
            # list of loaders would be remarked on in every run.
            self.val_dataloader = super().val_dataloader  # type: ignore[method-assign]
        self.read(stage)

    def train_dataloader(self) -> PlannedLoader | DataLoader[Any]:
        """Batches of like length in random order, resumable in the middle of an epoch."""
        rows = self._split("train")
        lengths = self.lengths(rows)
        trainer: Any = self.trainer
        if trainer is None:
            plan = LengthGrouped(lengths, self.batch_size, self.seed, self.window)
            return PlannedLoader(rows, plan, self.collate(), self.num_workers)
        if trainer.overfit_batches > 0:
            return self.in_order(rows)  # overfitting means the same few batches in every epoch
        rank, world_size = trainer.global_rank, trainer.world_size
        plan = LengthGrouped(lengths, self.batch_size, self.seed, self.window, rank, world_size)
        progress = trainer.fit_loop.epoch_loop.batch_progress
        loader = PlannedLoader(rows, plan, self.collate(), self.num_workers, lambda: int(progress.current.processed))
        if self._position is not None:
            loader.load_state_dict(self._position)
            self._position = None
        self._loader = loader
        return loader

    def batches(self) -> int:
        """Training batches per epoch, in one process."""
        return -(-len(self._split("train")) // self.batch_size)

    def val_dataloader(self) -> DataLoader[Any]:
        """Validation rows, from short to long."""
        return self.in_order(self.by_length(self._split("val")))

    def test_dataloader(self) -> DataLoader[Any]:
        """Test rows, from short to long."""
        return self.in_order(self.by_length(self._split("test")))

    def predict_dataloader(self) -> DataLoader[Any]:
        """Rows to predict, in the order of the file."""
        return self.in_order(self._split("predict"))

    def by_length(self, rows: Any) -> Sized:
        """Rows for evaluation, from short to long: it does not depend on the order, and little is padded."""
        return ByLength(rows, self.lengths(rows))

    def state_dict(self) -> dict[str, Any]:
        """The place in the training data; with it a checkpoint can be taken inside an epoch."""
        return {} if self._loader is None else {"train": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Note the place for the loader that this fit will make.

        Lightning itself restores a loader's state only if nobody has asked for the loader before the run starts, and a
        `configure_optimizers` that reads `trainer.estimated_stepping_batches` does ask.
        """
        if self.trainer is not None and self.trainer.training:  # not when a checkpoint is only evaluated
            self._position = state_dict["train"]

    def in_order(self, rows: Sized, collate: Callable[[list[Any]], Any] | None = None) -> DataLoader[Any]:
        """Batches of these rows, as they follow each other; made by `collate`, where it is another than the usual."""
        return DataLoader(
            rows,  # type: ignore[arg-type]  # DataLoader asks for no more than the protocol
            batch_size=self.batch_size,
            collate_fn=collate or self.collate(),
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(self.seed),  # else each iterator draws from the global generator
        )

    @property
    def _holds_out(self) -> bool:
        """Whether some training rows are validated on."""
        return self.sources["val"] is None and self.val_share > 0

    def _divided(self, rows: Sequence[Item], source: str, kind: str) -> dict[str, list[Item]]:
        """Training rows by split, in their order: those held out by the seed, where some are, and those to train on.

        Args:
            rows: all of them.
            source: where they are from, for the error's sentence.
            kind: what they are, for the same.

        Raises:
            ValueError: there are too few.
        """
        if not self._holds_out:
            return {"train": list(rows)}
        held = round(self.val_share * len(rows))
        if not 0 < held < len(rows):
            raise ValueError(
                f"{source!r} has {len(rows)} {kind}, too few to hold out a share of {self.val_share}. Give more text, "
                "a file val=..., or val_share=0."
            )
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed)).tolist()
        return {"val": [rows[i] for i in sorted(order[:held])], "train": [rows[i] for i in sorted(order[held:])]}

    def _split(self, split: str) -> Any:
        """The rows of a split.

        Raises:
            ValueError: there is no such split.
            RuntimeError: it was not read yet.
        """
        if split not in self._splits:
            name = type(self).__name__
            if self.sources[split] is None:
                raise ValueError(f"{name} has no {split} set: give {split}=... (a file, or a split of `dataset`).")
            raise RuntimeError(f"{name} has not read its {split} set: call setup() first, or let a Trainer do it.")
        return self._splits[split]

    def load_tokenizer(self) -> Any:
        """The tokenizer, loaded once.

        Raises:
            ValueError: it cannot be loaded.
        """
        if self._tokenize is None:
            self._tokenize = tokenizer_from(self.tokenizer)
        return self._tokenize
