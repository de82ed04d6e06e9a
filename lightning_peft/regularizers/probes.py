"""Probes: hear what named layers of a module give, as one row of features per example."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.padding import attention_mask_of
from lightning_peft.patterns import matches
from lightning_peft.rank.budget import clean_name
from lightning_peft.regularizers.base import BESIDE_MODEL
from lightning_peft.regularizers.calls import Calls
from lightning_peft.regularizers.widths import output_width

Pool = Literal["mean", "first", "last"]
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def probed(module: nn.Module, patterns: Sequence[str], argument: str = "layers") -> dict[str, nn.Module]:
    """The layers that patterns name, by name, in the module's order; each pattern as one of `targets`.

    Args:
        module: with its adapters, which stand for the layers that they adapt.
        patterns: regular expressions, of whole names or their ends after a dot.
        argument: what the user calls them, for the error.

    Raises:
        ValueError: a pattern matches nothing.
    """
    layers = dict(_layers(module))
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in layers if matches([pattern], name)}
        if not found:
            near = list(dict.fromkeys([*difflib.get_close_matches(pattern, layers, n=5, cutoff=0.4), *layers]))[:8]
            raise ValueError(
                f"{argument}={pattern!r} matches no layer of {type(module).__name__}; there are "
                f"{', '.join(map(repr, near)) or 'none'}{', ...' if len(layers) > len(near) else ''}."
            )
        chosen |= found
    return {name: layer for name, layer in layers.items() if name in chosen}


def only_probed(module: nn.Module, pattern: str, argument: str) -> str:
    """The name of the one layer that a pattern names.

    Raises:
        ValueError: it names none, or several.
    """
    found = list(probed(module, [pattern], argument))
    if len(found) > 1:
        raise ValueError(
            f"{argument}={pattern!r} names {len(found)} layers, {found[0]!r} and {found[1]!r} among them, and one is "
            "meant. Write more of its name."
        )
    return found[0]


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    inside: tuple[str, ...] = ()
    for path, child in module.named_modules():
        name = clean_name(path)
        hidden = any(path == part or path.startswith(f"{part}.") for part in inside)
        if not name or name.partition(".")[0] in BESIDE_MODEL or hidden:
            continue
        if isinstance(child, Adapter):
            # What a prompt adapts is a whole model, whose layers are the user's own.
            own = [name for name, _ in child.named_children() if name != "base" or child.placeholder is None]
            inside = (*inside, *(f"{path}.{name}" for name in own))
        yield name, child


class Probes:
    """What named layers give while it listens: one row of features per example.

    Args:
        module: the module that has them.
        names: of the layers, as :func:`probed` gives them.
        pool: how positions become one row: their "mean", the "first" one or the "last" one, of those that the batch's
            `attention_mask` shows. An output of (N, d) is taken as it is, and one of a convolution averaged.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], pool: Pool = "mean") -> None:
        require_pool(pool)
        self.names, self.pool = tuple(names), pool
        self._calls = Calls(module, self.names)
        self._module, self._longer = module, longer(module)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what the layers give inside the block."""
        self._calls.attach()  # layers may have been replaced
        self._calls.taken_inside()
        self._calls.on = True
        try:
            yield
        finally:
            self._calls.on = False

    def heard(self, batch: Any) -> dict[str, list[Tensor]]:
        """Each layer's features, (N, d) for every call of it in the last :meth:`listening`.

        Args:
            batch: whose `attention_mask`, (N, L), or that of a part of it, says which positions count; those of a
                prompt do not.

        Raises:
            RuntimeError: a layer was not called, ran without gradients while others are to be had, or gave something
                that cannot be pooled.
        """
        inside = self._calls.taken_inside()
        masks = masks_of(batch, self._longer)
        found = {}
        for name in self.names:
            outputs = inside.get(name, [])
            if not outputs:
                raise RuntimeError(
                    f"{name!r} gave no tensor in this training_step, so it has no features. Name a layer that is "
                    "called there; calling a module's forward() does not call the module."
                )
            if name in self._calls.blind and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{name!r} ran without gradients, as re-entrant activation checkpointing runs layers. Set "
                    "use_reentrant=False, or name a layer outside of what is checkpointed."
                )
            found[name] = [self._rows(name, output, masks) for output in outputs]
        return found

    def heard_once(self, batch: Any) -> dict[str, Tensor]:
        """As :meth:`heard`, of layers that are called once in a step.

        Raises:
            RuntimeError: likewise, and where one was called several times.
        """
        every = self.heard(batch)
        for name, rows in every.items():
            if len(rows) > 1:
                raise RuntimeError(
                    f"{name!r} was called {len(rows)} times in this training_step, and there is no telling which of "
                    "its features are meant. Name a layer that is called once."
                )
        return {name: rows[0] for name, rows in every.items()}

    def detach(self) -> None:
        """Take the hooks off."""
        self._calls.detach()

    def _rows(self, name: str, output: Tensor, masks: Sequence[Tensor]) -> Tensor:
        return pooled(output, self._module.get_submodule(self._calls.path(name)), name, masks, self.pool)


def longer(module: nn.Module) -> list[Adapter]:
    """The adapters that add columns to the texts of their models."""
    return [child for child in module.modules() if isinstance(child, Adapter) and child.placeholder is not None]


def masks_of(batch: Any, longer: Sequence[Adapter]) -> list[Tensor]:
    """The positions that count: the batch's `attention_mask`, and what it is behind adapters that add columns.

    Args:
        batch: may have a mask, (N, L).
        longer: adapters as :func:`longer` gives them, whose own columns count for nothing.
    """
    mask = attention_mask_of(batch)
    if mask is None:
        return []
    behind = [adapter.lengthened(mask.long()) for adapter in longer]
    return [mask, *(each for each in behind if each is not None)]


def pooled(output: Tensor, layer: nn.Module, name: str, masks: Sequence[Tensor] = (), pool: Pool = "mean") -> Tensor:
    """One row of features per example, (N, d), of what a layer gives.

    Args:
        output: (N, d), (N, L, d), or of a convolution (N, d, ...).
        layer: what gave it.
        name: of it, for the error.
        masks: (N, L), the positions that count: the first of the output's own length; all where there is none.
        pool: see :class:`Probes`.

    Raises:
        RuntimeError: the output is of another shape.
    """
    if output.dim() == 2:
        return output
    while isinstance(layer, Adapter):
        layer = layer.base
    if isinstance(layer, _CONVOLUTIONS) and output.dim() > 2:
        return output.flatten(2).mean(2)
    if output.dim() != 3:
        raise RuntimeError(
            f"the output of {name!r} is of shape {tuple(output.shape)}, and features are (N, d), or (N, L, d) to "
            "be pooled. Name another layer."
        )
    attention = getattr(layer, "self_attn", layer)
    if getattr(attention, "batch_first", True) is False:  # torch's own: positions come first, examples second
        output = output.transpose(0, 1)
    shown = next((mask for mask in masks if mask.shape == output.shape[:2]), None)
    if pool in ("first", "last"):
        if shown is None:
            return output[:, 0 if pool == "first" else -1]
        ahead = torch.arange(output.shape[1], device=output.device) + 1
        chosen = (shown.bool() * (ahead if pool == "last" else ahead.flip(0))).argmax(1)
        return output[torch.arange(len(output), device=output.device), chosen]
    if shown is None:
        return output.mean(1)
    weights = shown.to(torch.promote_types(output.dtype, torch.float32)).unsqueeze(2)
    return (output * weights).sum(1) / weights.sum(1).clamp_min(1)


def require_pool(pool: object) -> None:
    """Check that an argument is a way to pool.

    Raises:
        ValueError: it is none.
    """
    if pool not in ("mean", "first", "last"):
        raise ValueError(f"pool={pool!r}: choose 'mean', 'first' or 'last'.")


def probed_width(module: nn.Module, name: str, features: int | None) -> int:
    """How wide a layer's features are: as the user says, or as the layer does."""
    return output_width(probed(module, [re.escape(name)])[name], name) if features is None else features
