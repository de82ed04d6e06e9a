"""What there is in a module: its adapters, what can be adapted, what is trained, what may be sharded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from lightning_peft.adapters.attention import has_in_proj
from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.layers import why_not
from lightning_peft.heads import KEPT as KEPT
from lightning_peft.heads import hub_models
from lightning_peft.rank.budget import clean_name, layer_name
from lightning_peft.regularizers.base import Regularizer

# Attributes of the module that `inject` was called on.
BEFORE = "_requires_grad_before_inject"
"""requires_grad before, by name, where inject changed it."""
STARTS = "_starts_of_large_parameters"
"""What processes compare of their adapters' large parameters, which are in pieces when they could."""


def adapters(module: nn.Module) -> dict[str, Adapter]:
    """The adapters of a module, gated or not, by the name of the layer that they adapt, in the module's order."""
    paths = {path: child for path, child in module.named_modules() if isinstance(child, Adapter)}
    return {layer_name(path, paths): child for path, child in paths.items()}


def adapter_paths(module: nn.Module) -> set[str]:
    """Where the adapters are, by their paths in the module."""
    return {path for path, child in module.named_modules() if isinstance(child, Adapter)}


def adaptable(module: nn.Module, kind: type[Adapter] | None = None) -> dict[str, nn.Module]:
    """What can be adapted, by name; a shared layer once. An attention stands for its `in_proj`."""
    reason = why_not if kind is None else kind.why_not
    found: dict[str, nn.Module] = {}
    adapted: list[str] = []
    for name, child in named(module):
        if isinstance(child, Adapter):
            adapted.append(name + ".")
        elif not name.startswith(tuple(adapted)):
            if has_in_proj(child):
                found[f"{name}.in_proj" if name else "in_proj"] = child
            elif reason(child) is None:
                found[name] = child
    return found


def places(module: nn.Module, kind: type[Adapter] | None) -> dict[str, nn.Module]:
    """What adapters of a class can stand in the place of, by name: layers, or whole transformers models."""
    return hub_models(module) if kind is not None and kind.adapts == "model" else adaptable(module, kind)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name: adapters, what :func:`inject` kept trainable, and whatever requires a gradient.

    And what terms train by themselves, which requires one only inside their own steps. Freezing a module when it is
    trained therefore takes nothing away.
    """
    ids = {id(p) for adapter in adapters(module).values() for _, p in adapter.own_parameters()}
    ids |= {id(p) for term in module.modules() if isinstance(term, Regularizer) for p in term.apart()}
    for owner in module.modules():
        kept = owner.__dict__.get(KEPT, ())
        if kept:
            paths = adapter_paths(owner)
            ids |= {id(p) for name, p in owner.named_parameters() if layer_name(name, paths) in kept}
    named = module.named_parameters(remove_duplicate=False)
    return {name: p for name, p in named if p.requires_grad or id(p) in ids}


def small_parameters(module: nn.Module) -> list[nn.Parameter]:
    """What is to stay whole when the rest is sharded: adapters, and what is trained beside them.

    Not the factors of an adapter that has its layer's weight in another form: they are sharded as the weight would be.
    But what is left of that layer, its bias: nobody calls the layer, so nobody would gather it.

    For a module that shards itself, after its adapters are in and before it does:

        fully_shard(block, mesh=mesh, ignored_params=set(small_parameters(self)))

    Have AdapterInjection among the Trainer's callbacks all the same: it averages the gradients of what is whole.

    Raises:
        ValueError: there is no adapter yet.
    """
    if not adapters(module):
        raise ValueError(
            f"small_parameters found no adapter in {type(module).__name__}; call inject before it, fully_shard after."
        )
    large = large_parameters(module)
    every = [*trained(module).values(), *left_of_bases(module)]
    return list({id(p): p for p in every if id(p) not in large}.values())


def left_of_bases(module: nn.Module) -> list[nn.Parameter]:
    """What is left of the layers whose weight is gone, trained or not."""
    return [p for adapter in adapters(module).values() if adapter.releases_base for p in adapter.base.parameters()]


def large_parameters(module: nn.Module) -> set[int]:
    """Ids of the adapters' own parameters that may be sharded."""
    return {id(p) for adapter in adapters(module).values() for p in adapter.large_parameters()}


def is_flattened(parameter: Tensor) -> bool:
    """Whether FSDP1 has made this parameter a part of a flat one, so that a process holds some slice of it."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def is_read(module: nn.Module, layer: nn.Module) -> bool:
    """Whether an attention reads this layer's weight and never calls it."""
    return any(
        isinstance(parent, nn.MultiheadAttention) and layer in (parent.out_proj, getattr(parent, "in_proj", None))
        for parent in module.modules()
    )


def named(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by the names that the user knows."""
    return ((clean_name(name), child) for name, child in module.named_modules())
