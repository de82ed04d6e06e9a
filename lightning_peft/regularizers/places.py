"""Where a module's trained parameters are held, so that something else can stand in their places for a while."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from lightning_peft.rank.budget import clean_name

_NOT_THE_MODEL = ("peft_terms", "peft_masks")  # children that our callbacks add to the LightningModule

Kind = Literal["elementwise", "linear", "shared"]


@dataclass(frozen=True)
class Part:
    """One parameter: its name, and the modules that hold it.

    Attributes:
        name: the first one that it has.
        shape: its shape.
        places: (module, name there): several where it is tied.
        broadcasts: whether an adapter takes it as (examples, n) too, see :class:`lightning_peft.Adapter`.
    """

    name: str
    shape: tuple[int, ...]
    places: tuple[tuple[nn.Module, str], ...]
    broadcasts: bool = False

    @property
    def value(self) -> Tensor:
        """What stands in its place now."""
        owner, name = self.places[0]
        value = owner._parameters[name]
        assert value is not None
        return value

    @property
    def owner(self) -> nn.Module:
        """The first module that holds it."""
        return self.places[0][0]

    @property
    def kind(self) -> Kind:
        """How it can be another one for every example of a batch.

        "elementwise": as (examples, n) in the place of (n,), which its adapter says that it broadcasts. "linear": at
        the output of the linear layer that has it. "shared": not without further passes.
        """
        if len(self.places) > 1:
            return "shared"
        if self.broadcasts:
            return "elementwise"
        return "linear" if type(self.owner) is nn.Linear else "shared"


def trained(module: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that require a gradient; not those of terms and of what draws masks."""
    return tuple(name for name, _, _, p in _held(module) if p.requires_grad)


def parts(module: nn.Module, names: Collection[str]) -> list[Part]:
    """The parameters of these names, in the module's order; each once."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    first: dict[int, tuple[str, tuple[int, ...]]] = {}
    wanted = set()
    for name, owner, attribute, parameter in _held(module, every=True):
        key = id(parameter)
        places.setdefault(key, []).append((owner, attribute))
        first.setdefault(key, (name, tuple(parameter.shape)))
        if name in names:
            wanted.add(key)
    broadcast = {place for adapter in module.modules() for place in _broadcast(adapter)}
    return [Part(*first[key], tuple(held), held[0] in broadcast) for key, held in places.items() if key in wanted]


def _broadcast(adapter: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Where an adapter holds what it calls `elementwise`, itself or in a part such as its gate."""
    paths: Sequence[str] = getattr(type(adapter), "elementwise", ())
    for path in paths:
        part, _, name = path.rpartition(".")
        yield adapter.get_submodule(part), name


def chosen(module: nn.Module, over: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the trained parameters that patterns match, or what holds them; all for ``None``.

    Raises:
        ValueError: a pattern matches nothing.
    """
    names = trained(module)
    if over is None:
        return names
    found: set[str] = set()
    for pattern in over:
        here = {name for name in names if _matches(pattern, name)}
        if not here:
            raise ValueError(
                f"over={[pattern]!r} matches no trained parameter; there are "
                f"{', '.join(map(repr, names[:5])) or 'none'}{', ...' if len(names) > 5 else ''}."
            )
        found |= here
    return tuple(name for name in names if name in found)


def require_whole(part: Part) -> None:
    """Check that noise can stand in a parameter's place.

    Raises:
        RuntimeError: it is split over processes, or its layer keeps a second reference to it.
    """
    value = part.value
    if hasattr(value, "full_tensor") or getattr(value, "_fsdp_flattened", False):
        raise RuntimeError(
            f"{part.name!r} is split over processes, and a posterior is over whole parameters. Pass "
            "ignored_params=set(small_parameters(self)) to every call of fully_shard, or leave it out of Q: over=[...]."
        )
    if isinstance(part.owner, nn.RNNBase):
        raise RuntimeError(
            f"{part.name!r} is held by a {type(part.owner).__name__}, which computes with a list of its own, where no "
            "noise can be put. Leave it out of Q (over=[...])."
        )


def _held(module: nn.Module, every: bool = False) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    seen: set[int] = set()
    for path, owner in module.named_modules():
        if clean_name(path).partition(".")[0] in _NOT_THE_MODEL:
            continue
        for attribute, parameter in owner._parameters.items():
            if parameter is None or (id(parameter) in seen and not every):
                continue
            seen.add(id(parameter))
            yield clean_name(f"{path}.{attribute}" if path else attribute), owner, attribute, parameter


def _matches(pattern: str, name: str) -> bool:
    pieces = name.split(".")
    return any(re.fullmatch(rf"(.*\.)?({pattern})", ".".join(pieces[: i + 1])) for i in range(len(pieces)))
