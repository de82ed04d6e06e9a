"""Batches of texts of like length, and a loader that a checkpoint can stop and continue inside an epoch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset


class Sized(Protocol):
    """What a loader needs of a data set: an item by index."""

    def __getitem__(self, index: int, /) -> Any: ...

    def __len__(self) -> int: ...


class ByLength(Dataset[Any]):
    """The same rows from short to long; of equal length, in the order they have.

    Args:
        rows: the rows.
        lengths: length of each.
    """

    def __init__(self, rows: Sized, lengths: Tensor) -> None:
        self._rows = rows
        self._order = lengths.argsort(stable=True)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Any:
        return self._rows[int(self._order[index])]


class LengthGrouped(Sampler[list[int]]):
    """Batches of like length in random order, a pure function of (seed, epoch).

    A permutation of all rows is cut into windows of `window` batches; each window is sorted by length and cut into
    batches; then all batches of the epoch are shuffled. So little is padded, and the order is still random.

    Every process draws the same plan and takes its own share of each batch, so processes stay in step without
    communication; with several, a last batch that does not divide is filled up with rows from its start.

    Args:
        lengths: length of each row.
        batch_size: rows per batch and process.
        seed: with the epoch, all there is to the order; the global generator is not touched.
        window: batches sorted together.
        rank: number of this process.
        world_size: how many processes share each batch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Tensor,
        batch_size: int,
        seed: int = 0,
        window: int = 20,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("window", window)):
            if value < 1:
                raise ValueError(f"{name}={value}: it must be at least 1.")
        self.lengths = torch.as_tensor(lengths)
        self.batch_size, self.seed, self.window, self.rank, self.world_size = batch_size, seed, window, rank, world_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iteration plans; a trainer calls this."""
        self.epoch = epoch

    def __len__(self) -> int:
        """Batches per epoch, the same in every process."""
        return -(-len(self.lengths) // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[int]]:
        """The batches of this process in the current epoch."""
        generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
        size = self.batch_size * self.world_size
        order = torch.randperm(len(self.lengths), generator=generator)
        batches: list[Tensor] = []
        for rows in torch.split(order, size * self.window):
            batches.extend(torch.split(rows[self.lengths[rows].argsort(stable=True)], size))
        for index in torch.randperm(len(batches), generator=generator).tolist():
            rows = batches[index]
            if missing := -len(rows) % self.world_size:
                rows = torch.cat([rows, rows.repeat(missing)[:missing]])
            yield rows[self.rank :: self.world_size].tolist()


class PlannedLoader:
    """An iterable of batches that knows how far it is, so that a stopped run continues with the batch that is next.

    Lightning saves and restores a loader that has `state_dict` and `load_state_dict`. Any other loader it starts anew
    inside the epoch, in a new order: some rows are seen twice, others never. It finds `set_epoch` through `sampler`.

    Args:
        dataset: rows by index.
        sampler: plan of the batches.
        collate: makes a batch of a list of rows.
        num_workers: processes that read ahead.
        finished: number of batches of this epoch whose step is done, if somebody knows; a step that was interrupted
            (a checkpoint written on an exception) is then done again.
    """

    def __init__(
        self,
        dataset: Sized,
        sampler: LengthGrouped,
        collate: Callable[[list[Any]], Any],
        num_workers: int = 0,
        finished: Callable[[], int] | None = None,
    ) -> None:
        self.sampler = sampler
        self._dataset, self._collate, self._num_workers, self._finished = dataset, collate, num_workers, finished
        self._epoch, self._given = 0, 0  # epoch under way, batches of it given out so far
        self._resume: tuple[int, int] | None = None

    def __len__(self) -> int:
        """Batches per epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[Any]:
        """The batches of the current epoch; of a restored one, those that remain."""
        # A generator, because Lightning makes the iterator of a resumed run before it sets the epoch: what follows must
        # not run before the first batch is asked for.
        self._epoch, self._given = self.sampler.epoch, 0
        if self._resume is not None:
            epoch, done = self._resume
            self._resume = None
            self._given = done if epoch == self._epoch else 0
        # The private generator only seeds workers; without one, each iterator would draw from the global generator.
        loader: DataLoader[Any] = DataLoader(
            _as_dataset(self._dataset),
            batch_sampler=list(self.sampler)[self._given :],
            collate_fn=self._collate,
            num_workers=self._num_workers,
            generator=torch.Generator().manual_seed(self.sampler.seed),
        )
        for batch in loader:
            self._given += 1
            yield batch

    def once(self) -> DataLoader[Any]:
        """Every row once, from short to long, in one process: for what looks at all rows and in whatever order."""
        order = self.sampler.lengths.argsort(stable=True).tolist()
        return DataLoader(
            Subset(_as_dataset(self._dataset), order),
            batch_size=self.sampler.batch_size,
            collate_fn=self._collate,
            num_workers=self._num_workers,
            generator=torch.Generator().manual_seed(self.sampler.seed),
        )

    def __copy__(self) -> PlannedLoader:
        """A loader of the same batches from the epoch's first on, which leaves this one where it is."""
        return PlannedLoader(self._dataset, self.sampler, self._collate, self._num_workers)

    def state_dict(self) -> dict[str, int]:
        """The epoch, the batches of it that are done, and what the plan depends on."""
        done = self._given if self._finished is None else min(self._given, self._finished())
        return {"epoch": self._epoch, "done": done, "seed": self.sampler.seed, "batches": len(self)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that are done.

        Raises:
            RuntimeError: the plan of this loader is not the one that was interrupted.
        """
        inside = 0 < state["done"] < state["batches"]
        if inside and (state["seed"], state["batches"]) != (self.sampler.seed, len(self)):
            raise RuntimeError(
                f"the checkpoint stopped after batch {state['done']} of {state['batches']} (seed {state['seed']}), but "
                f"the data module now makes {len(self)} batches with seed {self.sampler.seed}, so the remaining ones "
                "are not known. Resume with the same files, batch_size, seed and number of processes, or from a "
                "checkpoint of an epoch's end."
            )
        self._resume = (state["epoch"], state["done"])


def _as_dataset(rows: Sized) -> Dataset[Any]:
    return rows  # type: ignore[return-value]  # DataLoader asks for no more than the protocol


def _mix(seed: int, epoch: int) -> int:
    """One number of two, so that (0, 1) and (1, 0) are different orders."""
    return (seed * 1_000_003 + epoch) % 2**63
