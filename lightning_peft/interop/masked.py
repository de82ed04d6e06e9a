"""Tensors that read as masked: whoever asks a PEFT layer for its factor gets the one with closed components at zero.

PEFT reads the up-projection in many places: in forward, in the norm of DoRA, in merges, in the delta of a convolution.
All of them ask a module for `weight`, or a dictionary of parameters for an entry. So that is where the mask goes: the
answer is parameter times mask, a part of the graph, and no formula of PEFT is written anew. The parameter itself stays
where it was, under its name: optimizers, `state_dict` and `named_parameters` see it whole and unmasked.

The classes are put in place of an object's own by `mask_reads`, as FSDP2 does, and taken off by `unmask_reads`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lightning_peft.rank.gate import Gate

_GATES = "_masking_gates"  # in an object's own dictionary, not among its children: the gate has another home


def masked(parameter: Tensor, gate: Gate, dim: int) -> Tensor:
    """The parameter with closed components at zero along `dim`; its dtype stays.

    Raises:
        RuntimeError: it has another number of components than the gate.
    """
    if parameter.shape[dim] != len(gate):
        raise RuntimeError(
            f"an adopted PEFT layer has {parameter.shape[dim]} components now, and had {len(gate)} when it was "
            "adopted: its adapter was replaced. Call release(model) before an adapter is loaded under the same name, "
            "and adopt(model) after."
        )
    shape = [1] * parameter.dim()
    shape[dim] = -1
    return parameter * gate.mask.view(shape).to(parameter.dtype)


class MaskedWeight(nn.Module):
    """A layer whose `weight` reads as masked along its second dimension, the inputs."""

    # pickle and deepcopy know the classes below by their names, so there is one for each kind and none is made up.
    @property
    def weight(self) -> Tensor:
        """The weight that the layer acts with."""
        parameter = self._parameters["weight"]
        assert parameter is not None
        return masked(parameter, self.__dict__[_GATES], 1)


class MaskedLinear(MaskedWeight, nn.Linear):  # type: ignore[override]
    """A Linear layer whose weight reads as masked."""


class MaskedConv1d(MaskedWeight, nn.Conv1d):  # type: ignore[override]
    """A Conv1d layer whose weight reads as masked."""


class MaskedConv2d(MaskedWeight, nn.Conv2d):  # type: ignore[override]
    """A Conv2d layer whose weight reads as masked."""


class MaskedConv3d(MaskedWeight, nn.Conv3d):  # type: ignore[override]
    """A Conv3d layer whose weight reads as masked."""


class MaskedParameters(nn.ParameterDict):
    """A dictionary of parameters of which some read as masked: by key. What iterates over it sees parameters."""

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        gate, dim = self.__dict__[_GATES].get(key, (None, 0))
        return value if gate is None else masked(value, gate, dim)

    def parameter(self, key: str) -> Any:
        """The parameter itself."""
        return super().__getitem__(key)

    def values(self) -> Iterator[Any]:
        return (self.parameter(key) for key in self)

    def items(self) -> Iterator[tuple[str, Any]]:
        return ((key, self.parameter(key)) for key in self)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: MaskedLinear,
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Conv3d: MaskedConv3d,
}
_PLAIN = {masked: plain for plain, masked in _KINDS.items()}


def can_mask(holder: nn.Module) -> bool:
    """Whether reads of this layer's weight, or of this dictionary's entries, can be masked."""
    return type(holder) in _KINDS or type(holder) in (nn.ParameterDict, MaskedParameters)


def mask_reads(holder: nn.Module, key: str, gate: Gate, dim: int) -> None:
    """Let what is read of `holder` be masked: its weight, or its entry `key` where it is a dictionary."""
    if isinstance(holder, nn.ParameterDict):
        holder.__class__ = MaskedParameters
        holder.__dict__.setdefault(_GATES, {})[key] = (gate, dim)
    else:
        holder.__class__ = _KINDS[type(holder)]
        holder.__dict__[_GATES] = gate


def unmask_reads(holder: nn.Module, key: str) -> None:
    """Undo :func:`mask_reads`; a dictionary stays masked for its other keys."""
    if isinstance(holder, MaskedParameters):
        gates = holder.__dict__[_GATES]
        gates.pop(key, None)
        if not gates:
            del holder.__dict__[_GATES]
            holder.__class__ = nn.ParameterDict  # type: ignore[assignment]
    elif type(holder) in _PLAIN:
        del holder.__dict__[_GATES]
        holder.__class__ = _PLAIN[type(holder)]


def reads_masked(holder: nn.Module, key: str, gate: Gate) -> bool:
    """Whether what is read of `holder`, or of its entry `key`, is masked by this gate."""
    if isinstance(holder, nn.ParameterDict):
        found, _ = holder.__dict__.get(_GATES, {}).get(key, (None, 0))
        return found is gate
    return holder.__dict__.get(_GATES) is gate


def parameter_of(holder: nn.Module, key: str) -> nn.Parameter:
    """The parameter behind a layer's weight, or behind a dictionary's entry, unmasked."""
    found = holder._parameters["weight" if not isinstance(holder, nn.ParameterDict) else key]
    assert found is not None
    return found
