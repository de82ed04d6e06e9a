"""A prompt out of a PEFT folder, as ours: what PEFT calls prompt tuning."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.prompts.soft_prompt import SoftPrompt
from lightning_peft.archive import AdapterFileError
from lightning_peft.export import own_random
from lightning_peft.heads import hub_models
from lightning_peft.interop.prompt_export import PREFIX, TENSOR
from lightning_peft.surgery.injection import install

Module = TypeVar("Module", bound=nn.Module)
# Options that say nothing about what the prompt computes, or that are read below. All others must be off.
_UNDERSTOOD = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers",
    "modules_to_save", "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
}  # fmt: skip


def put_prompt_in(module: Module, config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path) -> Module:
    """What :func:`lightning_peft.from_hf_peft` does with a folder of prompt tuning: a :class:`SoftPrompt` of the same.

    Raises:
        AdapterFileError: the folder holds what is not expressed here, or does not fit the model.
    """
    tensor, beside = _understood(config, tensors, folder)
    models = hub_models(module)
    if "" in models or len(models) != 1:
        found = ", ".join(map(repr, models)) or "none"
        raise AdapterFileError(
            f"{folder} holds a prompt, which stands in the place of a whole transformers model inside a module. There "
            f"{'is' if len(models) == 1 else 'are'} {'the module itself' if '' in models else found}: give a module "
            "that holds one, such as a LightningModule or nn.ModuleDict({'model': model})."
        )
    ((path, host),) = models.items()
    own = dict(host.state_dict(keep_vars=True))
    for name, value in beside.items():
        if name not in own or own[name].shape != value.shape:
            raise AdapterFileError(
                f"{folder}: {name!r} of shape {tuple(value.shape)} does not fit this model. Build it as it was "
                "trained, with as many labels."
            )

    @torch.no_grad()
    def build(base: nn.Module) -> Adapter:
        with own_random(base):  # its start is overwritten at once
            prompt = SoftPrompt(base, length=len(tensor), init="random")
        if prompt.width != tensor.shape[1]:
            raise AdapterFileError(
                f"{folder}: the prompt is of width {tensor.shape[1]}, and this model's embeddings of {prompt.width}."
            )
        prompt.P.copy_(tensor)
        return prompt

    kept = {f"{path}.{name}" for name in beside if isinstance(own[name], nn.Parameter)}
    install(module, {path: (host, build)}, lambda _: kept)
    with torch.no_grad():
        for name, value in beside.items():
            own[name].copy_(value)
    return module


def _understood(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], folder: Path
) -> tuple[Tensor, dict[str, Tensor]]:
    """The prompt, and the tensors beside it by their names in the model; or what is wrong."""
    on = [name for name, value in config.items() if value and name not in _UNDERSTOOD]
    if on:
        raise AdapterFileError(f"{folder}: the option {on[0]}={config[on[0]]!r} cannot be expressed here.")
    if config.get("num_transformer_submodules") not in (None, 1):
        raise AdapterFileError(
            f"{folder} has a prompt for the decoder as well (num_transformer_submodules="
            f"{config['num_transformer_submodules']!r}); here a prompt goes in front of the encoder's text alone."
        )
    if config.get("num_transformer_submodules") is None and config.get("task_type") == "SEQ_2_SEQ_LM":
        raise AdapterFileError(
            f"{folder}: num_transformer_submodules is not said, and for SEQ_2_SEQ_LM PEFT takes 2: a prompt for the "
            "decoder as well, which there is none of here."
        )
    tensor = tensors.get(TENSOR)
    if tensor is None or tensor.dim() != 2 or not tensor.is_floating_point() or 0 in tensor.shape:
        raise AdapterFileError(f"{folder} holds no {TENSOR!r}, a matrix of virtual tokens.")
    if len(tensor) != config.get("num_virtual_tokens"):
        raise AdapterFileError(
            f"{folder}: {TENSOR!r} has {len(tensor)} rows, and the config says num_virtual_tokens="
            f"{config.get('num_virtual_tokens')!r}."
        )
    odd = next((k for k, t in tensors.items() if t.is_floating_point() and not t.float().isfinite().all()), None)
    if odd is not None:
        raise AdapterFileError(f"{folder}: {odd!r} holds numbers that are not finite; use another copy.")
    beside = {name.removeprefix(PREFIX): value for name, value in tensors.items() if name != TENSOR}
    return tensor, beside
