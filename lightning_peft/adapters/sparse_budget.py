"""SparseBudget: SpaRTA in many layers, as many entries in all as one budget says."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from inspect import signature
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter, AdapterFactory
from lightning_peft.adapters.planned import PlannedFactory
from lightning_peft.adapters.roles import value_and_output
from lightning_peft.adapters.sparta import SpaRTA, require_arguments, require_some
from lightning_peft.arguments import require_integer
from lightning_peft.functional.sparse_budget import density_of_parameters, density_of_sparsity, require_sparsity
from lightning_peft.rank.budget import clean_name


class SparseBudget(PlannedFactory):
    """Build SpaRTA adapters of one density, which comes from what all of them may have together.

        sparsity      q = (1 - s) N / N_targets        N: the base's parameters, the head not counted
        parameters    q = k / N_targets
        density       q

    Every layer has q of its entries, rounded, so that all together are within one per layer of the budget, or one
    `block`. Where nobody names layers, they are the value and output projections of every attention, as in the paper's
    code.

    Args:
        density: q, share of every target's entries.
        sparsity: s, share of the base's parameters that stay as they are.
        parameters: k, scalars to train.
        arguments: of :class:`~lightning_peft.SpaRTA`: seed, sampling, block, kernel, scaling.

    Raises:
        TypeError: an argument is of another type, or not one of these.
        ValueError: not exactly one of the three is given, or an argument is out of range; or, when layers are chosen,
            they cannot have it.

    Reference:
        Rios et al., SpaRTA, Findings of EMNLP 2025, arXiv 2502.15975, with the authors' code.
    """

    kind: ClassVar[type[Adapter]] = SpaRTA

    def __init__(
        self,
        density: float | None = None,
        sparsity: float | None = None,
        parameters: int | None = None,
        **arguments: Any,
    ) -> None:
        given = {"density": density, "sparsity": sparsity, "parameters": parameters}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            raise ValueError(
                "how many entries are trained is said in exactly one of density, sparsity and parameters. Got "
                f"{', '.join(f'{name}={value}' for name, value in given.items()) or 'none'}."
            )
        if density is not None:
            require_some(density)
        if sparsity is not None:
            require_sparsity(sparsity)
        if parameters is not None:
            require_integer("parameters", parameters)
            if parameters < 1:
                raise ValueError(f"parameters is how many scalars are trained, at least 1. Got {parameters}.")
        known = signature(require_arguments).parameters
        if unknown := [name for name in arguments if name not in known]:
            raise TypeError(f"SparseBudget takes of SpaRTA {', '.join(known)}. Got {', '.join(map(repr, unknown))}.")
        require_arguments(**arguments)
        self.density, self.sparsity, self.parameters = density, sparsity, parameters
        self.arguments = arguments

    def usual(self, module: nn.Module) -> Sequence[str]:
        return value_and_output(module)

    def planned(self, module: nn.Module, layers: Mapping[str, nn.Module], head: Collection[str]) -> AdapterFactory:
        return partial(SpaRTA, density=self._density(module, layers, head), **self.arguments)

    def _density(self, module: nn.Module, layers: Mapping[str, nn.Module], head: Collection[str]) -> float:
        if self.density is not None:
            return self.density
        sizes = [_weight(layer).numel() for layer in layers.values()]
        if self.parameters is not None:
            return density_of_parameters(self.parameters, sum(sizes), len(sizes), self.arguments.get("block", 1))
        assert self.sparsity is not None
        total = sum(p.numel() for name, p in module.named_parameters() if clean_name(name) not in head)
        return density_of_sparsity(self.sparsity, total, sum(sizes))


def _weight(layer: nn.Module) -> Tensor:
    weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
    return weight  # type: ignore[return-value]  # a module's attribute
