"""Sparse adapters in PEFT's SHiRA format, where every layer has as many entries as r components of LoRA have numbers.

PEFT computes  y = (W + sum_j delta_j e_{r_j} e_{c_j}^T) x + b  with indices that it reads from the file, so whatever
drew them is exact there; what is left over of r (d_out + d_in) entries is filled with zeros at the first entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_peft.adapters.attention import AdaptedAttention
from lightning_peft.functional.sparse_arithmetic import SparseDelta
from lightning_peft.interop.host import plain_copy
from lightning_peft.interop.targets import PREFIX
from lightning_peft.interop.verify import (
    WEIGHTS,
    Head,
    compare_outputs,
    load_with_peft,
    made_up_inputs,
    require_close,
    take,
)
from lightning_peft.surgery.removal import eject


def shira_rank(sizes: Mapping[str, tuple[int, tuple[int, ...]]]) -> int:
    """The least r with room for all entries of every layer.

    Args:
        sizes: layer -> how many entries it has, and the shape of its weight.

    Raises:
        TypeError: a weight is no matrix of a linear layer.
        ValueError: r (d_out + d_in) would be more than a layer has.
    """
    ranks = {name: max(1, ceil(k / sum(shape))) for name, (k, shape) in sizes.items()}
    most = max(ranks, key=lambda name: ranks[name])
    rank = ranks[most]
    for name, (_, (d_out, d_in)) in sizes.items():
        if rank * (d_out + d_in) > d_out * d_in:
            raise ValueError(
                f"PEFT's SHiRA has one r for all layers, and r={rank}, which {most!r} needs, is more than the layer "
                f"{name!r} of {d_out} x {d_in} can have. Save a SparseAdapter, or the merged model with save_merged."
            )
    return rank


def lay_out_sparse(host: nn.Module, deltas: Mapping[str, SparseDelta]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and the part of the config that says their number.

    Args:
        host: the model, with its adapters.
        deltas: layer -> what its entries are changed by.

    Raises:
        TypeError: a layer is no linear one.
        ValueError: nothing is changed, or PEFT has no room for it.
    """
    for name in deltas:
        base: Any = host.get_submodule(name).base if _has(host, name) else None
        # An attention's input projection is a layer only while it is adapted.
        inside = isinstance(host.get_submodule(name.rpartition(".")[0]), AdaptedAttention)
        if type(base) is not nn.Linear or inside:
            raise TypeError(
                f"layer {name!r} cannot be written for PEFT, whose SHiRA takes nn.Linear alone. Save a SparseAdapter, "
                "or the merged model with save_merged."
            )
    kept = {name: delta for name, delta in deltas.items() if len(delta.indices)}
    if not kept:
        raise ValueError("no entry of any adapter is open, so there is nothing to write.")
    rank = shira_rank({name: (len(delta.indices), delta.shape) for name, delta in kept.items()})
    tensors: dict[str, Tensor] = {}
    for name, delta in kept.items():
        d_out, d_in = delta.shape
        left = rank * (d_out + d_in) - len(delta.indices)
        where = torch.cat([delta.indices, delta.indices.new_zeros(left)])
        rows = torch.stack([where // d_in, where % d_in]).to(torch.int32)
        tensors[f"{PREFIX}{name}.shira_indices"] = rows
        tensors[f"{PREFIX}{name}.shira_weight"] = torch.cat([delta.delta.float(), torch.zeros(left)])
    return tensors, {
        "peft_type": "SHIRA",
        "r": rank,
        "mask_type": "random",
        "random_seed": None,
        "fan_in_fan_out": False,
        "init_weights": True,
    }


def _has(host: nn.Module, name: str) -> bool:
    return any(path == name for path, _ in host.named_modules())


def load_shira(
    folder: Path, host: nn.Module, deltas: Mapping[str, SparseDelta], head: Head, inputs: Any
) -> tuple[float, str]:
    """Load the folder with stock PEFT on a copy of the base and compare it with the module that it came from.

    Returns:
        The largest difference in outputs, or in updates where there are no inputs; and what was compared.

    Raises:
        RuntimeError: they differ.
    """
    with torch.sparse.check_sparse_tensor_invariants(True):  # torch warns where nobody says whether it should
        return _load_shira(folder, host, deltas, head, inputs)


@torch.no_grad()
def _load_shira(
    folder: Path, host: nn.Module, deltas: Mapping[str, SparseDelta], head: Head, inputs: Any
) -> tuple[float, str]:
    base = plain_copy(host)
    eject(base)
    ours: nn.Module = host
    if any(p.is_floating_point() and p.element_size() < 4 for p in host.parameters()):
        ours, base = plain_copy(host).float(), base.float()
    theirs = load_with_peft(folder, base, head)
    loaded: Any = theirs.base_model.model
    worst = 0.0
    for name, delta in deltas.items():
        if len(delta.indices):
            got = loaded.get_submodule(name).get_delta_weight("default").to_dense()
            worst = max(worst, require_close(got, _dense(delta).to(got.device), name))
    for name, kept in head.items():
        got_state = loaded.get_submodule(name).modules_to_save["default"].state_dict()
        for key, tensor in kept.items():
            require_close(got_state[key], tensor, f"{name}.{key}")
    samples = [inputs] if inputs is not None else made_up_inputs(host)
    difference = compare_outputs(ours, theirs, samples, given=inputs is not None)
    if difference is None:
        return worst, "loaded with stock PEFT on a copy of the base; updates of every layer compared, outputs not"
    many = "1 input" if len(samples) == 1 else f"{len(samples)} inputs"
    return difference, f"loaded with stock PEFT on a copy of the base; outputs compared on {many}"


def read_shira(folder: Path, deltas: Mapping[str, SparseDelta], head: Head) -> tuple[float, str]:
    """Read the folder again and compare every tensor with the module that it came from.

    Raises:
        RuntimeError: a tensor is missing, left over, or differs.
    """
    tensors = load_file(folder / WEIGHTS)
    worst = 0.0
    for name, delta in deltas.items():
        if len(delta.indices):
            rows, columns = take(tensors, f"{PREFIX}{name}.shira_indices").long()
            got = torch.zeros(delta.shape)
            got.index_put_((rows, columns), take(tensors, f"{PREFIX}{name}.shira_weight"), accumulate=True)
            worst = max(worst, require_close(got, _dense(delta), name))
    for name, kept in head.items():
        for key, tensor in kept.items():
            require_close(take(tensors, f"{PREFIX}{name}.{key}"), tensor, f"{name}.{key}")
    if tensors:
        raise RuntimeError(f"{WEIGHTS} holds tensors that belong nowhere: {', '.join(sorted(tensors)[:3])}.")
    return worst, "files read again and every tensor compared; PEFT did not load them"


def _dense(delta: SparseDelta) -> Tensor:
    whole = torch.zeros(delta.shape)
    whole.view(-1)[delta.indices] = delta.delta.float()
    return whole
