"""Keep a PEFT model and give it gates: `adopt`, and `release`, which undoes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from reprlib import repr as shortened
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.archive import AdapterFileError
from lightning_peft.interop.adopted import Adopted, AdoptedAdaLoRA, AdoptedLoRA
from lightning_peft.interop.peft_layers import (
    choose,
    config_of,
    has_adapter,
    lora_layers,
    lora_layers_or_none,
    require_adoptable,
)
from lightning_peft.rank.budget import BESIDE, RankBudget, clean_name
from lightning_peft.surgery.layers import KEPT, adapters


@dataclass(frozen=True)
class AdoptionReport:
    """What :func:`adopt` did; print it.

    Attributes:
        adapter_name: which adapter has gates now.
        adapted: names of its layers.
        trained: names of the parameters that are trained beside it, such as those of `modules_to_save`.
        capacity: components in all.
        parameters: trainable parameters of the adapter.
    """

    adapter_name: str
    adapted: tuple[str, ...]
    trained: tuple[str, ...]
    capacity: int
    parameters: int

    def __str__(self) -> str:
        lines = [
            f"Adopted {len(self.adapted)} layers of the PEFT adapter {self.adapter_name!r}: {self.capacity} "
            f"components, {self.parameters:,} trainable parameters."
        ]
        if not self.parameters:
            lines.append(
                "Its parameters are frozen, as PEFT loads them for inference: to train, load with "
                "PeftModel.from_pretrained(..., is_trainable=True)."
            )
        if self.trained:
            owners = dict.fromkeys(name.rpartition(".")[0] or name for name in self.trained)
            lines.append(f"Trained beside them: {', '.join(owners)}.")
        return "\n".join(lines)


def adopt(module: nn.Module, adapter_name: str | None = None) -> AdoptionReport:
    """Give the LoRA-type layers that PEFT injected gates, in place; the model stays the PEFT model that it is.

        PEFT's B (AdaLoRA: its E) reads as B diag(m), wherever PEFT reads it

    From then on policies, terms, monitors, checkpoints and exporters find these layers as they find ours, and PEFT's
    own forward goes on running: with its quantized bases, DoRA, and every other variant. Parameters and their names
    stay; `merge_and_unload`, `merge_adapter`, `disable_adapter` and `save_pretrained` give what the gated model gives.
    Only `state_dict()` holds B unmasked, beside the masks, so that training resumes exactly.

    Soft removal zeroes a component's column of B once (AdaLoRA: its entry of E; KaSA: of its diagonal).

    Args:
        module: a PeftModel, a module that has one inside, or one that PEFT's layers were injected into.
        adapter_name: the adapter that gets gates; ``None`` for the active one. Others stay as they are.

    Returns:
        What was done; print it.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
        ValueError: there is nothing to adopt, no adapter of this name, several are active, or it was adopted already.
        TypeError: a layer is of a kind of PEFT's that has no components, such as IA3's.
        RuntimeError: the adapter is merged or disabled, or it is called under inference mode.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), LoraConfig(r=4, target_modules=["0"]))
        >>> print(adopt(model))
        Adopted 1 layers of the PEFT adapter 'default': 4 components, 64 trainable parameters.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"adopt takes a PeftModel, or a module with one inside. Got a {type(module).__name__}.")
    if find_spec("peft") is None:
        raise ModuleNotFoundError(
            "adopt takes PEFT models, and PEFT is not installed: pip install 'lightning-peft[hf]'."
        )
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "adopt is called under torch.inference_mode, where masks could never be trained. Call it outside."
        )
    first = next(iter(adapters(module).items()), None)
    if first is not None:
        name, there = first
        raise ValueError(
            f"{type(module).__name__} is adopted already, the first layer at {name!r}: call release(model) first."
            if there.hosted
            else f"{type(module).__name__} has adapters that inject put in, the first at {name!r}: call eject first."
        )
    layers = lora_layers(module)
    chosen = choose(layers, adapter_name)
    found = {path: layer for path, layer in layers.items() if has_adapter(layer, chosen)}
    for path, layer in found.items():
        require_adoptable(path, layer, chosen)
    owner_of = _owners(module, found)
    for path, (_, owner) in owner_of.items():
        if isinstance(owner, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            raise ValueError(
                f"layer {clean_name(path)!r}: the gates would be one more entry of a {type(owner).__name__}, which "
                "calls or lists its entries. Call adopt on the module that holds it, or wrap it with get_peft_model."
            )
    views: list[Adopted] = []
    for path, layer in found.items():
        owner_path, owner = owner_of[path]
        kind: type[Adopted] = AdoptedAdaLoRA if hasattr(layer, "lora_E") else AdoptedLoRA
        view = kind(layer, chosen, config_of(owner, layer, chosen))
        _place(owner, path.removeprefix(f"{owner_path}." if owner_path else ""), view)
        views.append(view)
    for view in views:
        view.attach()
    for _, owner in dict(owner_of.values()).items():
        if hasattr(type(owner), "save_pretrained") and hasattr(owner, "peft_config"):
            owner.__dict__["save_pretrained"] = FoldedSave(owner)
    own = {id(p): p for view in views for _, p in view.own_parameters()}
    beside = tuple(clean_name(n) for n, p in module.named_parameters() if p.requires_grad and id(p) not in own)
    module.__dict__[KEPT] = beside
    budget = RankBudget.of(module)
    trainable = sum(p.numel() for p in own.values() if p.requires_grad)
    return AdoptionReport(chosen, tuple(budget), beside, budget.capacity, trainable)


def release(module: nn.Module) -> None:
    """Fold the masks into PEFT's tensors and take the gates off: a stock PEFT model of the same outputs is left.

    Components that were closed are zero from then on, and PEFT trains them again if it trains.

    Raises:
        ValueError: nothing was adopted.
    """
    found = [view for view in adapters(module).values() if isinstance(view, Adopted)]
    if not found:
        raise ValueError(
            f"release found nothing adopted in {type(module).__name__}; adopt(model) gives a PEFT model gates."
        )
    for view in found:
        if not view.gone:
            view.fold()
    _take_off(module, found)


def _take_off(module: nn.Module, views: list[Adopted]) -> None:
    for view in views:
        view.detach()
    for owner in list(module.modules()):
        if BESIDE in owner._modules:
            delattr(owner, BESIDE)
            owner.__dict__.pop(KEPT, None)
            if isinstance(owner.__dict__.get("save_pretrained"), FoldedSave):
                del owner.__dict__["save_pretrained"]
    module.__dict__.pop(KEPT, None)


class FoldedSave:
    """`save_pretrained` of an adopted model: what is written has the masks folded in. The model is not changed."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        state = kwargs.pop("state_dict", None)
        state = self.model.state_dict() if state is None else state
        return type(self.model).save_pretrained(self.model, *args, state_dict=folded(self.model, state), **kwargs)


def folded(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of an adopted module with the masks folded into its tensors, and without the masks.

    For PEFT's functions that are given one: `get_peft_model_state_dict(model, folded(model, model.state_dict()))`.
    """
    views = [view for view in adapters(module).values() if isinstance(view, Adopted)]
    dims = {id(view.gated_parameter()): (view, view._gated()[1]) for view in views}
    names = {
        clean_name(name): dims[id(p)] for name, p in module.named_parameters(remove_duplicate=False) if id(p) in dims
    }
    result = {}
    for key, value in state.items():
        if BESIDE in key.split("."):
            continue
        if clean_name(key) in names and isinstance(value, Tensor):
            view, dim = names[clean_name(key)]
            shape = [1] * value.dim()
            shape[dim] = -1
            value = value.masked_fill((view.gate.mask.detach().to(value.device) == 0).view(shape), 0.0)
        result[key] = value
    return result


def take_over(module: nn.Module, recipe: Mapping[str, Any], source: str) -> Callable[[], None]:
    """Adopt what a checkpoint's recipe asks for, before it is loaded; returns the undoing.

    Raises:
        AdapterFileError: the module has no PEFT layers, or no adapter of that name.
    """
    given = recipe["adapters"][0]["arguments"]
    name, config = str(given.get("adapter_name")), given.get("config")
    if find_spec("peft") is None or not lora_layers_or_none(module):
        settings = "..."
        if isinstance(config, dict):
            settings = ", ".join(f"{key}={shortened(value)}" for key, value in config.items() if key != "peft_type")
        raise AdapterFileError(
            f"{source} holds the adapter of a PEFT model, and {type(module).__name__} has no PEFT layers. Build it "
            f"first, as it was when it was trained: get_peft_model(base, {_config_class(config)}({settings}))."
        )
    try:
        adopt(module, name)
    except (ValueError, TypeError, RuntimeError) as error:
        raise AdapterFileError(f"{source} holds the PEFT adapter {name!r}: {error}") from error
    views = [view for view in adapters(module).values() if isinstance(view, Adopted)]
    return lambda: _take_off(module, views)


def _config_class(config: object) -> str:
    kind = config.get("peft_type") if isinstance(config, dict) else None
    return "AdaLoraConfig" if kind == "ADALORA" else "LoraConfig"


def _owners(module: nn.Module, layers: Mapping[str, Any]) -> dict[str, tuple[str, nn.Module]]:
    """Where the views of each layer are kept: the model around it that saves the adapter, or `module` itself.

    That is a PeftModel, or a transformers model that has got the adapter by its own `add_adapter`. Not in PEFT's own
    layers: all that is in one, PEFT takes for its adapter's state.
    """
    from peft import PeftModel

    models = {
        path: child
        for path, child in module.named_modules()
        if isinstance(child, PeftModel) or getattr(child, "_hf_peft_config_loaded", False)
    }
    found: dict[str, tuple[str, nn.Module]] = {}
    for path in layers:
        around = [name for name in models if not name or path.startswith(f"{name}.")]  # outermost first
        found[path] = (around[0], models[around[0]]) if around else ("", module)
    return found


def _place(owner: nn.Module, path: str, view: Adopted) -> None:
    parts = [BESIDE, *clean_name(path).split(".")]
    for part in parts[:-1]:
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        inner = owner._modules[part]
        assert inner is not None
        owner = inner
    owner.add_module(parts[-1], view)
