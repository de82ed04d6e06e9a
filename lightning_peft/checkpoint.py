"""What an adapter-only checkpoint holds beside Lightning's own entries, how it is checked, and how it is loaded."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.distributed import picked
from lightning_peft.export import own_random
from lightning_peft.rank.budget import RankBudget, clean_name
from lightning_peft.surgery import adaptable, adapters, eject, install, is_flattened, trained

ENTRY = "lightning_peft"
"""The key of our entry in a checkpoint."""
VERSION = 1
_SAMPLES = 8


class AdapterFileError(RuntimeError):
    """A file does not hold what it should, or not for this model."""


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(item) for key, item in value.items())
    if isinstance(value, list | tuple):
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
    own = {id(p) for adapter in adapters(module).values() for _, p in adapter.own_parameters()}
    return {
        "adapters": groups,
        "trained": sorted(clean_name(n) for n, p in trained(module).items() if id(p) not in own),
    }


def fingerprint(module: nn.Module) -> dict[str, Tensor]:
    """A few values of every parameter of the frozen base, by name: enough to tell one base model from another."""
    changed = {id(p) for p in trained(module).values()}
    base = {clean_name(n): p for n, p in module.named_parameters() if id(p) not in changed and p.numel()}
    picks = {n: torch.linspace(0, p.numel() - 1, _SAMPLES, dtype=torch.float64).long() for n, p in base.items()}
    return picked(base, picks)


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
        "costs": {name: site.gate.cost for name, site in budget.items()},
        "base": fingerprint(module) if base is None else dict(base),
    }
    return entry | {"digest": digest(state, entry)}


def check(
    module: nn.Module, checkpoint: Mapping[str, Any], source: str, base: Mapping[str, Tensor] | None = None
) -> None:
    """Check that a checkpoint was made for this module, which has its adapters by now.

    Args:
        module: the module that will load it.
        checkpoint: what was read.
        source: what to call it.
        base: the module's :func:`fingerprint`, where that was taken before.

    Raises:
        AdapterFileError: it is of another base model or other adapters, or keys are missing or of another shape.
    """
    entry, state = checkpoint[ENTRY], checkpoint["state_dict"]
    here = recipe(module)
    if here["adapters"] != entry["recipe"]["adapters"]:
        raise AdapterFileError(
            f"{source} holds other adapters than this model has: {_difference(entry['recipe'], here)}."
        )
    _check_base(fingerprint(module) if base is None else base, entry["base"], source)
    shapes = {key: value.shape for key, value in adapter_state_dict(module).items() if isinstance(value, Tensor)}
    missing = sorted(shapes.keys() - state.keys())
    if missing:
        raise AdapterFileError(
            f"{source} lacks {missing[0]!r}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which this "
            "model trains: it was saved with fewer trainable parts (`train`, terms) than the model has now."
        )
    for key in sorted(shapes):
        if shapes[key] != state[key].shape:
            raise AdapterFileError(
                f"{source}: {key!r} has shape {tuple(state[key].shape)}, and {tuple(shapes[key])} in this model."
            )


def check_entry(checkpoint: Mapping[str, Any], source: str) -> None:
    """Check a checkpoint by itself: that it is ours, of a version that we read, and unchanged since it was written."""
    entry = checkpoint.get(ENTRY)
    if not isinstance(entry, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise AdapterFileError(
            f"{source} is no adapter checkpoint: it has no entry {ENTRY!r}. Train with AdapterCheckpoint."
        )
    if entry.get("version") != VERSION:
        raise AdapterFileError(f"{source} is of format version {entry.get('version')}; this release reads {VERSION}.")
    try:
        whole = digest(checkpoint["state_dict"], entry) == entry["digest"]
    except (AttributeError, KeyError, TypeError, ValueError):  # not even of the kinds that we write
        whole = False
    if not whole:
        raise AdapterFileError(
            f"{source} was changed after it was written: its contents do not match their digest. Use another copy."
        )


def read(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint: tensors only, never pickled code.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: it is cut, damaged, or holds more than tensors and plain values.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what torch raises on a damaged file is not documented
        raise AdapterFileError(unreadable(path, error)) from error
    if not isinstance(checkpoint, dict):
        raise AdapterFileError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint.")
    return checkpoint


def unreadable(path: object, error: BaseException) -> str:
    """The sentence for a file that torch cannot read."""
    first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{path} cannot be read: it is cut short, damaged, or holds more than tensors ({first}). Use another copy."


def load(module: nn.Module, path: str | PathLike[str]) -> nn.Module:
    """Load an adapter checkpoint into a plain module, in a bare script: inject from its recipe, then load strictly.

    Args:
        module: the LightningModule, or the model inside it, that the checkpoint was trained on; without adapters, or
            with the very same ones. An adapter class that is not ours must have been imported.
        path: a checkpoint that AdapterCheckpoint has filtered.

    Returns:
        The module, adapters in place and weights loaded.

    Raises:
        AdapterFileError: the file is damaged, changed, or of another base model.
        FileNotFoundError: there is no such file.
    """
    checkpoint, source = read(path), str(path)
    check_entry(checkpoint, source)
    entry = checkpoint[ENTRY]
    layers = adaptable(module)
    prefix = _prefix(entry["recipe"], {*layers, *adapters(module)}, source)
    if prefix:
        checkpoint = _without_prefix(checkpoint, prefix)
        entry = checkpoint[ENTRY]
    if not adapters(module):
        plan = {}
        for group in entry["recipe"]["adapters"]:
            factory = _factory(group["class"], group["arguments"], source)
            for name in group["layers"]:
                if name not in layers:
                    raise AdapterFileError(
                        f"{source} has an adapter for {name!r}, a layer that this model does not have."
                    )
                plan[name] = (layers[name], factory)
        known = {name for name, _ in module.named_parameters()}
        # The start of the adapters is overwritten at once: it must not use up the caller's random numbers.
        with own_random(module):
            install(module, plan, {name for name in entry["recipe"]["trained"] if name in known})
        try:
            check(module, checkpoint, source)
        except AdapterFileError:
            eject(module)
            raise
    else:
        check(module, checkpoint, source)
    module.load_state_dict({key: checkpoint["state_dict"][key] for key in adapter_state_dict(module)}, strict=False)
    return module


def _check_base(here: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: str) -> None:
    """Compare samples of the base's values: equal, after rounding to the narrower of the two types."""
    for name in sorted({*here, *saved}):
        if name not in here or name not in saved:
            fault = f"{name!r} is not in {'the file' if name in here else 'this model, or is trained here'}"
        elif not _same(here[name], saved[name]):
            fault = f"{name!r} differs"
        else:
            continue
        raise AdapterFileError(
            f"{source} was made for another base model: {fault}. Build the model with the weights that the adapters "
            "were trained on."
        )


def _same(a: Tensor, b: Tensor) -> bool:
    narrow = min(a.dtype, b.dtype, key=lambda dtype: dtype.itemsize)
    return a.shape == b.shape and torch.equal(a.to(narrow).nan_to_num(), b.to(narrow).nan_to_num())


def _difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    def layers(of: Mapping[str, Any]) -> dict[str, str]:
        return {
            name: f"{group['class'].rpartition(':')[2]}({', '.join(f'{k}={v}' for k, v in group['arguments'].items())})"
            for group in of["adapters"]
            for name in group["layers"]
        }

    old, new = layers(saved), layers(here)
    for name in [*new, *old]:
        if old.get(name) != new.get(name):
            return f"at {name!r} it has {old.get(name, 'none')}, the model {new.get(name, 'none')}"
    return "the same ones in another order"


def _factory(path: str, arguments: Mapping[str, Any], source: str) -> AdapterFactory:
    """The adapter class that a recipe names, which must have been imported: a file never makes us import anything."""
    module_name, _, qualname = path.partition(":")
    found: Any = sys.modules.get(module_name)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    if not (isinstance(found, type) and issubclass(found, Adapter)):
        raise AdapterFileError(
            f"{source} was made with the adapter class {path!r}, which is not imported; import it before loading."
        )
    return partial(found, **arguments)


def _prefix(saved: Mapping[str, Any], known: set[str], source: str) -> str:
    """What the saved names have in front of the names in this module: "model." where it is the model inside."""
    names = [name for group in saved["adapters"] for name in group["layers"]]
    if not names:
        raise AdapterFileError(f"{source} holds no adapter.")
    parts = names[0].split(".")
    for start in range(len(parts)):
        prefix = ".".join([*parts[:start], ""]) if start else ""
        if all(name.startswith(prefix) and name[len(prefix) :] in known for name in names):
            return prefix
    raise AdapterFileError(f"{source} has an adapter for {names[0]!r}, a layer that this model does not have.")


def _without_prefix(checkpoint: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The part of a checkpoint below `prefix`, with its names shortened."""

    def cut(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {name[len(prefix) :]: value for name, value in mapping.items() if name.startswith(prefix)}

    entry = dict(checkpoint[ENTRY])
    groups = [g | {"layers": [n[len(prefix) :] for n in g["layers"]]} for g in entry["recipe"]["adapters"]]
    trained = [name[len(prefix) :] for name in entry["recipe"]["trained"] if name.startswith(prefix)]
    entry |= {"recipe": {"adapters": groups, "trained": trained}, "base": cut(entry["base"])}
    return {ENTRY: entry, "state_dict": cut(checkpoint["state_dict"])}
