"""Views: two rows of features for every example, whose information about each other is estimated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.regularizers.calls import Calls, with_logits
from lightning_peft.regularizers.everyone import Everyone
from lightning_peft.regularizers.labels import labels_of
from lightning_peft.regularizers.probes import Pool, Probes
from lightning_peft.regularizers.wide import widened

WORDS = ("labels", "dropout", "halves")
"""What the other view can be beside another layer."""


class Views:
    """The features x of named layers, and what each is compared with; see :class:`~lightning_peft.MutualInformation`.

    Args:
        module: has the layers.
        names: of the layers.
        of: "labels", "dropout", "halves", or anything else for another layer.
        other: that layer's name.
        pool: how positions become one row.
        called: with "dropout", the name of the module that is called again.
    """

    def __init__(
        self, module: nn.Module, names: Sequence[str], of: str, other: str | None, pool: Pool, called: str | None
    ) -> None:
        self.names, self.of, self.other, self.called = tuple(names), of, other, called
        others = () if other is None else (other,)
        self._probes = Probes(module, tuple(dict.fromkeys([*names, *others])), pool)
        self._calls = Calls(with_logits(module, called, "MutualInformation")) if of == "dropout" else None

    @contextmanager
    def listening(self, module: nn.Module) -> Iterator[None]:
        """Hear what the layers give inside the block; then, with "dropout", have the model run again."""
        with self._probes.listening():
            if self._calls is None:
                yield
                return
            self._calls.attach()
            self._calls.taken()
            self._calls.on = True
            try:
                yield
            finally:
                self._calls.on = False
            root = with_logits(module, self.called, "MutualInformation")
            for call in self._calls.taken():
                root(*call.args, **call.kwargs)

    def pairs(self, batch: Any, everyone: Everyone, first: bool) -> tuple[list[Tensor], list[Tensor] | Tensor]:
        """x of every layer and what it is compared with, (N, d) each, of the rows of all processes; labels as (N,).

        Args:
            batch: of this process.
            everyone: whose rows are gathered.
            first: whether it is to be checked that two views are not the same, which waits for the device.

        Raises:
            RuntimeError: a layer was not called as often as it is to be, there are no labels, a batch has no halves,
                or the two views are the same.
        """
        if self.of == "dropout":
            x, z = self._again(batch, first)
            return _halved(_gathered([*x, *z], everyone))
        once = self._probes.heard_once(batch)
        x = [once[name] for name in self.names]
        if self.of == "labels":
            labels = labels_of(batch)
            if labels is None or labels.shape != x[0].shape[:1]:
                raise RuntimeError(
                    f"of='labels' needs a label for each of {len(x[0])} examples, and the batch, a "
                    f"{type(batch).__name__}, has no such integers under 'labels' nor for the second of two."
                )
            return _gathered(x, everyone), everyone.gather(labels)
        if self.of == "halves":
            if len(x[0]) % 2:
                raise RuntimeError(
                    f"of='halves' pairs the first half of a batch with the second, and a batch has {len(x[0])} "
                    "examples. Give an even number, and drop_last=True."
                )
            half = len(x[0]) // 2
            return _halved(_gathered([*(each[:half] for each in x), *(each[half:] for each in x)], everyone))
        assert self.other is not None
        *rows, other = _gathered([*x, once[self.other].detach()], everyone)
        return rows, [other] * len(rows)

    def _again(self, batch: Any, first: bool) -> tuple[list[Tensor], list[Tensor]]:
        heard = self._probes.heard(batch)
        odd = next((name for name, rows in heard.items() if len(rows) != 2), None)
        if odd is not None:
            raise RuntimeError(
                f"{odd!r} was called {len(heard[odd])} times in a training_step and the pass after it, and each is to "
                "call it once. Say which module calls it: MutualInformation(called='model')."
            )
        x, z = ([heard[name][side] for name in self.names] for side in (0, 1))
        if first and all(torch.equal(one, other) for one, other in zip(x, z, strict=True)):
            raise RuntimeError(
                "of='dropout' compares two passes under two dropout masks, and both gave the same features: no "
                "dropout is at work. Give the model or the adapters some, or take views of='halves'."
            )
        return x, z

    def detach(self) -> None:
        """Take the hooks off."""
        self._probes.detach()
        if self._calls is not None:
            self._calls.detach()


def _gathered(parts: Sequence[Tensor], everyone: Everyone) -> list[Tensor]:
    """The rows of all processes, in one message, in the widest dtype."""
    count = len(parts[0])
    odd = next((part for part in parts if len(part) != count), None)
    if odd is not None:
        raise RuntimeError(
            f"layers gave features of {count} and of {len(odd)} examples. Name layers with one row for each."
        )
    dtype = widened(parts[0], *parts[1:])
    everything = everyone.gather(torch.cat([part.to(dtype) for part in parts], 1))
    return list(everything.split([part.shape[1] for part in parts], 1))


def _halved(rows: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    return rows[: len(rows) // 2], rows[len(rows) // 2 :]
