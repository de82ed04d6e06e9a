"""Put adapters in the place of layers, and freeze the rest."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from lightning_peft.adapters.attention import expose_in_proj, hide_in_proj
from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.adapters.layers import why_not
from lightning_peft.distributed import fingerprint, is_shard, world_size
from lightning_peft.heads import find_head
from lightning_peft.rank.budget import clean_name, layer_name
from lightning_peft.surgery.choice import DEFAULT, adapter_kind, choose, kept_trainable, refuse_thin
from lightning_peft.surgery.layers import BEFORE, KEPT, STARTS, adapter_paths, is_flattened, is_read, places
from lightning_peft.surgery.removal import refuse_hosted, replace, take_out


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
            what the adapter's class leaves alone. For a class that stands in the place of a whole transformers model,
            such as SoftPrompt, patterns of these models; ``None`` means the one that there is.
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
                advice = f"Leave it out to adapt {DEFAULT}."
            raise TypeError(f"{name} must be a list of patterns, not one string. {advice}")
        for pattern in patterns or ():
            if not isinstance(pattern, str):
                raise TypeError(f"{name} must be a list of patterns, which are strings. Got {pattern!r}.")
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{name}={[pattern]!r} is not a regular expression: {error}.") from error
    if isinstance(module, Adapter) or why_not(module) is None or _is_one_model(module, adapter_kind(factory)):
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
    kind = adapter_kind(factory)
    chosen = choose(module, targets, head, kind)
    if kind is not None and kind.releases_base:
        refuse_thin(module, chosen, kind.__name__)
    # A pattern that matches nothing is told before anything is built.
    wanted = {id(p) for p in module.parameters() if p.requires_grad}
    kept = partial(kept_trainable, module, train, head, chosen, wanted)
    kept(chosen if kind is None or kind.releases_base else ())
    return install(module, {name: (layer, factory) for name, layer in chosen.items()}, kept)


def _is_one_model(module: nn.Module, kind: type[Adapter] | None) -> bool:
    return kind is not None and kind.adapts == "model" and "" in places(module, kind)


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
        told: dict[str, Adapter] = {}
        for name, adapter in built.items():
            adapter.placed(name, told)
            told[name] = adapter
        _refuse_shared(module, {name: layers[name] for name, adapter in built.items() if adapter.writes_base})
    except Exception:
        # Nothing half done: a layer was refused, so all is put back as it was.
        for attention in inputs.values():
            hide_in_proj(attention)  # type: ignore[arg-type]
        for parameter, wanted in before:
            parameter.requires_grad_(wanted)
        raise
    read = tuple(name for name, layer in layers.items() if is_read(module, layer))
    released = {name: layers[name].weight for name, adapter in built.items() if adapter.releases_base}
    replace(module, {id(layers[name]): adapter for name, adapter in built.items()})
    own = {id(p): p for adapter in built.values() for _, p in adapter.own_parameters()}
    paths = adapter_paths(module)
    beside = [p for name, p in module.named_parameters() if layer_name(name, paths) in names]
    kept_ids = {id(p) for p in beside}
    for parameter in module.parameters():
        if id(parameter) not in own:  # an adapter knows itself what it trains
            parameter.requires_grad_(id(parameter) in kept_ids)
    module.__dict__[KEPT] = tuple(sorted(names))
    if world_size() > 1:
        large = {n: [fingerprint(p) for p in adapter.large_parameters()] for n, adapter in built.items()}
        module.__dict__[STARTS] = {f"{n} at its start": torch.stack(v).tolist() for n, v in large.items() if v}
    module.__dict__[BEFORE] = {name: wanted for name, wanted in trainable.items() if wanted != (name in names)}
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


def _refuse_shared(module: nn.Module, written: Mapping[str, nn.Module]) -> None:
    """Refuse to write into a weight that another layer has as well.

    Raises:
        ValueError: there is one.
    """
    own = {id(layer.weight): (name, layer) for name, layer in written.items()}
    for path, child in module.named_modules():
        for part, parameter in child._parameters.items():
            name, layer = own.get(id(parameter), ("", child))
            if layer is not child:
                raise ValueError(
                    f"layer {name!r}: its weight is one parameter with {clean_name(f'{path}.{part}')!r}, which would "
                    "change along without a gradient of its own. Leave the layer out of the targets, or untie the two."
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
