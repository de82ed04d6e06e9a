"""What fine-tuning will take: memory, files and network traffic, from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import ceil
from typing import get_args

from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.checkpoint import adapter_state_dict
from lightning_peft.interop.size import exported_bytes, pairs_bytes
from lightning_peft.planning.figures import Load, Optimizer, Plan, Precision, Strategy
from lightning_peft.rank.budget import Budget, RankBudget
from lightning_peft.rank.importance import Importance
from lightning_peft.surgery.layers import adapters, large_parameters, small_parameters, trained

Width = Callable[[Tensor], int]

# What Lightning casts the whole module to; the mixed kinds leave it as it is.
_CAST = {"bf16-true": 2, "16-true": 2, "64-true": 8}
# What Lightning has FSDP1 cast a weight to before it crosses the network.
_FSDP1_GATHER = {"32-true": 4, "bf16-mixed": 2, "16-mixed": 2, "bf16-true": 2, "16-true": 2}
_SLOTS = {"adamw": 2, "sgd": 0, "sgd-momentum": 1}
_STEP = 4  # bytes: Adam counts the steps of every tensor in one float32


def plan(
    module: nn.Module,
    world_size: int = 1,
    *,
    nodes: int = 1,
    strategy: Strategy = "ddp",
    precision: Precision = "32-true",
    optimizer: Optimizer = "adamw",
    final: Budget | None = None,
    importance: Importance | None = None,
    accumulate: int = 1,
    reshard_after_forward: bool = True,
) -> Plan:
    """Memory, files and network traffic of a module with adapters, from shapes alone: on the meta device it is free.

        gradients       G = sum of bytes of the trainable parameters
        optimizer       AdamW: 2 G + 4 bytes a tensor;  SGD with momentum: G;  SGD: 0
        all-reduce      2 (N - 1) / N  G      sent per process and optimizer step, by a ring of N processes
        all-gather      (N - 1) / N  S        per forward pass, and per backward pass if weights are resharded
        base            DDP: S;  FSDP: S / N, for FSDP2 with every tensor's first dimension rounded up to N

    S is the bytes of the frozen base. Under DDP each process also gets all buffers, masks among them, from process 0
    once per optimizer step, and the whole module once at the start. Under FSDP the trained parameters are whole on
    every process, which gets them once at the start, and the frozen base has no gradient, so nothing is
    reduce-scattered. Frozen factors that an adapter has in the place of its layer's weight are sharded under FSDP2 with
    the base, and count as it. What a root FSDP unit holds itself is not resharded after its forward pass, so
    `gather_backward` is an upper bound by that much.

    Not counted: activations, the weights that FSDP gathers for a moment, casts of mixed precision, what a calibration
    holds before the first step (GoRA: a float32 gradient of every adapted weight), and what the libraries themselves
    take. What a callback has opened or closed is not known: all components count, unless there is a final budget. What
    a callback adds to the module (what draws masks, terms with parameters) counts if it is there: add it first, a
    term's by `before_adapters(module)` before :func:`~lightning_peft.inject` and `attach(module)` after it.

    Args:
        module: a module with adapters, on any device; nothing is allocated, no mask is read.
        world_size: processes N in all, over all nodes.
        nodes: machines; divides `world_size`.
        strategy: how the module is spread: "ddp", "fsdp2" (ModelParallelStrategy) or "fsdp1" (FSDPStrategy), with the
            trained parameters kept whole. One process needs none of them.
        precision: the Trainer's; the "true" ones cast base and adapters, the "mixed" ones leave them as they are.
        optimizer: "adamw" (Adam's is the same), "sgd", or "sgd-momentum".
        final: the final budget, if rank is cut while training.
        importance: what components are chosen by while training, if they are; its statistics count until the last
            event. It is told of these adapters, so do not give one that is at work.
        accumulate: the Trainer's `accumulate_grad_batches`.
        reshard_after_forward: whether FSDP frees the gathered weights between forward and backward.

    Raises:
        ValueError: there is no adapter, a number is out of range, an option is unknown, or the final budget does not
            fit the adapters.
        TypeError: a final budget is given and an adapter's components cannot be cut out; or FSDP2 would shard what an
            adapter trains with the base, which is not planned.

    Example:
        >>> import torch
        >>> from lightning_peft import LoRA, inject
        >>> with torch.device("meta"):
        ...     net = nn.Sequential(nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 2))
        >>> _ = inject(net, lambda layer: LoRA(layer, rank=16))
        >>> plan(net, world_size=2).start.all_reduce
        557064
    """
    _check(world_size, nodes, accumulate, strategy, precision, optimizer)
    budget = RankBudget.of(module)
    if not budget:
        raise ValueError(f"plan found no adapter in {type(module).__name__}; inject puts them in.")
    if world_size > 1 and strategy == "fsdp2":
        _require_whole(module)
    width = _width(budget, precision)
    frozen = [p for p in module.parameters() if not p.requires_grad]
    sharded = world_size > 1 and strategy != "ddp"
    base = sum(size for _, size in _sized(frozen, width))
    before, after = _statistics(budget, importance)
    start = _load(module, budget, 1.0, width, world_size, strategy, optimizer)
    start = replace(start, statistics=before)
    last, most = None, None
    if final is not None:
        share, most = _final(budget, final)
        last = _load(module, budget, share, width, world_size, strategy, optimizer)
        last = replace(last, statistics=round(share * after))
        if sharded:  # compaction waits for the export
            last = replace(start, components=last.components, exported=last.exported, statistics=after)
    ring = (world_size - 1) / world_size
    gathered, once = 0, base + start.weights + start.buffers
    if sharded:
        per_weight = _FSDP1_GATHER[precision] if strategy == "fsdp1" else None
        stays = _whole(module, strategy)
        split = [p for p in frozen if id(p) not in stays]
        gathered = round(
            ring * world_size * sum(_shard(p, world_size, strategy, per_weight or width(p)) for p in split)
        )
        base = sum(_shard(p, world_size, strategy, width(p)) for p in split)
        base += sum(size for _, size in _sized((p for p in frozen if id(p) in stays), width))
        sent = {id(p): p for p in trained(module).values() if id(p) in stays}
        once = sum(size for _, size in _sized([*sent.values(), *(s.gate.mask for s in budget.values())], width))
    return Plan(
        model=type(module).__name__,
        layers=len(budget),
        world_size=world_size,
        nodes=nodes,
        strategy=strategy,
        precision=precision,
        optimizer=optimizer,
        accumulate=accumulate,
        base_parameters=sum(p.numel() for p in frozen),
        base=base,
        start=start,
        final=last,
        most_parameters=most,
        padded=exported_bytes(module, None, width),
        gather_forward=gathered * accumulate,
        gather_backward=gathered * accumulate * reshard_after_forward,
        event=budget.capacity if world_size > 1 else 0,
        startup=once if world_size > 1 else 0,
    )


def _load(
    module: nn.Module,
    budget: RankBudget,
    share: float,
    width: Width,
    world_size: int,
    strategy: Strategy,
    optimizer: Optimizer,
) -> Load:
    """The figures with a share of every layer's components: the tensors of a low-rank adapter shrink with it."""
    scale: dict[int, float] = {}
    for site in budget.values():
        scale |= dict.fromkeys((id(p) for _, p in site.adapter.own_parameters()), share)
        scale |= dict.fromkeys(map(id, site.adapter.lasting_parameters()), 1.0)
        scale[id(site.gate.mask)] = share
    own = {id(p) for site in budget.values() for _, p in site.adapter.own_parameters()}

    def scaled(tensors: Iterable[Tensor]) -> int:
        return round(sum(scale.get(id(t), 1.0) * size for t, size in _sized(tensors, width)))

    constants = [site.adapter.get_buffer(name) for site in budget.values() for name in site.adapter.constants]
    left = set(map(id, constants))  # DDP does not send them
    wanted = [p for p in module.parameters() if p.requires_grad]
    adapted = round(sum(scale[id(p)] * p.numel() for p in wanted if id(p) in own))
    weights = scaled(wanted)
    keys = adapter_state_dict(module).keys()
    # Not copies: a tied tensor is written once.
    state = {id(t): t for key, t in module.state_dict(keep_vars=True).items() if key in keys}
    several = world_size > 1
    return Load(
        components=round(share * budget.capacity),
        adapter_parameters=adapted,
        trained_parameters=sum(p.numel() for p in wanted if id(p) not in own),
        weights=weights,
        gradients=weights,
        buckets=weights if several else 0,
        optimizer=_SLOTS[optimizer] * weights + (_STEP * len(wanted) if optimizer == "adamw" else 0),
        statistics=0,
        constants=scaled(constants),
        checkpoint=scaled(state.values()),
        exported=exported_bytes(module, share, width),
        pairs=pairs_bytes(module, width),
        all_reduce=round(2 * (world_size - 1) / world_size * weights),
        buffers=scaled(b for b in module.buffers() if id(b) not in left) if several and strategy == "ddp" else 0,
    )


def _require_whole(module: nn.Module) -> None:
    """Refuse what is trained in pieces: its gradients are scattered, and none of the figures says so."""
    for name, adapter in adapters(module).items():
        if any(p.requires_grad for p in adapter.large_parameters()):
            raise TypeError(
                f"layer {name!r}: FSDP2 shards the factors of {type(adapter).__name__} with the base, and a run that "
                "trains them is not planned yet. Plan for 'ddp' or 'fsdp1', which keep them whole: the most that it "
                "can take; or for frozen ones (trained=False)."
            )


def _whole(module: nn.Module, strategy: Strategy) -> set[int]:
    """Ids of what is whole on every process, trained or not, where the rest is sharded."""
    found = {id(p) for p in small_parameters(module)}
    return found | large_parameters(module) if strategy == "fsdp1" else found


def _statistics(budget: RankBudget, importance: Importance | None) -> tuple[int, int]:
    """Bytes of an importance's statistics of all components: until the last event, and after it."""
    if importance is None:
        return 0, 0
    importance.track(budget)
    try:
        before = importance.statistics_bytes()
        importance.forget()
        return before, importance.statistics_bytes()
    finally:
        importance.release()


def _final(budget: RankBudget, final: Budget) -> tuple[float, int]:
    """The share of every layer's components that the final budget leaves, and the most parameters that it can leave."""
    for name, site in budget.items():
        if type(site.adapter).compacted is Adapter.compacted:
            raise TypeError(
                f"layer {name!r}: {type(site.adapter).__name__} cannot be compacted, so it keeps its size: plan "
                "without a final budget."
            )
    sizes, amount = budget.sizes(final.unit), final.amount(budget)
    share = amount / sum(sizes[name] * len(site.gate) for name, site in budget.items())
    # What a component adds in parameters: its gain, if it has one, counts here and not in the budget.
    all_ = {name: sum(p.numel() for _, p in site.adapter.own_parameters()) for name, site in budget.items()}
    lasting = {name: sum(p.numel() for p in site.adapter.lasting_parameters()) for name, site in budget.items()}
    added = {name: (all_[name] - lasting[name]) / len(site.gate) for name, site in budget.items()}
    most, left = float(sum(lasting.values())), float(amount)
    for name in sorted(budget, key=lambda name: added[name] / sizes[name], reverse=True):
        taken = min(len(budget[name].gate), left / sizes[name])
        most += taken * added[name]
        left -= taken * sizes[name]
    return share, round(most)


def _width(budget: RankBudget, precision: Precision) -> Width:
    """Bytes of one number of a tensor once the Trainer has cast the module; masks stay float32."""
    masks = {id(site.gate.mask) for site in budget.values()}
    cast = _CAST.get(precision)

    def width(tensor: Tensor) -> int:
        if cast is None or id(tensor) in masks or not tensor.is_floating_point():
            return tensor.element_size()
        return cast

    return width


def _sized(tensors: Iterable[Tensor], width: Width) -> Iterator[tuple[Tensor, int]]:
    return ((t, t.numel() * width(t)) for t in tensors)


def _shard(parameter: Tensor, world_size: int, strategy: Strategy, width: int) -> int:
    """Bytes of one process's part: rows for FSDP2, numbers for FSDP1, both rounded up."""
    if strategy == "fsdp1":
        return ceil(parameter.numel() / world_size) * width
    rows = parameter.shape[0]
    return ceil(rows / world_size) * (parameter.numel() // rows) * width


def _check(
    world_size: int, nodes: int, accumulate: int, strategy: Strategy, precision: Precision, optimizer: Optimizer
) -> None:
    for name, count in (("world_size", world_size), ("nodes", nodes), ("accumulate", accumulate)):
        if count < 1:
            raise ValueError(f"{name}={count}: it is a count, at least 1.")
    if world_size % nodes:
        raise ValueError(
            f"world_size={world_size} counts the processes of all nodes, and {nodes} nodes cannot share them equally; "
            "give nodes times devices per node."
        )
    for name, value, known in (
        ("strategy", strategy, get_args(Strategy)),
        ("precision", precision, get_args(Precision)),
        ("optimizer", optimizer, get_args(Optimizer)),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: choose {', '.join(map(repr, known))}.")
    if strategy == "fsdp1" and precision not in _FSDP1_GATHER:
        raise ValueError(f"FSDPStrategy does not take precision={precision!r}; choose another, or strategy='fsdp2'.")
