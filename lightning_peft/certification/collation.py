"""What a loader makes of examples: a batch has each of them, as it would be by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

Leaf = Tensor | list[Any]
"""A part of a batch that may hold one entry per example."""


def require_by_themselves(
    collate: Callable[[Any], Any],
    read: Callable[[int], Any],
    places: Sequence[int],
    print_of: Callable[[Any], bytes],
) -> None:
    """Check that a batch holds each example once, and of each what it gives in a batch of its own.

    Padding on either side is the batch's own affair, and so is the order. Of tensors, arrays and lists, those are
    compared whose first dimension is the example; a batch of a class of its own, whose contents cannot be told, is not
    looked into. Random numbers are left as they were.

    Args:
        collate: makes a batch of a list of examples.
        read: gives the example of a place.
        places: of the batch's examples.
        print_of: a number for the contents of a batch; raises TypeError where they cannot be told.

    Raises:
        ValueError: the batch is another one each time, or not what its examples are by themselves.
    """
    advice = "Give the data without that: RiskCertificate(data=...)."
    with isolate_rng():
        batch, again = (collate([read(i) for i in places]) for _ in range(2))
        try:
            same = print_of(batch) == print_of(again)
        except TypeError:
            return
        if not same:
            raise ValueError(
                "the loader's collate_fn gives another batch each time that it is given the same examples: something "
                f"is drawn in it (augmentation, masking). {advice}"
            )
        alone = [dict(leaves(collate([read(i)]))) for i in places]
    count = len(places)
    shared: list[tuple[Leaf, list[Leaf]]] = []
    for path, leaf in leaves(batch):
        own = [each[path] for each in alone if path in each and len(each[path]) == 1]
        if len(own) < count or len(leaf) == 1 < count:
            continue  # it is not one entry per example
        if len(leaf) != count:
            raise ValueError(
                f"the loader's collate_fn makes {len(leaf)} examples of {count}, and a certificate counts each "
                f"once. {advice}"
            )
        shared.append((leaf, own))

    def fits(row: int, i: int) -> bool:
        return all(_fits(leaf[row], own[i][0]) for leaf, own in shared)

    odd = next((i for i in range(count) if not fits(i, i)), None)
    if odd is None:
        return
    left = list(range(count))
    for row in range(count):
        taken = next((i for i in left if fits(row, i)), None)
        if taken is None:
            raise ValueError(
                f"the loader's collate_fn gives a batch in which its example {odd} is not what example {places[odd]} "
                "gives by itself: examples are repeated, mixed, or measured by each other, and a certificate counts "
                f"each as one that was drawn by itself. {advice}"
            )
        left.remove(taken)


def leaves(batch: Any, path: str = "") -> Iterator[tuple[str, Leaf]]:
    """Tensors, arrays, and lists of text or numbers of a batch, by where they stand in it."""
    if isinstance(batch, Tensor):
        if batch.dim():
            yield path, batch
    elif isinstance(batch, Mapping):
        for key, item in batch.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(batch, list | tuple):
        if batch and all(isinstance(item, str | int | float | bytes) for item in batch):
            yield path, list(batch)
        else:
            for i, item in enumerate(batch):
                yield from leaves(item, f"{path}[{i}]")
    elif hasattr(batch, "__array__"):
        yield from leaves(torch.as_tensor(batch), path)


def _fits(row: Any, own: Any) -> bool:
    """Whether two entries are equal where both have values, from the first one on or to the last one."""
    if not isinstance(row, Tensor) or not isinstance(own, Tensor):
        return bool(row == own)
    if row.dim() != own.dim():
        return False
    sizes = [min(pair) for pair in zip(row.shape, own.shape, strict=True)]
    first = tuple(slice(size) for size in sizes)
    last = tuple(slice(length - size, None) for length, size in zip(row.shape, sizes, strict=True))
    last_own = tuple(slice(length - size, None) for length, size in zip(own.shape, sizes, strict=True))
    return _equal(row[first], own[first]) or _equal(row[last], own[last_own])


def _equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | ((a != a) & (b != b))).all())  # what is missing is NaN in both
