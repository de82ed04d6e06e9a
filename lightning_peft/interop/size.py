"""How large a PEFT folder's file of weights will be, before there are weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from math import ceil

from torch import Tensor, nn

from lightning_peft.head_modules import refuse_head_modules
from lightning_peft.interop.hf_peft import kept_modules
from lightning_peft.interop.host import find_host, with_statistics
from lightning_peft.interop.targets import PREFIX, all_targets, has_lengths
from lightning_peft.rank.budget import clean_name

_DTYPES = {1: "U8", 2: "F16", 4: "F32", 8: "F64"}


def exported_bytes(module: nn.Module, share: float | None, width: Callable[[Tensor], int]) -> int | None:
    """Bytes of `adapter_model.safetensors` as `to_hf_peft` writes it, head included; ``None`` where it refuses to.

    Args:
        module: has adapters inside, on any device; its masks are not read.
        share: the share of its components that every layer has, for true ranks (modes "compact" and "folded").
            ``None`` is the widest layer's rank everywhere (mode "padded").
        width: bytes of one number of a tensor.
    """
    try:
        name, host = find_host(module, "to_hf_peft")
        targets = all_targets(host)
        refuse_head_modules(host, "to_hf_peft", "")
        head = kept_modules(module, name, host)
        head |= with_statistics(host, head)
    except (TypeError, ValueError):  # not a fault: the adapters are trained and merged all the same
        return None
    capacity = [
        max((len(part.adapter.gate) for part in target.parts if part.adapter is not None), default=0)
        for target in targets
    ]
    tensors: list[tuple[str, tuple[float, ...], int]] = []
    for target, n in zip(targets, capacity, strict=True):
        rank = max(capacity) if share is None else share * n
        for part in target.parts:
            name_a, name_b = part.names()
            # Narrower adapters are widened; an attention's other projection is zeros in float32.
            bytes_each = 4 if part.adapter is None else max(4, width(part.adapter.A))
            inner, outer = part.shapes(float(rank))
            tensors += [(name_a, inner, bytes_each), (name_b, outer, bytes_each)]
            if has_lengths(targets):
                tensors.append((part.lengths_name, part.lengths_shape, bytes_each))
    for kept, child in head.items():
        state = child.state_dict(keep_vars=True)
        tensors += [(f"{PREFIX}{kept}.{clean_name(key)}", tuple(t.shape), width(t)) for key, t in state.items()]
    return _file_bytes(tensors)


def _file_bytes(tensors: list[tuple[str, tuple[float, ...], int]]) -> int:
    """A safetensors file: 8 bytes, the header as JSON filled up to a multiple of 8, the numbers."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0.0
    for name, shape, width in tensors:
        size = float(width)
        for length in shape:
            size *= length
        offsets = [round(end), round(end + size)]
        header[name] = {"dtype": _DTYPES[width], "shape": [ceil(n) for n in shape], "data_offsets": offsets}
        end += size
    text = len(json.dumps(header, separators=(",", ":")).encode())
    return 8 + ceil(text / 8) * 8 + round(end)
