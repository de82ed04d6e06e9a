"""Which layers get an adapter, and what stays trainable beside them: by patterns, or by what is usual."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from inspect import ismethod

from torch import nn

from lightning_peft.adapters.attention import AdaptedAttention, has_in_proj
from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.adapters.layers import is_convolution, why_not
from lightning_peft.adapters.planned import PlannedFactory
from lightning_peft.adapters.thin import is_thin_linear
from lightning_peft.heads import Head
from lightning_peft.patterns import matches
from lightning_peft.rank.budget import clean_name
from lightning_peft.surgery.layers import named, places

DEFAULT = "all linear layers and convolutions except the head"  # what targets=None means, in sentences


def adapter_kind(factory: AdapterFactory) -> type[Adapter] | None:
    """The class behind a factory; ``None`` where a function hides it."""
    while isinstance(factory, partial):
        factory = factory.func
    if isinstance(factory, PlannedFactory):
        return factory.kind
    # A class's own method is another constructor of it, such as DPT.within.
    kind: object = factory.__self__ if ismethod(factory) else factory
    return kind if isinstance(kind, type) and issubclass(kind, Adapter) else None


def choose(
    module: nn.Module, targets: Sequence[str] | None, head: Head, kind: type[Adapter] | None
) -> dict[str, nn.Module]:
    """What to adapt, by name, in the module's order: layers, or the transformers models in it.

    Args:
        module: has no adapter yet.
        targets: patterns; ``None`` for what is usual.
        head: what is left alone where nobody says otherwise.
        kind: the adapter's class, if it is known: it may be for whole models, and leave layers alone.

    Raises:
        ValueError: a pattern matches nothing, or there is nothing to adapt.
    """
    layers = places(module, kind)
    if kind is not None and kind.adapts == "model":
        return _choose_models(module, layers, targets, kind)
    left = () if kind is None else kind.leaves
    if targets is None:
        usual = {n: m for n, m in layers.items() if _is_usual(m) and not head.holds(n)}
        chosen = {n: m for n, m in usual.items() if not any(matches(left, part) for part in _prefixes(n))}
        if not chosen:
            raise ValueError(_nothing_to_adapt(module))
        return chosen
    # An attention's own name means its two projections.
    inside = {
        layer: name
        for name, m in named(module)
        if isinstance(m, nn.MultiheadAttention)
        for layer in (f"{name}.in_proj", f"{name}.out_proj")
    }
    chosen = {}
    for pattern in targets:
        found = {n: m for n, m in layers.items() if matches([pattern], n) or matches([pattern], inside.get(n, "\n"))}
        if not found:
            raise ValueError(_no_match(pattern, module, layers))
        chosen.update(found)
    if not chosen:
        raise ValueError(f"targets=[] names no layer; leave targets out to adapt {DEFAULT}.")
    return {name: layer for name, layer in layers.items() if name in chosen}


def _choose_models(
    module: nn.Module, models: Mapping[str, nn.Module], targets: Sequence[str] | None, kind: type[Adapter]
) -> dict[str, nn.Module]:
    names = ", ".join(map(repr, models))
    if not models:
        raise ValueError(
            f"{type(module).__name__} has no transformers model inside, which {kind.__name__} stands in the place of. "
            "If it builds one later, inject then."
        )
    if targets is None:
        if len(models) > 1:
            raise ValueError(
                f"{type(module).__name__} has {len(models)} transformers models, {names}: say which of them "
                f"{kind.__name__} is for, targets=[{next(iter(models))!r}]."
            )
        return dict(models)
    for pattern in targets:
        if not any(matches([pattern], name) for name in models):
            raise ValueError(f"targets={[pattern]!r} matches no transformers model; there is {names}.")
    chosen = {name: model for name, model in models.items() if matches(targets, name)}
    if not chosen:
        raise ValueError(f"targets=[] names no transformers model; leave targets out to adapt {names}.")
    return chosen


def refuse_thin(module: nn.Module, chosen: Mapping[str, nn.Module], kind: str) -> None:
    """Refuse to take apart a layer that is one of two thin ones.

    Raises:
        ValueError: there is one.
    """
    halves = {id(half): name for name, m in named(module) if is_thin_linear(m) for half in m.children()}
    name = next((halves[id(layer)] for layer in chosen.values() if id(layer) in halves), None)
    if name is not None:
        raise ValueError(
            f"the layer {name!r} is compressed already: it is two thin layers, and {kind} would take each of them "
            "apart again. Start from the dense model, with the smaller budget; or train adapters on top, such as LoRA."
        )


def _is_usual(layer: nn.Module) -> bool:
    """Whether a layer is adapted when nobody says which."""
    if not has_in_proj(layer) and why_not(layer) is not None:
        return False  # a kind that some adapters take, and most do not
    return not (isinstance(layer, nn.Embedding) or _is_grouped(layer))


def _is_grouped(layer: nn.Module) -> bool:
    return is_convolution(layer) and bool(layer.groups != 1)


def _no_match(pattern: str, module: nn.Module, layers: Mapping[str, nn.Module]) -> str:
    for name, child in named(module):
        if name and matches([pattern], name):
            if is_thin_linear(child):
                return (
                    f"targets={[pattern]!r} matches {name!r}, which is compressed: it is two thin layers. Name them, "
                    f"{f'{pattern}.down'!r} and {f'{pattern}.up'!r}, or leave targets out to adapt {DEFAULT}."
                )
            reason = why_not(child)
            return f"targets={[pattern]!r} matches {name!r}, which cannot be adapted: {reason}."
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    near = difflib.get_close_matches(pattern, dict.fromkeys([*ends, *layers]), n=5, cutoff=0.4) or ends[:8]
    return f"targets={[pattern]!r} matches no layer; the nearest names are {', '.join(map(repr, near)) or 'none'}."


def _nothing_to_adapt(module: nn.Module) -> str:
    return (
        f"{type(module).__name__} has no linear layer or convolution to adapt. If it builds its layers later, inject "
        "then; other layers can be named in `targets`."
    )


def kept_trainable(
    module: nn.Module,
    train: Sequence[str] | None,
    head: Head,
    chosen: Mapping[str, nn.Module],
    wanted: Collection[int],
    biased: Collection[str],
) -> set[str]:
    """Names of the base's parameters that stay trainable; of adapted layers the biases of those that `biased` names.

    Of the head those stay that `wanted` has, ids of what required a gradient before adapters were built.
    """
    adapted = {
        id(p)
        for name, layer in chosen.items()
        for part, p in _parts(layer)
        if part.endswith("weight") or name not in biased
    }
    own = {id(p): clean_name(name) for name, p in module.named_parameters() if id(p) not in adapted}
    if train is None:
        return {name for key, name in own.items() if key in wanted and name in head.trained}
    # A tied parameter can be named by any of its names, and goes by the first one.
    named = module.named_parameters(remove_duplicate=False)
    names = {clean_name(name): own[id(p)] for name, p in named if id(p) in own}
    kept: set[str] = set()
    for pattern in train:
        found = {name for name in names if any(matches([pattern], part) for part in _prefixes(name))}
        if not found:
            owners = list(dict.fromkeys(name.split(".")[0] for name in names))
            near = difflib.get_close_matches(pattern, [*owners, *names], n=5, cutoff=0.4) or owners[:8]
            raise ValueError(
                f"train={[pattern]!r} matches no module or parameter that is not adapted; "
                f"the nearest names are {', '.join(map(repr, near))}."
            )
        kept |= {names[name] for name in found}
    return kept


def _parts(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A layer's own parameters; an attention's input weight, which is a layer itself while adapters are put in, too."""
    yield from layer.named_parameters(recurse=False)
    if isinstance(layer, AdaptedAttention):
        yield from layer.in_proj.named_parameters(prefix="in_proj")


def _prefixes(name: str) -> list[str]:
    """A name, and those of the modules that it is in: "a.b" is in "a"."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
