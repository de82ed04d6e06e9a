"""Have a probe hear what adapted layers are called with: what the Calibration callback does, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_peft.adapters.rows import input_rows, output_rows, sample_rows
from lightning_peft.padding import text_of
from lightning_peft.rank.budget import RankBudget, Site
from lightning_peft.rank.probe import Probe


def positions(batch: Any) -> Tensor | None:
    """Which positions of a batch of text count: (batch, length) bool; ``None`` for all.

    Where a batch, or a part of it, is a mapping with an `attention_mask` of two dimensions, those that it shows; and of
    these, if there are `labels` of the same shape, those whose label is not -100, as in PEFT.
    """
    text = text_of(batch)
    if text is None:
        return None
    mask: Tensor = text["attention_mask"]
    labels = text.get("labels")
    if isinstance(labels, Tensor) and labels.shape == mask.shape:
        return torch.logical_and(mask, labels != -100)
    return mask.bool()


def samples(batch: Any) -> int | None:
    """How many samples a batch has: the first dimension of all its tensors; ``None`` where they differ."""
    sizes = {len(tensor) for tensor in _tensors(batch) if tensor.dim()}
    return sizes.pop() if len(sizes) == 1 else None


def is_square(batch: Any, samples: int) -> bool:
    """Whether a batch has as many positions as samples, so that a layer's input does not tell one from the other.

    Positions are what whole numbers of two dimensions have, such as those of tokens, or anything of three.
    """
    return samples > 1 and any(
        tensor.shape[:2] == (samples, samples) and (tensor.dim() > 2 or not tensor.is_floating_point())
        for tensor in _tensors(batch)
    )


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping | list | tuple):
        for part in batch.values() if isinstance(batch, Mapping) else batch:
            yield from _tensors(part)


@contextmanager
def heard(
    probe: Probe,
    budget: RankBudget,
    layers: Collection[str] | None = None,
    shown: Tensor | None = None,
    samples: int | None = None,
) -> Iterator[set[str]]:
    """Have a probe hear every call of adapted layers inside the block, and their backward where it reads gradients.

    Gradients reach it also where nothing that comes before a layer is trained, and the layer is not.

    Args:
        probe: hears.
        budget: the adapters.
        layers: names of the layers that it is to hear; ``None`` for those that it wants.
        shown: (batch, length) bool, positions of a batch of text that count; see :func:`positions`. Who reads gradients
            gets all: a weight's gradient is the sum over every position, whatever its label.
        samples: how many samples the batch has, for a probe of samples; see :func:`samples`.

    Yields:
        The names of the layers that were called, as they are: of some of them a probe of gradients hears nothing,
        because the loss does not depend on them.

    Raises:
        RuntimeError: it reads samples, and which rows of a layer are whose cannot be told; or it reads gradients, and
            what a layer was called with is written over before they come.

    Example:
        >>> from functools import partial
        >>> from torch import nn
        >>> from lightning_peft import EVA, LoRA, RankBudget, inject
        >>> from lightning_peft.rank.probe import Alone
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
        >>> _ = inject(net, partial(LoRA, rank=4), targets=["0"])
        >>> eva, budget = EVA(rank=2), RankBudget.of(net)
        >>> eva.begin(budget, Alone())
        >>> with heard(eva, budget):
        ...     _ = net(torch.randn(16, 8))
        >>> eva.fold()
        >>> budget.keep(eva.act())
        >>> budget.ranks()
        {'0': 2}
    """
    called: set[str] = set()
    with ExitStack() as hooks:
        by_sample = []
        for name in probe.wanted() if layers is None else layers:
            listen: Callable[..., Tensor | None]
            if probe.reads == "samples":
                by_sample.append(_Samples(probe, budget[name], samples))
                listen = by_sample[-1].hear
            else:
                listen = partial(_hear, probe, budget[name], shown if probe.reads == "inputs" else None)
            adapter = budget[name].adapter
            for hook in (
                adapter.register_forward_pre_hook(partial(_note, called, name)),
                adapter.register_forward_hook(listen, with_kwargs=True),
            ):
                hooks.callback(hook.remove)
        yield called
        for layer in by_sample:
            layer.tell()


def _note(called: set[str], name: str, *_: Any) -> None:
    called.add(name)


def _input(args: Any, kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _with_gradient(output: Any) -> Any:
    """The output, or one that is equal and gets a gradient though nothing before it asks for one."""
    if output.requires_grad or not torch.is_grad_enabled():
        return output
    return output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)


def _tell(
    probe: Probe, layer: str, x: Tensor, rows: Callable[[], Tensor], gradient: Callable[[], Tensor] | None = None
) -> None:
    # A layer is called under the model's autocast, which would round what the probe computes.
    with torch.autocast(x.device.type, enabled=False):
        probe.see(layer, x, rows, gradient)


def _version(x: Tensor) -> int:
    """How often a tensor was written over; an inference tensor does not count."""
    return 0 if x.is_inference() else x._version


def _require_unchanged(probe: Probe, layer: str, x: Tensor, version: int) -> None:
    # Autograd checks what it has saved, and of a layer that is not trained it saves no input.
    if _version(x) != version:
        raise RuntimeError(
            f"{type(probe).__name__} reads what {layer!r} was called with beside its gradient, and the model has "
            "written over it in place since. Write x = x + y for x += y, and inplace=False."
        )


def _hear(
    probe: Probe, site: Site, shown: Tensor | None, adapter: Any, args: Any, kwargs: Mapping[str, Any], output: Any
) -> Tensor | None:
    x = _input(args, kwargs)

    def rows(tensor: Tensor, of: Callable[[Any, Tensor], Tensor]) -> Tensor:
        tensor = tensor.detach()
        if shown is not None and tensor.dim() == 3 and tensor.shape[:2] == shown.shape:
            tensor = tensor[shown]
        return of(adapter.base, tensor)

    inputs = partial(rows, x, input_rows)
    if probe.reads == "inputs":
        _tell(probe, site.name, x, inputs)
        return None
    output = _with_gradient(output)
    if output.requires_grad:
        version = _version(x)

        def arrived(g: Tensor) -> None:
            _require_unchanged(probe, site.name, x, version)
            _tell(probe, site.name, x, inputs, partial(rows, g, output_rows))

        output.register_hook(arrived)
    return output  # type: ignore[no-any-return]


class _Samples:
    """A layer's calls in one batch, told to the probe as one: a sample's gradient is the sum over all of them."""

    def __init__(self, probe: Probe, site: Site, samples: int | None) -> None:
        self.probe, self.site, self.samples = probe, site, samples
        self.calls = 0
        self.heard: list[tuple[Tensor, Tensor]] = []

    def hear(self, adapter: Any, args: Any, kwargs: Mapping[str, Any], output: Any) -> Tensor:
        output = _with_gradient(output)
        if output.requires_grad:
            self.calls += 1
            x = _input(args, kwargs).detach()
            output.register_hook(partial(self._arrived, x, _version(x)))
        return output  # type: ignore[no-any-return]

    def _arrived(self, x: Tensor, version: int, g: Tensor) -> None:
        _require_unchanged(self.probe, self.site.name, x, version)
        self.heard.append((x, g.detach()))
        # Calls whose output the loss does not depend on never arrive; what waits for them is told in the end.
        if len(self.heard) == self.calls:
            self.tell()

    def tell(self) -> None:
        heard, self.heard, self.calls = self.heard, [], 0
        if heard:
            _tell(
                self.probe,
                self.site.name,
                heard[0][0],
                lambda: torch.cat([self._rows(x, input_rows) for x, _ in heard], 1),
                lambda: torch.cat([self._rows(g, output_rows) for _, g in heard], 1),
            )

    def _rows(self, tensor: Tensor, rows: Callable[[Any, Tensor], Tensor]) -> Tensor:
        kind = type(self.probe).__name__
        if self.samples is None:
            raise RuntimeError(
                f"{kind} looks at every sample's gradient, and how many samples a batch has cannot be told: its "
                "tensors do not agree in their first dimension. Give it others: Calibration(..., data=<batches>)."
            )
        try:
            return sample_rows(self.site.adapter.base, tensor, self.samples, rows)
        except ValueError as error:
            raise RuntimeError(
                f"{kind} looks at every sample's gradient, and at {self.site.name!r} it cannot be told whose is "
                f"whose: {error} Give it batches of one: Calibration(..., data=DataLoader(..., batch_size=1))."
            ) from None
