"""How large a PEFT folder's file of weights will be, before there are weights."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import ceil

from torch import Tensor, nn

from lightning_peft.adapters.sparse import Sparse
from lightning_peft.head_modules import refuse_head_modules
from lightning_peft.interop.hf_peft import kept_modules
from lightning_peft.interop.host import find_host, trained_beside, with_statistics
from lightning_peft.interop.shira import shira_rank
from lightning_peft.interop.sparse import described, metadata, parameter_name, stored_shape
from lightning_peft.interop.targets import PREFIX, all_targets, has_lengths
from lightning_peft.rank.budget import clean_name
from lightning_peft.surgery.layers import adapters

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
        if all(isinstance(adapter, Sparse) for adapter in adapters(host).values()):
            return None if share is not None else _shira_bytes(module, name, host, width)
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


def pairs_bytes(module: nn.Module, width: Callable[[Tensor], int]) -> int | None:
    """Bytes of the file of indices and deltas that `SparseAdapter.save` writes, head included; ``None`` if it cannot.

    Args:
        module: has adapters inside, on any device; its masks are not read.
        width: bytes of one number of a tensor.
    """
    try:
        _, host = find_host(module, "SparseAdapter.of")
    except ValueError:
        return None
    found = adapters(host)
    beside = trained_beside(host)
    if len(beside) < len(trained_beside(module)):
        return None
    tensors: list[tuple[str, tuple[float, ...], int]] = []
    shapes = {}
    for layer, adapter in found.items():
        if not isinstance(adapter, Sparse):
            return None
        key, indices = parameter_name(host, layer), adapter.indices
        shapes[key] = stored_shape(adapter)
        k = (float(indices.numel()),)
        tensors += [(f"{key}.indices", k, indices.element_size()), (f"{key}.delta", k, 4)]
    tensors += [(f"head.{n}", tuple(p.shape), width(p)) for n, p in beside.items()]
    return _file_bytes(tensors, metadata(shapes, described(next(iter(found.values())))))


def _shira_bytes(module: nn.Module, name: str, host: nn.Module, width: Callable[[Tensor], int]) -> int:
    """The file of PEFT's SHiRA format: two int32 and one float32 for every place that its r gives a layer."""
    refuse_head_modules(host, "to_hf_peft", "")
    head = kept_modules(module, name, host)
    head |= with_statistics(host, head)
    sizes = {n: (a.indices.numel(), stored_shape(a)) for n, a in adapters(host).items()}
    rank = shira_rank(sizes)
    tensors: list[tuple[str, tuple[float, ...], int]] = []
    for layer, (_, (d_out, d_in)) in sizes.items():
        k = float(rank * (d_out + d_in))
        tensors += [(f"{PREFIX}{layer}.shira_indices", (2, k), 4), (f"{PREFIX}{layer}.shira_weight", (k,), 4)]
    for kept, child in head.items():
        state = child.state_dict(keep_vars=True)
        tensors += [(f"{PREFIX}{kept}.{clean_name(key)}", tuple(t.shape), width(t)) for key, t in state.items()]
    return _file_bytes(tensors)


def _file_bytes(tensors: list[tuple[str, tuple[float, ...], int]], metadata: Mapping[str, str] | None = None) -> int:
    """A safetensors file: 8 bytes, the header as JSON filled up to a multiple of 8, the numbers."""
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
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
