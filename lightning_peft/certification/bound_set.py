"""The bound set: the examples that a certificate counts over, each once a pass, in batches that no process changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
)
from torch.utils.data.dataloader import default_collate

from lightning_peft.certification.collation import require_by_themselves

_BATCH = 32
"""Examples per batch where nobody says."""
_READ_TWICE = 8
"""Examples that are read twice, to see whether something is drawn in them."""


class BoundSet:
    """Examples that are counted once each, in one order, in one division into batches.

    A loader is asked for its dataset, its collate function and its batch size, and not iterated: with several processes
    it would repeat examples to fill up the last batch, and shuffle.

    Args:
        data: a DataLoader over the examples; or a loader that offers one by `once()`, as those of
            :class:`~lightning_peft.modules.TextData` do; or a Dataset, or any sequence of examples.
        batch_size: examples per batch; ``None`` for the loader's own.

    Raises:
        ValueError: the data are a stream or empty, the loader drops, repeats, mixes or chooses examples, or an example
            is another each time that it is read.
        TypeError: data, or what an example holds, are of another kind.
    """

    def __init__(self, data: Any, batch_size: int | None = None) -> None:
        loader: Any = data.once() if callable(getattr(data, "once", None)) else data
        self._workers, self._collate = 0, default_collate
        if isinstance(loader, DataLoader):
            self._collate, self._workers = loader.collate_fn, loader.num_workers
            _require_each_once(loader)
            batch_size = batch_size or loader.batch_size or _size_of(loader)
            loader = loader.dataset
        if isinstance(loader, IterableDataset) or not hasattr(loader, "__getitem__") or not hasattr(loader, "__len__"):
            raise (ValueError if isinstance(loader, IterableDataset) else TypeError)(
                f"{type(loader).__name__} is a stream or no data, and a certificate counts every example of a set "
                "once. Give a DataLoader over a Dataset with a length, or that Dataset: RiskCertificate(data=...)."
            )
        self.dataset: Any = loader
        if not len(self.dataset):
            raise ValueError("the bound set has no example, and a certificate needs some: give other data.")
        self.batch_size = int(batch_size or _BATCH)
        size = len(self.dataset)
        again = size - len(set(root(self.dataset)[1]))
        if again:
            raise ValueError(
                f"the bound set has {again} example{'s' if again > 1 else ''} more than once, of {size}, and a "
                "certificate counts each as one that was drawn by itself. Give the set without repetitions: "
                "RiskCertificate(data=...)."
            )
        for i in sorted({i * (size - 1) // (_READ_TWICE - 1) for i in range(_READ_TWICE)}):
            if example_hash(self.dataset[i]) != example_hash(self.dataset[i]):
                raise ValueError(
                    f"example {i} of the bound set is another one each time that it is read: something is drawn in it "
                    "(augmentation, dropout). Give the data without that: RiskCertificate(data=...)."
                )
        if self._collate is not default_collate:
            for places in (batches := self.batches)[:1] + batches[1:][-1:]:
                require_by_themselves(self._collate, self.dataset.__getitem__, places, example_hash)

    def __len__(self) -> int:
        """Number of examples, n."""
        return len(self.dataset)

    @property
    def batches(self) -> list[list[int]]:
        """The places of each batch's examples."""
        places = range(len(self))
        return [list(places[i : i + self.batch_size]) for i in range(0, len(places), self.batch_size)]

    def keep(self, places: Sequence[int]) -> None:
        """Leave the examples at these places, and no other.

        Raises:
            ValueError: there is none.
        """
        if not places:
            raise ValueError("all examples of the training set chose the prior, and none is left to certify on.")
        if len(places) < len(self):
            self.dataset = Subset(self.dataset, list(places))

    def read(self, batches: Sequence[int]) -> Iterator[Any]:
        """The batches of these numbers, collated. The global random numbers are left alone."""
        every = self.batches
        loader: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=[every[i] for i in batches],
            collate_fn=self._collate,
            num_workers=self._workers,
            generator=torch.Generator().manual_seed(0),  # else each iterator draws from the global generator
        )
        yield from loader

    def digest(self) -> str:
        """SHA-256 of all examples in their order."""
        total = hashlib.sha256(f"{len(self)}|".encode())
        for i in range(len(self)):
            total.update(example_hash(self.dataset[i]))
        return total.hexdigest()


def root(dataset: Any) -> tuple[Any, list[int]]:
    """What a Subset of a Subset is of in the end, and the places of its examples in that."""
    places = list(range(len(dataset)))
    while isinstance(dataset, Subset):
        indices, dataset = dataset.indices, dataset.dataset
        places = [int(indices[i]) for i in places]
    return dataset, places


def example_hash(example: Any) -> bytes:
    """SHA-256 of an example: tensors, arrays, numbers, text and bytes, in lists, tuples and mappings.

    Raises:
        TypeError: it holds something else, which prints as nothing but a place in memory.
    """
    total = hashlib.sha256()
    _add(example, total.update)
    return total.digest()


def form(example: Any) -> str:
    """How an example is built: types, keys and dimensions. Where that differs, contents cannot be compared."""
    if hasattr(example, "__array__") and not isinstance(example, Tensor):
        example = torch.as_tensor(example)
    if isinstance(example, Tensor):
        return f"{example.dtype}[{example.dim()}]"
    if isinstance(example, Mapping):
        return f"{{{', '.join(f'{key!r}: {form(example[key])}' for key in sorted(example, key=repr))}}}"
    if isinstance(example, list | tuple):
        inside = [form(item) for item in example]
        return f"[{', '.join(inside[:1] if len(set(inside)) == 1 else inside)}]"
    return type(example).__name__


def _add(value: Any, update: Callable[[bytes], object]) -> None:
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        update(f"{value.dtype}|{tuple(value.shape)}|".encode())
        update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key, item in value.items():
            update(f"{key!r}:".encode())
            _add(item, update)
    elif isinstance(value, list | tuple):
        update(f"{len(value)}[".encode())
        for item in value:
            _add(item, update)
    elif hasattr(value, "__array__"):
        _add(torch.as_tensor(value), update)
    else:
        says: object = type(value).__repr__
        if says is object.__repr__:
            raise TypeError(
                f"an example holds a {type(value).__name__}, whose contents cannot be told, and a certificate says "
                "which examples it counted. Give examples of tensors, arrays, numbers and text, or give that class a "
                "__repr__ that says all."
            )
        update(f"{type(value).__name__}|{value!r}|".encode())


def _require_each_once(loader: DataLoader[Any]) -> None:
    """Check that a pass over the loader is a pass over its dataset.

    Raises:
        ValueError: it is not, or there is no telling.
    """
    batches, sampler = loader.batch_sampler, loader.sampler
    advice = "A certificate counts each example once: give the set by itself, RiskCertificate(data=<a Dataset>)."
    if isinstance(loader.dataset, IterableDataset):
        return  # told by the caller
    if isinstance(batches, BatchSampler):
        sampler = batches.sampler
    elif loader.batch_size is None and batches is not None:
        raise ValueError(f"the loader's batches come from a {type(batches).__name__} of somebody's own. {advice}")
    sampler = getattr(getattr(sampler, "dataset", None), "_sampler", sampler)  # what Lightning has shared out
    size = len(loader.dataset)  # type: ignore[arg-type]
    if isinstance(batches, BatchSampler) and batches.drop_last and size % batches.batch_size:
        raise ValueError(
            f"the loader drops the last {size % batches.batch_size} of {size} examples (drop_last=True). {advice}"
        )
    if isinstance(sampler, RandomSampler) and (sampler.replacement or sampler.num_samples != size):
        raise ValueError(f"the loader draws {sampler.num_samples} of {size} examples, some of them twice. {advice}")
    if not isinstance(sampler, RandomSampler | SequentialSampler | DistributedSampler):
        raise ValueError(f"the loader's {type(sampler).__name__} chooses which examples are read. {advice}")


def _size_of(loader: DataLoader[Any]) -> int | None:
    return loader.batch_sampler.batch_size if isinstance(loader.batch_sampler, BatchSampler) else None
