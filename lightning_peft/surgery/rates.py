"""Learning rates that adapters ask for, in an optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from lightning_peft.surgery.layers import adapters


def split_by_rate(module: nn.Module, groups: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups in which every parameter has the rate that its adapter asks for; others stay as they are.

        lr of a parameter = lr of its group * what `Adapter.rates` says of it

    Call it in `configure_optimizers`, on what the optimizer is to be given. A scheduler scales all groups alike, so
    the ratio lasts.

    Args:
        module: has adapters inside, or none.
        groups: with "params" and "lr", as torch's optimizers take them. What else they have is copied; the "name" of a
            new group says its rate.

    Returns:
        The groups in their order, each followed by those that were split off.

    Raises:
        ValueError: a group is to be split and says no learning rate.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> [group["lr"] for group in split_by_rate(net, [{"params": list(net.parameters()), "lr": 0.1}])]
        [0.1]
    """
    wanted = {id(p): rate for _, _, p, rate in _asked(module)}
    split: list[dict[str, Any]] = []
    for group in groups:
        parts: dict[float, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            parts.setdefault(wanted.get(id(parameter), 1.0), []).append(parameter)
        for rate, parameters in sorted(parts.items(), key=lambda part: part[0] != 1.0):
            own = {**group, "params": parameters}
            if rate != 1.0:
                if "lr" not in group:
                    raise ValueError(
                        f"an adapter asks for {rate:g} times a learning rate, and its parameter group has no 'lr': "
                        "give every group one."
                    )
                own["lr"] = group["lr"] * rate
                if "name" in group:
                    own["name"] = f"{group['name']} x {rate:g}"
            split.append(own)
    return split


def not_followed(module: nn.Module, groups: Iterable[Mapping[str, Any]]) -> tuple[str, str, float] | None:
    """An adapter whose rates the optimizers' groups do not follow: its layer, a parameter and the rate; or none.

    Only where everything of the adapter has one rate: a ratio of another size is somebody's choice.
    """
    # A scheduler may have every group start at 0.
    rates = {id(p): float(group.get("initial_lr", group["lr"])) for group in groups for p in group["params"]}
    for name, part, parameter, rate in _asked(module):
        own = [p for _, p in adapters(module)[name].own_parameters()]
        here = {rates[id(p)] for p in own if id(p) in rates}
        if id(parameter) in rates and rate != 1.0 and len(own) > 1 and len(here) == 1:
            return name, part, rate
    return None


def _asked(module: nn.Module) -> list[tuple[str, str, nn.Parameter, float]]:
    """What adapters ask for: layer, parameter's name, parameter, rate."""
    found = []
    for name, adapter in adapters(module).items():
        rates = adapter.rates()
        found += [(name, part, p, float(rates[part])) for part, p in adapter.own_parameters() if part in rates]
    return found
