"""Every preset that the package has, made small: a new one is in these tests the moment it is exported."""

from __future__ import annotations

import inspect
from typing import Any

from lightning_peft import VIB, AdapterInjection, PACBayes, Regularization, presets
from lightning_peft.surgery.choice import adapter_kind

NAMES = [name for name in presets.__all__ if name != "Preset"]

# What makes a method small and quick, where its preset takes such an argument.
_SMALL: dict[str, Any] = {
    "final_rank": 2,
    "rank": 2,
    "initial_rank": 4,
    "interval": 2,
    "ratio": 0.2,
    "threshold": 0.03,
    "objective": "f_bbb",  # linear in the risk: the mean over processes is that of the whole batch
    "risk": "loss",
    "draws": 2,
    "measured": 8,
    "features": 8,
    "reach": 8,
}


_SMALL_OF: dict[str, dict[str, Any]] = {
    "prompt_tuning": {"length": 4},
    "dpt": {"length": 6, "rank": 4},
    "dept": {"length": 3, "rank": 4},
    "sparta": {"density": 0.2, "targets": ["0|query|value|dense"], "interval": None},  # nothing moves
    # With less, or where several samples average their noise, Adam divides gradients that are nearly 0, and steps by
    # their rounding. Several samples on two processes are compared by SGD, in test_mutual_information.py.
    "vib": {"beta": 1.0, "samples": 1},
}


def small(name: str, **also: Any) -> presets.Preset:
    """The preset with few components and frequent events.

    Args:
        name: of the preset.
        also: arguments that it is given if it takes them.
    """
    function = getattr(presets, name)
    known = inspect.signature(function).parameters
    options = _SMALL | _SMALL_OF.get(name, {}) | also
    preset: presets.Preset = function(**{key: value for key, value in options.items() if key in known})
    return preset


def releases_base(name: str) -> bool:
    """Whether the preset's adapters have their layers' weights in another form: PEFT has no format for these."""
    kind = adapter_kind(injection_of(name).adapter)
    return kind is not None and kind.releases_base


def adapts_models(name: str) -> bool:
    """Whether the preset's adapter stands in the place of a whole transformers model, and not of layers."""
    kind = adapter_kind(injection_of(name).adapter)
    return kind is not None and kind.adapts == "model"


def has_posterior(name: str) -> bool:
    """Whether the preset trains a distribution: what that is over, the head too, is to be whole."""
    terms = [term for each in small(name) if isinstance(each, Regularization) for term in each.terms.values()]
    return any(isinstance(term, PACBayes) for term in terms)


def has_head_module(name: str) -> bool:
    """Whether the preset puts several layers in the place of the head's one: PEFT builds the model with one."""
    terms = [term for each in small(name) if isinstance(each, Regularization) for term in each.terms.values()]
    return any(isinstance(term, VIB) for term in terms)


def injection_of(name: str) -> AdapterInjection:
    """What the preset puts adapters in with."""
    (injection,) = (each for each in small(name) if isinstance(each, AdapterInjection))
    return injection
