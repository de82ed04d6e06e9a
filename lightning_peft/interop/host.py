"""What of a user's module another tool can be given: the model with the adapters, and what trained beside them."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.export import require_whole
from lightning_peft.heads import find_head, hub_models
from lightning_peft.rank.budget import clean_name
from lightning_peft.regularizers.base import Regularizer
from lightning_peft.surgery.layers import adapters
from lightning_peft.surgery.removal import refuse_hosted

# Lists and dictionaries of modules are never called, so other tools cannot put a trained copy in their place.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def find_host(module: nn.Module, verb: str) -> tuple[str, nn.Module]:
    """The model to export and its cleaned name in `module`: the transformers model with the adapters, or all of it.

    Raises:
        ValueError: there is no adapter, or some are outside the transformers model, or in a second one.
        RuntimeError: the model is split over processes.
    """
    found = adapters(module)
    if not found:
        raise ValueError(f"{verb} found no adapter in {type(module).__name__}; inject puts them in.")
    refuse_hosted(module, verb)
    require_whole(module, verb)
    hosts = {
        clean_name(name): model
        for name, model in hub_models(module).items()
        if any(isinstance(child, Adapter) for child in model.modules())
    }
    if not hosts:
        return "", module
    outside = [name for name in found if not any(below(name, host) for host in hosts)]
    if len(hosts) > 1 or outside:
        parts = ", ".join(f"module.{host}" for host in hosts)
        also = f"adapters outside it ({', '.join(map(repr, outside[:3]))})" if outside else "more than one of them"
        raise ValueError(
            f"{verb} writes one transformers model, and {type(module).__name__} has {also}. "
            f"Export each part by itself: {parts}."
        )
    return next(iter(hosts.items()))


def below(name: str, root: str) -> bool:
    """Whether `name` is `root` or something inside it."""
    return not root or name == root or name.startswith(root + ".")


def trained_beside(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained beside the adapters, by cleaned name, a tied one under each of its names.

    Those that require a gradient; the terms of a loss do not count. If nothing at all does, the module was frozen as a
    whole after training, and then what counts is the head that :func:`lightning_peft.heads.find_head` finds.
    """
    skipped = {id(p) for adapter in adapters(module).values() for _, p in adapter.own_parameters()}
    skipped |= {id(p) for term in module.modules() if isinstance(term, Regularizer) for p in term.parameters()}
    named = {n: p for n, p in module.named_parameters(remove_duplicate=False) if id(p) not in skipped}
    if any(p.requires_grad for p in module.parameters()):
        trained = {id(p) for p in named.values() if p.requires_grad}
    else:
        head = find_head(module).trained
        trained = {id(p) for n, p in named.items() if n in head}
    return {clean_name(n): p for n, p in named.items() if id(p) in trained}


def whole_modules(host: nn.Module, trained: dict[str, nn.Parameter]) -> tuple[dict[str, nn.Module], list[str]]:
    """The largest modules of which every parameter is trained, and the parameters in none of them, by cleaned names."""
    ids = {id(p) for p in trained.values()}
    whole: dict[str, nn.Module] = {}
    for path, child in host.named_modules(remove_duplicate=False):
        name = clean_name(path)
        if not name or isinstance(child, _CONTAINERS) or any(below(name, outer) for outer in whole):
            continue
        parameters = list(child.parameters())
        if parameters and all(id(p) in ids for p in parameters):
            whole[name] = child
    return whole, [n for n in trained if not any(below(n, module) for module in whole)]


def with_statistics(host: nn.Module, whole: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of the base that keep running statistics, such as batch norm, by cleaned name; those in `whole` not.

    Training changes the statistics of a frozen layer too, so the base that others have is not the one that was trained.
    """
    found: dict[str, nn.Module] = {}
    for path, child in host.named_modules():
        name = clean_name(path)
        if getattr(child, "running_mean", None) is not None and not any(below(name, outer) for outer in whole):
            found[name] = child
    return found


def some(names: list[str]) -> str:
    """The first names, and how many there are beside them."""
    return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def plain_copy(module: nn.Module) -> nn.Module:
    """A deep copy without the wrappers that compilation and checkpointing put around modules."""
    copied = _inner(copy.deepcopy(module))
    for parent in list(copied.modules()):
        for name, child in list(parent.named_children()):
            setattr(parent, name, _inner(child))
    return copied


def _inner(module: nn.Module) -> nn.Module:
    for name in ("_orig_mod", "_checkpoint_wrapped_module"):
        if name in module._modules:
            return _inner(getattr(module, name))
    return module
