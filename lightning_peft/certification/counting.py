"""Counting the errors of networks drawn from Q: the same ones whatever the number of processes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_peft.certification.bound_set import BoundSet
from lightning_peft.certification.record import Unit
from lightning_peft.functional.pac_bayes import bounded_cross_entropy

Predict = Callable[[Any], tuple[Tensor, Tensor]]
"""Logits and labels of a batch: (batch, *places, classes) and (batch, *places)."""


class Sampler(Protocol):
    """A distribution over a module's parameters that can put a draw in their place."""

    def sampled(
        self, module: nn.Module, generator: torch.Generator, unit: Any = ..., examples: int | None = ...
    ) -> AbstractContextManager[Any]:
        """Inside, the module's forward sees a draw; outside, nothing has changed."""


@dataclass(frozen=True)
class Count:
    """What one batch added up to.

    Attributes:
        index: number of the pass and of the batch.
        errors: wrong predictions; of sequences, the shares of wrong places.
        cross_entropy: sum of the examples' bounded cross-entropies.
    """

    index: tuple[int, int]
    errors: float
    cross_entropy: float


def count(
    predict: Predict,
    posterior: Sampler,
    module: nn.Module,
    data: BoundSet,
    *,
    passes: int,
    unit: Unit,
    seed: int,
    p_min: float,
    process: tuple[int, int] = (0, 1),
    advance: Callable[[], object] = lambda: None,
) -> Iterator[Count]:
    """Run this process's share of the batches through drawn networks.

    The noise of a pass, or of a batch, is drawn from a generator of its own, which the seed and its number decide: one
    process counts what several would count together. Processes take batches in turn; one that has no more runs its last
    one again, uncounted, for as long as the others run: a sharded module needs all of them in every forward.

    Args:
        predict: gives logits and labels of a batch, by a forward of `module`.
        posterior: Q.
        module: in eval mode.
        data: the bound set.
        passes: how often to go through it.
        unit: what shares a draw.
        seed: of the noise.
        p_min: of the bounded cross-entropy.
        process: this process's number, and how many there are.
        advance: called after each batch.

    Raises:
        ValueError: logits and labels are not what a count needs.
    """
    mine = list(range(process[0], len(data.batches), process[1]))
    rounds = -(-len(data.batches) // process[1])
    idle = [mine[-1] if mine else 0] * (rounds - len(mine))
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    for k in range(passes):
        whole = posterior.sampled(module, generator(device, seed, k)) if unit == "pass" else nullcontext()
        with whole:
            order = [*mine, *idle]
            for i, batch, counted in zip(
                order, data.read(order), [True] * len(mine) + [False] * len(idle), strict=True
            ):
                size = len(data.batches[i])
                own: AbstractContextManager[Any] = nullcontext()
                if unit == "batch":
                    own = posterior.sampled(module, generator(device, seed, k, i))
                elif unit == "example":
                    own = posterior.sampled(module, generator(device, seed, k, i), unit="example", examples=size)
                with own, torch.no_grad():
                    logits, labels = predict(batch)
                if logits.shape[0] != size:
                    raise ValueError(
                        f"a batch of {size} examples has logits of shape {tuple(logits.shape)}: the first dimension "
                        "must be the example."
                    )
                if counted:
                    wrong = errors(logits, labels)
                    # A network that has overflowed has its errors counted; a cross-entropy that is no number is 1.
                    loss = bounded_cross_entropy(logits.float(), labels, p_min).double().nan_to_num(1.0)
                    yield Count((k, i), float(wrong.sum()), float(loss.sum()))
                advance()


def errors(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """The 0-1 loss of each example; of a sequence, the share of places at which the prediction is wrong.

    Logits that are not all finite are an error, whatever the label.

    Args:
        logits: (batch, *places, classes).
        labels: (batch, *places), integers.
        ignore_index: the label of places that count for nothing.

    Returns:
        (batch,), float64, in [0, 1].

    Raises:
        ValueError: the shapes do not fit, or an example has no label at all.
    """
    if logits.dim() < 2 or logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}: a certificate "
            "of 0-1 risk needs (batch, classes) and (batch,), or a prediction at each place of a sequence."
        )
    shown = (labels != ignore_index).flatten(1) if labels.dim() > 1 else (labels != ignore_index)[:, None]
    if not shown.any(1).all():
        raise ValueError("an example of the bound set has no label, so no error can be counted. Leave it out.")
    wrong = (logits.argmax(-1) != labels) | ~logits.isfinite().all(-1)
    wrong = wrong.flatten(1) if labels.dim() > 1 else wrong[:, None]
    return (wrong & shown).sum(1).double() / shown.sum(1)


def generator(device: torch.device, *numbers: int) -> torch.Generator:
    """A generator of its own for each combination of numbers."""
    name = "|".join(map(str, ("certificate", *numbers)))
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1
    return torch.Generator(device).manual_seed(seed)


def total(counts: list[Count]) -> tuple[float, float]:
    """Errors and cross-entropy of all counts, correctly rounded: in whatever order they come.

    Raises:
        RuntimeError: a batch was counted twice.
    """
    if len({each.index for each in counts}) != len(counts):
        raise RuntimeError("a batch was counted twice, which is a fault of this library.")
    return math.fsum(each.errors for each in counts), math.fsum(each.cross_entropy for each in counts)


def read_logits(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Logits and labels of a batch by the module's own forward, where there is one way to read them.

    Of a dictionary with `labels`, the module is called with the dictionary; of a pair, with its first part. The logits
    are the output, or its `logits`.

    Raises:
        ValueError: there is no such way, or several.
    """
    advice = "Say how: read=lambda module, batch: (logits, labels)."
    if isinstance(batch, dict) and isinstance(batch.get("labels"), Tensor):
        inputs, labels = batch, batch["labels"]
    elif isinstance(batch, list | tuple) and len(batch) == 2 and isinstance(batch[1], Tensor):
        inputs, labels = batch
    else:
        kind = f"dictionary of {', '.join(map(str, batch))}" if isinstance(batch, dict) else type(batch).__name__
        raise ValueError(f"a batch is a {kind}, in which there is no telling what the labels are. {advice}")
    outputs = module(inputs)
    logits = outputs.get("logits") if isinstance(outputs, dict) else getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor):
        raise ValueError(f"{type(module).__name__} returns a {type(outputs).__name__} without `logits`. {advice}")
    if logits.dim() > 2:
        raise ValueError(
            f"{type(module).__name__} gives logits of shape {tuple(logits.shape)}, one prediction at each place, and "
            f"there is no telling whether a label stands at its own place or at the next. {advice}"
        )
    return logits, labels
