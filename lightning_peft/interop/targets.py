"""Where PEFT would put LoRA: the layers of a model that its format can express, and their pairs of tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.adapters.attention import AdaptedAttention
from lightning_peft.adapters.layers import is_convolution, matrix
from lightning_peft.adapters.low_rank import LowRankUpdate
from lightning_peft.export import widened
from lightning_peft.functional.weight_decomposition import row_norms
from lightning_peft.rank.budget import clean_name
from lightning_peft.surgery.layers import adapters

Rank = TypeVar("Rank", int, float)  # a share of a rank is what a size is estimated with


PREFIX = "base_model.model."


@dataclass(frozen=True)
class Part:
    """One pair of tensors: where PEFT keeps it, the shape of the layer's matrix, and the adapter that it comes from."""

    key: str
    shape: tuple[int, int]
    adapter: LowRankUpdate | None  # None: an attention's other projection, which PEFT adapts too and which gets zeros

    @property
    def kernel(self) -> tuple[int, ...]:
        """A convolution's (c_in, *kernel), in which PEFT keeps a row of A; empty for other layers."""
        if self.adapter is None or not is_convolution(self.adapter.base):
            return ()
        weight: Tensor = self.adapter.base.weight  # type: ignore[assignment]
        return tuple(weight.shape[1:])

    @property
    def rank(self) -> int:
        return 0 if self.adapter is None else int(self.adapter.gate.open().sum())

    @property
    def lengths_name(self) -> str:
        """Name of the rows' lengths in the file, where there are some."""
        return f"{self.key}.lora_magnitude_vector"

    @property
    def lengths_shape(self) -> tuple[int, ...]:
        """Shape of the rows' lengths in the file: (d_out,), or (1, d_out, 1, ...) for a convolution."""
        d_out = self.shape[0]
        return (1, d_out, *[1] * (len(self.kernel) - 1)) if self.kernel else (d_out,)

    @property
    def has_lengths(self) -> bool:
        """Whether the layer has lengths of its own: then it is more than its update, also where that is zero."""
        return self.adapter is not None and self.adapter.lengths() is not None

    @torch.no_grad()
    def lengths(self) -> Tensor:
        """Lengths of the rows: the layer's own, or those with which PEFT's DoRA does what the layer does.

        In their :attr:`lengths_shape`.

        Raises:
            TypeError: there are none such.
        """
        assert self.adapter is not None  # an attention, which is refused before
        adapter = widened(self.adapter)
        norms = row_norms(matrix(adapter.base), adapter.A, adapter.B, adapter.value())
        name = self.key.removeprefix(PREFIX)
        if not norms.all():
            raise TypeError(
                f"layer {name!r} has a row of zeros in its weight, and where PEFT keeps lengths of rows it divides by "
                "theirs: its outputs would not be numbers. Leave the layer out, or export the merged model."
            )
        own = adapter.lengths()
        return (norms if own is None else own.detach()).cpu().contiguous().view(self.lengths_shape)

    def names(self) -> tuple[str, str]:
        """Names of A and B in the file."""
        if self.adapter is not None and isinstance(self.adapter.base, nn.Embedding):
            return f"{self.key}.lora_embedding_A", f"{self.key}.lora_embedding_B"
        return f"{self.key}.lora_A.weight", f"{self.key}.lora_B.weight"

    def shapes(self, rank: Rank) -> tuple[tuple[Rank, ...], tuple[Rank, ...]]:
        """Shapes of A and B in the file: (rank, d_in) and (d_out, rank), or those of kernels.

        For a convolution (rank, c_in, *kernel) and (d_out, rank, 1, ...).
        """
        return (rank, *(self.kernel or self.shape[1:])), (self.shape[0], rank, *[1] * (len(self.kernel) - 1))

    def update(self) -> Tensor:
        """The update that the tensors stand for: (d_out, d_in)."""
        return torch.zeros(self.shape) if self.adapter is None else widened(self.adapter).update().detach()

    def factors(self, rank: int, scale: float) -> tuple[Tensor, Tensor]:
        """A and B in their :meth:`shapes`, zero-padded, such that scale * B A is the adapter's update."""
        inner, outer = self.shapes(rank)
        if self.adapter is None:
            return torch.zeros(inner), torch.zeros(outer)
        A, B = widened(self.adapter).factors()
        B = B * (self.adapter.scaling / scale)
        short = rank - A.shape[0]
        A, B = F.pad(A, (0, 0, 0, short)).cpu(), F.pad(B, (0, short)).cpu()
        return A.contiguous().view(inner), B.contiguous().view(outer)


@dataclass(frozen=True)
class Target:
    """A module that PEFT puts LoRA on: its path, and one pair of tensors, or the two of an attention."""

    path: str
    parts: tuple[Part, ...]

    @property
    def rank(self) -> int:
        """What is written: at least 1 where there is something beside the components, since PEFT knows no rank 0."""
        return max(max(part.rank for part in self.parts), int(any(part.has_lengths for part in self.parts)))


def find_targets(host: nn.Module) -> list[Target]:
    """What to write, without layers of rank 0 that act as their base.

    Raises:
        TypeError: an adapter, or the place where it is, cannot be expressed in PEFT's LoRA format.
        ValueError: every layer is of rank 0.
    """
    targets = [target for target in all_targets(host) if target.rank]
    if not targets:
        raise ValueError(
            f"all {len(adapters(host))} adapted layers are of rank 0, so there is no adapter to write: the model is "
            "its base. Train before exporting (a gain that starts at 0 has no component yet), or raise the budget."
        )
    return targets


def all_targets(host: nn.Module) -> list[Target]:
    """The modules that PEFT would put LoRA on, whatever their ranks: no mask is read, so it works without data.

    Raises:
        TypeError: an adapter, or the place where it is, cannot be expressed in PEFT's LoRA format.
    """
    found = adapters(host)
    places = _attention_places(host)
    shared = _shared(host)
    paired: dict[str, dict[str, Part]] = {}
    for name, adapter in found.items():
        if not isinstance(adapter, LowRankUpdate):
            raise TypeError(
                f"layer {name!r}: {type(adapter).__name__} cannot be expressed in PEFT's LoRA format, which holds a "
                "low-rank update of a weight. " + ("Export the merged model instead." if adapter.mergeable else "")
            )
        if odd := _not_by_peft(adapter.base):
            raise TypeError(
                f"layer {name!r} is a convolution with {odd}, and PEFT computes something else on it. Export the "
                "merged model instead, or leave the layer out of the targets."
            )
        attention, role = places.get(id(adapter), (None, ""))
        for module in (adapter, attention):
            if module is not None and id(module) in shared:
                raise TypeError(
                    f"layer {name!r} is shared by several parents ({', '.join(shared[id(module)])}), and PEFT would "
                    "adapt it in only one of them. Export the merged model instead."
                )
        shape = adapter.B.shape[0], adapter.A.shape[1]
        if attention is None:
            paired[name] = {"": Part(PREFIX + name, shape, adapter)}
            continue
        if adapter.lengths() is not None:
            raise TypeError(
                f"layer {name!r}: {type(adapter).__name__} trains the lengths of a weight's rows, which PEFT does not "
                "know on a MultiheadAttention. Export the merged model instead."
            )
        path = name.rpartition(".")[0]
        if not attention._qkv_same_embed_dim or not path:
            raise TypeError(
                f"layer {name!r}: PEFT adapts a MultiheadAttention only as a part of a model and with query, key and "
                "value of one size. Export the merged model instead."
            )
        pair = paired.setdefault(path, _empty(path, attention.embed_dim))
        pair[role] = Part(pair[role].key, shape, adapter)
    targets = [Target(path, tuple(parts.values())) for path, parts in paired.items()]
    several = next((target.path for target in targets if len(target.parts) > 1), None)
    if several is not None and has_lengths(targets):
        raise TypeError(
            f"layer {several!r} is a MultiheadAttention, and other layers train the lengths of their weights' rows: "
            "PEFT has such lengths in all layers of an adapter or in none, and does not know them on an attention. "
            "Export the merged model instead."
        )
    return targets


def has_lengths(targets: Iterable[Target]) -> bool:
    """Whether some layer has lengths of its own. PEFT's switch is for a whole adapter, so then all get some."""
    return any(part.has_lengths for target in targets for part in target.parts)


def idle(host: nn.Module, ranks: Mapping[str, int]) -> tuple[str, ...]:
    """Layers that act as their base: no component is open, and there is nothing else."""
    more = {name for name, adapter in adapters(host).items() if adapter.lengths() is not None}
    return tuple(name for name, rank in ranks.items() if not rank and name not in more)


def _not_by_peft(layer: nn.Module) -> str | None:
    """What of a convolution PEFT, up to 0.21, leaves out when it moves A's kernels over the input; ``None`` if nothing.

    Of groups it knows only in B: its A spans the channels of all groups.
    """
    if not is_convolution(layer):
        return None
    base: Any = layer
    if base.groups != 1:
        return f"groups={base.groups}"
    if any(step != 1 and edge != 1 for step, edge in zip(base.dilation, base.kernel_size, strict=True)):
        return f"dilation={base.dilation}"
    # Nothing is padded by the kernel 1: then the mode does not matter.
    padded = any(base._reversed_padding_repeated_twice)
    return f"padding_mode={base.padding_mode!r}" if base.padding_mode != "zeros" and padded else None


def _empty(path: str, width: int) -> dict[str, Part]:
    """An attention's two projections before any adapter is seen; PEFT gives both the same rank and scale."""
    inward = Part(PREFIX + path, (3 * width, width), None)
    return {"in": inward, "out": Part(f"{PREFIX}{path}.base_layer.out_proj", (width, width), None)}


def _attention_places(host: nn.Module) -> dict[int, tuple[nn.MultiheadAttention, str]]:
    places: dict[int, tuple[nn.MultiheadAttention, str]] = {}
    for module in host.modules():
        if isinstance(module, nn.MultiheadAttention):
            places[id(module.out_proj)] = (module, "out")
            if isinstance(module, AdaptedAttention):
                places[id(module.in_proj)] = (module, "in")
    return places


def _shared(host: nn.Module) -> dict[int, list[str]]:
    """Modules that more than one parent holds, with the names that they have there."""
    held: dict[int, list[str]] = {}
    for path, parent in host.named_modules():
        for name, child in parent._modules.items():
            if child is not None:
                held.setdefault(id(child), []).append(clean_name(f"{path}.{name}" if path else name))
    return {key: names for key, names in held.items() if len(names) > 1}
