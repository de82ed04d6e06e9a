"""RankBudget: all gates of a module, as one mapping; and how much of it may be spent."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from math import floor, isfinite
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from lightning_peft.arguments import require_number
from lightning_peft.rank.gate import Gate

if TYPE_CHECKING:
    from lightning_peft.adapters.base import Adapter

Unit = Literal["components", "parameters"]

WHOLE = "_adapters_before_compaction"
"""Attribute of a module whose adapters were cut while it trained: layer -> what its adapter was before that.

Plain data: `class` (module:name), `arguments`, `components`, `cost` of one component, and `dense`, what the layer's own
weight has.
"""

BESIDE = "_adopted"
"""Child of a module that holds adapters whose tensors live in another library's layers, by the paths of these layers.

    model._adopted.encoder.query        is the adapter of the layer        model.encoder.query
"""

# What sharding, compilation and data-parallel wrappers put into a module's name.
_WRAPPERS = frozenset({"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"})


def clean_name(name: str) -> str:
    """The name that the user knows: without what wrappers insert.

    Example:
        >>> clean_name("net._orig_mod.layer.0._fsdp_wrapped_module.query")
        'net.layer.0.query'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def layer_name(path: str, adapted: Container[str]) -> str:
    """The name of the layer that the adapter at `path` adapts: neither `base` nor :data:`BESIDE` is a part of it."""
    parts = path.split(".")
    kept = [p for i, p in enumerate(parts) if p != BESIDE and not (p == "base" and ".".join(parts[:i]) in adapted)]
    return clean_name(".".join(kept))


@dataclass(frozen=True)
class Site:
    """One adapted layer: its cleaned name, its gate and its adapter."""

    name: str
    gate: Gate
    adapter: Adapter


@dataclass(frozen=True)
class Extent:
    """How large one layer's adapter is, or was before components were cut out of it.

    Attributes:
        adapter: name of its class.
        components: how many it had at the start, open or closed.
        cost: parameters that one of them costs.
    """

    adapter: str
    components: int
    cost: int


def whole(module: nn.Module) -> dict[str, Mapping[str, Any]]:
    """What :data:`WHOLE` says in `module` and the modules inside it, by the layers' cleaned names in `module`."""
    return {
        clean_name(f"{path}.{name}" if path else name): record
        for path, owner in module.named_modules()
        for name, record in owner.__dict__.get(WHOLE, {}).items()
    }


def _kind(path: str) -> str:
    """The class in "module:Outer.Class"."""
    return path.rpartition(":")[2].rpartition(".")[2]


class RankBudget(Mapping[str, Site]):
    """Every gated adapter of a module, by the name of the layer that it adapts.

    The one thing that policies, terms, monitors and exporters look at: none searches modules or parameter names.
    The order is the module's own. It is a view: it holds no state, and building it again gives the same.

    Where components were cut out while the module trained (`RankPruning(..., compact="final")`), the mapping holds the
    adapters that are there, and all that counts (ranks, sizes, capacity, the table) goes on as if they were closed.

    Example:
        >>> from lightning_peft import LoRA, inject
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> _ = inject(net, lambda layer: LoRA(layer, rank=2), targets=["0"])
        >>> budget = RankBudget.of(net)
        >>> budget.keep({"0": torch.tensor([1, 0])})
        >>> budget.spent, budget.capacity, budget.ranks()
        (1, 2, {'0': 1})
    """

    def __init__(self, sites: Mapping[str, Site], before: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._sites = dict(sites)
        known = {
            name: Extent(_kind(was["class"]), was["components"], was["cost"]) for name, was in (before or {}).items()
        }
        self._dense = {name: int(was["dense"]) for name, was in (before or {}).items()}
        here = {n: Extent(type(s.adapter).__name__, len(s.gate), s.gate.cost) for n, s in sites.items()}
        self._extents = known | {name: extent for name, extent in here.items() if name not in known}

    @classmethod
    def of(cls, module: nn.Module) -> RankBudget:
        """Collect the gated adapters of `module`; a layer shared by several parents counts once."""
        # Who holds a gate under this name is an adapter; its class is above this folder and not asked for.
        gated = {path: child for path, child in module.named_modules() if isinstance(child._modules.get("gate"), Gate)}
        sites = {}
        for path, child in gated.items():
            name = layer_name(path, gated)
            sites[name] = Site(name, cast(Gate, child._modules["gate"]), cast("Adapter", child))
        return cls(sites, whole(module))

    def __getitem__(self, name: str) -> Site:
        return self._sites[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def extents(self) -> Mapping[str, Extent]:
        """How large every layer's adapter was at the start, layers whose adapter was cut away since included."""
        return self._extents

    @property
    def capacity(self) -> int:
        """Components there are, open or closed, and those that were cut out."""
        return sum(extent.components for extent in self._extents.values())

    @property
    def spent(self) -> int:
        """Components that are open now. Reads the device: for events, tables and tests, not for every step."""
        return sum(self.ranks().values())

    @property
    def capacity_parameters(self) -> int:
        """What all components cost together, in parameters."""
        return sum(extent.components * extent.cost for extent in self._extents.values())

    @property
    def dense_parameters(self) -> int:
        """What the adapted layers' own weights have together, in parameters."""
        here = {name: site.adapter.dense_parameters for name, site in self.items() if name not in self._dense}
        return sum(here.values()) + sum(self._dense.values())

    @property
    def spent_parameters(self) -> int:
        """What the open components cost together, in parameters."""
        return sum(rank * self._extents[name].cost for name, rank in self.ranks().items())

    def ranks(self) -> dict[str, int]:
        """Open components per layer, read in one transfer from the device; 0 where the adapter was cut away."""
        if not self:
            return dict.fromkeys(self._extents, 0)
        counts = torch.stack([site.gate.open().sum() for site in self.values()]).tolist()
        return dict.fromkeys(self._extents, 0) | dict(zip(self, (int(count) for count in counts), strict=True))

    def sizes(self, unit: Unit = "components") -> dict[str, int]:
        """What one component costs per layer: 1 where components are counted, else its parameters."""
        return {name: 1 if unit == "components" else extent.cost for name, extent in self._extents.items()}

    def keep(self, masks: Mapping[str, Tensor], soft: bool = False) -> None:
        """Keep the components that `masks` names, layer by layer, in place; see :meth:`Gate.keep`.

        Raises:
            KeyError: a mask names a layer that has no gate.
        """
        for name in masks:
            if name not in self:
                raise KeyError(f"no adapted layer is called {name!r}; there are {', '.join(self) or 'none'}.")
        for name, mask in masks.items():
            self[name].gate.keep(mask.to(self[name].gate.mask.device), soft=soft)

    def table(self) -> str:
        """Ranks per layer as text, with the totals in the last row."""
        ranks = self.ranks()
        rows = [
            (name, extent.adapter, f"{ranks[name]}/{extent.components}", f"{ranks[name] * extent.cost:,}")
            for name, extent in self._extents.items()
        ]
        total = (
            f"{len(self._extents)} layers",
            "",
            f"{sum(ranks.values())}/{self.capacity}",
            f"{self.spent_parameters:,}",
        )
        header = ("layer", "adapter", "rank", "parameters")
        widths = [max(len(row[i]) for row in (header, *rows, total)) for i in range(4)]

        def line(row: tuple[str, str, str, str]) -> str:
            layer, kind, rank, cost = row
            return f"{layer:<{widths[0]}}  {kind:<{widths[1]}}  {rank:>{widths[2]}}  {cost:>{widths[3]}}"

        rule = "-" * (sum(widths) + 6)
        return "\n".join([line(header), rule, *map(line, rows), rule, line(total)])


@dataclass(frozen=True)
class Budget:
    """What the open components may cost together at the end, in the unit that is at hand. Give exactly one.

    Args:
        rank: average rank per adapted layer: components, each counted as one, whatever its layer's size.
        parameters: adapter parameters.
        share: share of the adapters' parameters at full rank, in (0, 1].
        dense_share: share of the parameters that the adapted layers' own weights have, for adapters that have these
            weights in another form: the size that a compressed model keeps. Where components cost less than that from
            the start, as they may if it is 1 or more, nothing is closed.
        megabytes: size of the exported adapter file in 10^6 bytes: float32 tensors of true rank (`to_hf_peft` with mode
            "compact" or "folded") and their header; the head is not counted. Adapters that have more than components
            are counted with what they have; one that then has no component is written with one of zeros, uncounted.

    Raises:
        ValueError: not exactly one is given, or the one given is not positive.

    Example:
        >>> Budget(megabytes=2.5)
        Budget(megabytes=2.5)
    """

    rank: float | None = None
    parameters: int | None = None
    share: float | None = None
    megabytes: float | None = None
    dense_share: float | None = None

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            raise ValueError(
                "a budget is given in exactly one of rank, parameters, share, megabytes, dense_share. "
                f"Got {', '.join(f'{k}={v}' for k, v in given.items()) or 'none'}."
            )
        name, value = next(iter(given.items()))
        require_number(f"a budget's {name}", value)
        if not (value > 0 and isfinite(value)) or (name == "share" and value > 1):
            bounds = "in (0, 1]" if name == "share" else "positive and finite"
            raise ValueError(f"a budget's {name} must be {bounds}. Got {value}.")

    def __repr__(self) -> str:
        return f"Budget({', '.join(f'{k}={v}' for k, v in self._given().items())})"

    def _given(self) -> dict[str, float]:
        return {k: v for k, v in vars(self).items() if v is not None}

    @property
    def unit(self) -> Unit:
        """What is counted: components for an average rank, parameters for all others."""
        return "components" if self.rank is not None else "parameters"

    def amount(self, budget: RankBudget, minimum: int = 0) -> int:
        """The budget in whole units of :attr:`unit`.

        Args:
            budget: the adapters that share it.
            minimum: components that every layer keeps; the floor under the budget.

        Raises:
            ValueError: it is below the floor, above the capacity, or leaves no component open.
        """
        sizes = budget.sizes(self.unit)
        capacity = sum(sizes[name] * extent.components for name, extent in budget.extents.items())
        if self.rank is not None:
            amount = floor(len(sizes) * self.rank + 1e-9)
        elif self.parameters is not None:
            amount = int(self.parameters)
        elif self.share is not None:
            amount = floor(capacity * self.share + 1e-9)
        elif self.dense_share is not None:
            amount = min(capacity, floor(budget.dense_parameters * self.dense_share + 1e-9))
        else:
            assert self.megabytes is not None
            # Two tensors a layer; an entry in a safetensors header is its name and some 120 bytes of JSON.
            lasting = {
                n: [p.numel() for p in site.adapter.lasting_parameters()]
                for n, site in budget.items()
                if not site.adapter.folds_lasting
            }
            header = sum((2 + len(lasting.get(name, ()))) * (len(name) + 120) for name in sizes)
            whole_ = sum(map(sum, lasting.values()))
            amount = max(0, floor((self.megabytes * 1e6 - header) / 4) - whole_)
        # Components are closed whole, so a cut may go over by one: with less than the dearest, all might be closed.
        least = max(minimum * sum(sizes.values()), max(sizes.values(), default=1))
        if amount < least:
            raise ValueError(
                f"{self} is {amount:,} {self.unit} for {len(sizes)} layers, below the floor of {least:,} "
                f"({minimum} components kept in every layer, in all at least the dearest). Raise it or lower `minimum`."
            )
        if amount > capacity:
            raise ValueError(
                f"{self} is {amount:,} {self.unit}, more than the {capacity:,} that the adapters have at full rank. "
                "Lower the budget or raise the adapters' rank."
            )
        return amount
