"""Where a run stands, beyond weights: the random numbers to come, and the place in the training data."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

State = dict[str, Any]


def rng_state() -> State:
    """The state of the global generators of torch, Python and NumPy: tensors and numbers only."""
    version, keys, gauss = random.getstate()
    _, np_keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: State = {
        "torch": torch.get_rng_state(),
        "python": [version, torch.tensor(keys, dtype=torch.int64), gauss],
        "numpy": [torch.from_numpy(np.asarray(np_keys).astype(np.int64)), position, has_gauss, cached],
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Restore what :func:`rng_state` gave."""
    torch.set_rng_state(state["torch"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys.tolist()), gauss))
    np_keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state(("MT19937", np_keys.numpy().astype(np.uint32), position, has_gauss, cached))
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that can say where it stands, and go there again in another process.

    Lightning resumes in the middle of an epoch by taking the remaining number of batches from the *start* of a new,
    differently shuffled epoch. Here the state of the generators is noted where a DataLoader draws from them: when an
    iterator is made (the workers' seed) and at the first batch (the sampler's seed). Going back means to make the
    iterator again in that state and to take the batches that were seen; no draw of anybody else changes.

    Never built: :func:`make_resumable` changes a loader's class in place and :func:`make_plain` changes it back.
    """

    _position: _Position | None
    _target: State | None
    _anew: list[ResumableLoader]

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        return _Position(self)

    def state_dict(self) -> State:
        """Batches taken since the iterator was made, and the generators' states that it was made in."""
        position = self.__dict__.get("_position")
        return {} if position is None else {"taken": position.taken, "made": position.made, "first": position.first}

    def load_state_dict(self, state: State) -> None:
        """Go where `state` says with the next batch; with an empty state, to the start of a new epoch."""
        if state:
            self._target = state
        else:
            begin_anew([self])


class _Position(Iterator[Any]):
    """The iterator of a :class:`ResumableLoader`."""

    def __init__(self, loader: ResumableLoader) -> None:
        self.loader = loader
        self.taken = 0
        self.made: State = rng_state()
        self.first: State | None = None
        self.batches: Iterator[Any] = DataLoader.__iter__(loader)
        loader._position = self

    def __next__(self) -> Any:
        for loader in self.loader.__dict__.pop("_anew", []):
            loader.__dict__.pop("_anew", None)
            loader._position._begin()
        target, self.loader._target = self.loader.__dict__.get("_target"), None
        if target is not None:
            self._go(target)
        if self.first is None:
            self.first = rng_state()
        batch = next(self.batches)
        self.taken += 1
        return batch

    def _begin(self) -> None:
        # The generators now are what they were when the interrupted run would have made its next iterator.
        self.taken, self.made, self.first = 0, rng_state(), None
        self.batches = DataLoader.__iter__(self.loader)

    def _go(self, target: State) -> None:
        here = rng_state()
        self.taken, self.made, self.first = target["taken"], target["made"], target["first"]
        set_rng_state(self.made)
        self.batches = DataLoader.__iter__(self.loader)
        if self.first is None:  # it was made, and nobody had asked it yet
            set_rng_state(here)
            return
        set_rng_state(self.first)
        for _ in range(self.taken):
            next(self.batches)
        if not self.taken:  # the sampler draws when it is first asked
            self.batches = chain([next(self.batches)], self.batches)
        set_rng_state(here)


def begin_anew(loaders: Iterable[ResumableLoader]) -> None:
    """With the first batch that one of them is asked for, make the iterators of all anew, in their order.

    An epoch makes all its iterators before it asks any of them, and each draws from the global generators. What has no
    iterator yet will begin by itself.
    """
    every = list(loaders)
    made = [loader for loader in every if loader.__dict__.get("_position") is not None]
    for loader in every:
        loader._target = None  # Lightning may have told it to go where it stood
    for loader in made:
        loader._anew = made


def make_resumable(loader: object) -> ResumableLoader | None:
    """Make a plain DataLoader resumable, in place; ``None`` for anything else, which is left to its own means."""
    if type(loader) is not DataLoader:
        return loader if isinstance(loader, ResumableLoader) else None
    loader.__class__ = ResumableLoader
    assert isinstance(loader, ResumableLoader)
    return loader


def make_plain(loader: ResumableLoader) -> None:
    """Undo :func:`make_resumable`."""
    if type(loader) is not ResumableLoader:
        return  # it is plain already: one loader may be held twice
    for name in ("_position", "_target", "_anew"):
        loader.__dict__.pop(name, None)
    loader.__class__ = DataLoader  # type: ignore[assignment]
