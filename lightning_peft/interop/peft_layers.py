"""The LoRA-type layers that PEFT injected: found, chosen by adapter, checked; their configuration as plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

from torch import nn

from lightning_peft.interop.masked import can_mask
from lightning_peft.rank.budget import clean_name

# What changes while a model trains, or says where it came from: no part of what an adapter is.
_PASSING = {
    "auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config",
    "total_step", "tinit", "tfinal",
}  # fmt: skip
# They mix adapters, or have factors of another form than B diag(m) A.
_OTHER_VARIANTS = {"ArrowLinearVariant", "BdLoraLinearVariant"}


def lora_layers_or_none(module: nn.Module) -> dict[str, Any]:
    """The LoRA-type layers by path; an empty mapping if there are none."""
    from peft.tuners.lora import LoraLayer

    return {path: child for path, child in module.named_modules() if isinstance(child, LoraLayer)}


def lora_layers(module: nn.Module) -> dict[str, Any]:
    """The LoRA-type layers by path; with a sentence on what is there instead, if there are none."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = lora_layers_or_none(module)
    if found:
        return found
    other = next((child for child in module.modules() if isinstance(child, BaseTunerLayer)), None)
    prompts = next((child for child in module.modules() if isinstance(child, PeftModel)), None)
    if other is not None or prompts is not None:
        kinds = (
            [str(getattr(c.peft_type, "value", c.peft_type)) for c in prompts.peft_config.values()] if prompts else []
        )
        kind = ", ".join(kinds) or type(other).__module__.split(".")[2]
        raise TypeError(
            f"{type(module).__name__} is a PEFT model of type {kind}, which has no rank: adopt takes LoRA and what "
            "builds on it (rsLoRA, DoRA, AdaLoRA, KaSA, ...)."
        )
    raise ValueError(
        f"adopt found no PEFT layer in {type(module).__name__}. Wrap the model first: get_peft_model(model, "
        "LoraConfig(...)); or put our own adapters in with inject."
    )


def choose(layers: Mapping[str, Any], adapter_name: str | None) -> str:
    """The adapter that is meant: the named one, or the only active one.

    Raises:
        ValueError: there is no adapter of this name, or not one that is active.
    """
    there = sorted({name for layer in layers.values() for name in layer.scaling})
    if adapter_name is not None:
        if adapter_name not in there:
            raise ValueError(f"adapter_name={adapter_name!r}: there is {', '.join(map(repr, there))}.")
        return adapter_name
    active = sorted({name for layer in layers.values() for name in layer.active_adapters if name in layer.scaling})
    if len(active) != 1:
        raise ValueError(
            f"{'several adapters are' if active else 'no adapter is'} active, and one gets gates. Name it: "
            f"adopt(model, adapter_name={(active or there)[0]!r}); there is {', '.join(map(repr, there))}."
        )
    return str(active[0])


def has_adapter(layer: Any, name: str) -> bool:
    """Whether a layer has the named adapter."""
    return name in layer.lora_A or name in layer.lora_embedding_A


def require_adoptable(path: str, layer: Any, name: str) -> None:
    """Refuse a layer whose components cannot be switched as it stands.

    Raises:
        TypeError: its variant has no rank-one components, or there are none.
        RuntimeError: its adapters are merged or disabled.
    """
    where = f"layer {clean_name(path)!r}"
    if layer.merged:
        raise RuntimeError(
            f"{where}: its adapters are merged into the base ({', '.join(layer.merged_adapters)}), so a gate would "
            "switch nothing. Call unmerge_adapter() first."
        )
    if layer.disable_adapters:
        raise RuntimeError(
            f"{where}: its adapters are disabled. Call enable_adapter_layers() first, or leave disable_adapter()."
        )
    variant = type(layer.lora_variant.get(name)).__name__
    if name in layer.lora_embedding_B:
        holder: Any = layer.lora_embedding_B
    elif hasattr(layer, "lora_E"):
        holder = layer.lora_E
    else:
        holder = layer.lora_B[name]
    odd = next((kind for kind in (type(layer).__name__,) if kind in ("MultiheadAttention", "ParamWrapper")), None)
    if variant in _OTHER_VARIANTS:
        odd = variant.removesuffix("LinearVariant")
    if odd is not None or not can_mask(holder):
        raise TypeError(
            f"{where}: PEFT's {odd or type(layer).__name__} has no rank-one components that can be switched one by "
            "one. Leave it out of target_modules."
        )
    if getattr(layer.get_base_layer(), "groups", 1) != 1:
        raise TypeError(
            f"{where} is a convolution of {layer.get_base_layer().groups} groups, whose components act on one group "
            "each; PEFT itself cannot merge it. Leave it out of target_modules."
        )
    if hasattr(layer, "lora_E") and layer.r[name] == 0:
        raise TypeError(f"{where} has rank 0, so it has nothing to switch. Leave it out of target_modules.")


def config_of(owner: Any, layer: Any, name: str) -> dict[str, Any]:
    """What the PEFT config says beyond its defaults, as plain values."""
    config = (getattr(owner, "peft_config", None) or {}).get(name)
    if config is None:
        return {}
    default = {field: value.default for field, value in type(config).__dataclass_fields__.items()}
    passing = _PASSING | ({"rank_pattern"} if hasattr(layer, "lora_E") else set())
    given = {key: _plain(value) for key, value in config.to_dict().items() if key not in passing}
    kept = {key: value for key, value in given.items() if value and value != _plain(default.get(key))}
    return {"peft_type": given["peft_type"], **kept}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, set | frozenset):
        return sorted(map(str, value))
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if value is None or type(value) in (bool, int, float, str):
        return value
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
