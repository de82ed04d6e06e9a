"""Adapters out of a PEFT folder, as ours: LoRA, its weight-decomposed form, AdaLoRA, and prompts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import partial
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.adapters.adalora import AdaLoRA
from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.layers import is_convolution, matrix
from lightning_peft.adapters.lora import LoRA
from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.adapters.weight_decomposed import WeightDecomposed
from lightning_peft.archive import AdapterFileError, unreadable
from lightning_peft.heads import hub_models
from lightning_peft.interop.prompt_import import put_prompt_in
from lightning_peft.interop.targets import PREFIX
from lightning_peft.interop.triplets import ADDED
from lightning_peft.interop.verify import CONFIG, WEIGHTS, first_match
from lightning_peft.rank.budget import clean_name
from lightning_peft.surgery.injection import install
from lightning_peft.surgery.layers import adaptable

Module = TypeVar("Module", bound=nn.Module)

# Options that say nothing about what the adapters compute, or that are read below. All others must be off.
_UNDERSTOOD = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config", "eva_config", "init_lora_weights",
    "bias", "target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
    "ensure_weight_tying",
}  # fmt: skip
# Ways to start that leave the base as it is. PiSSA, OLoRA, CorDA and LoftQ change it: adapters alone are not enough.
_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
# Suffixes of tensors, longest first; what stands before is the layer's path.
_SUFFIXES = {
    ".lora_A.weight": "A", ".lora_B.weight": "B", ".lora_embedding_A": "A", ".lora_embedding_B": "B",
    ".lora_magnitude_vector": "magnitude", ".lora_magnitude_vector.weight": "magnitude",
    ".lora_A": "A", ".lora_B": "B", ".lora_E": "E",
}  # fmt: skip
# A name as a regular expression, perhaps for the end of a path. Any other could be made to take for ever.
_NAME = r"(\.\*)?\^?(\\.|[^\\^$*+?{}\[\]|()])*"


@dataclass(frozen=True)
class _Layer:
    """One layer of the file: its tensors by role, and the scale of its update."""

    tensors: Mapping[str, Tensor]
    scale: float

    @property
    def rank(self) -> int:
        return self.tensors["A"].shape[0]


def from_hf_peft(module: Module, folder: str | Path) -> Module:
    """Put the adapters of a PEFT folder into a model, as ours and with equal outputs, to train on, prune or export.

        LoRA       y = W x + b + lora_alpha / r B A x      with PEFT's rank and alpha patterns, or rank-stabilised
        use_dora   :class:`~lightning_peft.WeightDecomposed`
        AdaLoRA    y = W x + b + lora_alpha / (init_r + 1e-5) B diag(E) A x,      its layers of rank 0 left plain
        prompts    :class:`~lightning_peft.SoftPrompt`, around the one transformers model that the module holds

    Of LoRA, a rank beyond a layer's smaller side, such as an exported :class:`~lightning_peft.RLoRA` has, becomes that
    side: the same update in as many components as it can have.

    Nothing but tensors and the config is read: `adapter_model.safetensors`, never a pickle. The modules that PEFT saved
    beside the adapters (`modules_to_save`) are loaded into the model's own and stay trainable; all else is frozen, as
    :func:`lightning_peft.inject` does. What cannot be expressed is refused by name, before anything is changed.

    Args:
        module: the base: the model that the adapters were trained on, or a module that holds it.
        folder: adapter_config.json and adapter_model.safetensors, by `save_pretrained` or :func:`to_hf_peft`.

    Returns:
        The module.

    Raises:
        AdapterFileError: a file is missing or damaged, holds an option or a layer that cannot be expressed, or does not
            fit the model.
        ValueError: the module has adapters already, or a layer is too small for its rank of AdaLoRA.
        TypeError: a layer is of a kind that cannot be adapted.
    """
    folder = Path(folder)
    if any(isinstance(child, Adapter) for child in module.modules()):
        raise ValueError(f"{type(module).__name__} has adapters already: give from_hf_peft the plain model.")
    config, tensors = _read(folder)
    if config["peft_type"] == "PROMPT_TUNING":
        return put_prompt_in(module, config, tensors, folder)
    layers, beside = _layers(folder, config, tensors)
    host = _find_host(module, layers, beside, folder)
    found = adaptable(host)
    for name, layer in layers.items():
        _require_shapes(name, layer, found[name], folder)
    own = dict(host.state_dict(keep_vars=True))
    inside = tuple(f"{name}." for name in layers)
    wanted = [name for name in own if not name.startswith(inside) and _whole(name, config)]
    if lost := [name for name in wanted if name not in beside]:
        raise AdapterFileError(
            f"{folder}: modules_to_save asks for {lost[0]!r}, and {WEIGHTS} has no such tensor: it is cut, or was "
            "written without its head."
        )
    for name, tensor in beside.items():
        if own[name].is_floating_point() != tensor.is_floating_point():
            raise AdapterFileError(
                f"{folder}: {name!r} is of dtype {tensor.dtype}, and in this model of {own[name].dtype}."
            )
        if own[name].shape != tensor.shape:
            raise AdapterFileError(
                f"{folder}: {name!r} is of shape {tuple(tensor.shape)}, and in this model of {tuple(own[name].shape)}. "
                "Build the model as it was trained, with as many labels."
            )
    kept = [name for name in beside if isinstance(own[name], nn.Parameter) and _to_save(name, config)]
    dropout = float(config.get("lora_dropout") or 0.0)
    plan = {name: (found[name], _factory(layer, dropout)) for name, layer in layers.items()}
    install(host, plan, lambda _: [clean_name(name) for name in kept])
    with torch.no_grad():
        for name, tensor in beside.items():
            own[name].copy_(tensor)
    return module


def _factory(layer: _Layer, dropout: float) -> Callable[[nn.Module], Adapter]:
    kind: type[LowRank] = (
        AdaLoRA if "E" in layer.tensors else WeightDecomposed if "magnitude" in layer.tensors else LoRA
    )

    @torch.no_grad()
    def build(base: nn.Module) -> Adapter:
        d_out, d_in = matrix(base).shape
        A, B = layer.tensors["A"].reshape(layer.rank, d_in), layer.tensors["B"].reshape(d_out, layer.rank)
        if "E" not in layer.tensors:
            A, B = _usable(A, B)
        adapter = partial(kind, rank=len(A), alpha=layer.scale * len(A), dropout=dropout)(base)
        adapter.A.copy_(A)
        adapter.B.copy_(B)
        if "E" in layer.tensors:
            assert adapter.gate.gain is not None
            adapter.gate.gain.copy_(layer.tensors["E"].flatten())
        if isinstance(adapter, WeightDecomposed):
            adapter.magnitude.weight.copy_(layer.tensors["magnitude"].flatten())
        return adapter

    return build


def _usable(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of the same product, up to rounding, with no more components than it can have: min(d_in, d_out).

    With A = Q T or B^T = Q T, Q with orthonormal columns:  B A = (B Q) T  or  T^T (Q^T A).
    """
    rank, d_in = A.shape
    if rank <= min(d_in, len(B)):
        return A, B
    wide_A, wide_B = A.double(), B.double()
    if d_in <= len(B):
        Q, T = torch.linalg.qr(wide_A)
        return T.to(A.dtype), (wide_B @ Q).to(B.dtype)
    Q, T = torch.linalg.qr(wide_B.mT)
    return (Q.mT @ wide_A).to(A.dtype), T.mT.to(B.dtype)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if not (folder / CONFIG).is_file():
        raise AdapterFileError(f"{folder} holds no {CONFIG}: it is no folder that PEFT has written.")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterFileError(unreadable(folder / CONFIG, error)) from error
    if not isinstance(config, dict) or config.get("peft_type") not in ("LORA", "ADALORA", "PROMPT_TUNING"):
        kind = config.get("peft_type") if isinstance(config, dict) else config
        raise AdapterFileError(f"{folder}: peft_type={kind!r} cannot be read; LORA, ADALORA and PROMPT_TUNING can.")
    if not (folder / WEIGHTS).is_file():
        other = "adapter_model.bin"
        also = (
            f" {other} is a pickle, which can run code: load it with PEFT and save it again."
            * (folder / other).is_file()
        )
        raise AdapterFileError(f"{folder} holds no {WEIGHTS}, the one file of weights that is read.{also}")
    if config["peft_type"] != "PROMPT_TUNING":  # which has other options
        _require_understood(config, folder)
    try:
        return config, load_file(folder / WEIGHTS)
    except Exception as error:
        raise AdapterFileError(unreadable(folder / WEIGHTS, error)) from error


def _require_understood(config: Mapping[str, Any], folder: Path) -> None:
    """Check that every option is one that is expressed here, or off.

    Raises:
        AdapterFileError: one is not.
    """
    on = [name for name, value in config.items() if value and name not in _UNDERSTOOD]
    if config.get("bias", "none") != "none":
        on.append("bias")
    if config.get("init_lora_weights") not in _STARTS:
        on.append("init_lora_weights")
    if on:
        raise AdapterFileError(
            f"{folder}: the option {on[0]}={config[on[0]]!r} cannot be expressed here. Merge the adapter with PEFT "
            "(merge_and_unload) and adapt the merged model."
        )
    numbers = ["init_r"] if config["peft_type"] == "ADALORA" else ["r"]
    for name in (*numbers, "lora_alpha"):
        _require_number(config.get(name), name, folder)
    adalora = config["peft_type"] == "ADALORA"
    if adalora and config.get("use_dora"):
        raise AdapterFileError(f"{folder}: AdaLoRA with use_dora={config['use_dora']!r}, which PEFT has not.")
    dropout = config.get("lora_dropout") or 0.0
    if type(dropout) not in (int, float) or not 0 <= dropout < 1:
        raise AdapterFileError(f"{folder}: lora_dropout={dropout!r} is no probability in [0, 1).")
    for name, kind in (("rank_pattern", dict), ("alpha_pattern", dict), ("modules_to_save", list)):
        if not isinstance(config.get(name) or kind(), kind):
            raise AdapterFileError(f"{folder}: {name}={config[name]!r} is no {kind.__name__}.")
    for name in ["alpha_pattern"] if adalora else ["alpha_pattern", "rank_pattern"]:
        for pattern, value in (config.get(name) or {}).items():
            if not _is_name(pattern):
                raise AdapterFileError(
                    f"{folder}: {name} has the general expression {pattern!r}; names and '.*name' are read."
                )
            _require_number(value, f"{name}[{pattern!r}]", folder)


def _is_name(pattern: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({pattern})$")  # an escape may be none that there is
    except re.error:
        return False
    return re.fullmatch(_NAME, pattern) is not None


def _require_number(value: Any, name: str, folder: Path) -> None:
    if type(value) not in (int, float) or not (isfinite(value) and 0 < value < 2**31):
        raise AdapterFileError(f"{folder}: {name}={value!r} is no positive number.")


def _layers(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[dict[str, _Layer], dict[str, Tensor]]:
    """The adapted layers by path, without those of rank 0, and all other tensors by their name in the model."""
    parts: dict[str, dict[str, Tensor]] = {}
    beside: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() and "lora_" in key:
            raise AdapterFileError(f"{folder}: {key!r} is of dtype {tensor.dtype}, which no adapter has.")
        if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.isfinite().all():
            raise AdapterFileError(f"{folder}: {key!r} holds numbers that are not finite; use another copy.")
        path = key.removeprefix(PREFIX)
        suffix = next((suffix for suffix in _SUFFIXES if path.endswith(suffix)), None)
        if suffix is None:
            beside[path] = tensor
        else:
            own = parts.setdefault(path.removesuffix(suffix), {})
            if _SUFFIXES[suffix] in own:
                raise AdapterFileError(f"{folder}: {key!r} is there twice, under another name as well.")
            own[_SUFFIXES[suffix]] = tensor
    # PEFT writes the weight of an adapted embedding too, which in its own model is one level down.
    beside = {_base_name(name, parts): tensor for name, tensor in beside.items()}
    if not parts:
        raise AdapterFileError(f"{folder / WEIGHTS} holds no adapter.")
    adalora, decomposed = config["peft_type"] == "ADALORA", bool(config.get("use_dora"))
    wanted = {"A", "B"} | ({"E"} if adalora else set()) | ({"magnitude"} if decomposed else set())
    layers = {}
    for path, own in parts.items():
        if set(own) != wanted:
            raise AdapterFileError(
                f"{folder}: the layer {path!r} has {', '.join(sorted(own))}, and needs {', '.join(sorted(wanted))}."
            )
        rank = own["A"].shape[0] if own["A"].ndim else 0
        alpha = first_match(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
        if adalora:
            if rank == 0:
                continue
            pattern = (config.get("rank_pattern") or {}).get(f"{path}.lora_E")
            if pattern is not None and not isinstance(pattern, list):
                raise AdapterFileError(f"{folder}: rank_pattern[{path + '.lora_E'!r}]={pattern!r} is no list.")
            said = config["init_r"] if pattern is None else sum(map(bool, pattern))
            scale = config["lora_alpha"] / (config["init_r"] + ADDED)
        else:
            said = first_match(config.get("rank_pattern") or {}, path, config["r"])
            scale = alpha / (sqrt(said) if config.get("use_rslora") else said)
        if said != rank:
            raise AdapterFileError(f"{folder}: the layer {path!r} is of rank {rank}, and {CONFIG} says {said}.")
        layers[path] = _Layer(own, scale)
    return layers, beside


def _whole(name: str, config: Mapping[str, Any]) -> bool:
    """Whether a tensor is of a module that `modules_to_save` names in full, so that PEFT would ask for it."""
    return any(f".{end}." in f".{name}" for end in config.get("modules_to_save") or ())


def _base_name(name: str, adapted: Container[str]) -> str:
    """A tensor's name in the plain model; one that would be an adapted layer's there, and is not in PEFT's, is left."""
    path, _, last = name.rpartition(".")
    layer = path.removesuffix(".base_layer")
    if layer in adapted:
        return f"{layer}.{last}" if layer != path else f"{path}.(adapted).{last}"
    return name


def _to_save(name: str, config: Mapping[str, Any]) -> bool:
    """Whether PEFT trains the module of this name, or one around it, beside the adapters: it goes by ends of names."""
    parts = name.split(".")
    ends = tuple(map(str, config.get("modules_to_save") or ()))
    return any(".".join(parts[:i]).endswith(ends) for i in range(1, len(parts) + 1)) if ends else False


def _find_host(module: nn.Module, layers: Mapping[str, Any], beside: Mapping[str, Any], folder: Path) -> nn.Module:
    """The model in `module` in which the file's names are right."""
    missing: list[str] = []
    for host in (*hub_models(module).values(), module):
        names, state = adaptable(host), host.state_dict()
        lost = [name for name in layers if name not in names] + [name for name in beside if name not in state]
        if not lost:
            return host
        missing = missing or lost
    raise AdapterFileError(
        f"{folder}: {type(module).__name__} has no layer {missing[0]!r} that can be adapted or loaded, and "
        f"{len(missing) - 1} others are missing as well. Give the model that the adapters were trained on. Adapters of "
        "Linear, Conv1D, Embedding and convolutions are read, those of torch's attentions are not."
    )


def _require_shapes(name: str, layer: _Layer, base: nn.Module, folder: Path) -> None:
    if isinstance(base, nn.MultiheadAttention):
        raise AdapterFileError(f"{folder}: {name!r} is a MultiheadAttention, whose adapters are not read.")
    d_out, d_in = matrix(base).shape
    A, B = layer.tensors["A"], layer.tensors["B"]
    fits = A.numel() == layer.rank * d_in and B.ndim >= 2 and B.shape[:2] == (d_out, layer.rank)
    fits = fits and B.numel() == d_out * layer.rank and (is_convolution(base) or A.ndim == B.ndim == 2)
    sizes = {"E": layer.rank, "magnitude": d_out}
    if not fits or any(layer.tensors[key].numel() != size for key, size in sizes.items() if key in layer.tensors):
        raise AdapterFileError(
            f"{folder}: the adapter of {name!r} has A {tuple(A.shape)} and B {tuple(B.shape)}, which does not fit "
            f"a layer of {d_in} inputs and {d_out} outputs. Give the model that it was trained on."
        )
