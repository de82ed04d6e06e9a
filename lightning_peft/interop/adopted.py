"""What our policies, terms, monitors and exporters see of a layer that PEFT injected: A, B, a gate, a scale."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.layers import is_transformers_conv1d
from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.interop.masked import mask_reads, parameter_of, reads_masked, unmask_reads
from lightning_peft.rank.gate import Gate


class SoftGate(Gate):
    """A gate on a factor that PEFT holds. Soft removal zeroes the component's slice of the factor, once.

    So it needs no parameter that PEFT does not know: after a soft removal the component adds nothing, and its gradient,
    which does not depend on the slice itself, may bring it back. Only the mask says whether a component is open.

    Args:
        n: number of components.
        cost: parameters that one component costs.
        holder: the layer or the dictionary of parameters that holds the factor.
        key: the factor's key in a dictionary.
        dim: the dimension of the factor that counts components.
    """

    def __init__(self, n: int, cost: int, holder: nn.Module, key: str, dim: int) -> None:
        super().__init__(n, cost)
        self.__dict__["_holder"] = holder  # not as a child: its parameters have a name already
        self._key = key
        self._dim = dim

    @property
    def removes_softly(self) -> bool:
        return True

    def _factor(self) -> nn.Parameter:
        return parameter_of(self.__dict__["_holder"], self._key)

    @torch.no_grad()
    def keep(self, which: Tensor, soft: bool = False) -> None:
        if not soft or which.shape != self.mask.shape:
            super().keep(which)
            return
        factor = self._factor()
        shape = [1] * factor.dim()
        shape[self._dim] = -1
        factor.masked_fill_((which.to(factor.device) == 0).view(shape), 0.0)


class GainGate(SoftGate):
    """A gate whose method has a scalar of its own per component, which PEFT holds: AdaLoRA's E, KaSA's diagonal."""

    def value(self) -> Tensor:
        return self._factor().reshape(-1) * self.mask

    def open(self) -> Tensor:
        return (self.mask.detach() != 0) & (self._factor().detach().reshape(-1) != 0)


class Adopted(LowRank):
    """A view of one adapter in one PEFT layer. It owns no tensor but its gate's mask, and PEFT's own forward runs.

        update = scaling * B diag(value) A

    A: (r, d_in) and B: (d_out, r) are PEFT's own parameters; of a convolution, views of them with the kernel in d_in.
    value: (r,), the mask, times the method's own gain if it has one.

    Never made by hand: see :func:`lightning_peft.adopt`. `arguments()` says what the PEFT layer is, so that a
    checkpoint can be told to fit it or not; nothing is built from them.

    Args:
        layer: a LoRA-type layer of PEFT.
        adapter_name: which of the layer's adapters.
        config: what its PEFT config says, as plain values.
    """

    mergeable: ClassVar[bool] = False
    hosted: ClassVar[bool] = True

    def __init__(self, layer: Any, adapter_name: str, config: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        self.__dict__["_layer"] = layer  # not as a child: it has its place in the model
        self.adapter_name = adapter_name
        self._attached = False
        self.config = dict(config)
        self.kind = type(layer).__name__
        variant = layer.lora_variant.get(adapter_name)
        self.variant = None if variant is None else type(variant).__name__
        self.rank = self.A.shape[0]
        self.alpha = float(layer.lora_alpha[adapter_name])
        self.dropout = float(getattr(layer.lora_dropout[adapter_name], "p", 0.0))
        self.gate = self._make_gate(self.A.shape[1], self.B.shape[0]).to(self.A.device)
        self.training = layer.training

    @classmethod
    def take_over(cls, module: nn.Module, recipe: Mapping[str, Any], source: str) -> Callable[[], None]:
        from lightning_peft.interop.adoption import take_over

        return take_over(module, recipe, source)

    @property
    def layer(self) -> Any:
        """The PEFT layer."""
        return self.__dict__["_layer"]

    @property
    def base(self) -> nn.Module:  # type: ignore[override]
        """The layer that PEFT adapted."""
        found: nn.Module = self.layer.get_base_layer()
        return found

    @property
    def gone(self) -> bool:
        """Whether the PEFT layer has lost this adapter since, or has got another one of this name."""
        if self.adapter_name not in self.layer.scaling:
            return True
        return self._attached and not reads_masked(self._gated()[0], self.adapter_name, self.gate)

    def _held(self, container: str) -> nn.Parameter:
        holder = getattr(self.layer, container)
        if self.adapter_name not in holder or self.gone:
            raise RuntimeError(
                f"the adapter {self.adapter_name!r} of this {self.kind} is gone. Call release(model) before "
                "delete_adapter, and adopt(model) for one that is left."
            )
        owner = holder if isinstance(holder, nn.ParameterDict) else holder[self.adapter_name]
        return parameter_of(owner, self.adapter_name)

    def attach(self) -> None:
        """Let PEFT read the gated factor as masked."""
        holder, dim = self._gated()
        mask_reads(holder, self.adapter_name, self.gate, dim)
        self._attached = True

    def detach(self) -> None:
        """Let PEFT read its own parameter again."""
        self._attached = False
        # A dictionary outlives the entry that it lost.
        holders: list[nn.Module] = [c for c in self.layer.children() if isinstance(c, nn.ParameterDict)]
        if self.adapter_name in self.layer.scaling:
            holders.append(self._gated()[0])
        for holder in holders:
            if reads_masked(holder, self.adapter_name, self.gate):
                unmask_reads(holder, self.adapter_name)

    @abstractmethod
    def _gated(self) -> tuple[nn.Module, int]:
        """What holds the factor that is masked, and the factor's dimension of components."""

    @torch.no_grad()
    def fold(self) -> None:
        """Write the mask into the gated factor: closed components are zero there, for good."""
        holder, dim = self._gated()
        factor = parameter_of(holder, self.adapter_name)
        shape = [1] * factor.dim()
        shape[dim] = -1
        factor.masked_fill_((self.gate.mask == 0).view(shape), 0.0)

    def gated_parameter(self) -> nn.Parameter:
        """The parameter that PEFT reads as masked."""
        return parameter_of(self._gated()[0], self.adapter_name)

    def own_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        if self.gone and self.adapter_name in self.layer.scaling:
            self._held(self.layer.adapter_layer_names[0])  # raises: another adapter has its name
        for name in self.layer.adapter_layer_names:
            holder = getattr(self.layer, name, None)
            if holder is None or self.adapter_name not in holder:
                continue
            if isinstance(holder, nn.ParameterDict):
                yield name, parameter_of(holder, self.adapter_name)
            else:
                for part, parameter in holder[self.adapter_name].named_parameters():
                    yield f"{name}.{part}", parameter

    def lasting_parameters(self) -> Iterator[nn.Parameter]:
        own = dict(self.own_parameters())
        return (p for name, p in own.items() if name.endswith(".bias") or name.startswith("lora_magnitude_vector"))

    def arguments(self) -> dict[str, Any]:
        names = ("adapter_name", "kind", "variant", "rank", "alpha", "scaling", "dropout", "config")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def effective_weight(self) -> Tensor:
        """The weight that PEFT's layer acts with, its base dequantized: (d_out, d_in). PEFT computes it."""
        from peft.utils.integrations import dequantize_module_weight

        layer, name = self.layer, self.adapter_name
        weight = dequantize_module_weight(self.base).detach().clone()
        variant = layer.lora_variant.get(name)
        if variant is None:
            weight += layer.get_delta_weight(name).to(weight.dtype)
        else:
            kept = dict(layer._caches)  # where a merge notes what its undoing needs
            weight = variant.merge_safe(layer, name, weight)
            layer._caches = kept
        # Not `is_transposed`: a quantized Linear is no nn.Linear, and is stored like one.
        if isinstance(self.base, nn.Embedding) or is_transformers_conv1d(self.base):
            return weight.t()
        return weight.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """PEFT's own forward, the base and other active adapters included."""
        y: Tensor = self.layer(x)
        return y

    def compacted(self, keep: Tensor | None = None) -> Adapter | None:
        raise TypeError(
            "the tensors are PEFT's and stay at its rank. to_hf_peft(model, folder, mode='compact') writes them at "
            "their true ranks."
        )

    def reset_parameters(self) -> None:
        # PEFT fills the tensors that it reads, and of the masked factor it would fill a copy.
        self.detach()
        try:
            self._reset()
        finally:
            self.attach()

    def _reset(self) -> None:
        self.layer.reset_lora_parameters(self.adapter_name, True)

    def extra_repr(self) -> str:
        return f"{self.kind}, adapter_name={self.adapter_name!r}, rank={self.rank}, scaling={self.scaling:g}"


class AdoptedLoRA(Adopted):
    """PEFT's LoRA in one layer, and what builds on it: rsLoRA, DoRA, KaSA, MonteCLoRA, aLoRA and others.

    B reads as masked: column i of a closed component is zero, so that nothing of the component is left, whatever a
    variant does to A or between the two. In a DoRA layer the mask's gradient treats the norm as a constant, as PEFT
    does for A and B.
    """

    @property
    def A(self) -> Any:  # type: ignore[override]
        embedded = self.adapter_name in self.layer.lora_embedding_A
        A = self._held("lora_embedding_A" if embedded else "lora_A")
        return A if A.dim() == 2 else A.flatten(1)

    @property
    def B(self) -> Any:  # type: ignore[override]
        embedded = self.adapter_name in self.layer.lora_embedding_B
        B = self._held("lora_embedding_B" if embedded else "lora_B")
        return B if B.dim() == 2 else B.flatten(1)

    @property
    def scaling(self) -> float:
        return float(self.layer.scaling[self.adapter_name])

    def _gated(self) -> tuple[nn.Module, int]:
        layer, name = self.layer, self.adapter_name
        return (layer.lora_embedding_B, 1) if name in layer.lora_embedding_B else (layer.lora_B[name], 1)

    def _make_gate(self, d_in: int, d_out: int) -> Gate:
        diagonal: nn.ParameterDict | None = getattr(self.layer, "lora_diag", None)
        if diagonal is not None and self.adapter_name in diagonal:
            return GainGate(self.rank, d_in + d_out, diagonal, self.adapter_name, 0)
        holder, dim = self._gated()
        return SoftGate(self.rank, d_in + d_out, holder, self.adapter_name, dim)


class AdoptedAdaLoRA(Adopted):
    """PEFT's AdaLoRA in one layer: its E is the gain, and reads as masked.

        update = scaling / (r + 1e-5) * B diag(E m) A

    A component costs d_in + d_out parameters, what it has when E is folded into B.
    """

    @property
    def A(self) -> Any:  # type: ignore[override]
        return self._held("lora_A")

    @property
    def B(self) -> Any:  # type: ignore[override]
        return self._held("lora_B")

    @property
    def scaling(self) -> float:
        # `ranknum` is frozen at the rank that training started with, whatever was cut since: read once, it may be on a
        # device.
        if "_ranknum" not in self.__dict__:
            self._ranknum = float(self.layer.ranknum[self.adapter_name])
        return float(self.layer.scaling[self.adapter_name]) / (self._ranknum + 1e-5)

    def _reset(self) -> None:
        self.layer.reset_lora_parameters(self.adapter_name)

    def _gated(self) -> tuple[nn.Module, int]:
        return self.layer.lora_E, 0

    def _make_gate(self, d_in: int, d_out: int) -> Gate:
        return GainGate(self.rank, d_in + d_out, self.layer.lora_E, self.adapter_name, 0)
