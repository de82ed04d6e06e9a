"""What an adapter-only checkpoint holds beside Lightning's own entries, how it is checked, and how it is loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from reprlib import repr as shortened
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attention import has_in_proj
from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.archive import AdapterFileError as AdapterFileError
from lightning_peft.archive import check_archive, reading
from lightning_peft.archive import unreadable as unreadable
from lightning_peft.export import own_random
from lightning_peft.fingerprint import check_base, fingerprint
from lightning_peft.head_modules import HeadModule, head_modules, replace_head
from lightning_peft.rank.budget import WHOLE, RankBudget, clean_name, layer_name, whole
from lightning_peft.surgery.injection import install
from lightning_peft.surgery.layers import adaptable, adapters, is_flattened, trained
from lightning_peft.surgery.removal import replace
from lightning_peft.validation import (
    CUT,
    adapter_class,
    check_arguments,
    check_plain,
    check_ranks,
    check_sizes,
    check_structure,
    check_tensors,
    imported_class,
)

ENTRY = "lightning_peft"
"""The key of our entry in a checkpoint."""
TERMS = "peft_terms"
"""The child of a LightningModule that holds its terms."""
VERSION = 1
# Floating-point numbers are converted to the model's precision; no other type is converted.
_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


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


def check(
    module: nn.Module,
    checkpoint: Mapping[str, Any],
    source: str,
    base: Mapping[str, Tensor] | None = None,
    was_cut: bool = False,
) -> None:
    """Check that a checkpoint was made for this module, which has its adapters by now.

    Args:
        module: the module that will load it.
        checkpoint: what was read.
        source: what to call it.
        base: the module's :func:`fingerprint`, where that was taken before.
        was_cut: whether the module's adapters were cut by an earlier fit, so that what was made beside them since has
            other sizes than the file's.

    Raises:
        AdapterFileError: it is of another base model or other adapters, or keys are missing or of another shape.
    """
    entry, state = checkpoint[ENTRY], checkpoint["state_dict"]
    here = recipe(module)
    if here["adapters"] != entry["recipe"]["adapters"]:
        raise AdapterFileError(
            f"{source} holds other adapters than this model has: {_difference(entry['recipe'], here)}."
        )
    if here.get("heads", []) != entry["recipe"].get("heads", []):
        raise AdapterFileError(
            f"{source} has {_heads(entry['recipe'])}, and this model {_heads(here)}: give the term that puts it in "
            "the settings that it was trained with."
        )
    saved = entry.get("derived", {})
    for name, derived in digests(module).items():
        if saved.get(name) != derived:
            raise AdapterFileError(
                f"{source} was trained with other constants at {name!r} than this model derives from seed and key: "
                f"digest {saved.get(name)}, here {derived}. It was written by a version that draws them otherwise, or "
                "was changed; use that version, or another copy."
            )
    check_base(fingerprint(module) if base is None else base, entry["base"], source)
    ours = {key: value for key, value in adapter_state_dict(module).items() if isinstance(value, Tensor)}
    missing = sorted(ours.keys() - state.keys())
    odd = missing or [key for key in sorted(ours) if ours[key].shape != state[key].shape]
    if was_cut and odd:
        raise AdapterFileError(
            f"{source} does not fit {odd[0]!r}, which was made for adapters that an earlier fit of this model object "
            "has cut. Build the model anew, and resume on that."
        )
    if missing:
        raise AdapterFileError(
            f"{source} lacks {missing[0]!r}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}, which this "
            "model trains: it was saved with fewer trainable parts (`train`, terms) than the model has now."
        )
    for key in sorted(ours):
        if ours[key].shape != state[key].shape:
            raise AdapterFileError(
                f"{source}: {key!r} has shape {tuple(state[key].shape)}, and {tuple(ours[key].shape)} in this model."
            )
        if not {ours[key].dtype, state[key].dtype} <= _FLOATING and ours[key].dtype != state[key].dtype:
            raise AdapterFileError(
                f"{source}: {key!r} is of dtype {state[key].dtype}, and {ours[key].dtype} in this model."
            )
    check_ranks(entry, source)


def check_entry(checkpoint: Mapping[str, Any], source: str) -> None:
    """Check a checkpoint by itself: that it is ours, of a version that we read, and unchanged since it was written.

    Raises:
        AdapterFileError: it is not; or its entry or its tensors are not of the kinds that we write.
    """
    entry, state = checkpoint.get(ENTRY), checkpoint.get("state_dict")
    if not isinstance(entry, dict) or not isinstance(state, dict):
        raise AdapterFileError(
            f"{source} is no adapter checkpoint: it has no entry {ENTRY!r}. Train with AdapterCheckpoint."
        )
    if type(entry.get("version")) is not int or entry["version"] != VERSION:
        raise AdapterFileError(
            f"{source} is of format version {shortened(entry.get('version'))}; this release reads {VERSION}."
        )
    base = entry.get("base")
    check_tensors(state, base if isinstance(base, dict) else {}, source)
    check_plain({key: value for key, value in entry.items() if key != "base"}, source)
    if not isinstance(base, dict) or digest(state, entry) != entry.get("digest"):
        raise AdapterFileError(
            f"{source} was changed after it was written: its contents do not match their digest. Use another copy."
        )
    check_structure(entry, source)


def read(path: str | PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint: tensors only, never pickled code.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: it is cut, damaged, holds more than tensors and plain values, or is smaller than it says.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {str(path)!r}.")
    check_archive(path)
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, dict):
        raise AdapterFileError(f"{path} holds a {type(checkpoint).__name__}, not a checkpoint.")
    return checkpoint


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
    undo = None if adapters(module) else _take_over(module, entry["recipe"], source)
    try:
        return _load(module, checkpoint, source)
    except BaseException:
        if undo is not None:
            undo()
        raise


def _take_over(module: nn.Module, recipe: Mapping[str, Any], source: str) -> Callable[[], None] | None:
    """Have the adapters that live in another library's layers, which are there; ``None`` if the file has none such."""
    if not recipe["adapters"]:
        return None
    kind = adapter_class(recipe["adapters"][0]["class"], source)
    return kind.take_over(module, recipe, source) if kind.hosted else None


def _load(module: nn.Module, checkpoint: Mapping[str, Any], source: str) -> nn.Module:
    entry = checkpoint[ENTRY]
    layers = adaptable(module)
    prefix = _prefix(entry["recipe"], {*layers, *adapters(module)}, source)
    if prefix:
        checkpoint = _without_prefix(checkpoint, prefix)
        entry = checkpoint[ENTRY]
    if not adapters(module):
        # The start of the adapters is overwritten at once: it must not use up the caller's random numbers.
        with own_random(module), _heads_put_in(module, checkpoint, source):
            plan = _plan(module, adaptable(module), checkpoint, source)
            known = {name for name, _ in module.named_parameters()}
            wanted = {name for name in entry["recipe"]["trained"] if name in known}
            install(module, plan, lambda _: wanted, lambda: check(module, checkpoint, source))
    else:
        check(module, checkpoint, source)
    module.load_state_dict({key: checkpoint["state_dict"][key] for key in adapter_state_dict(module)}, strict=False)
    if CUT in entry:
        module.__dict__[WHOLE] = entry[CUT]
    return module


@contextmanager
def _heads_put_in(module: nn.Module, checkpoint: Mapping[str, Any], source: str) -> Iterator[None]:
    """Put the heads of a checked entry in, unless they are there; back to what was if what follows fails."""
    linear = {clean_name(path): child for path, child in module.named_modules() if type(child) is nn.Linear}
    wanted = checkpoint[ENTRY]["recipe"].get("heads", [])
    plan: dict[str, Callable[[nn.Linear], HeadModule]] = {}
    for each in wanted if not head_modules(module) else ():
        name = each["path"]
        kind = imported_class(each["class"], HeadModule, "head", source)  # type: ignore[type-abstract]
        if name not in linear:
            raise AdapterFileError(f"{source} has a head in the place of {name!r}, no linear layer of this model.")
        check_arguments(kind, each["arguments"], source)
        check_sizes(kind, each["arguments"], linear[name], name, checkpoint["state_dict"], source)
        plan[name] = partial(kind, **each["arguments"])
    put = [(replace_head(module, name, build), linear[name]) for name, build in plan.items()]
    try:
        yield
    except BaseException:
        for head, layer in put:
            replace(module, {id(head): layer})
        raise


def _heads(recipe: Mapping[str, Any]) -> str:
    found = [f"{each['class'].rpartition(':')[2]} at {each['path']!r}" for each in recipe.get("heads", [])]
    arguments = [", ".join(f"{k}={v!r}" for k, v in each["arguments"].items()) for each in recipe.get("heads", [])]
    shown = [f"{each} ({those})" for each, those in zip(found, arguments, strict=True)]
    return "the head " + ", ".join(shown) if shown else "a plain head"


def _plan(
    module: nn.Module, layers: Mapping[str, nn.Module], checkpoint: Mapping[str, Any], source: str
) -> dict[str, tuple[nn.Module, AdapterFactory]]:
    """What a checked entry asks for, wholly checked against the module and the file before anything is built."""
    paths = {id(child): path for path, child in module.named_modules()}
    plan: dict[str, tuple[nn.Module, AdapterFactory]] = {}
    for group in checkpoint[ENTRY]["recipe"]["adapters"]:
        kind, arguments = adapter_class(group["class"], source), group["arguments"]
        if kind.hosted:
            raise AdapterFileError(f"{source} mixes {kind.__name__} with adapters of other kinds; use another copy.")
        check_arguments(kind, arguments, source)
        for name in group["layers"]:
            if name not in layers:
                raise AdapterFileError(f"{source} has an adapter for {name!r}, a layer that this model does not have.")
            layer = layers[name]
            path = paths[id(layer)] + (".in_proj" if has_in_proj(layer) else "")
            check_sizes(kind, arguments, layer, path, checkpoint["state_dict"], source)
            plan[name] = (layer, partial(kind.unfilled, **arguments))
    return plan


def _difference(saved: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    def layers(of: Mapping[str, Any]) -> dict[str, str]:
        found: dict[str, str] = {}
        for group in of["adapters"]:
            arguments = ", ".join(f"{k}={v!r}" for k, v in group["arguments"].items())
            found |= dict.fromkeys(group["layers"], f"{group['class'].rpartition(':')[2]}({arguments})")
        return found

    old, new = layers(saved), layers(here)
    for name in [*new, *old]:
        if old.get(name) != new.get(name):
            return f"at {name!r} it has {old.get(name, 'none')}, the model {new.get(name, 'none')}"
    return "the same ones in another order"


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
    heads = [
        each | {"path": each["path"][len(prefix) :]}
        for each in entry["recipe"].get("heads", [])
        if each["path"].startswith(prefix)
    ]
    recipe = {"adapters": groups, "trained": trained} | ({"heads": heads} if heads else {})
    entry |= {"recipe": recipe, "base": cut(entry["base"])}
    entry |= {field: cut(entry[field]) for field in ("ranks", "costs", "derived", CUT) if field in entry}
    return {ENTRY: entry, "state_dict": cut(checkpoint["state_dict"])}
