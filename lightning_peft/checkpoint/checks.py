"""How a checkpoint is checked: by itself, and against the module that is to load it."""

from __future__ import annotations

from collections.abc import Mapping
from reprlib import repr as shortened
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.archive import AdapterFileError
from lightning_peft.checkpoint.entry import ENTRY, VERSION, adapter_state_dict, digest, digests, recipe
from lightning_peft.fingerprint import check_base, fingerprint
from lightning_peft.validation import check_plain, check_ranks, check_structure, check_tensors

# Floating-point numbers are converted to the model's precision; no other type is converted.
_FLOATING = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


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


def _heads(recipe: Mapping[str, Any]) -> str:
    found = [f"{each['class'].rpartition(':')[2]} at {each['path']!r}" for each in recipe.get("heads", [])]
    arguments = [", ".join(f"{k}={v!r}" for k, v in each["arguments"].items()) for each in recipe.get("heads", [])]
    shown = [f"{each} ({those})" for each, those in zip(found, arguments, strict=True)]
    return "the head " + ", ".join(shown) if shown else "a plain head"


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
