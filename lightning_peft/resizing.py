"""Give a module's adapters the sizes that a checkpoint's have, where compaction is all that tells them apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lightning_peft.adapters.attention import AdaptedAttention, expose_in_proj
from lightning_peft.adapters.base import Adapter
from lightning_peft.checkpoint import ENTRY, AdapterFileError, recipe
from lightning_peft.export import own_random, trainability_kept
from lightning_peft.rank.budget import WHOLE, whole
from lightning_peft.surgery.layers import adaptable, adapters
from lightning_peft.surgery.removal import replace
from lightning_peft.validation import CUT, adapter_class, check_arguments, check_sizes

_Kind = tuple[str, Mapping[str, Any]]
"""An adapter as a recipe tells it: its class and its arguments."""


@contextmanager
def resized(module: nn.Module, checkpoint: Mapping[str, Any], source: str) -> Iterator[None]:
    """Resize the adapters to what a checkpoint's entry says, before its weights are copied; undone if the block raises.

    A run that compacts writes checkpoints of two sizes: before and after. Both can be loaded into a module whose
    adapters are new, at full rank, and into one that was compacted already. Adapters that differ in more than what was
    cut out of them (another class, alpha or rank at the start) are left as they are, for `check` to name.

    Args:
        module: has its adapters, at any size.
        checkpoint: what was read, whose entry has been checked by itself.
        source: what to call the checkpoint in errors.

    Raises:
        AdapterFileError: the entry's adapters cannot be built.
    """
    undo = _resize(module, checkpoint, source)
    try:
        yield
    except BaseException:
        undo()
        raise


def _resize(module: nn.Module, checkpoint: Mapping[str, Any], source: str) -> Callable[[], None]:
    """Do it, and return what undoes it."""
    entry = checkpoint[ENTRY]
    saved, here, before = _layers(entry["recipe"]), _layers(recipe(module)), entry.get(CUT, {})
    paths = {id(child): path for path, child in module.named_modules()}
    full = saved | {name: (was["class"], was["arguments"]) for name, was in before.items()}
    full_here = here | {name: (was["class"], was["arguments"]) for name, was in whole(module).items()}
    cut_only = full == full_here and all(kind[0] == full[name][0] for name, kind in saved.items())
    if saved != here and not cut_only:
        return lambda: None
    changed = [name for name in full if saved.get(name) != here.get(name)]
    found = adapters(module)
    holders = {id(m.in_proj): m for m in module.modules() if isinstance(m, AdaptedAttention)}
    new: dict[int, nn.Module] = {}
    back: dict[int, nn.Module] = {}
    bare: list[tuple[AdaptedAttention, Adapter]] = []  # attentions that lose their adapter, and with it their in_proj
    try:
        with own_random(module):  # the start of an adapter is overwritten at once
            for name in changed:
                old = found.get(name)
                base, path = _plain(module, name, paths, source) if old is None else (old.base, paths[id(old)])
                module_here = base if old is None else old
                module_then = base
                if name in saved:
                    module_then = _build(saved[name], base, old, path, checkpoint["state_dict"], source)
                new[id(module_here)], back[id(module_then)] = module_then, module_here
                if old is not None and name not in saved and id(old) in holders:
                    bare.append((holders[id(old)], old))
    except BaseException:
        replace(module, {})  # an attention whose projection was exposed for nothing is plain again
        raise
    replace(module, new)
    # The file's history, also where nothing changes in size: it is what the schedule in the file was made for.
    remembered = [(owner, owner.__dict__.pop(WHOLE)) for owner in module.modules() if WHOLE in owner.__dict__]
    if before:
        module.__dict__[WHOLE] = before

    def undo() -> None:
        module.__dict__.pop(WHOLE, None)
        for owner, record in remembered:
            owner.__dict__[WHOLE] = record
        for attention, adapter in bare:
            expose_in_proj(attention)
            attention.in_proj = adapter
        replace(module, back)

    return undo


def _layers(of: Mapping[str, Any]) -> dict[str, _Kind]:
    return {name: (group["class"], group["arguments"]) for group in of["adapters"] for name in group["layers"]}


def _plain(module: nn.Module, name: str, paths: Mapping[int, str], source: str) -> tuple[nn.Module, str]:
    """The layer whose adapter was cut away, and its path; an attention's input projection is made a layer again."""
    layers = adaptable(module)
    if name not in layers:
        raise AdapterFileError(f"{source} has an adapter for {name!r}, a layer that this model does not have.")
    layer = layers[name]
    path = paths[id(layer)]
    return (expose_in_proj(layer), f"{path}.in_proj") if isinstance(layer, nn.MultiheadAttention) else (layer, path)


def _build(
    kind: _Kind, base: nn.Module, old: Adapter | None, path: str, state: Mapping[str, Tensor], source: str
) -> Adapter:
    """The adapter that a recipe tells, trainable and of the dtype of the one that is there now."""
    found, arguments = adapter_class(kind[0], source), kind[1]
    check_arguments(found, arguments, source)
    check_sizes(found, arguments, base, path, state, source)
    with trainability_kept(base):
        adapter = found(base, **arguments)
    parts = {} if old is None else dict(old.own_parameters())
    for part, parameter in adapter.own_parameters():
        if part in parts:
            parameter.data = parameter.data.to(parts[part])
            parameter.requires_grad_(parts[part].requires_grad)
    return adapter.train(base.training if old is None else old.training)
