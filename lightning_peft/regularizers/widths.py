"""How wide the output of a layer is, before it was ever called: what is built on it is built before training."""

from __future__ import annotations

from torch import nn

from lightning_peft.adapters.base import Adapter

_NAMES = ("out_features", "embedding_dim", "out_channels", "num_features", "nf")
"""What layers call the width of their output; the last is transformers' Conv1D."""
_KEEP_WIDTH = (nn.Identity, nn.Dropout, nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.LeakyReLU, nn.ELU)


def output_width(layer: nn.Module, name: str) -> int:
    """The number of features that a layer gives for an example or a position.

    Read from the layer itself, adapted, compiled or not: linear layers and embeddings, convolutions, normalisations,
    recurrent layers, transformer layers of torch, and a Sequential's last one of these.

    Args:
        layer: the layer.
        name: as the user knows it, for the error.

    Raises:
        ValueError: it cannot be told.
    """
    found = _width(layer)
    if found is None:
        raise ValueError(
            f"{name!r} is a {type(layer).__name__}, which does not say how many features it gives. Say it: "
            "features=<their number>; or name a layer inside it whose output is meant."
        )
    return found


def _width(layer: nn.Module) -> int | None:
    layer = getattr(layer, "_orig_mod", layer)
    if isinstance(layer, Adapter):
        return _width(layer.base)  # what its update is added to
    if isinstance(layer, nn.Sequential):
        last = next((child for child in reversed(layer) if not isinstance(child, _KEEP_WIDTH)), None)
        return None if last is None else _width(last)
    if isinstance(layer, nn.RNNBase):
        return int(layer.proj_size or layer.hidden_size) * (2 if layer.bidirectional else 1)
    if isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return int(layer.linear2.out_features)
    if isinstance(layer, nn.MultiheadAttention):
        return int(layer.embed_dim)
    shape = getattr(layer, "normalized_shape", None)
    if shape:
        return int(shape[-1])
    return next((size for size in (getattr(layer, name, None) for name in _NAMES) if isinstance(size, int)), None)
