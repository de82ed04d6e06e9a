"""How adapters are laid out in PEFT's AdaLoRA format: A, E and B of every layer, one scale for all of them.

    PEFT computes y = W x + b + lora_alpha / (init_r + 1e-5) * B diag(E) A x

with as many triplets in a layer as its list in `rank_pattern` has ones. PEFT keeps init_r, not a layer's own rank, for
the scale, and adds 1e-5 to it: E makes up for both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.adapters.layers import is_transformers_conv1d
from lightning_peft.export import widened
from lightning_peft.interop.targets import PREFIX, Part, Target
from lightning_peft.interop.verify import CONFIG, WEIGHTS, require_close, take

ADDED = 1e-5
"""What PEFT adds to init_r before it divides by it."""


def lay_out_triplets(targets: list[Target]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the open triplets, and the part of the config that says their number and scale.

    Raises:
        TypeError: PEFT's AdaLoRA does not know such a layer.
    """
    parts = [_only(target) for target in targets]
    adapters = [part.adapter for part in parts if part.adapter is not None]
    widest = max(len(adapter.gate) for adapter in adapters)
    alpha = adapters[0].scaling * widest
    tensors: dict[str, Tensor] = {}
    pattern: dict[str, list[bool]] = {}
    for target, part, adapter in zip(targets, parts, adapters, strict=True):
        which = adapter.gate.open()
        wide = widened(adapter)
        with torch.no_grad():
            E = wide.value()[which] * ((widest + ADDED) / alpha)
            tensors[f"{part.key}.lora_A"] = wide.A[which].cpu().contiguous()
            tensors[f"{part.key}.lora_E"] = E[:, None].to(wide.A.dtype).cpu().contiguous()
            tensors[f"{part.key}.lora_B"] = wide.B[:, which].cpu().contiguous()
        pattern[f"{target.path}.lora_E"] = which.tolist() + [False] * (widest - len(which))
    config = {
        "peft_type": "ADALORA",
        "init_r": widest,
        "target_r": max(1, ceil(sum(part.rank for part in parts) / len(parts))),
        "lora_alpha": alpha,
        "rank_pattern": pattern,
        "use_dora": False,
        # Asked for by PEFT, and of no meaning for adapters whose ranks are final.
        "total_step": 1,
        "fan_in_fan_out": any(is_transformers_conv1d(adapter.base) for adapter in adapters),
    }
    return tensors, config


def _only(target: Target) -> Part:
    (part, *others) = target.parts
    base = nn.Module() if part.adapter is None else part.adapter.base
    if others or not (isinstance(base, (nn.Linear, nn.Conv2d)) or is_transformers_conv1d(base)):
        kind = "MultiheadAttention" if others else type(base).__name__
        raise TypeError(
            f"layer {target.path!r}: {kind} is no layer that PEFT's AdaLoRA adapts. Use mode='padded', 'compact' or "
            "'folded', which write the same update as PEFT's LoRA."
        )
    if part.has_lengths:
        raise TypeError(
            f"layer {target.path!r}: {type(part.adapter).__name__} trains the lengths of a weight's rows, which PEFT's "
            "AdaLoRA has not. Use mode='padded', 'compact' or 'folded'."
        )
    return part


def read_triplets(folder: Path, targets: list[Target], head: Mapping[str, Mapping[str, Tensor]]) -> tuple[float, str]:
    """Read the folder as PEFT would and compare every tensor with the module that it came from.

    Raises:
        RuntimeError: a tensor is missing, left over, or differs.
    """
    config, tensors = json.loads((folder / CONFIG).read_text(encoding="utf-8")), load_file(folder / WEIGHTS)
    scale, worst = config["lora_alpha"] / (config["init_r"] + ADDED), 0.0
    for target in targets:
        (part,) = target.parts
        A, E, B = (take(tensors, f"{part.key}.lora_{letter}") for letter in "AEB")
        worst = max(worst, require_close(scale * (B * E[:, 0]) @ A, part.update().cpu(), part.key))
    for name, kept in head.items():
        for key, tensor in kept.items():
            require_close(take(tensors, f"{PREFIX}{name}.{key}"), tensor, f"{name}.{key}")
    if tensors:
        raise RuntimeError(f"{WEIGHTS} holds tensors that belong nowhere: {', '.join(sorted(tensors)[:3])}.")
    return worst, "files read again and every tensor compared; PEFT did not load them"
