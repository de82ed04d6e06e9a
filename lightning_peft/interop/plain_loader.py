"""Puts thin layers into a model and loads their weights: needs torch and safetensors, and no library that made them.

    model = TheModel(...)          # as it was built before it was compressed
    load(model, "folder")

A layer of rank k that was `y = W x + b` is `y = up(down(x))`: `down` has k outputs and no bias, `up` has the bias. The
ranks stand in `config.json`, by the names of the layers; a layer that is not there is as it was.
"""

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_map


class Product(torch.Tensor):
    """`up @ down`, multiplied where it is used, and not where a model asks for its dtype, as T5 does in every call."""

    factors: "tuple[torch.Tensor, torch.Tensor]"
    known = {getattr(torch.Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim")} | {
        getattr(torch.Tensor, name) for name in ("size", "dim", "numel", "is_floating_point")
    }

    @staticmethod
    def __new__(cls, up: torch.Tensor, down: torch.Tensor) -> "Product":
        shape = (up.shape[0], down.shape[1])
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=up.dtype, device=up.device)
        made.factors = (up, down)
        return made

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in cls.known:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return cls.__torch_dispatch__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        args, kwargs = tree_map(lambda x: x.factors[0] @ x.factors[1] if isinstance(x, cls) else x, (args, kwargs))
        return func(*args, **(kwargs or {}))


class ThinLinear(nn.Sequential):
    """Two linear layers in the place of one. What reads `weight` gets their product."""

    def __init__(self, d_in: int, d_out: int, rank: int, bias: bool) -> None:
        down = nn.Linear(d_in, rank, bias=False)
        super().__init__(OrderedDict(down=down, up=nn.Linear(rank, d_out, bias=bias)))
        self.in_features, self.out_features = d_in, d_out

    @property
    def weight(self) -> torch.Tensor:
        up, down = self.up.weight, self.down.weight  # type: ignore[union-attr]
        return up @ down if torch.compiler.is_compiling() else Product(up, down)  # type: ignore[operator, arg-type]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.up.bias  # type: ignore[return-value, union-attr]


def thin(layer: nn.Module, rank: int) -> nn.Module:
    """A layer of this rank for the place of a linear layer, a convolution or transformers' Conv1D."""
    weight: torch.Tensor = layer.weight  # type: ignore[assignment]
    bias = layer.bias is not None
    if weight.dim() == 2:
        d_in, d_out = weight.shape if type(layer).__name__ == "Conv1D" else reversed(weight.shape)
        pair: nn.Module = ThinLinear(d_in, d_out, rank, bias)
    else:
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        geometry = {name: getattr(layer, name) for name in names}
        down = type(layer)(layer.in_channels, rank, bias=False, **geometry)
        up = type(layer)(rank, layer.out_channels, 1, bias=bias)
        pair = nn.Sequential(OrderedDict(down=down, up=up))
    return pair.to(device=weight.device, dtype=weight.dtype)


def put_in(model: nn.Module, ranks: "dict[str, int]") -> None:
    """Put thin layers in the place of dense ones, in place.

    Args:
        model: has the dense layers.
        ranks: name of a layer -> its rank. A name may have the prefix of transformers' base model in front or not.
    """
    prefix = getattr(model, "base_model_prefix", "") + "."
    modules = dict(model.named_modules(remove_duplicate=False))
    new = {}
    for name, rank in ranks.items():
        found = next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules), None)
        if found is None:
            if getattr(model, "base_model", None) is model:
                continue  # a layer of the head, and this is the base model alone
            raise ValueError(f"{type(model).__name__} has no layer {name!r}: it is not the model that was compressed.")
        new[id(modules[found])] = thin(modules[found], rank)
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # also the second name of a layer that has two
            if id(child) in new:
                setattr(parent, name, new[id(child)])


def load(model: nn.Module, folder: "str | Path") -> nn.Module:
    """Put thin layers into a model as it was built before it was compressed, load all weights, return the model."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    put_in(model, config["thin_layers"])
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(file))
    for name, same in config.get("same", {}).items():
        tensors[name] = tensors[same]
    model.load_state_dict(tensors)
    return model
