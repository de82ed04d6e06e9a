"""Take adapters out again, and put modules in the place of others."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightning_peft.adapters.attention import AdaptedAttention, hide_in_proj
from lightning_peft.rank.budget import WHOLE, clean_name
from lightning_peft.surgery.layers import BEFORE, KEPT, STARTS, adapters


def eject(module: nn.Module) -> None:
    """Take all adapters out again: the very base layers return, bit for bit, and with them what was trainable.

    Raises:
        ValueError: there is no adapter.
        RuntimeError: an adapter has its layer's weight in another form, and the layer has none to return with.
    """
    found = adapters(module)
    refuse_hosted(module, "eject")
    if not found:
        raise ValueError(f"eject found no adapter in {type(module).__name__}; inject puts them in.")
    gone = next((name for name, adapter in found.items() if adapter.releases_base), None)
    if gone is not None:
        raise RuntimeError(
            f"eject cannot bring back the layer {gone!r}: {type(found[gone]).__name__} has taken its weight apart and "
            "released it. Call merge(model), which writes the adapter into a plain layer; for the weight that was "
            "there before, build the model anew."
        )
    take_out(module, {id(adapter): adapter.base for adapter in found.values()})


def take_out(module: nn.Module, layers: Mapping[int, nn.Module]) -> None:
    """Put layers in the adapters' places (by `id`), and what was trainable before :func:`inject` back to that."""
    for adapter in adapters(module).values():
        if id(adapter) in layers:
            adapter.restore_base()
    replace(module, layers)
    for owner in list(module.modules()):
        before = owner.__dict__.pop(BEFORE, {})
        owner.__dict__.pop(KEPT, None)
        owner.__dict__.pop(STARTS, None)
        owner.__dict__.pop(WHOLE, None)
        for name, parameter in owner.named_parameters():
            parameter.requires_grad_(before.get(clean_name(name), parameter.requires_grad))


def refuse_hosted(module: nn.Module, verb: str) -> None:
    """Refuse adapters that live in another library's layers, which we neither put in nor take out.

    Raises:
        ValueError: there is one.
    """
    name = next((name for name, adapter in adapters(module).items() if adapter.hosted), None)
    if name is not None:
        raise ValueError(
            f"{verb} is for adapters that stand in a layer's place, and the one at {name!r} is PEFT's own, adopted. "
            "Call release(model), which leaves a PEFT model of the same outputs; its merge_and_unload() merges."
        )


def replace(module: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put modules in place of others (by `id`) in every parent that holds them; an attention left plain is restored."""
    for parent in list(module.modules()):
        # Not named_children: it gives a layer once that a parent holds under two names.
        for name, child in list(parent._modules.items()):
            # An adapter's own base is where the old layer goes on living.
            if id(child) in new and new[id(child)] is not parent:
                setattr(parent, name, new[id(child)])
        if isinstance(parent, AdaptedAttention) and type(parent.in_proj) is nn.Linear:
            hide_in_proj(parent)
