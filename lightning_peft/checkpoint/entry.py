"""What an adapter-only checkpoint holds beside Lightning's own entries: the entry that says how to inject again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.fingerprint import fingerprint
from lightning_peft.head_modules import head_modules
from lightning_peft.rank.budget import RankBudget, clean_name, layer_name, whole
from lightning_peft.surgery.layers import adapters, is_flattened, trained
from lightning_peft.validation import CUT

ENTRY = "lightning_peft"
"""The key of our entry in a checkpoint."""
TERMS = "peft_terms"
"""The child of a LightningModule that holds its terms."""
VERSION = 1
"""Of the entry's format: what is written, and what is read."""


@runtime_checkable
class Described(Protocol):
    """A part of a term that says in plain values how it is built again, and so is in a checkpoint's recipe."""

    def arguments(self) -> dict[str, Any]: ...


def _is_plain(value: Any) -> bool:
    # Exact types, as `check_plain` wants them when the file is read: a subclass would be saved and never load.
    if type(value) is dict:
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def adapter_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The module's state dict without its frozen base: adapters, masks, terms, trained head, buffers."""
    mine = trained(module)
    if any(map(is_flattened, module.parameters())):
        # FSDP1 would gather the whole base to say what its state is.
        return {clean_name(n): v.detach() for n, v in [*mine.items(), *_persistent_buffers(module)]}
    frozen = {name for name, _ in module.named_parameters(remove_duplicate=False)} - mine.keys()
    return {key: value for key, value in module.state_dict().items() if key not in frozen}


def _persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, child in module.named_modules(remove_duplicate=False):
        for name, buffer in child.named_buffers(recurse=False):
            if name not in child._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, buffer


def dense(value: Tensor) -> Tensor:
    """The tensor as a file holds it: an expanded one, or one that is conjugated when it is read, is written out."""
    if type(value) is not Tensor or value.layout != torch.strided:
        return value
    value = value.resolve_conj().resolve_neg()
    expanded = value.numel() * value.element_size() > value.untyped_storage().nbytes()
    return value.contiguous() if expanded else value


def recipe(module: nn.Module) -> dict[str, Any]:
    """The data needed to inject again: per kind of adapter its class and arguments and the layers that have it.

    Taken from the adapters that are there, not from the patterns that once chose them: it names what is, whatever was
    cut since.
    """
    groups: list[dict[str, Any]] = []
    for name, adapter in adapters(module).items():
        for argument, value in adapter.arguments().items():
            if not _is_plain(value):
                raise TypeError(
                    f"{type(adapter).__name__} at {name!r} has {argument}={value!r} of type {type(value).__name__}; a "
                    "checkpoint holds numbers, strings, lists and dictionaries: keep the argument as one of these."
                )
        kind = f"{type(adapter).__module__}:{type(adapter).__qualname__}"
        entry = {"class": kind, "arguments": adapter.arguments()}
        group = next((g for g in groups if {k: g[k] for k in entry} == entry), None)
        if group is None:
            groups.append(entry | {"layers": [name]})
        else:
            group["layers"].append(name)
    beside = [
        {
            "class": f"{type(child).__module__}:{type(child).__qualname__}",
            "arguments": child.arguments(),
            "path": clean_name(path),
        }
        for path, child in module.named_modules()
        if path.startswith(f"{TERMS}.") and isinstance(child, Described)
    ]
    heads = [
        {
            "class": f"{type(head).__module__}:{type(head).__qualname__}",
            "arguments": head.arguments(),
            "path": name,
        }
        for name, head in head_modules(module).items()
    ]
    own = {id(p) for adapter in adapters(module).values() for _, p in adapter.own_parameters()}
    paths = {path for path, child in module.named_modules() if isinstance(child, Adapter)}
    return {
        "adapters": groups,
        "trained": sorted(layer_name(n, paths) for n, p in trained(module).items() if id(p) not in own),
        **({"beside": beside} if beside else {}),
        **({"heads": heads} if heads else {}),
    }


def digest(state: Mapping[str, Tensor], entry: Mapping[str, Any]) -> str:
    """SHA-256 of all tensors (names, types, shapes, bytes) and of the rest of the entry. No signature."""
    total = hashlib.sha256()
    for tensors in (state, entry["base"]):
        for name in sorted(tensors):
            value = tensors[name].detach().cpu().contiguous()
            total.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
            total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    rest = {key: value for key, value in entry.items() if key not in ("base", "digest")}
    total.update(json.dumps(rest, sort_keys=True).encode())
    return total.hexdigest()


def describe(
    module: nn.Module, state: Mapping[str, Tensor], base: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """Our entry for a checkpoint that holds `state`: tensors, strings and numbers only.

    Args:
        module: has adapters inside.
        state: what the checkpoint holds of it.
        base: its :func:`fingerprint`, where that was taken before.

    Raises:
        TypeError: an adapter's argument is not a plain value, so that a file could not hold it.
    """
    budget = RankBudget.of(module)
    entry = {
        "version": VERSION,
        "recipe": recipe(module),
        "ranks": budget.ranks(),
        "costs": {name: extent.cost for name, extent in budget.extents.items()},
        "base": fingerprint(module) if base is None else dict(base),
    }
    if before := whole(module):
        entry[CUT] = {name: dict(record) for name, record in before.items()}
    if derived := digests(module):
        entry["derived"] = derived
    return entry | {"digest": digest(state, entry)}


def digests(module: nn.Module) -> dict[str, str]:
    """Digests of what adapters derive from their arguments and no file holds, by layer."""
    found = {name: adapter.digest() for name, adapter in adapters(module).items()}
    return {name: each for name, each in found.items() if each is not None}
