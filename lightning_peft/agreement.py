"""Agreement: what processes that train together must have alike, and the errors where they do not."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_peft import distributed
from lightning_peft.adapters.base import Adapter
from lightning_peft.distributed import is_shard
from lightning_peft.rank.budget import RankBudget, clean_name
from lightning_peft.surgery.layers import STARTS, adapters, trained


def masks(module: nn.Module) -> dict[str, Tensor]:
    """The masks of all gates, by clean name."""
    return {f"{name}.gate.mask": site.gate.mask for name, site in RankBudget.of(module).items()}


def small(module: nn.Module) -> dict[str, Tensor]:
    """What is whole on every process, by clean name: the trained parameters that are not sharded, and the masks."""
    return {clean_name(n): p for n, p in trained(module).items() if not is_shard(p)} | masks(module)


def constants(module: nn.Module) -> dict[str, Tensor]:
    """The buffers of adapters that training leaves as they are, by their paths in the module."""
    return {
        f"{path}.{name}": child.get_buffer(name)
        for path, child in module.named_modules()
        if isinstance(child, Adapter)
        for name in child.constants
    }


def leave_constants(module: nn.Module) -> None:
    """Tell DDP, which reads it from this attribute, to leave constants alone: it sends buffers at every forward."""
    listed = module.__dict__.get("_ddp_params_and_buffers_to_ignore", ())
    if more := [name for name in constants(module) if name not in listed]:
        module.__dict__["_ddp_params_and_buffers_to_ignore"] = [*listed, *more]


def require_alike(module: nn.Module) -> None:
    """Check that all processes train the same parameters, of the same shapes, and what is sharded from one start.

    Raises:
        RuntimeError: on all processes, if one of them does not.
    """
    name = distributed.first_odd({clean_name(n): (tuple(p.shape), p.requires_grad) for n, p in trained(module).items()})
    if name is not None:
        raise RuntimeError(
            f"{name!r} is not trained in the same way on all processes: they have other adapters, or froze other "
            "parameters. Call inject and requires_grad_ on every process alike, whatever its rank."
        )
    name = distributed.first_odd({n: a.digest() for n, a in adapters(module).items()})
    if name is not None:
        raise RuntimeError(
            f"the adapter at {name!r} derives other constants on some processes than on others, as its digest tells: "
            "give all of them the same seed and key, and run the same version everywhere."
        )
    odd = distributed.first_odd({k: v for m in module.modules() for k, v in m.__dict__.get(STARTS, {}).items()})
    if odd is not None and any(map(is_shard, module.parameters())):
        raise RuntimeError(
            f"the adapter of {odd} differs between processes, and each has kept its own part: their weights, or what "
            "decomposes them, are not the same. Inject in one process, save a checkpoint, load it in configure_model."
        )


def require_equal(module: nn.Module, when: str) -> None:
    """Check that masks and whole parameters have the same bits on all processes; the masks first.

    Raises:
        RuntimeError: they differ.
    """
    first = masks(module)
    name = distributed.first_difference(first | {n: t for n, t in small(module).items() if n not in first})
    if name is not None:
        raise RuntimeError(
            f"{name!r} is not the same on all processes {when}: training has come apart. Whatever changes adapters, "
            "masks or requires_grad must do so on every process alike, and before the strategy wraps the module."
        )
