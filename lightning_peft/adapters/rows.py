"""A layer's inputs and outputs as rows of the matrix product y = W x that it is, whatever the kind of layer.

For a convolution a row of the input is what its kernel covers at one place of the output, in one of its groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What the layer's (d_out, d_in) matrix multiplies, a row per position.

    Args:
        layer: a layer that can be adapted, but no embedding: a row of its input would be one-hot.
        x: what it is called with: (..., d_in), or ([N,] c_in, *places) for a convolution.

    Returns:
        (n, d_in); for a convolution with groups n counts every group, and d_in = c_in / groups * prod(kernel).
    """
    if not isinstance(layer, _CONVOLUTIONS):
        return x.reshape(-1, x.shape[-1])
    conv: Any = layer
    dims = len(conv.kernel_size)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    patches = F.pad(_batched(x, dims), conv._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        patches = patches.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (N, c_in, *places, *kernel) -> (groups, N, *places, c_in / groups, *kernel)
    patches = patches.unflatten(1, (conv.groups, -1)).movedim(1, 0).movedim(2, 2 + dims)
    rows: Tensor = patches.flatten(2 + dims).flatten(0, 1 + dims)
    return rows


def output_rows(layer: nn.Module, y: Tensor) -> Tensor:
    """What the layer's matrix multiplies to, in the order of :func:`input_rows`: (n, d_out).

    A group of a convolution gives its own outputs only; in its rows the others are zero.
    """
    if not isinstance(layer, _CONVOLUTIONS):
        return y.reshape(-1, y.shape[-1])
    conv: Any = layer
    rows = _batched(y, len(conv.kernel_size)).movedim(1, -1).flatten(0, -2)
    if conv.groups == 1:
        return rows
    size = rows.shape[1] // conv.groups
    every = rows.new_zeros(conv.groups, *rows.shape)
    for group in range(conv.groups):
        own = slice(group * size, (group + 1) * size)
        every[group, :, own] = rows[:, own]
    return every.flatten(0, 1)


def sample_rows(layer: nn.Module, x: Tensor, samples: int, rows: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
    """The rows of a layer's input or output, by sample: (samples, n, d).

    Samples are the first dimension, or the second where only that is as long: of (length, samples, d). Where both are,
    neither is right for sure.

    Args:
        layer: a layer that can be adapted.
        x: its input or output.
        samples: how many the batch has.
        rows: :func:`input_rows` or :func:`output_rows`.

    Raises:
        ValueError: neither dimension is as long, or both are, so that whose rows they are cannot be told.
    """
    if isinstance(layer, _CONVOLUTIONS):
        conv: Any = layer
        if _batched(x, len(conv.kernel_size)).shape[0] == samples:
            every = rows(layer, x)  # of groups, then samples, then places
            return every.reshape(conv.groups, samples, -1, every.shape[-1]).transpose(0, 1).flatten(1, 2)
    elif x.dim() > 2 and samples > 1 and x.shape[:2] == (samples, samples):
        raise ValueError(
            f"rows of shape {tuple(x.shape)} are of {samples} samples and as many positions, in one order or the other."
        )
    elif samples == 1 or (x.dim() > 1 and x.shape[0] == samples):
        return rows(layer, x).reshape(samples, -1, x.shape[-1])
    elif x.dim() > 2 and x.shape[1] == samples:
        return rows(layer, x.transpose(0, 1)).reshape(samples, -1, x.shape[-1])
    raise ValueError(f"rows of shape {tuple(x.shape)} are not those of {samples} samples.")


def _batched(x: Tensor, dims: int) -> Tensor:
    return x if x.dim() == dims + 2 else x[None]
