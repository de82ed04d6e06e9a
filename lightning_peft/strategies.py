"""All that depends on the Trainer's strategy: small things stay whole on every process, what is base-sized is sharded.

    one process, DDP     nothing to do: DDP averages gradients and broadcasts masks
    FSDP1                the strategy is told to ignore the small parameters
    FSDP2                the user tells `fully_shard` so, or adapters are injected after it and are whole by themselves

Under FSDP the gradients of small parameters are averaged here, once per optimizer step, and because everything that is
trained is whole, a checkpoint is one ordinary file that any strategy and any number of processes can load.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._common_utils import clean_tensor_name
from torch.optim import Optimizer

from lightning_peft.agreement import masks
from lightning_peft.checkpoint import adapter_state_dict
from lightning_peft.distributed import is_shard, like, whole
from lightning_peft.rank.budget import clean_name
from lightning_peft.seams import Link, wrap_method
from lightning_peft.surgery.layers import adapters, is_flattened, large_parameters, left_of_bases, trained
from lightning_peft.surgery.refresh import bases_restored

Undo = Callable[[], object]


def is_sharded(strategy: Strategy) -> bool:
    """Whether the strategy splits parameters over processes."""
    return isinstance(strategy, FSDPStrategy | ModelParallelStrategy)


def can_resize(strategy: Strategy) -> bool:
    """Whether parameters may change their shapes while training; see :func:`unwrapped`."""
    return isinstance(strategy, SingleDeviceStrategy | DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)


@contextmanager
def unwrapped(strategy: Strategy) -> Iterator[None]:
    """Take the module out of DDP's wrapper and wrap it anew: a reducer knows the parameters that it was made for."""
    if not isinstance(strategy, DDPStrategy):
        yield
        return
    strategy.model = strategy.lightning_module  # the old reducer goes, and with it its hooks on what stays
    try:
        yield
    finally:
        strategy.configure_ddp()
        strategy._pl_static_graph_delay_done = False  # manual optimization tells the new reducer as it did the old


def each_alone(strategy: Strategy) -> AbstractContextManager[None]:
    """For a forward and a backward in which every process's gradients stay its own; DDP's reducer does not notice."""
    return strategy.block_backward_sync() if isinstance(strategy, DDPStrategy) else nullcontext()


def counts_gradients(strategy: Strategy) -> bool:
    """Whether the strategy takes a second gradient of a parameter in one backward pass for a mistake (DDP)."""
    model = strategy.model if isinstance(strategy, DDPStrategy) else None
    return isinstance(model, nn.parallel.DistributedDataParallel) and not model.static_graph


def flattens(strategy: Strategy) -> bool:
    """Whether the strategy makes flat slices of parameters, in which no single value can be found (FSDP1)."""
    return isinstance(strategy, FSDPStrategy)


def require_supported(strategy: Strategy) -> None:
    """Refuse what would train adapters wrongly without a word.

    Raises:
        MisconfigurationException: with the fix.
    """
    name = type(strategy).__name__
    if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDPStrategy | ModelParallelStrategy):
        raise MisconfigurationException(
            f"adapters are not tested under {name}; use one device, strategy='ddp', 'fsdp' or ModelParallelStrategy."
        )
    if isinstance(strategy, ModelParallelStrategy) and strategy.device_mesh["tensor_parallel"].size() > 1:
        raise MisconfigurationException(
            f"{name} splits layers over {strategy.device_mesh['tensor_parallel'].size()} processes (tensor "
            "parallelism), and adapters need whole ones. Shard by FSDP2 alone: "
            "ModelParallelStrategy(data_parallel_size=<all processes>, tensor_parallel_size=1)."
        )
    if isinstance(strategy, FSDPStrategy):
        if not strategy.kwargs.get("use_orig_params", True):
            raise MisconfigurationException(
                "FSDPStrategy(use_orig_params=False) hides parameters inside flat ones, and adapters are to stay "
                "whole. Leave use_orig_params at True."
            )
        if strategy.kwargs.get("ignored_modules") is not None:
            raise MisconfigurationException(
                "FSDPStrategy has ignored_modules, which excludes the list of parameters that adapters need there; "
                "pass the parameters of these modules as ignored_states."
            )


def keep_whole(strategy: Strategy, module: nn.Module) -> None:
    """Have FSDP1 leave everything that is trained whole; call it before the strategy wraps `module`."""
    if not isinstance(strategy, FSDPStrategy):
        return
    small = [*trained(module).values(), *left_of_bases(module)]
    ids = {id(p) for p in small}
    given = list(strategy.kwargs.get("ignored_states") or ())
    strategy.kwargs["ignored_states"] = [*(p for p in given if id(p) not in ids), *small]
    for tensor in [*small, *masks(module).values()]:
        tensor.data = tensor.data.to(strategy.root_device)  # FSDP1 does not move what it ignores


def keep_masks_wide(call: Callable[..., Any], strategy: Strategy, *args: Any, **kwargs: Any) -> None:
    """Have FSDP1 leave the masks in float32, after it has wrapped: under mixed precision it casts every other buffer.

    A mask is 0 or 1 in any dtype, but what multiplies it and what adds up in its gradient is not.
    """
    call(*args, **kwargs)
    assert strategy.model is not None
    kept = {id(mask) for mask in masks(strategy.model).values()}
    for unit in FullyShardedDataParallel.fsdp_modules(strategy.model):
        # torch has this set for modules that it ignores whole, and no way to name a single buffer.
        names = (name for name, buffer in unit.named_buffers() if id(buffer) in kept)
        unit._ignored_buffer_names |= {clean_tensor_name(name) for name in names}


def reshard(module: nn.Module) -> None:
    """Have FSDP2 put the sharded parameters back, which a forward without a backward leaves gathered.

    The gathered ones are other tensors, in no optimizer and without a gradient.
    """
    for child in module.modules():
        if isinstance(child, FSDPModule):
            child.reshard()


def averaged(strategy: Strategy, module: nn.Module) -> list[nn.Parameter]:
    """The parameters whose gradients the strategy does not average."""
    if not is_sharded(strategy):
        return []
    return list({id(p): p for p in trained(module).values() if p.requires_grad and not is_shard(p)}.values())


def require_synchronised(strategy: Strategy, module: LightningModule) -> None:
    """Check, when the strategy has wrapped the module, that every trained parameter will be the same everywhere.

    Raises:
        MisconfigurationException: one was made too late for DDP, or is split over processes under FSDP; or gradients
            are scaled and some are whole, some sharded.
    """
    sharded = [clean_name(n) for n, p in trained(module).items() if p.requires_grad and is_shard(p)]
    if sharded and averaged(strategy, module) and getattr(strategy.precision_plugin, "scaler", None) is not None:
        raise MisconfigurationException(
            "16-mixed scales gradients, and torch cannot unscale whole ones (the adapters') together with sharded ones "
            f"({sharded[0]!r}). Use bf16-mixed, or inject in configure_model and pass "
            "ignored_params=set(small_parameters(self)) to every call of fully_shard."
        )
    own = {id(p) for a in adapters(module).values() for _, p in a.own_parameters()} - large_parameters(module)
    known: set[int] | None = None
    ignored: set[str] = set()
    if isinstance(strategy, DDPStrategy) and isinstance(strategy.model, nn.parallel.DistributedDataParallel):
        known = {id(p) for p in strategy.model._module_parameters}
        ignored = strategy.model.parameters_to_ignore
    for name, parameter in trained(module).items():
        if parameter.requires_grad and name in ignored:
            raise MisconfigurationException(
                f"{clean_name(name)!r} is trained and among the parameters that DDP is told to ignore "
                "(_ddp_params_and_buffers_to_ignore), so processes would drift apart. Take it out of that list."
            )
        if known is not None and parameter.requires_grad and id(parameter) not in known:
            raise MisconfigurationException(
                f"{clean_name(name)!r} came into the module after DDP had wrapped it, so its gradients would not be "
                "averaged and processes would drift apart. Inject adapters in __init__, setup or configure_model, or "
                "let AdapterInjection do it."
            )
        if id(parameter) in own and is_shard(parameter):
            raise MisconfigurationException(
                f"{clean_name(name)!r} is split over processes by fully_shard, and adapters are to stay whole. Pass "
                "ignored_params=set(small_parameters(self)) to every call of fully_shard, or let AdapterInjection "
                "inject after configure_model."
            )
        if is_flattened(parameter):
            raise MisconfigurationException(
                f"{clean_name(name)!r} is part of a flat parameter of FSDP1, and what is trained is to stay whole. "
                "Pass ignored_states=small_parameters(self) where you wrap, or leave the wrapping to FSDPStrategy."
            )


def clip_by_norm(call: Callable[..., Any], plugin: Any, optimizer: Optimizer, clip_val: float) -> None:
    """Clip whole and sharded gradients by their common norm, which neither FSDP1's plugin nor torch does for a mix."""
    gradients = [p.grad for p in plugin.main_params(optimizer) if p.grad is not None]
    kinds = [[g for g in gradients if is_shard(g) == sharded] for sharded in (False, True)]
    norms = [whole(torch.nn.utils.get_total_norm(kind)) for kind in kinds if kind]
    if not norms:
        return
    total = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    scale = (clip_val / (total + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
    for gradient in gradients:
        gradient.detach().mul_(scale)


def clip_by_value(call: Callable[..., Any], plugin: Any, optimizer: Optimizer, clip_val: float) -> None:
    """Clip whole gradients, then sharded ones: torch takes no mix."""
    parameters = [p for p in plugin.main_params(optimizer) if p.grad is not None]
    kinds = [[p for p in parameters if is_shard(p) == sharded] for sharded in (False, True)]
    for kind in filter(None, kinds):
        torch.nn.utils.clip_grad_value_(kind, clip_val)


def whole_checkpoints(strategy: Strategy) -> list[Undo]:
    """Make a sharded strategy write and read one ordinary file of what is trained, whole.

    A module without adapters is left to the strategy's own ways.

    Returns:
        Functions that undo it.
    """
    links: dict[str, Link] = {
        "lightning_module_state_dict": _state_dict,
        "optimizer_state": _optimizer_state,
        "save_checkpoint": _save,
        "load_checkpoint": _load,
        "load_model_state_dict": _load_state,
    }
    return [wrap_method(strategy, name, partial(_if_adapted, link)) for name, link in links.items()]


def _if_adapted(link: Link, call: Callable[..., Any], strategy: Strategy, *args: Any, **kwargs: Any) -> Any:
    assert strategy.lightning_module is not None
    return link(call, strategy, *args, **kwargs) if adapters(strategy.lightning_module) else call(*args, **kwargs)


def _state_dict(call: Callable[..., Any], strategy: Strategy) -> dict[str, Any]:
    assert strategy.lightning_module is not None
    own = adapter_state_dict(strategy.lightning_module)
    return {name: whole(value) if isinstance(value, Tensor) else value for name, value in own.items()}


def _optimizer_state(call: Callable[..., Any], strategy: Strategy, optimizer: Any) -> dict[str, Any]:
    state: dict[str, Any] = getattr(optimizer, "_optimizer", optimizer).state_dict()
    entries = {
        i: {key: whole(value) if isinstance(value, Tensor) else value for key, value in entry.items()}
        for i, entry in state["state"].items()
    }
    return state | {"state": entries}


def _save(call: Callable[..., Any], strategy: Any, checkpoint: dict[str, Any], filepath: Any, **kwargs: Any) -> None:
    path, is_folder = _common(strategy, filepath)
    if is_folder:
        raise IsADirectoryError(
            f"{path} is a folder, perhaps an older sharded checkpoint, and a checkpoint of adapters is one file. "
            "Remove the folder or choose another path."
        )
    Strategy.save_checkpoint(strategy, checkpoint, path, **kwargs)


def _load(call: Callable[..., Any], strategy: Any, path: Any, weights_only: bool | None = None) -> Any:
    path, is_folder = _common(strategy, path)
    if is_folder:
        return call(path, weights_only=weights_only)  # a sharded checkpoint that Lightning itself has written
    return strategy.checkpoint_io.load_checkpoint(path, map_location="cpu", weights_only=weights_only)


def _common(strategy: Any, path: Any) -> tuple[str, bool]:
    """Process 0's path, and whether it finds a folder there; no process goes another way than the others."""
    common: tuple[str, bool] = strategy.broadcast((os.fspath(path), os.path.isdir(path)))
    return common


def _load_state(call: Callable[..., Any], strategy: Any, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
    if "state_dict" not in checkpoint:
        call(checkpoint, strict=strict)  # loaded by now, from a folder
        return
    module: LightningModule = strategy.lightning_module
    state, own = checkpoint["state_dict"], adapter_state_dict(module)
    with torch.no_grad(), bases_restored(module):
        for name, value in own.items():
            if isinstance(value, Tensor):
                value.copy_(like(state[name], value))
    extra = {name: state[name] for name, value in own.items() if not isinstance(value, Tensor)}
    if extra:  # what modules say in get_extra_state
        module.load_state_dict(extra, strict=False)
    if module.trainer.state.fn == TrainerFn.FITTING:
        # Lightning leaves optimizers to these strategies.
        for optimizer, saved in zip(strategy.optimizers, checkpoint.get("optimizer_states", ()), strict=False):
            optimizer.load_state_dict(_sharded(saved, optimizer))


def _sharded(saved: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's whole state, sharded as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def place(value: Any, parameter: Tensor) -> Any:
        fits = isinstance(value, Tensor) and value.shape == parameter.shape
        return like(value, parameter) if fits else value

    state = {i: {k: place(v, parameters[i]) for k, v in entry.items()} for i, entry in saved["state"].items()}
    return {**saved, "state": state}
