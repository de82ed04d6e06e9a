"""The kinds of layer that can be adapted, and the one fact in which they differ: how they store their weight.

nn.Linear, MultiheadAttention's in_proj and out_proj   weight (d_out, d_in)
transformers' Conv1D, nn.Embedding                     weight (d_in, d_out)
nn.Conv1d, nn.Conv2d, nn.Conv3d                        weight (d_out, c_in / groups, *kernel)

A convolution's d_in is c_in / groups * prod(kernel), what its kernel covers at one place. Two kinds have nearly one
name: transformers' Conv1D is a linear layer and no convolution, nn.Conv1d is one.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED_CONVOLUTIONS = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_NORMS = ("LayerNorm", "RMSNorm", "GroupNorm")  # ends of classes' names: transformers has some dozens
_NAMES = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d")


def is_transformers_conv1d(layer: nn.Module) -> bool:
    """Whether `layer` is transformers' Conv1D, a linear layer with a transposed weight. Imports nothing."""
    return any(
        kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils" for kind in type(layer).__mro__
    )


def is_convolution(layer: nn.Module) -> bool:
    """Whether `layer` is torch's Conv1d, Conv2d or Conv3d."""
    return isinstance(layer, _CONVOLUTIONS)


def why_not(layer: nn.Module) -> str | None:
    """Why `layer` cannot be adapted, as the end of a sentence; ``None`` if it can."""
    kind = type(layer)
    if isinstance(layer, nn.Linear):
        known = kind.forward is nn.Linear.forward
    elif isinstance(layer, nn.Embedding):
        known = kind.forward is nn.Embedding.forward and layer.max_norm is None
    elif is_transformers_conv1d(layer):
        known = kind.__name__ == "Conv1D"
    elif is_convolution(layer):
        plain = next(base for base in _CONVOLUTIONS if isinstance(layer, base))
        known = kind.forward is plain.forward and kind._conv_forward is plain._conv_forward  # type: ignore[attr-defined]
    elif isinstance(layer, _TRANSPOSED_CONVOLUTIONS):
        return f"{kind.__name__} is a transposed convolution, for which there is no adapter"
    else:
        # A quantized layer is called Linear as well, and is none.
        name = f"{kind.__module__}.{kind.__name__}" if kind.__name__ in _NAMES else kind.__name__
        return f"{name} is not a Linear, Conv1d, Conv2d, Conv3d, Embedding or transformers' Conv1D layer"
    if not known:
        # Its forward is not y = W x + b, so an update of W would not be what merging writes.
        return f"{kind.__name__} computes something else than its base class does"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (by an offloading or profiling tool?); adapt it before that"
    if parametrize.is_parametrized(layer):
        return "its weight is parametrized; call torch.nn.utils.parametrize.remove_parametrizations first"
    weight: Tensor = layer.weight  # type: ignore[assignment]  # a module's attribute; these kinds all have it
    if is_lazy(weight):
        return "its shape is not known yet; run one batch through the model first"
    if not weight.is_floating_point():
        return f"its weight is of dtype {weight.dtype}, which has no gradient"
    return None


def why_not_with_norms(layer: nn.Module) -> str | None:
    """Like :func:`why_not`, and a normalisation can be adapted too: a layer with one vector of its own, `weight`."""
    weight = layer._parameters.get("weight")
    if not type(layer).__name__.endswith(_NORMS) or weight is None or weight.dim() != 1:
        return why_not(layer)
    if "forward" in vars(layer) or parametrize.is_parametrized(layer):
        return "its forward was replaced on the instance, or its weight is parametrized; adapt it before that"
    return None if weight.is_floating_point() else f"its weight is of dtype {weight.dtype}, which has no gradient"


def is_transposed(layer: nn.Module) -> bool:
    """Whether the layer stores its weight as (d_in, d_out)."""
    return not isinstance(layer, (nn.Linear, *_CONVOLUTIONS))


def matrix(layer: nn.Module) -> Tensor:
    """The layer's weight as the (d_out, d_in) matrix of y = W x; a view, but for a kernel in channels-last memory.

    For a convolution x is what its kernel covers at one place, and W the kernel with all but its outputs flattened.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]  # a module's attribute; why_not() has seen it
    return weight.t() if is_transposed(layer) else weight.flatten(1)


def stored(layer: nn.Module, weight: Tensor) -> Tensor:
    """A (d_out, d_in) matrix in the layout in which `layer` stores its weight; a view where it can be."""
    if is_convolution(layer):
        kernel: Tensor = layer.weight  # type: ignore[assignment]
        return weight.reshape(kernel.shape)
    return weight.t() if is_transposed(layer) else weight
