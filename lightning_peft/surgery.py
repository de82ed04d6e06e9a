"""Find layers, put adapters in their place, freeze the rest; and undo all of it."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from lightning_peft.adapters.attention import AdaptedAttention, expose_in_proj, has_in_proj, hide_in_proj
from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.adapters.layers import is_convolution, why_not
from lightning_peft.distributed import fingerprint, is_shard, world_size
from lightning_peft.heads import Head, find_head
from lightning_peft.rank.budget import WHOLE, clean_name, layer_name

# Attribute of the module that inject was called on: requires_grad before, by name, where inject changed it.
_BEFORE = "_requires_grad_before_inject"
KEPT = "_kept_by_inject"
"""Likewise: names of what stayed trainable beside the adapters."""
STARTS = "_starts_of_large_parameters"
"""Likewise: what processes compare of their adapters' large parameters, which are in pieces when they could."""
_DEFAULT = "all linear layers and convolutions except the head"  # what targets=None means, in sentences


@dataclass(frozen=True)
class Injection:
    """What :func:`inject` did.

    Attributes:
        adapted: names of the layers that now have an adapter, in the module's order.
        trained: names of the base's parameters that stay trainable beside the adapters; as they were before.
        frozen: names of the base's parameters that were trainable and no longer are.
        read: adapted layers whose weight is read by their parent and which are never called themselves.
        parameters: trainable parameters of the adapters.
        trained_parameters: trainable parameters beside them.
        total: parameters of the whole module, adapters included.
    """

    adapted: tuple[str, ...]
    trained: tuple[str, ...]
    frozen: tuple[str, ...]
    read: tuple[str, ...]
    parameters: int
    trained_parameters: int
    total: int

    def __str__(self) -> str:
        kinds: dict[str, list[str]] = {}
        for name in self.adapted:
            kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append(name)
        lines = [f"Adapted {len(self.adapted)} layers with {self.parameters:,} trainable parameters:"]
        lines += [f"  {kind}" + (f"  ({len(names)} layers)" if len(names) > 1 else "") for kind, names in kinds.items()]
        if self.trained:
            owners = dict.fromkeys(name.rpartition(".")[0] or name for name in self.trained)
            lines.append(f"Trained beside them: {', '.join(owners)} ({self.trained_parameters:,} parameters).")
        if self.read:
            lines.append(f"Read, never called, so that adapter dropout does not act there: {len(self.read)} layers.")
        share = (self.parameters + self.trained_parameters) / max(1, self.total)
        lines.append(f"Trainable in all: {share:.2%} of {self.total:,} parameters.")
        return "\n".join(lines)


def inject(
    module: nn.Module,
    factory: AdapterFactory,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
) -> Injection:
    """Put adapters in place of layers and freeze everything else, in place.

    A layer that several parents share is adapted once and stays shared. A pattern is a regular expression that matches
    a layer's whole name, or the end of it after a dot: "query" matches "encoder.layer.0.attention.self.query".

    Args:
        module: any module; not itself the layer to adapt.
        factory: builds an adapter around a layer: `partial(LoRA, rank=8)`.
        targets: patterns of the layers to adapt: Linear, Conv1d, Conv2d, Conv3d, Embedding, transformers' Conv1D, and
            `in_proj` and `out_proj` of MultiheadAttention. ``None`` means all of them except embeddings, convolutions
            in groups (small by design, and not for PEFT), the head (see :func:`lightning_peft.heads.find_head`), and
            what the adapter's class leaves alone.
        train: patterns of modules or parameters that stay trainable. ``None`` means the head; `[]` means nothing. Of an
            adapted layer its bias can be named, where the adapter has the layer's weight in another form.

    Returns:
        What was done; print it.

    Raises:
        ValueError: a pattern matches nothing or is no regular expression, or the module has adapters already.
        TypeError: a target cannot be adapted.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"inject takes a module, such as a LightningModule. Got a {type(module).__name__}.")
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "inject is called under torch.inference_mode, where adapters could never be trained. Call it outside."
        )
    require_factory(factory)
    for name, patterns in (("targets", targets), ("train", train)):
        if isinstance(patterns, str):
            advice = f"Write {name}=[{patterns!r}]."
            if patterns == "all-linear":
                advice = f"Leave it out to adapt {_DEFAULT}."
            raise TypeError(f"{name} must be a list of patterns, not one string. {advice}")
        for pattern in patterns or ():
            if not isinstance(pattern, str):
                raise TypeError(f"{name} must be a list of patterns, which are strings. Got {pattern!r}.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name}={[pattern]!r} is not a regular expression: {error}.") from error
    if isinstance(module, Adapter) or why_not(module) is None:
        raise TypeError(
            f"inject replaces layers inside a module and got a single {type(module).__name__}; "
            "wrap it (nn.Sequential) or call the adapter's class on it."
        )
    first = next(((name, child) for name, child in module.named_modules() if isinstance(child, Adapter)), None)
    if first is not None:
        refuse_hosted(module, "inject")
        # Adding to them would freeze them, and the layers left over are no longer where the head can be told from.
        raise ValueError(
            f"{type(module).__name__} has adapters already, the first at {clean_name(first[0])!r}: call "
            f"{'merge' if first[1].releases_base else 'eject'} first, or inject all layers in one call. Parts of a "
            "model can have adapters of their own: call inject on each part."
        )
    for name, child in module.named_modules():
        # By its class's name, for PEFT may not be installed; its layers hold the linear layers A and B.
        if any(c.__name__ == "BaseTunerLayer" and c.__module__.startswith("peft.") for c in type(child).__mro__):
            raise ValueError(
                f"{type(module).__name__} is a PEFT model: {clean_name(name)!r} has an adapter of PEFT's. Keep it, "
                "with adopt(model) or the callback Adoption; or inject into the base model alone."
            )
        if name.rpartition(".")[2] == "_orig_mod" and why_not(child) is None:
            raise ValueError(
                f"the layer {clean_name(name)!r} is compiled, and what was compiled knows no adapter: inject first, "
                "call torch.compile afterwards, or compile the whole module."
            )
    head = find_head(module)
    kind = _kind(factory)
    chosen = _choose(module, targets, head, () if kind is None else kind.leaves)
    # A pattern that matches nothing is told before anything is built.
    _kept(module, train, head, chosen, chosen if kind is None or kind.releases_base else ())
    kept = partial(_kept, module, train, head, chosen)
    return install(module, {name: (layer, factory) for name, layer in chosen.items()}, kept)


def require_factory(factory: object) -> None:
    """Check that `factory` can build adapters.

    Raises:
        TypeError: it is an adapter already, or nothing that can be called.
    """
    if isinstance(factory, nn.Module) or not callable(factory):
        name = f"a {type(factory).__name__} that is built already" if isinstance(factory, nn.Module) else f"{factory!r}"
        raise TypeError(f"adapters are built around each layer by a factory: partial(LoRA, rank=8). Got {name}.")


def install(
    module: nn.Module,
    plan: Mapping[str, tuple[nn.Module, AdapterFactory]],
    kept: Callable[[Collection[str]], Collection[str]],
    verify: Callable[[], object] | None = None,
) -> Injection:
    """Put adapters exactly where `plan` says: name -> (layer, factory); what :func:`inject` does once it has chosen.

    Args:
        module: the module that is changed.
        plan: what to adapt, from :func:`adaptable`, with the factory for each layer.
        kept: gives the names, before injection, of the base's parameters that stay trainable; it is told of which
            adapted layers the bias may be.
        verify: called when all is in place; if it raises, all is put back as it was.

    Raises:
        RuntimeError: an attention's input projection is to be adapted and is sharded already.
    """
    trainable = {clean_name(name): p.requires_grad for name, p in module.named_parameters()}
    before = [(p, p.requires_grad) for p in module.parameters()]
    inputs = {name: layer for name, (layer, _) in plan.items() if isinstance(layer, nn.MultiheadAttention)}
    for name, attention in inputs.items():
        if is_shard(attention.in_proj_weight) or is_flattened(attention.in_proj_weight):
            # The sharding library would go on putting the whole weight where it was.
            raise RuntimeError(
                f"layer {name!r} is part of an attention that is sharded already, and has to be made a layer first. "
                "Call inject before fully_shard and pass ignored_params=set(small_parameters(self)) to it, or leave "
                "the layer out of the targets."
            )
    layers = {n: expose_in_proj(m) if isinstance(m, nn.MultiheadAttention) else m for n, (m, _) in plan.items()}
    try:
        built = {name: _build(plan[name][1], name, layer) for name, layer in layers.items()}
        names = {clean_name(name) for name in kept({n for n, adapter in built.items() if adapter.releases_base})}
    except Exception:
        # Nothing half done: a layer was refused, so all is put back as it was.
        for attention in inputs.values():
            hide_in_proj(attention)  # type: ignore[arg-type]
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        raise
    told: dict[str, Adapter] = {}
    for name, adapter in built.items():
        adapter.placed(name, told)
        told[name] = adapter
    read = tuple(name for name, layer in layers.items() if is_read(module, layer))
    released = {name: layers[name].weight for name, adapter in built.items() if adapter.releases_base}
    replace(module, {id(layers[name]): adapter for name, adapter in built.items()})
    own = {id(p): p for adapter in built.values() for _, p in adapter.own_parameters()}
    paths = _paths(module)
    beside = [p for name, p in module.named_parameters() if layer_name(name, paths) in names]
    kept_ids = {id(p) for p in beside}
    for parameter in module.parameters():
        if id(parameter) not in own:  # an adapter knows itself what it trains
            parameter.requires_grad_(id(parameter) in kept_ids)
    module.__dict__[KEPT] = tuple(sorted(names))
    if world_size() > 1:
        large = {n: [fingerprint(p) for p in adapter.large_parameters()] for n, adapter in built.items()}
        module.__dict__[STARTS] = {f"{n} at its start": torch.stack(v).tolist() for n, v in large.items() if v}
    module.__dict__[_BEFORE] = {name: wanted for name, wanted in trainable.items() if wanted != (name in names)}
    try:
        if verify is not None:
            verify()
    except BaseException:
        take_out(module, {id(adapter): layers[name] for name, adapter in built.items()})
        raise
    _warn_of_untied(module, released)
    return Injection(
        adapted=tuple(built),
        trained=tuple(sorted(names)),
        frozen=tuple(sorted(name for name, wanted in trainable.items() if wanted and name not in names)),
        read=read,
        parameters=sum(p.numel() for p in own.values() if p.requires_grad),
        trained_parameters=sum(p.numel() for p in beside),
        total=sum(p.numel() for p in module.parameters()),
    )


def _warn_of_untied(module: nn.Module, released: Mapping[str, object]) -> None:
    """Warn of weights that were one parameter with another, and are taken apart on their own from now on."""
    others = {id(p): clean_name(name) for name, p in module.named_parameters()}
    for name, weight in released.items():
        other = others.setdefault(id(weight), f"{name}.weight")
        if other != f"{name}.weight":
            warnings.warn(
                f"the weight of {name!r} was one parameter with {other!r} and no longer is: its factors are its own, "
                "and what they are compressed to is not shared. Leave the layer out of the targets to keep it.",
                stacklevel=4,
            )


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
    replace(module, layers)
    for owner in list(module.modules()):
        before = owner.__dict__.pop(_BEFORE, {})
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


def adapters(module: nn.Module) -> dict[str, Adapter]:
    """The adapters of a module, gated or not, by the name of the layer that they adapt, in the module's order."""
    paths = {path: child for path, child in module.named_modules() if isinstance(child, Adapter)}
    return {layer_name(path, paths): child for path, child in paths.items()}


def _paths(module: nn.Module) -> set[str]:
    return {path for path, child in module.named_modules() if isinstance(child, Adapter)}


def adaptable(module: nn.Module) -> dict[str, nn.Module]:
    """What can be adapted, by name; a shared layer once. An attention stands for its `in_proj`."""
    found: dict[str, nn.Module] = {}
    adapted: list[str] = []
    for name, child in _named(module):
        if isinstance(child, Adapter):
            adapted.append(name + ".")
        elif not name.startswith(tuple(adapted)):
            if has_in_proj(child):
                found[f"{name}.in_proj" if name else "in_proj"] = child
            elif why_not(child) is None:
                found[name] = child
    return found


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """What training changes, by name: adapters, what :func:`inject` kept trainable, and whatever requires a gradient.

    Freezing a module when it is trained therefore takes nothing away.
    """
    ids = {id(p) for adapter in adapters(module).values() for _, p in adapter.own_parameters()}
    for owner in module.modules():
        kept = owner.__dict__.get(KEPT, ())
        if kept:
            paths = _paths(owner)
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


def matches(patterns: Sequence[str], name: str) -> bool:
    """Whether one of the patterns matches the whole name, or the end of it after a dot."""
    return any(re.fullmatch(rf"(.*\.)?({pattern})", name) for pattern in patterns)


def _build(factory: AdapterFactory, name: str, layer: nn.Module) -> Adapter:
    training = layer.training
    try:
        adapter = factory(layer)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError  # a subclass may want other arguments
        raise kind(f"layer {name!r}: {error}") from error
    if not isinstance(adapter, Adapter):
        raise TypeError(
            f"layer {name!r}: the factory returned a {type(adapter).__name__}; it must return an Adapter, "
            "as partial(LoRA, rank=8) does."
        )
    return adapter.train(training)


def _kind(factory: AdapterFactory) -> type[Adapter] | None:
    """The class behind a factory; ``None`` where a function hides it."""
    while isinstance(factory, partial):
        factory = factory.func
    return factory if isinstance(factory, type) and issubclass(factory, Adapter) else None


def _choose(module: nn.Module, targets: Sequence[str] | None, head: Head, left: Sequence[str]) -> dict[str, nn.Module]:
    layers = adaptable(module)
    if targets is None:
        usual = {n: m for n, m in layers.items() if _is_usual(m) and not head.holds(n)}
        chosen = {n: m for n, m in usual.items() if not any(matches(left, part) for part in _prefixes(n))}
        if not chosen:
            raise ValueError(_nothing_to_adapt(module))
        return chosen
    # An attention's own name means its two projections.
    inside = {
        layer: name
        for name, m in _named(module)
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
        raise ValueError(f"targets=[] names no layer; leave targets out to adapt {_DEFAULT}.")
    return {name: layer for name, layer in layers.items() if name in chosen}


def _is_usual(layer: nn.Module) -> bool:
    """Whether a layer is adapted when nobody says which."""
    return not isinstance(layer, nn.Embedding) and not (is_convolution(layer) and layer.groups != 1)


def _no_match(pattern: str, module: nn.Module, layers: Mapping[str, nn.Module]) -> str:
    for name, child in _named(module):
        if name and matches([pattern], name):
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


def _kept(
    module: nn.Module,
    train: Sequence[str] | None,
    head: Head,
    chosen: Mapping[str, nn.Module],
    biased: Collection[str],
) -> set[str]:
    """Names of the base's parameters that stay trainable; of adapted layers the biases of those that `biased` names."""
    adapted = {
        id(p)
        for name, layer in chosen.items()
        for part, p in _parts(layer)
        if part.endswith("weight") or name not in biased
    }
    own = {id(p): clean_name(name) for name, p in module.named_parameters() if id(p) not in adapted}
    if train is None:
        wanted = {id(p) for p in module.parameters() if p.requires_grad}
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


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules by the names that the user knows."""
    return ((clean_name(name), child) for name, child in module.named_modules())


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def is_read(module: nn.Module, layer: nn.Module) -> bool:
    """Whether an attention reads this layer's weight and never calls it."""
    return any(
        isinstance(parent, nn.MultiheadAttention) and layer in (parent.out_proj, getattr(parent, "in_proj", None))
        for parent in module.modules()
    )
