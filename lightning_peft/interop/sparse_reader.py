"""Read sparse adapters from files: ours, and those of the authors' newer package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from os import PathLike

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lightning_peft.archive import AdapterFileError, reading
from lightning_peft.functional.sparse_arithmetic import SparseDelta, is_finite
from lightning_peft.interop.sparse import FORMAT, VERSION, SparseAdapter, named_weights, require_fitting


def read_sparse(path: str | PathLike[str], model: nn.Module | None = None) -> SparseAdapter:
    """Read a file that :meth:`SparseAdapter.save` wrote, or one of the authors' newer package.

    That has `indices.<parameter>`, (k, 2) rows and columns of int32, and `deltas.<parameter>`, and does not say how
    large its tensors are, so that the model has to be given. Tensors of it under other names are taken for parts of the
    head if the model has parameters of these names and shapes.

    Args:
        path: a safetensors file.
        model: the plain model that it is for; what it changes is compared with the parameters there.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: it is damaged, no sparse adapter, not of this model, or not finite.
        ValueError: its layout says no shapes, and no model is given.
    """
    with reading(path), safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
        odd = next((key for key, tensor in tensors.items() if not is_finite(tensor)), None)
    if odd is not None:
        raise AdapterFileError(f"{path}: {odd!r} holds numbers that are not finite; use another copy.")
    shapes = None if model is None else {n: tuple(p.shape) for n, p in named_weights(model).items()}
    if metadata.get("format") == FORMAT:
        with reading(path):
            found = _ours(path, tensors, metadata)
    elif any(key.startswith("deltas.") for key in tensors):
        if shapes is None:
            raise ValueError(
                f"{path} says no shapes of the tensors that it changes: give the model, read_sparse(path, model)."
            )
        with reading(path):
            found = _theirs(path, tensors, shapes)
    else:
        raise AdapterFileError(f"{path} holds no sparse adapter: no indices with deltas are in it.")
    if shapes is not None:
        require_fitting(path, found, shapes)
    return found


def _ours(path: object, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> SparseAdapter:
    if metadata.get("version") != VERSION:
        raise AdapterFileError(
            f"{path} is of version {metadata.get('version')!r} of the format, and {VERSION!r} is read: use a newer "
            "lightning_peft."
        )
    shapes = {str(name): tuple(map(int, shape)) for name, shape in json.loads(metadata["shapes"]).items()}
    deltas = {
        name: SparseDelta(_whole_numbers(tensors.pop(f"{name}.indices")), tensors.pop(f"{name}.delta"), shape)
        for name, shape in shapes.items()
    }
    head = {key.removeprefix("head."): tensors.pop(key) for key in list(tensors) if key.startswith("head.")}
    _require_empty(path, tensors)
    return SparseAdapter(deltas, head, json.loads(metadata.get("about", "{}")))


def _theirs(path: object, tensors: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> SparseAdapter:
    """Rows and columns of their entries, in any order."""
    deltas = {}
    for key in [key for key in tensors if key.startswith("deltas.")]:
        name = key.removeprefix("deltas.")
        if name not in shapes or f"indices.{name}" not in tensors:
            raise AdapterFileError(
                f"{path} changes {name!r}, "
                + ("and does not say which entries." if name in shapes else "which this model does not have.")
            )
        where, delta = _whole_numbers(tensors.pop(f"indices.{name}")), tensors.pop(key)
        shape = shapes[name]
        if where.dim() != 2 or where.shape[1] != len(shape) or bool((where >= where.new_tensor(shape)).any()):
            raise AdapterFileError(
                f"{path} changes entries of {name!r} that its shape {shape} does not have: it is of another model."
            )
        if delta.shape != where.shape[:1]:
            raise AdapterFileError(
                f"{path} has {len(where)} positions and {tuple(delta.shape)} deltas in {name!r}; use another copy."
            )
        if bool((where < 0).any()):
            raise AdapterFileError(f"{path} has negative positions in {name!r}; use another copy.")
        flat = (where * where.new_tensor([prod(shape[dim + 1 :]) for dim in range(len(shape))])).sum(1)
        flat, ascending = flat.sort()
        deltas[name] = SparseDelta(flat, delta.float()[ascending], shape)
    head = {key: tensors.pop(key) for key in list(tensors) if shapes.get(key) == tuple(tensors[key].shape)}
    _require_empty(path, tensors)
    return SparseAdapter(deltas, head)


def _whole_numbers(tensor: Tensor) -> Tensor:
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"positions of {tensor.dtype}")
    return tensor.long()


def _require_empty(path: object, tensors: Mapping[str, Tensor]) -> None:
    if tensors:
        raise AdapterFileError(
            f"{path} holds tensors that belong to no entry and no parameter: {', '.join(sorted(tensors)[:3])}. It is "
            "of another model or of another tool."
        )
