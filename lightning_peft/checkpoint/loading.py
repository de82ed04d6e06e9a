"""Read a checkpoint, and load it into a plain module: inject from its recipe, then load strictly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_peft.adapters.attention import has_in_proj
from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.archive import AdapterFileError, check_archive, reading
from lightning_peft.checkpoint.checks import check, check_entry
from lightning_peft.checkpoint.entry import ENTRY, adapter_state_dict
from lightning_peft.export import own_random
from lightning_peft.head_modules import HeadModule, head_modules, replace_head
from lightning_peft.rank.budget import WHOLE, clean_name
from lightning_peft.surgery.injection import install
from lightning_peft.surgery.layers import adaptable, adapters, named, places
from lightning_peft.surgery.removal import replace
from lightning_peft.validation import CUT, adapter_class, check_arguments, check_sizes, imported_class


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
    prefix = _prefix(entry["recipe"], {*adaptable(module), *dict(named(module)), *adapters(module)}, source)
    if prefix:
        checkpoint = _without_prefix(checkpoint, prefix)
        entry = checkpoint[ENTRY]
    if not adapters(module):
        # The start of the adapters is overwritten at once: it must not use up the caller's random numbers.
        with own_random(module), _heads_put_in(module, checkpoint, source):
            plan = _plan(module, checkpoint, source)
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


def _plan(module: nn.Module, checkpoint: Mapping[str, Any], source: str) -> dict[str, tuple[nn.Module, AdapterFactory]]:
    """What a checked entry asks for, wholly checked against the module and the file before anything is built."""
    paths = {id(child): path for path, child in module.named_modules()}
    plan: dict[str, tuple[nn.Module, AdapterFactory]] = {}
    for group in checkpoint[ENTRY]["recipe"]["adapters"]:
        kind, arguments = adapter_class(group["class"], source), group["arguments"]
        if kind.hosted:
            raise AdapterFileError(f"{source} mixes {kind.__name__} with adapters of other kinds; use another copy.")
        check_arguments(kind, arguments, source)
        layers = places(module, kind)
        for name in group["layers"]:
            if name not in layers:
                raise AdapterFileError(f"{source} has an adapter for {name!r}, a layer that this model does not have.")
            layer = layers[name]
            path = paths[id(layer)] + (".in_proj" if has_in_proj(layer) else "")
            check_sizes(kind, arguments, layer, path, checkpoint["state_dict"], source)
            plan[name] = (layer, partial(kind.unfilled, **arguments))
    return plan


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
