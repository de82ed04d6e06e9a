"""Soft prompts as products of two factors: where they start, what they cost, and offsets by position."""

from __future__ import annotations

from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.arguments import require_integer, require_number


def half_width(std: float, rank: int) -> float:
    """Half-width a of the uniform factors whose product has entries of a given standard deviation.

        A, B ~ U(-a, a)   =>   std(A B) = sqrt(b) a^2 / 3         a = sqrt(3 std / sqrt(b))

    The factors of a prompt of 10 components that start in +-0.5, as DPT's code has it, give 0.2635.

    Args:
        std: of the product's entries, such as that of a model's token embeddings.
        rank: number of components b.

    Raises:
        ValueError: one of them is not positive.

    Example:
        >>> round(half_width(0.2635, 10), 3), round(half_width(0.02, 10), 3)
        (0.5, 0.138)
    """
    require_number("std", std)
    require_integer("rank", rank)
    if not std > 0 or rank < 1:
        raise ValueError(f"a start needs a positive deviation and at least one component. Got std={std}, rank={rank}.")
    return sqrt(3 * std / sqrt(rank))


def product_std(a: float, rank: int) -> float:
    """Standard deviation of the product of factors in U(-a, a); the other way round than :func:`half_width`.

    Example:
        >>> round(product_std(0.5, 10), 4)
        0.2635
    """
    return sqrt(rank) * a * a / 3


def svd_start(rows: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of given embeddings by `rank` components.

        rows = U diag(S) V,    of which the first `rank` columns of U, entries of S and rows of V

    Args:
        rows: (e, d), embeddings of tokens.
        rank: number of components; at most min(e, d).

    Returns:
        U (e, rank), S (rank,) descending and V (rank, d), in the rows' dtype, at least float32.
    """
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    U, S, V = torch.linalg.svd(wide, full_matrices=False)
    # A sign is a decomposition's own: the largest entry of every column is made positive, so that it is always one.
    sign = U.gather(0, U.abs().argmax(0, keepdim=True)).sign()
    return (U * sign)[:, :rank], S[:rank], (V * sign.mT)[:rank]


def position_offsets(positions: Tensor, A: Tensor, B: Tensor, value: Tensor) -> Tensor:
    """What is added to token embeddings by their positions alone.

        offset(p) = (A diag(value) B)[p]  for 0 <= p < s,     0 elsewhere

    Args:
        positions: (...,) whole numbers; a negative one has no offset.
        A: (s, r).
        B: (r, d).
        value: (r,), a gate's value with what scales the product.

    Returns:
        (..., d), in A's dtype.

    Example:
        >>> A, B = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0, -1.0]])
        >>> position_offsets(torch.tensor([-1, 0, 1, 2]), A, B, torch.ones(1)).tolist()
        [[0.0, 0.0], [1.0, -1.0], [2.0, -2.0], [0.0, 0.0]]
    """
    reach = len(A)
    table = F.pad((A * value.to(A.dtype)) @ B, (0, 0, 0, 1))  # a row of zeros for all other positions
    index = torch.where((positions >= 0) & (positions < reach), positions, reach)
    return F.embedding(index, table)


class PromptSplit(NamedTuple):
    """How parameters are shared between prompt tokens and offsets: `length` m and `rank` r."""

    length: int
    rank: int


def dpt_parameters(length: int, width: int, rank: int) -> int:
    """Numbers in a prompt of e = `length` tokens as a product of b = `rank` components: b (e + d).

    Example:
        >>> dpt_parameters(100, 768, 10), dpt_parameters(100, 4096, 10)
        (8680, 41960)
    """
    return rank * (length + width)


def dpt_rank(parameters: int, length: int, width: int) -> int:
    """The most components that a decomposed prompt can have for so many parameters: floor(p / (e + d)).

    More than min(e, d) components say no more, so that is the most there are.

    Args:
        parameters: what may be spent.
        length: prompt tokens e.
        width: of an embedding, d.

    Raises:
        ValueError: not even one component fits.

    Example:
        >>> dpt_rank(8_700, 100, 768)
        10
    """
    require_sizes(parameters=parameters, length=length, width=width)
    if parameters < length + width:
        raise ValueError(
            f"parameters={parameters:,} is less than one component costs: {length:,} prompt tokens of width {width:,} "
            f"take {length + width:,}. Raise it, or shorten the prompt."
        )
    return min(parameters // (length + width), length, width)


def dept_parameters(length: int, width: int, rank: int, reach: int) -> int:
    """Numbers in a prompt of m = `length` tokens and offsets of r = `rank` components for s = `reach` positions.

        m d + r (s + d)

    Example:
        >>> dept_parameters(60, 768, 30, 256), dept_parameters(100, 768, 0, 256)
        (76800, 76800)
    """
    return length * width + rank * (reach + width)


def dept_split(parameters: int, width: int, reach: int, length: int | None = None) -> PromptSplit:
    """Prompt tokens and components of the offsets for so many parameters, never one more.

        r = floor( (p - m d) / (s + d) )            m = 60 % of the p / d tokens that a whole prompt could have

    Args:
        parameters: what may be spent; l d is what a plain prompt of l tokens has.
        width: of an embedding, d.
        reach: positions with an offset, s.
        length: prompt tokens m; ``None`` for 60 % (of 100 tokens the authors recommend 40 or 60).

    Raises:
        ValueError: the prompt tokens alone cost more, or there would be none.

    Example:
        >>> dept_split(76_800, 768, 256), dept_split(409_600, 4096, 256, length=40)
        (PromptSplit(length=60, rank=30), PromptSplit(length=40, rank=56))
    """
    require_sizes(parameters=parameters, width=width, reach=reach)
    if length is None:
        length = round(0.6 * (parameters // width))
    else:
        require_integer("length", length)
    if length < 1 or length * width > parameters:
        raise ValueError(
            f"parameters={parameters:,} does not pay for {max(1, length)} prompt tokens of width {width:,}, which take "
            f"{max(1, length) * width:,}. Raise it, or give a shorter prompt."
        )
    # With more components than this the product of the factors is no larger set of offsets.
    return PromptSplit(length, min((parameters - length * width) // (reach + width), reach, width))


def require_sizes(least: int = 1, **sizes: int | None) -> None:
    """Check numbers of tokens, components or places.

    Args:
        least: the smallest that there may be.
        sizes: by name; ``None`` where it was not given.

    Raises:
        TypeError: one is no whole number.
        ValueError: one is too small.
    """
    for name, value in sizes.items():
        if value is None:
            continue
        require_integer(name, value)
        if value < least:
            raise ValueError(f"{name} must be at least {least}. Got {value}.")
