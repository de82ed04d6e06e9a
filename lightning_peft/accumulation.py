"""The gradients of an optimizer step that has not all its micro-batches yet: what a checkpoint from there must hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.distributed import gather_objects, is_shard, like, rank, whole, world_size
from lightning_peft.rank.budget import RankBudget, clean_name
from lightning_peft.surgery.layers import trained


def partial_gradients(module: nn.Module) -> dict[str, Any]:
    """The gradients so far of all that is trained, and of the masks that measure their own worth, on the CPU.

    Every process calls it. Processes have summed up their own micro-batches, so each has its own gradients; those of
    sharded parameters are averaged already and are kept once, whole.
    """
    sharded: dict[str, Tensor] = {}
    local: dict[str, Tensor] = {}
    for name, tensor in _leaves(module).items():
        if tensor.grad is not None:
            kept = sharded if is_shard(tensor.grad) else local
            kept[name] = whole(tensor.grad).detach().to("cpu", copy=True)
    return {"sharded": sharded, "ranks": gather_objects(local)}


def restore_gradients(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Put back what :func:`partial_gradients` gave, as if backward had just been called.

    As many processes as have written it get each their own. Any other number, and sharded parameters, get the mean: the
    step's gradient is the mean over processes, and that stays the same.
    """
    ranks = state["ranks"]
    for name, tensor in _leaves(module).items():
        held = [gradients[name] for gradients in ranks if name in gradients]
        value: Tensor | None = None
        if name in state["sharded"]:
            value = state["sharded"][name]
        elif len(ranks) == world_size() and not is_shard(tensor):
            value = ranks[rank()].get(name)
        elif held:
            value = torch.stack(held).sum(0) / len(ranks)  # a process without a gradient counts as zero
        tensor.grad = None if value is None else like(value.to(tensor.device, tensor.dtype, copy=True), tensor)


def _leaves(module: nn.Module) -> dict[str, Tensor]:
    named: list[tuple[str, Tensor]] = [(clean_name(name), p) for name, p in trained(module).items()]
    named += [(f"{name}.gate.mask", site.gate.mask) for name, site in RankBudget.of(module).items()]
    once = {id(tensor): (name, tensor) for name, tensor in reversed(named) if tensor.requires_grad}
    return dict(reversed(once.values()))
