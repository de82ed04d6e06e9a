"""Leaving adapters behind: `merge` writes them into plain layers, `compact` cuts them to their open components.

Both work in place and keep the outputs; to undo adapters instead, see :func:`lightning_peft.surgery.eject`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attention import AdaptedAttention
from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.layers import stored
from lightning_peft.distributed import is_shard
from lightning_peft.head_modules import fold_heads
from lightning_peft.rank.budget import clean_name
from lightning_peft.surgery.layers import adapters, is_flattened
from lightning_peft.surgery.removal import refuse_hosted, replace, take_out

A = TypeVar("A", bound=Adapter)


@dataclass(frozen=True)
class Merged:
    """What :func:`merge` did.

    Attributes:
        layers: names of the layers that got a new weight.
        untied: groups of parameters that were one parameter and are not any more, because only some were adapted.
    """

    layers: tuple[str, ...]
    untied: tuple[tuple[str, ...], ...]

    def __str__(self) -> str:
        lines = [f"Merged the adapters of {len(self.layers)} layers."]
        lines += [f"No longer tied: {', '.join(names)}." for names in self.untied]
        return "\n".join(lines)


def merge(module: nn.Module) -> Merged:
    """Write every adapter's effective weight into its plain base layer and take the adapters out, in place.

        W <- W + scaling * B diag(value) A,     computed in float32 or wider, rounded once to W's dtype

    A head that is more in training than outside of it, such as a bottleneck, is left as the plain layers that it is
    outside, see :func:`~lightning_peft.head_modules.fold_heads`.

    Every parameter requires a gradient as it did before injection. The merged weight is a new parameter, so a parameter
    that other modules share is not changed behind their back: it is no longer shared, and a warning says so.

    Args:
        module: has adapters inside; is not itself one.

    Returns:
        What was done; print it.

    Raises:
        ValueError: there is no adapter.
        TypeError: an adapter is more than a change of its layer's weight, so there is nothing to write.
        RuntimeError: the base is split over processes.
    """
    found = _found(module, "merge")
    require_whole(module, "merge")
    refused = [f"{name!r} ({type(adapter).__name__})" for name, adapter in found.items() if not adapter.mergeable]
    if refused:
        raise TypeError(
            f"merge cannot write these adapters into a weight: {', '.join(refused)}. They act otherwise than through a "
            "layer's weight; eject them, or keep the module as it is. Nothing was changed."
        )
    # An attention's in_proj is a layer only while it is adapted: the weight goes back to the attention itself.
    attentions = {id(child.in_proj): child for child in module.modules() if isinstance(child, AdaptedAttention)}
    take_out(module, {id(adapter): adapter.base for adapter in found.values()})
    before = dict(module.named_parameters(remove_duplicate=False))
    for adapter in found.values():
        owner, attribute = attentions.get(id(adapter), adapter.base), "weight"
        if isinstance(owner, nn.MultiheadAttention):
            attribute = "in_proj_weight"
        wanted = getattr(owner, attribute).requires_grad
        setattr(owner, attribute, nn.Parameter(merged_weight(adapter), requires_grad=wanted))
    untied = _untied(before, dict(module.named_parameters(remove_duplicate=False)))
    fold_heads(module)
    for names in untied:
        warnings.warn(
            f"{', '.join(names)} were one parameter and no longer are: the merged weight is one layer's alone. If the "
            "model ties them again when it is saved or loaded, turn that off (transformers: "
            "model.config.tie_word_embeddings = False).",
            stacklevel=2,
        )
    return Merged(tuple(found), untied)


def compact(module: nn.Module) -> dict[str, int]:
    """Cut every adapter to its open components, in place; outputs stay equal and what is left stays trainable.

    A layer without an open component gets its base back, frozen as it was. New parameters take the place of old ones:
    build the optimizer anew afterwards. Eject still restores the base, as long as an adapter is left.

    Args:
        module: has adapters inside; is not itself one.

    Returns:
        The rank of every layer that was adapted, 0 for those that no longer are.

    Raises:
        ValueError: there is no adapter.
        TypeError: an adapter's components cannot be cut out; nothing was changed.
    """
    new: dict[int, nn.Module] = {}
    ranks: dict[str, int] = {}
    found = _found(module, "compact")
    # Building an adapter draws its start, which is overwritten here: the user's random stream should not notice.
    with own_random(module):
        for name, adapter in found.items():
            if adapter.gate is None:
                raise TypeError(f"layer {name!r}: {type(adapter).__name__} has no gate, so there is nothing to cut.")
            ranks[name] = int(adapter.gate.open().sum())
            if ranks[name] == len(adapter.gate):
                continue
            small = smaller(name, adapter)
            new[id(adapter)] = adapter.base if small is None else small
    replace(module, new)
    return ranks


def require_whole(module: nn.Module, verb: str) -> None:
    """Refuse a module whose base FSDP has split over processes.

    Raises:
        RuntimeError: it has; with what to do instead.
    """
    split = next((n for n, p in module.named_parameters() if is_shard(p) or is_flattened(p)), None)
    if split is not None:
        raise RuntimeError(
            f"{verb} needs the base in one piece, and {clean_name(split)!r} is split over processes. Save a checkpoint "
            f"(trainer.save_checkpoint), and in one process call load(module, path) on a fresh module, then {verb}."
        )


def smaller(name: str, adapter: Adapter, keep: Tensor | None = None) -> Adapter | None:
    """`adapter.compacted(keep)`, trainable where the adapter was; an error names the layer."""
    try:
        with trainability_kept(adapter.base):
            small = adapter.compacted() if keep is None else adapter.compacted(keep)
    except TypeError as error:
        raise TypeError(f"layer {name!r}: {error}") from error
    if small is not None:
        wanted = {part: parameter.requires_grad for part, parameter in adapter.own_parameters()}
        for part, parameter in small.own_parameters():
            parameter.requires_grad_(wanted.get(part, True))
    return small


@torch.no_grad()
def merged_weight(adapter: Adapter) -> Tensor:
    """An adapter's effective weight as its base would store it: computed in float32 or wider, rounded once."""
    weight: Tensor = adapter.base.weight  # type: ignore[assignment]  # a module's attribute, a tensor for every base
    return stored(adapter.base, widened(adapter).effective_weight()).to(weight.dtype, copy=True).contiguous()


def widened(adapter: A) -> A:
    """The adapter, or a float32 copy of it if its own parameters were cast to something narrower."""
    narrow = any(p.is_floating_point() and p.element_size() < 4 for _, p in adapter.own_parameters())
    return copy.deepcopy(adapter).float() if narrow else adapter


@contextmanager
def trainability_kept(base: nn.Module) -> Iterator[None]:
    """Build another adapter around a base: its constructor freezes all, and a head inside is to stay trainable."""
    before = [(p, p.requires_grad) for p in base.parameters()]
    try:
        yield
    finally:
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)


@contextmanager
def own_random(module: nn.Module) -> Iterator[None]:
    """Put the global random generators back at the end, those of the module's devices included."""
    devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(index for index in devices if index is not None)):
        yield


def _found(module: nn.Module, verb: str) -> dict[str, Adapter]:
    if isinstance(module, Adapter):
        raise ValueError(
            f"{verb} replaces adapters inside a module and got a single {type(module).__name__}; call it on the module "
            "that holds it."
        )
    found = adapters(module)
    if not found:
        raise ValueError(f"{verb} found no adapter in {type(module).__name__}; inject puts them in.")
    refuse_hosted(module, verb)
    return found


def _untied(before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> tuple[tuple[str, ...], ...]:
    groups: dict[int, list[str]] = {}
    for name, parameter in before.items():
        groups.setdefault(id(parameter), []).append(name)
    split = [names for names in groups.values() if len({id(after[name]) for name in names}) > 1]
    return tuple(tuple(map(clean_name, names)) for names in split)
