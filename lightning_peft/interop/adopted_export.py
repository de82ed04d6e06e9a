"""An adopted PEFT model as a PEFT folder of true ranks: its own config and tensors, cut."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.export import require_whole
from lightning_peft.interop.adopted import Adopted, AdoptedAdaLoRA, AdoptedLoRA
from lightning_peft.interop.adoption import folded
from lightning_peft.interop.host import some, whole_modules, with_statistics
from lightning_peft.interop.layout import Mode, _number, _patterns, modules_to_save, target_modules
from lightning_peft.interop.targets import PREFIX
from lightning_peft.interop.verify import (
    WEIGHTS,
    _counted,
    _is_narrow,
    compare_outputs,
    load_with_peft,
    made_up_inputs,
    require_close,
)
from lightning_peft.rank.budget import clean_name
from lightning_peft.regularizers.base import Regularizer
from lightning_peft.surgery.layers import adapters, trained

_WRONG = "the export was checked and is not right"


@dataclass(frozen=True)
class AdoptedLayout:
    """What is written of an adopted model.

    Attributes:
        model: the PeftModel.
        views: its adopted adapters, by the paths of their layers in the base model.
        tensors: the file's tensors.
        config: the PEFT config, as plain values.
        head: modules that were trained beside the adapters and are in the file.
    """

    model: Any
    views: Mapping[str, Adopted]
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    head: tuple[str, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """Open components of every layer."""
        return {path: int(view.gate.open().sum()) for path, view in self.views.items()}

    @property
    def left_out(self) -> tuple[str, ...]:
        """Layers of which nothing is in the file."""
        return tuple(path for path in self.views if not any(key.startswith(f"{PREFIX}{path}.") for key in self.tensors))


def lay_out_adopted(module: nn.Module, mode: Mode, head: bool) -> AdoptedLayout:
    """Lay out the adopted model inside `module` in PEFT's format: of LoRA and DoRA, or of AdaLoRA.

        padded    LoRA: one rank for all, zeros behind.       AdaLoRA: its own format at full rank, closed E at zero
        compact   LoRA: true ranks, and alphas to match.      AdaLoRA: its own format, cut, with `rank_pattern`
        folded    LoRA: true ranks, one alpha, B rescaled.    AdaLoRA: as such a LoRA, E folded into B

    A DoRA layer without an open component keeps its magnitude, and one component of zeros to carry it.

    Raises:
        ValueError: mode is none of these, every layer is of rank 0, the module holds several PEFT models, or something
            trained cannot be expressed.
        TypeError: the adapter is of a variant that cannot be cut.
    """
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict

    if mode not in get_args(Mode):
        raise ValueError(f"mode={mode!r}: choose {', '.join(map(repr, get_args(Mode)))}.")
    require_whole(module, "to_hf_peft")
    models = [child for child in module.modules() if isinstance(child, PeftModel)]
    if len(models) != 1:
        raise ValueError(
            f"to_hf_peft writes one PeftModel, and {type(module).__name__} holds {len(models)}. Export each by itself; "
            "PEFT layers without a PeftModel are written by release(model) and PEFT's own functions."
        )
    model: Any = models[0]
    views = {name.removeprefix(PREFIX): view for name, view in adapters(model).items() if isinstance(view, Adopted)}
    name = next(iter(views.values())).adapter_name
    config = copy.deepcopy(model.peft_config[name])
    _require_cuttable(views, config)
    state = get_peft_model_state_dict(
        model, state_dict=folded(model, model.state_dict()), adapter_name=name, save_embedding_layers=False
    )
    kept = _modules_to_save(model, name) if head else ()
    whole = {f"{PREFIX}{path}." for path in _modules_to_save(model, name)}
    tensors = {
        key: value.detach().cpu().clone() for key, value in state.items() if head or not key.startswith(tuple(whole))
    }
    more = _kept_beside(module, model, name, set(state)) if head else {}
    for path, child in more.items():
        for key, value in child.state_dict().items():
            tensors[f"{PREFIX}{path}.{clean_name(key)}"] = value.detach().cpu().clone().contiguous()
    config.inference_mode = True
    if not head:
        config.modules_to_save, config.task_type = None, None
    if hasattr(config, "init_r") and mode != "folded":
        _cut_adalora(tensors, views, config, mode)
        values = config.to_dict()
    else:
        values = _cut_lora(tensors, views, config, mode, model.get_base_model())
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    if more:
        host = model.get_base_model()
        paths = [path for path in views if any(key.startswith(f"{PREFIX}{path}.") for key in tensors)]
        plain["modules_to_save"] = [*(plain["modules_to_save"] or ()), *modules_to_save(host, more, paths)]
    return AdoptedLayout(model, views, tensors, plain, (*kept, *more))


def _require_cuttable(views: Mapping[str, Adopted], config: Any) -> None:
    for path, view in views.items():
        if view.variant is not None and not view.variant.startswith("Dora"):
            raise TypeError(
                f"layer {path!r}: to_hf_peft does not cut PEFT's {view.variant.removesuffix('LinearVariant')}. "
                "model.save_pretrained(folder) writes it at its rank, closed components at zero."
            )
    start = config.init_lora_weights
    if isinstance(start, str) and start not in ("gaussian", "orthogonal", "eva"):
        raise TypeError(
            f"init_lora_weights={start!r} changed the base by as much as the adapter's rank says, and PEFT does so "
            "again when it loads. model.save_pretrained(folder) writes it at its rank, closed components at zero."
        )


def _kept_beside(module: nn.Module, model: Any, name: str, written: set[str]) -> dict[str, nn.Module]:
    """What training changed and PEFT does not write by itself, by path in the base: whole modules and statistics.

    Raises:
        ValueError: something trained is outside the PeftModel, or is not a whole module.
    """
    base = model.get_base_model()
    inside = {id(p) for p in model.parameters()}
    # Noted at adoption: a module that was frozen since has been trained all the same.
    skipped = {id(p) for view in adapters(module).values() for _, p in view.own_parameters()}
    skipped |= {id(p) for term in module.modules() if isinstance(term, Regularizer) for p in term.parameters()}
    beside = {clean_name(n): p for n, p in trained(module).items() if id(p) not in skipped}
    outside = [n for n, p in beside.items() if id(p) not in inside]
    if outside:
        raise ValueError(
            f"trained beside the adapters, but outside the PeftModel: {some(outside)}. A PEFT folder describes that "
            "model alone: give head=False and save them yourself."
        )
    known = {id(p) for path in _modules_to_save(model, name) for p in base.get_submodule(path).parameters()}
    for layer in base.modules():  # of other adapters in the same layers
        if isinstance(inner := getattr(layer, "base_layer", None), nn.Module):
            known |= {id(p) for p in layer.parameters()} - {id(p) for p in inner.parameters()}
    wanted = {id(p) for p in beside.values()} - known
    names = {clean_name(n): p for n, p in base.named_parameters() if id(p) in wanted}
    # PEFT writes biases that its config trains, those of adapted layers without the part of the name that is its own.
    rest = {
        n: p for n, p in names.items() if not {f"{PREFIX}{n}", f"{PREFIX}{n.replace('.base_layer.', '.')}"} & written
    }
    whole, parts = whole_modules(base, {n: p for n, p in rest.items() if ".base_layer." not in n})
    parts = [n for n in rest if ".base_layer." in n or n in parts]
    if parts:
        raise ValueError(
            f"trained beside the adapters, but not a whole module: {some(parts)}. PEFT keeps whole modules only: name "
            "the module in modules_to_save, or give head=False and save them yourself."
        )
    return whole | with_statistics(base, {*whole, *_modules_to_save(model, name)})


def _modules_to_save(model: Any, name: str) -> tuple[str, ...]:
    base = model.get_base_model()
    return tuple(path for path, child in base.named_modules() if name in getattr(child, "modules_to_save", ()))


def _cut_adalora(tensors: dict[str, Tensor], views: Mapping[str, Adopted], config: Any, mode: Mode) -> None:
    """AdaLoRA's own format, in place. PEFT takes as many components from each layer as `rank_pattern` has True."""
    pattern: dict[str, list[bool]] = {}
    for path, view in views.items():
        key = PREFIX + path
        open_ = (view.gate.open() if mode == "compact" else torch.ones(view.rank, dtype=torch.bool)).cpu()
        tensors[f"{key}.lora_A"] = tensors[f"{key}.lora_A"][open_].contiguous()
        tensors[f"{key}.lora_E"] = tensors[f"{key}.lora_E"][open_].contiguous()
        tensors[f"{key}.lora_B"] = tensors[f"{key}.lora_B"][:, open_].contiguous()
        k = int(open_.sum())
        # Which ones does not matter: they are overwritten by the k that are in the file.
        pattern[f"{path}.lora_E"] = [True] * k + [False] * (config.init_r - k)
    config.rank_pattern = pattern if not all(all(row) for row in pattern.values()) else None


def _cut_lora(
    tensors: dict[str, Tensor], views: Mapping[str, Adopted], config: Any, mode: Mode, host: nn.Module
) -> dict[str, Any]:
    """LoRA's format, in place; returns the config's values."""
    from peft import LoraConfig

    # A magnitude or a bias acts without any component.
    carries = bool(config.use_dora or config.lora_bias)
    ranks = {path: max(int(view.gate.open().sum()), int(carries)) for path, view in views.items()}
    kept = [path for path, rank in ranks.items() if rank]
    if not kept:
        raise ValueError(
            f"all {len(views)} adopted layers are of rank 0, so there is no adapter to write: the model is its base. "
            "Train before exporting (AdaLoRA's E starts at 0), or raise the budget."
        )
    widest = max(ranks.values())
    s = next(iter(views.values())).scaling
    alphas: dict[str, float] = {}
    for path, view in views.items():
        key, rank = PREFIX + path, widest if mode == "padded" else ranks[path]
        for old in [old for old in tensors if old.startswith((f"{key}.lora_A", f"{key}.lora_B", f"{key}.lora_E"))]:
            if not old.endswith(".bias") or not ranks[path]:
                del tensors[old]
        if not ranks[path]:
            for old in [old for old in tensors if old.startswith(f"{key}.lora_embedding_")]:
                del tensors[old]
            continue
        alphas[path] = s * rank if mode == "compact" else s * widest
        factor = view.scaling * rank / alphas[path]
        A, B = (tensor.float().cpu() for tensor in view.factors())
        short = rank - A.shape[0]
        A, B = F.pad(A, (0, 0, 0, short)), F.pad(B * factor, (0, short))
        if isinstance(view.base, nn.Embedding):
            names = f"{key}.lora_embedding_A", f"{key}.lora_embedding_B"
        else:
            names = f"{key}.lora_A.weight", f"{key}.lora_B.weight"
            kernel = getattr(view.base, "kernel_size", ())
            A = A.reshape(rank, -1, *kernel) if kernel else A
            B = B.reshape(*B.shape, *(1,) * len(kernel))
        tensors[names[0]], tensors[names[1]] = A.contiguous(), B.contiguous()
        if f"{key}.lora_B.bias" in tensors:
            tensors[f"{key}.lora_B.bias"] *= factor
    values = {k: v for k, v in config.to_dict().items() if k in LoraConfig.__dataclass_fields__}
    used = {path: widest if mode == "padded" else ranks[path] for path in kept}
    return values | {
        "peft_type": "LORA",
        "r": widest,
        "lora_alpha": _number(s * widest),
        "rank_pattern": _patterns({path: rank for path, rank in used.items() if rank != widest}, kept),
        "alpha_pattern": _patterns({p: _number(a) for p, a in alphas.items() if a != s * widest}, kept),
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": target_modules(host, kept),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }


def load_adopted(folder: Path, layout: AdoptedLayout, inputs: Any) -> tuple[float, str]:
    """Load the folder with stock PEFT on a copy of the base, and compare updates and outputs with the model's.

    The copy's head is changed first, so that a head that is not loaded is noticed. In float32 or wider throughout.

    Raises:
        RuntimeError: they differ.
    """
    ours, name = layout.model, next(iter(layout.views.values())).adapter_name
    if _is_narrow(ours) or list(ours.active_adapters) != [name]:
        ours = copy.deepcopy(ours)
        ours.set_adapter(name)
        if _is_narrow(ours):
            ours = ours.float()
    base = copy.deepcopy(ours).unload()
    theirs = load_with_peft(folder, base, layout.head)
    worst = 0.0
    loaded: Any = theirs.get_base_model()
    source: Any = ours.get_base_model()
    own = {name.removeprefix(PREFIX): view for name, view in adapters(ours).items() if isinstance(view, Adopted)}
    for path, view in own.items():
        worst = max(worst, require_close(_update(loaded.get_submodule(path), view), view.update().detach(), path))
    samples = [inputs] if inputs is not None else made_up_inputs(source)
    difference = compare_outputs(ours, theirs, samples, given=inputs is not None)
    if difference is None:
        return worst, "loaded with stock PEFT on a copy of the base; updates of every layer compared, outputs not"
    return difference, f"loaded with stock PEFT on a copy of the base; outputs compared on {_counted(len(samples))}"


def _update(layer: Any, wanted: Adopted) -> Tensor:
    """The update of a layer that stock PEFT has loaded; zero where it has none."""
    # Not its `get_delta_weight`, which knows no 1x1x1 convolution.
    if not hasattr(layer, "lora_A") or not layer.r["default"]:
        return torch.zeros_like(wanted.update())
    kind = AdoptedAdaLoRA if hasattr(layer, "lora_E") else AdoptedLoRA
    return kind(layer, "default", {}).update().detach()


def read_adopted(folder: Path, layout: AdoptedLayout) -> tuple[float, str]:
    """Read the folder again and compare every tensor.

    Raises:
        RuntimeError: one is missing or differs.
    """
    read = load_file(folder / WEIGHTS)
    for name, tensor in layout.tensors.items():
        if name not in read or not torch.equal(read[name], tensor):
            raise RuntimeError(f"{_WRONG}: {name} was not written as it is. Nothing was written.")
    return 0.0, "files read again and every tensor compared; PEFT did not load them"
