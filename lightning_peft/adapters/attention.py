"""MultiheadAttention's packed input projection, made a layer like any other.

`nn.MultiheadAttention` holds the weights of query, key and value in one parameter, `in_proj_weight`, and reads it:
there is no layer to replace. Here the parameter moves into a child, `in_proj`, and the attention reads that child's
weight. Whatever then stands in the child's place answers with its effective weight, and so does an adapter on
`out_proj`, whose forward is never called either.
"""

from __future__ import annotations

from torch import Tensor, nn


class AdaptedAttention(nn.MultiheadAttention):
    """MultiheadAttention whose packed input projection is the weight of its child `in_proj`.

    Never built: :func:`expose_in_proj` changes an attention's class in place and :func:`hide_in_proj` changes it back.
    """

    in_proj: nn.Module

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]  # a parameter there, read only
        weight: Tensor = self.in_proj.weight  # type: ignore[assignment]
        return weight


def has_in_proj(module: nn.Module) -> bool:
    """Whether `module` is a MultiheadAttention with one packed input projection that is not exposed yet."""
    return type(module) is nn.MultiheadAttention and module._qkv_same_embed_dim


def expose_in_proj(attention: nn.MultiheadAttention) -> nn.Linear:
    """Move `in_proj_weight` into a child `in_proj`, in place; the bias stays where it is.

    Returns:
        The child, a Linear that holds the very same parameter.
    """
    weight = attention.in_proj_weight
    # Built on the meta device: nothing is allocated for a weight that is replaced at once.
    child = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    child.weight = weight
    child.train(attention.training)
    # None, not deleted: the parameter's place in the attention's order is kept for the way back.
    attention._parameters["in_proj_weight"] = None
    attention.__class__ = AdaptedAttention
    attention.add_module("in_proj", child)
    return child


def hide_in_proj(attention: AdaptedAttention) -> None:
    """Undo :func:`expose_in_proj`; the child must be a plain layer again."""
    weight = attention.in_proj.weight
    del attention._modules["in_proj"]
    attention.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
    attention._parameters["in_proj_weight"] = weight  # type: ignore[assignment]
