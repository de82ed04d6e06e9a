"""One draw from a Gaussian over parameters, and how it stands in their places for a while."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.functional.perturbation import log_sigma, perturbed, perturbed_output
from lightning_peft.regularizers.places import Part


class Draw:
    """One draw of w + sigma eps; all its random numbers come from one call.

    Parameters are swapped for tensors, past `__setattr__`, as `torch.func.functional_call` does it: nothing is added to
    them in place. A linear layer whose weight is another one for every example keeps it, and has the noise added to its
    output.

    Args:
        parts: the parameters.
        offset: (k,), see :func:`~lightning_peft.functional.perturbation.log_sigma`.
        start: (k,) or ().
        speed: of log sigma.
        generator: on the device of `offset`.
        rows: how many examples have a draw of their own; 0 for one draw for all.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        offset: Tensor,
        start: Tensor,
        speed: float,
        generator: torch.Generator,
        rows: int,
    ) -> None:
        self._parts, self._sizes = parts, [part.value.numel() for part in parts]
        self._offset, self._start, self._speed = offset, start, speed
        kinds = [part.kind if rows else "shared" for part in parts]
        once = sum(n for n, kind in zip(self._sizes, kinds, strict=True) if kind == "shared")
        each = sum(n for n, kind in zip(self._sizes, kinds, strict=True) if kind == "elementwise")
        owners = dict.fromkeys(p.owner for p, kind in zip(parts, kinds, strict=True) if kind == "linear")
        layers = [owner for owner in owners if isinstance(owner, nn.Linear)]
        counts = [once + rows * each, *(rows * layer.out_features for layer in layers)]
        noise, *outputs = torch.randn(sum(counts), generator=generator, device=offset.device, dtype=offset.dtype).split(
            counts
        )
        swapped = [part for part, kind in zip(parts, kinds, strict=True) if kind != "linear"]
        values: Sequence[Tensor] = ()
        if swapped:
            kept = [kind != "linear" for kind in kinds]
            values = perturbed(
                [part.value for part in swapped],
                self._some(offset, kept),
                self._some(start, kept),
                speed,
                noise,
                [kind == "elementwise" for kind in kinds if kind != "linear"],
                rows,
            )
        self._swaps = [(*place, v) for part, v in zip(swapped, values, strict=True) for place in part.places]
        self._eps: dict[nn.Module, Tensor] = {
            layer: eps.view(rows, -1) for layer, eps in zip(layers, outputs, strict=True)
        }
        self._heard: set[nn.Module] = set()
        self._here: set[nn.Module] = set()  # heard since the last time that the noise was put in its places

    def _some(self, flat: Tensor, kept: Sequence[bool]) -> Tensor:
        if not flat.dim() or all(kept):
            return flat
        return torch.cat([part for part, keep in zip(flat.split(self._sizes), kept, strict=True) if keep])

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the noise is in its places; to be entered again where something is computed again.

        Raises:
            RuntimeError: a linear layer that was to have noise at its output was not called, or called twice, or not
                with (rows, d_in).
        """
        self._here.clear()
        before = [(owner, name, owner._parameters[name]) for owner, name, _ in self._swaps]
        hooks = [layer.register_forward_hook(partial(self._add, eps)) for layer, eps in self._eps.items()]
        try:
            for owner, name, value in self._swaps:
                owner._parameters[name] = value  # type: ignore[assignment]
            yield
        finally:
            for owner, name, parameter in before:
                owner._parameters[name] = parameter
            for hook in hooks:
                hook.remove()
        silent = next((layer for layer in self._eps if layer not in self._heard), None)
        if silent is not None:
            raise RuntimeError(
                f"the linear layer of {self._of(silent)[0].name!r} is in Q and was not called, so it had no noise: "
                "with unit='example' that is added to its output. Use unit='batch', or leave it out of Q (over=[...])."
            )

    def _of(self, layer: nn.Module) -> list[Part]:
        return [part for part in self._parts if part.owner is layer]

    def _add(self, eps: Tensor, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        mine, x = self._of(layer), inputs[0] if inputs else None
        if not isinstance(x, Tensor) or x.dim() != 2 or len(x) != len(eps):
            shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise RuntimeError(
                f"the linear layer of {mine[0].name!r} got {shape} for an input, and noise for every one of "
                f"{len(eps)} examples needs ({len(eps)}, {layer.in_features}). Use unit='batch'."
            )
        # Two inputs with one eps have not the distribution of two inputs with one weight. What backward computes again
        # is the same input.
        if layer in self._here and torch._C._current_graph_task_id() == -1:
            raise RuntimeError(
                f"the linear layer of {mine[0].name!r} was called twice, and noise for every example, which is added "
                "to its output, is that of one call. Use unit='batch'."
            )
        self._heard.add(layer)
        self._here.add(layer)
        flat = log_sigma(self._offset, self._start, self._speed).exp()
        sigmas = dict(zip(self._parts, flat.split(self._sizes), strict=True))
        of = {part.places[0][1]: sigmas[part].view(part.shape) for part in mine}
        return perturbed_output(x, output, of.get("weight"), of.get("bias"), eps)
