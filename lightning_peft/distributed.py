"""What crosses processes: the only file that sends anything. With one process nothing is sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from lightning_peft.regularizers.everyone import Everyone

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def gather_objects(value: Any) -> list[Any]:
    """`value` of every process, by rank; a list of one where there is one process."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(run: Callable[[], Any]) -> Any:
    """What something gives, run on every process; where it fails on one it fails on all: none is left waiting.

    Raises:
        RuntimeError: it has passed here and failed elsewhere. Where it fails, its own error is raised.
        OSError: likewise, where it failed elsewhere with one, of the same number.
    """
    try:
        found = run()
    except Exception as error:
        gather_objects((getattr(error, "errno", None), str(error)))
        raise
    told = gather_objects(None)
    for number, failure in enumerate(told):
        if failure is not None:
            code, sentence = failure
            text = f"process {number} stops: {sentence}"
            raise RuntimeError(text) if code is None else OSError(code, text)
    return found


def rank() -> int:
    """This process's number."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes, in place; one message per dtype.

    A parameter without a gradient counts as zero, and stays without one if no process has one. To do so twice changes
    nothing, so gradients that accumulate may be averaged after each backward as well as after the last.

    Args:
        parameters: whole ones, the same on every process and in the same order.
    """
    for group in _by_kind(parameters):
        # The last entries say who has a gradient: they are read, which waits for the device, only where one is missing.
        present = torch.tensor([float(p.grad is not None) for p in group], dtype=group[0].dtype, device=group[0].device)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in group]
        flat = torch.cat([*(part.reshape(-1) for part in parts), present])
        dist.all_reduce(flat)
        *means, counts = flat.div_(dist.get_world_size()).split([*(part.numel() for part in parts), len(group)])
        torch._foreach_copy_(parts, [mean.view_as(part) for mean, part in zip(means, parts, strict=True)])
        if any(p.grad is None for p in group):
            for p, part, count in zip(group, parts, counts.tolist(), strict=True):
                p.grad = part if count else None


@torch.no_grad()
def broadcast(tensors: Sequence[Tensor]) -> None:
    """Give every process the values of process 0, in place; one message per dtype."""
    for group in _by_kind(tensors):
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in group])
        dist.broadcast(flat, 0)
        parts = flat.split([tensor.numel() for tensor in group])
        torch._foreach_copy_([t.detach() for t in group], [p.view_as(t) for p, t in zip(parts, group, strict=True)])


class Processes(Everyone):
    """All processes, as a term sees them."""

    def __init__(self) -> None:
        self.rank, self.world = rank(), world_size()

    def gather(self, tensor: Tensor) -> Tensor:
        # Asked before every message: one of another size than the others' hangs or is misread, at whatever step.
        shape = tensor.new_tensor([*tensor.shape, *[-1] * (8 - tensor.dim())], dtype=torch.int64)
        shapes = [tuple(size for size in row if size >= 0) for row in _rows_of_all(shape[None]).tolist()]
        if len(set(shapes)) > 1:
            raise RuntimeError(
                "this term compares the examples of all processes, and their batches are of unequal sizes: "
                f"{', '.join(f'{size} on process {i}' for i, size in enumerate(shapes))}. Give every process as many: "
                "drop_last=True, or a sampler that shares them evenly."
            )
        rows: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
        return rows

    def average_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        average_gradients(parameters)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _rows_of_all(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return Processes().mine(total)


def _rows_of_all(tensor: Tensor) -> Tensor:
    rows = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, tensor.detach().contiguous())
    return torch.cat(rows)


def agreed(masks: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Process 0's masks, on every process: layer -> (n,) bool. One message of a byte per component.

    Args:
        masks: layer -> (n,) bool, of the same layers in the same order everywhere.
        device: one from which the backend can send.
    """
    if world_size() == 1 or not masks:
        return dict(masks)
    flat = torch.cat(list(masks.values())).to(device, torch.uint8)
    dist.broadcast(flat, 0)
    return dict(zip(masks, flat.bool().split([len(mask) for mask in masks.values()]), strict=True))


@torch.no_grad()
def first_difference(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor whose bits are not the same on all processes; ``None`` if all are.

    A tensor that only some processes have differs as well.
    """
    if world_size() == 1:
        return None
    prints = torch.stack([fingerprint(t) for t in tensors.values()]).tolist() if tensors else []
    return first_odd(dict(zip(tensors, prints, strict=True)))


def first_odd(values: Mapping[str, Any]) -> str | None:
    """The first name whose value is not the same on all processes; every process gets the same answer."""
    every = gather_objects(dict(values))
    names = dict.fromkeys(name for each in every for name in each)
    missing = object()
    return next((n for n in names if any(each.get(n, missing) != every[0].get(n, missing) for each in every)), None)


def fingerprint(tensor: Tensor) -> Tensor:
    """One number for a tensor's bits and their order: () int64, sum_i (2 i + 1) K bits_i modulo 2^64."""
    bits = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()]).long()
    # Odd multipliers: no single change is lost. K spreads small differences over all 64 bits (Knuth's golden ratio).
    return (bits * ((2 * torch.arange(len(bits), device=bits.device) + 1) * -0x61C8864680B583EB)).sum()


def is_shard(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor (FSDP2's DTensor)."""
    return isinstance(tensor, DTensor)


def whole(tensor: Tensor) -> Tensor:
    """The tensor in one piece, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, other: Tensor) -> Tensor:
    """`value`, which every process has in one piece, sharded as `other` is."""
    if not isinstance(other, DTensor):
        return value
    local = value.to(other.device_mesh.device_type)
    return distribute_tensor(local, other.device_mesh, other.placements, src_data_rank=None)


@torch.no_grad()
def picked(tensors: Mapping[str, Tensor], picks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A few values of every tensor, whole or sharded by rows; one message for all.

    Args:
        tensors: by name.
        picks: (k,) positions in the flattened whole tensor, by name.
    """
    values = {name: _mine(tensors[name].detach(), picks[name]) for name in tensors}
    shards = [name for name, tensor in tensors.items() if isinstance(tensor, DTensor)]
    if shards:
        # Zeros where another process has the value; in double precision the sum is exact.
        flat = torch.cat([values[name] for name in shards])
        dist.all_reduce(flat)
        values.update(zip(shards, flat.split([len(picks[name]) for name in shards]), strict=True))
    return {name: values[name].to(tensors[name].dtype).cpu() for name in tensors}


def _mine(tensor: Tensor, picks: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.reshape(-1)[picks.to(tensor.device)]
    local, mesh = tensor.to_local().reshape(-1), tensor.device_mesh
    placements = [p for p in tensor.placements if not isinstance(p, Replicate)]
    values = torch.zeros(len(picks), dtype=torch.float64, device=local.device)
    picks = picks.to(local.device)
    if len(placements) != 1 or not isinstance(placements[0], Shard) or placements[0].dim != 0 or mesh.ndim != 1:
        full = tensor.full_tensor().reshape(-1)[picks].double()
        return full if dist.get_rank() == 0 else values
    # FSDP2 cuts rows as torch.chunk does: as many as fit evenly, the last processes get what is left.
    row = tensor.numel() // tensor.shape[0]
    first = mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size()) * row
    here = (picks >= first) & (picks < first + local.numel())
    values[here] = local[picks[here] - first].double()
    return values


def _by_kind(tensors: Iterable[Any]) -> list[list[Any]]:
    groups: dict[object, list[Any]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return list(groups.values())
