"""A sparse adapter outside of training: pairs of index and delta by parameter, which add up, and are one small file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.sparse import Sparse
from lightning_peft.archive import AdapterFileError
from lightning_peft.atomic import write_whole
from lightning_peft.functional.sparse_arithmetic import SparseDelta, is_finite, require_factor
from lightning_peft.functional.sparse_layers import spread
from lightning_peft.interop.host import below, find_host, trained_beside
from lightning_peft.rank.budget import clean_name
from lightning_peft.surgery.layers import adapters

FORMAT = "lightning-peft sparse adapter"
VERSION = "1"
_INT32 = 2**31


class SparseAdapter(Mapping[str, SparseDelta]):
    """What a sparse adapter changes, by the names of a model's parameters; with the head that was trained beside it.

    Args:
        deltas: the changes, by the parameter's name.
        head: parameters of the head as they were trained, by name.
        about: what is known of how it was made, for readers of the file; nothing is computed from it.

    Raises:
        ValueError: the head has numbers that are not finite.

    Example:
        >>> one = SparseAdapter({"weight": SparseDelta(torch.tensor([1]), torch.tensor([0.5]), (2, 2))})
        >>> len(one + one * 2), (one + one * 2)["weight"].delta
        (1, tensor([1.5000]))
    """

    def __init__(
        self,
        deltas: Mapping[str, SparseDelta],
        head: Mapping[str, Tensor] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._deltas = dict(deltas)
        self.head = dict(head or {})
        if odd := next((name for name, tensor in self.head.items() if not is_finite(tensor)), None):
            raise ValueError(
                f"the head's {odd!r} is not finite: the run that it is from diverged. Take an earlier checkpoint of it."
            )
        self.about = dict(about or {})

    def __getitem__(self, name: str) -> SparseDelta:
        return self._deltas[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    @property
    def parameters(self) -> int:
        """Scalars that it changes, the head's not counted."""
        return sum(delta.indices.numel() for delta in self.values())

    def without_head(self) -> SparseAdapter:
        """The same changes without the head."""
        return SparseAdapter(self._deltas, None, self.about)

    def __add__(self, other: SparseAdapter) -> SparseAdapter:
        """Both adapters at once (task arithmetic): deltas of entries that both change are added.

        Raises:
            ValueError: both have a head, and heads of two tasks are not added; or a tensor has two shapes.
        """
        if self.head and other.head:
            raise ValueError(
                "both adapters have a head, and heads of two tasks cannot be added. Leave one out: "
                "a + b.without_head()."
            )
        both = {name: self[name] + other[name] if name in other else self[name] for name in self}
        return SparseAdapter(both | {n: d for n, d in other.items() if n not in both}, self.head or other.head)

    def __mul__(self, factor: float) -> SparseAdapter:
        """The same entries, changed by a multiple; the head stays.

        Raises:
            TypeError: the factor is no number.
            ValueError: it, or what comes of it, is not finite.
        """
        require_factor(factor)
        return SparseAdapter({name: delta * factor for name, delta in self.items()}, self.head, self.about)

    __rmul__ = __mul__

    @classmethod
    @torch.no_grad()
    def of(cls, module: nn.Module, head: bool = True) -> SparseAdapter:
        """The sparse adapters of a module as they are now; closed components are left out.

        Args:
            module: a transformers model, a LightningModule that holds one, or any module; with adapters inside. Names
                are those in the transformers model, if there is one.
            head: take what was trained beside the adapters with it.

        Raises:
            ValueError: there is no adapter, something trained is outside the transformers model, or not finite.
            TypeError: an adapter is of another kind.
        """
        name, host = find_host(module, "SparseAdapter.of")
        outside = [n for n in trained_beside(module) if not below(n, name)]
        if head and outside:
            raise ValueError(
                f"trained beside the adapters, but outside the transformers model {name!r}: {outside[0]!r}. Give "
                "head=False and save it yourself."
            )
        deltas = {parameter_name(host, layer): delta for layer, delta in changes(host).items()}
        about = described(next(iter(adapters(host).values())))
        beside = {n: p.detach().cpu().clone() for n, p in trained_beside(host).items()} if head else {}
        return cls(deltas, beside, about)

    def save(self, path: str | PathLike[str], overwrite: bool = False) -> int:
        """Write one safetensors file, whole or not at all, after it has been read again and compared.

            <name>.indices   (k,) int32 (int64 from 2^31 entries on), positions in the flattened tensor, ascending
            <name>.delta     (k,) float32, or the base's dtype where that is wider
            head.<name>      the head's parameters as they were trained

        Args:
            path: of the file.
            overwrite: replace a file that is no sparse adapter of ours.

        Returns:
            Its size in bytes.

        Raises:
            FileExistsError: something else is there, and `overwrite` is not set.
            OSError: it could not be written, such as for lack of space; what was there before stays.
        """
        path = Path(path)
        if path.is_dir() or (path.exists() and not overwrite and not _is_ours(path)):
            raise FileExistsError(f"{path} is there and no sparse adapter. Give another name, or overwrite=True.")
        tensors: dict[str, Tensor] = {}
        for name, each in self.items():
            wide = each.indices.new_tensor(each.shape).prod() >= _INT32
            tensors[f"{name}.indices"] = each.indices if wide else each.indices.int()
            tensors[f"{name}.delta"] = each.delta.contiguous()
        tensors |= {f"head.{name}": tensor.contiguous() for name, tensor in self.head.items()}
        data = save(tensors, metadata({name: each.shape for name, each in self.items()}, self.about))
        write_whole(path, data)
        return len(data)


def metadata(shapes: Mapping[str, Sequence[int]], about: Mapping[str, Any]) -> dict[str, str]:
    """What a file says beside its tensors."""
    listed = {name: list(shape) for name, shape in shapes.items()}
    return {"format": FORMAT, "version": VERSION, "shapes": json.dumps(listed), "about": json.dumps(dict(about))}


def described(adapter: Adapter) -> dict[str, Any]:
    """How an adapter was made, as a file says it: for its readers, nothing is computed from it."""
    about = {k: v for k, v in adapter.arguments().items() if v is None or type(v) in (int, float, str)}
    return about | {"dtype": str(adapter.base.weight.dtype).removeprefix("torch.")}


@torch.no_grad()
def changes(host: nn.Module) -> dict[str, SparseDelta]:
    """What sparse adapters change now, by layer, on the CPU; closed components are left out.

    Raises:
        TypeError: an adapter is of another kind.
    """
    found = {}
    for layer, adapter in adapters(host).items():
        if not isinstance(adapter, Sparse):
            raise TypeError(
                f"layer {layer!r}: {type(adapter).__name__} changes more than some entries of a weight, so there are "
                "no pairs of index and delta. Use to_hf_peft, or save_merged."
            )
        weight: Tensor = adapter.base.weight  # type: ignore[assignment]
        open_ = adapter.gate.open().to(adapter.delta.device)  # type: ignore[union-attr]  # what trains entries has one
        value = torch.where(open_, adapter.value(), 0).to(adapter.delta.dtype)
        update, kept = adapter.delta * spread(value, adapter.delta), spread(open_, adapter.delta)
        kept = kept.expand_as(update).reshape(-1)
        deltas = update.reshape(-1)[kept].cpu()
        found[layer] = SparseDelta(adapter.indices[kept].long().cpu(), deltas, tuple(weight.shape))
    return found


def named_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """A plain model's parameters by cleaned name, a tied one under each of its names."""
    return {clean_name(name): p for name, p in model.named_parameters(remove_duplicate=False)}


def require_fitting(source: object, adapter: SparseAdapter, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a model has all that an adapter changes.

    Raises:
        AdapterFileError: it has not, or in another shape.
    """
    wanted = {name: delta.shape for name, delta in adapter.items()}
    for name, shape in (wanted | {name: tuple(t.shape) for name, t in adapter.head.items()}).items():
        if shapes.get(name) != shape:
            there = f"of shape {shapes[name]}" if name in shapes else "missing"
            raise AdapterFileError(
                f"{source} changes {name!r} of shape {shape}, which is {there} in this model: it is of another model, "
                "or names its parameters from another module (give the transformers model itself)."
            )


def stored_shape(adapter: Adapter) -> tuple[int, ...]:
    """The shape of an adapted weight as its base stores it."""
    weight: Tensor = adapter.base.weight  # type: ignore[assignment]
    return tuple(weight.shape)


def parameter_name(host: nn.Module, layer: str) -> str:
    """The name of an adapted layer's weight in the host, as it is without adapters."""
    owner, _, last = layer.rpartition(".")
    inside = last == "in_proj" and isinstance(host.get_submodule(owner), nn.MultiheadAttention)
    return f"{layer}_weight" if inside else f"{layer}.weight"


def _is_ours(path: Path) -> bool:
    try:
        with safe_open(path, framework="pt") as file:
            return (file.metadata() or {}).get("format") == FORMAT
    except Exception:  # whatever it is that is there
        return False
