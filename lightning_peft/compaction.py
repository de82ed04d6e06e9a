"""Cut closed components out of adapters *and* of the optimizers that train them, while training goes on.

:func:`lightning_peft.compact` is for leaving: the optimizer is built anew afterwards. Here it stays, with its state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lightning_peft.adapters.base import Adapter
from lightning_peft.export import own_random, smaller
from lightning_peft.rank.budget import WHOLE, RankBudget
from lightning_peft.surgery.removal import replace


@dataclass(frozen=True)
class _Cut:
    """What becomes of one parameter.

    Attributes:
        name: what it is called in errors.
        old: the parameter.
        new: what takes its place; ``None`` if it goes with its adapter.
        dim: along which it is cut; ``None`` if it stays whole.
        index: positions that are kept along `dim`.
    """

    name: str
    old: nn.Parameter
    new: nn.Parameter | None
    dim: int | None
    index: Tensor

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor of the old parameter's shape that belongs to the new one."""
        return tensor if self.dim is None else tensor.index_select(self.dim, self.index.to(tensor.device))


State = dict[Any, dict[str, Any]]
_SIZES = ("exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "acc_delta", "sum", "variance")
"""What optimizers call their averages of gradients' sizes, by which they divide steps."""


@torch.no_grad()
def compact_training(module: nn.Module, optimizers: Iterable[Optimizer] = ()) -> dict[str, int]:
    """Cut every adapter to the components whose mask is open, and the optimizers' state with it, in place.

    Training then goes on as it would have with the mask, at the size of what is left: outputs are equal, and so is what
    every optimizer will do to what is left. New parameters take the places of old ones in their groups, with their
    state and their gradient; the order of parameters and groups stays. A layer without an open component gets its base
    back, frozen as it was, and its parameters leave their groups; a group may end up empty. A component whose mask is
    open and whose gain is 0 stays: it may still learn.

    All or nothing: what cannot be cut is found before anything is changed. The module remembers how large its adapters
    were, so that :class:`~lightning_peft.RankBudget` counts on as before, and checkpoints tell.

    Args:
        module: has adapters inside; is not itself one. Not wrapped by a data-parallel or sharding strategy: the wrapper
            is made anew afterwards.
        optimizers: every optimizer that trains the module. State per parameter must be tensors of the parameter's own
            shape (Adam, AdamW, SGD, RMSprop, Adagrad, ...) or single numbers.

    Returns:
        The rank of every layer that was adapted, 0 for those that no longer are.

    Raises:
        ValueError: there is no gated adapter.
        TypeError: an adapter, or an optimizer's state for it, cannot be cut.
        RuntimeError: no component is open, so that nothing of the adapters would be left to train.
    """
    budget = RankBudget.of(module)
    if not budget:
        raise ValueError(f"compact_training found no adapter to cut in {type(module).__name__}; inject puts them in.")
    keep = {name: site.gate.mask.detach() != 0 for name, site in budget.items()}
    counts = dict(zip(keep, torch.stack([mask.sum() for mask in keep.values()]).tolist(), strict=True))
    ranks = {name: int(counts.get(name, 0)) for name in budget.extents}
    closed = [name for name, site in budget.items() if counts[name] < len(site.gate)]
    if not closed:
        return ranks
    if not any(counts.values()):
        raise RuntimeError(
            "every component of every adapter is closed, so compaction would leave no adapter to train. Nothing was "
            "changed; eject the adapters, or open components with RankBudget.keep."
        )
    new: dict[int, nn.Module] = {}
    cuts: dict[int, _Cut] = {}
    with own_random(module):  # building an adapter draws its start, which is overwritten
        for name in closed:
            adapter = budget[name].adapter
            small = smaller(name, adapter, keep[name])
            new[id(adapter)] = adapter.base if small is None else small
            for cut in _cuts(name, adapter, small, adapter.kept(keep[name]).nonzero().flatten()):
                if id(cut.old) in cuts:
                    raise TypeError(f"{cut.name} is also {cuts[id(cut.old)].name}: what adapters share cannot be cut.")
                cuts[id(cut.old)] = cut
    optimizers = list(optimizers)
    states = [_cut_state(optimizer, cuts) for optimizer in optimizers]
    # From here on nothing can fail.
    _remember(module, budget)
    replace(module, new)
    for cut in cuts.values():
        if cut.new is not None and cut.old.grad is not None:
            cut.new.grad = cut.of(cut.old.grad)
    for optimizer, state in zip(optimizers, states, strict=True):
        for group in optimizer.param_groups:
            _swap(group, cuts)
        optimizer.state.clear()
        optimizer.state.update(state)
    return ranks


def _cuts(name: str, adapter: Adapter, small: Adapter | None, index: Tensor) -> Iterator[_Cut]:
    """How each parameter of an adapter becomes one of the smaller adapter.

    Raises:
        TypeError: a new parameter is not its old one cut along one dimension.
    """
    kept = {} if small is None else dict(small.own_parameters())
    for part, old in adapter.own_parameters():
        new, called = kept.get(part), f"{part!r} of the adapter at {name!r}"
        if small is None:
            yield _Cut(called, old, None, None, index)
            continue
        if new is None or new.ndim != old.ndim:
            dims = [-1, -1]
        else:
            dims = [d for d in range(old.ndim) if new.shape[d] != old.shape[d]]
        if len(dims) <= 1 and new is not None:
            cut = _Cut(called, old, new, dims[0] if dims else None, index)
            part_of_old = cut.of(old)
            # Bit for bit, and NaN as NaN: a run that has diverged is not this function's affair.
            if part_of_old.shape == new.shape and torch.equal(part_of_old.nan_to_num(), new.nan_to_num()):
                yield cut
                continue
        raise TypeError(
            f"{called} cannot be cut while training: {type(adapter).__name__}.compacted() makes another tensor of it "
            "than the kept components along one dimension, so the optimizer's state cannot follow. Nothing was changed."
        )


def _cut_state(optimizer: Optimizer, cuts: Mapping[int, _Cut]) -> State:
    """An optimizer's state after the cuts.

    Raises:
        TypeError: it has state that cannot be cut.
    """
    kind = type(optimizer).__name__
    for attribute, value in vars(optimizer).items():
        if attribute not in ("param_groups", "state") and any(id(leaf) in cuts for leaf in tree_leaves(value)):
            raise TypeError(
                f"{kind} keeps parameters of adapters in {attribute!r}, beside its param_groups, so it cannot follow "
                "a cut. Nothing was changed: use another optimizer, or compact after training."
            )
    state: State = {}
    for parameter, entry in optimizer.state.items():
        cut = cuts.get(id(parameter))
        if cut is None:
            state[parameter] = entry
        elif cut.new is not None:
            state[cut.new] = {key: _cut_value(key, value, cut, kind) for key, value in entry.items()}
    return state


def _cut_value(key: str, value: Any, cut: _Cut, optimizer: str) -> Any:
    if isinstance(value, Tensor) and value.shape == cut.old.shape:
        return cut.of(value)
    # A number for the whole parameter, such as its step (a tensor where the optimizer is capturable): kept as it is.
    large = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor) and leaf.numel() > 1]
    if not large:
        return value
    raise TypeError(
        f"{optimizer} keeps {key!r} of shape {tuple(large[0].shape)} for {cut.name}, which has shape "
        f"{tuple(cut.old.shape)}: what belongs to one component cannot be told. Nothing was changed: use an optimizer "
        "whose state has its parameters' shapes (Adam, AdamW, SGD, RMSprop, Adagrad), or compact after training."
    )


@torch.no_grad()
def follow_moves(optimizers: Iterable[Optimizer], moved: Mapping[nn.Parameter, Tensor]) -> None:
    """Move an optimizer's state where the entries of its parameters have moved, in place.

        direction of a new entry = 0          size of a new entry = mean over those that stay

    A size is what a step is divided by, such as Adam's second moment. The optimizer has one step count for all entries,
    and no longer corrects a size that begins at 0: the first steps of such an entry would be several times the rate.

    Args:
        optimizers: every optimizer that trains the module.
        moved: parameter (k,) -> (k,) for every entry its position before, -1 for one that starts anew. Where none
            stays, the mean is over those that went.

    Raises:
        TypeError: an optimizer's state is neither of the parameter's shape nor single numbers.
    """
    for optimizer in optimizers:
        for parameter, order in moved.items():
            entry = optimizer.state.get(parameter, {})
            for key, value in entry.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    new, stays = value.new_zeros(()), order[order >= 0]
                    if key in _SIZES and len(value):
                        new = (value[stays] if len(stays) else value).mean()
                    value.copy_(torch.where(order < 0, new, value[order.clamp(min=0)]))
                elif any(isinstance(leaf, Tensor) and leaf.numel() > 1 for leaf in tree_leaves(value)):
                    raise TypeError(
                        f"{type(optimizer).__name__} keeps {key!r} for a parameter of shape {tuple(parameter.shape)} "
                        "in another shape, so it cannot follow entries that move. Use an optimizer whose state has its "
                        "parameters' shapes (Adam, AdamW, SGD, RMSprop, Adagrad)."
                    )


def _swap(group: dict[str, Any], cuts: Mapping[int, _Cut]) -> None:
    """Put new parameters into the places of old ones, in the group's own lists."""
    left = [i for i, p in enumerate(group["params"]) if id(p) not in cuts or cuts[id(p)].new is not None]
    if "param_names" in group:
        group["param_names"][:] = [group["param_names"][i] for i in left]
    before = [group["params"][i] for i in left]
    group["params"][:] = [cuts[id(p)].new if id(p) in cuts else p for p in before]


def _remember(module: nn.Module, budget: RankBudget) -> None:
    """Note how large the adapters are before they are cut for the first time."""
    record = {
        name: {
            "class": f"{type(site.adapter).__module__}:{type(site.adapter).__qualname__}",
            "arguments": site.adapter.arguments(),
            "components": len(site.gate),
            "cost": site.gate.cost,
            "dense": site.adapter.dense_parameters,
        }
        for name, site in budget.items()
    }
    module.__dict__.setdefault(WHOLE, record)
