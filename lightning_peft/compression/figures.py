"""What a model and a job cost: parameters, bytes, milliseconds."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """How large a model is.

    Attributes:
        parameters: all of them, one that is tied counted once.
        linear_parameters: weights of the layers that were compressed, without biases.
        bytes: of all parameters, as they are stored.
    """

    parameters: int
    linear_parameters: int
    bytes: int


def size(model: nn.Module, layers: Collection[str]) -> Size:
    """The size of a model of plain layers.

    Args:
        model: dense, or with thin layers.
        layers: names of the layers that are compressed, or were or will be.
    """
    linear = 0
    for name in layers:
        # Of thin layers the two weights; `.weight` of the pair is their product.
        linear += sum(p.numel() for n, p in model.get_submodule(name).named_parameters() if n.endswith("weight"))
    parameters = list(model.parameters())
    return Size(sum(p.numel() for p in parameters), linear, sum(p.numel() * p.element_size() for p in parameters))


class Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """What runs inside belongs to this stage."""
        start = time.perf_counter()
        yield
        self.add(name, time.perf_counter() - start)

    def add(self, name: str, seconds: float) -> None:
        """Count time that was measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds


def peak_bytes() -> int:
    """Bytes that the process held at most; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    found = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return found if sys.platform == "darwin" else found * 1024


@torch.no_grad()
def milliseconds(models: Sequence[nn.Module], batch: Mapping[str, Tensor], rounds: int = 7) -> list[float]:
    """Median time of a forward pass of each model, on one thread.

    On a CPU it is the process's own time, which does not count what else the machine does; elsewhere wall time. The
    models take turns, so that what slows the machine falls on all of them alike; each has one call first that does not
    count.

    Args:
        models: what is measured; put into evaluation mode and back.
        batch: what they are called with.
        rounds: calls that count.
    """
    times: list[list[float]] = [[] for _ in models]
    with _one_thread(), _evaluating(models):
        for index in range(rounds + 1):
            for model, found in zip(models, times, strict=True):
                device = next(model.parameters()).device
                given = {name: tensor.to(device) for name, tensor in batch.items()}
                clock = time.process_time if device.type == "cpu" else time.perf_counter
                _wait(device)
                start = clock()
                model(**given)
                _wait(device)
                if index:
                    found.append(1e3 * (clock() - start))
    return [statistics.median(found) for found in times]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _evaluating(models: Sequence[nn.Module]) -> Iterator[None]:
    modes: list[tuple[Any, bool]] = [(child, child.training) for model in models for child in model.modules()]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for child, mode in modes:
            child.training = mode
