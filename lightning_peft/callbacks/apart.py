"""Batches of the training data, drawn so that training draws the same ones as if nobody had looked."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft.resume import ResumableLoader


def training_batches(trainer: Trainer) -> Iterator[Any]:
    """The batches of an epoch, as `training_step` gets them, from copies of the Trainer's own loaders.

    The global generators are drawn from: put their state back afterwards. Everything else is the copies' own.

    Raises:
        MisconfigurationException: a loader cannot be read twice.
    """
    combined = trainer.fit_loop._combined_loader
    assert combined is not None  # training is about to start
    twin = copy.copy(combined)
    twin.flattened = [apart(loader) for loader in combined.flattened]  # which makes a collection of the twin's own
    twin._iterator = None
    for batch, _, _ in twin:
        yield batch


def apart(loader: Any) -> Iterable[Any]:
    """A loader of the same batches whose reading leaves the given one, and its samplers, where they are.

    Raises:
        MisconfigurationException: there is no telling how: the data are a stream, or the loader is of an unknown kind.
    """
    if isinstance(loader, Sequence):
        return loader
    if isinstance(loader, DataLoader) and _is_plain(loader):
        if isinstance(loader.dataset, IterableDataset):
            kind = f"its dataset, {type(loader.dataset).__name__}, is a stream (an IterableDataset)"
        else:
            try:
                return _twin(loader)
            except Exception as error:  # whatever a sampler of somebody's own does when it is copied
                kind = f"its sampler cannot be copied ({error})"
    elif hasattr(type(loader), "__copy__"):
        twin: Iterable[Any] = copy.copy(loader)
        return twin
    else:
        kind = f"{type(loader).__name__} is no DataLoader, so there is no telling how to read it twice"
    raise MisconfigurationException(
        f"Calibration reads batches before training does, and training is to get the same ones all the same: {kind}. "
        "Give it batches of its own: Calibration(..., data=<a DataLoader or a list of batches>)."
    )


def _is_plain(loader: DataLoader[Any]) -> bool:
    return type(loader).__iter__ in (DataLoader.__iter__, ResumableLoader.__iter__)


def _twin(loader: DataLoader[Any]) -> DataLoader[Any]:
    twin = copy.copy(loader)
    if isinstance(twin, ResumableLoader):
        twin.__class__ = DataLoader  # type: ignore[assignment]
        for name in ("_position", "_target", "_anew"):
            twin.__dict__.pop(name, None)
    # A generator and a place in the data are the samplers' own; the data are shared, whoever refers to them.
    shared = {id(loader.dataset): loader.dataset}
    for name in ("generator", "sampler", "batch_sampler"):
        twin.__dict__[name] = copy.deepcopy(loader.__dict__[name], shared)
    # In this process: workers would be started for a few batches, and persistent ones are those that training has.
    twin.__dict__.update(num_workers=0, prefetch_factor=None, persistent_workers=False, _iterator=None, timeout=0)
    return twin
