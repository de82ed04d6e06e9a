"""Subsampled randomized Hadamard transforms: a random projection that is drawn from a name and never stored.

    P = S H_d D(e) / sqrt(d)           (n, d), rows orthonormal within a block

e: random signs. S: n distinct rows of H_d. Where n > d, P is made of blocks one below the other, each with signs of its
own: all but the last have every row, and the last a choice of them.

Two ways to apply it, equal up to rounding: :class:`Rows` has P as a matrix, n d multiplications per token;
:class:`Kron` has two small factors and goes through all of H_d, d (left + right) multiplications whatever n is. Both
work with +-1 times a power of two, which every dtype holds exactly and which keeps sums within the range of float16;
the rest of the scale is the number `unit`, for the caller to put where it costs nothing: P = unit * (what is applied).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Literal, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lightning_peft.functional import draws, hadamard

Path = Literal["rows", "kron"]

LARGEST = 4096
"""The largest factor that a Kronecker product is applied with: 64 MB in float32."""


class Projection(Protocol):
    """P / unit on one device, in one dtype. What has n numbers per token has the tokens last: its rows are long.

    Attributes:
        unit: what P is multiplied by beside.
        width: d.
        signs: (m, d), of the m blocks; ``None`` where there is one block that has them in it.
        piece: how many tokens are worked on at a time on a CPU.
    """

    unit: float
    width: int
    signs: Tensor | None
    piece: int

    def whole(self) -> Tensor:
        """P / unit itself: (n, d)."""
        ...

    def down(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """P (scale * x): (examples, tokens, d) -> (n, examples * tokens). `scale` is (d,) or (examples, 1, d)."""
        ...

    def spread(self, h: Tensor) -> Tensor:
        """P^T h, block by block and without the blocks' signs: (n, t) -> (m, t, d)."""
        ...


def up(projection: Projection, h: Tensor, like: Tensor, scale: Tensor | None = None) -> Tensor:
    """scale * P^T h, the adjoint of :meth:`Projection.down`: (n, examples * tokens) -> (examples, tokens, d)."""
    z = projection.spread(h).view(-1, *like.shape[:-1], projection.width)
    if projection.signs is not None:
        z = z * projection.signs.to(z.dtype)[:, None, None]
    x = z.squeeze(0) if len(z) == 1 else z.sum(0)
    return x if scale is None else x * scale


class Rows:
    """P as a matrix of n rows.

    Args:
        drawn: what P is.
        device: where.
        dtype: in which.
    """

    signs: Tensor | None = None

    def __init__(self, drawn: SRHT, device: torch.device, dtype: torch.dtype) -> None:
        self.width = drawn.d
        block = drawn.index // drawn.d
        power = hadamard.power_of_two(drawn.d)
        matrix = hadamard.rows(drawn.d, drawn.index % drawn.d) * drawn.signs[block]
        self.matrix = matrix.mul_(power).to(device, dtype)
        self.piece = max(256, 2**18 // drawn.d)  # the matrix is read for each
        self.unit = 1 / (sqrt(drawn.d) * power)

    def whole(self) -> Tensor:
        return self.matrix

    def down(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = x if scale is None else x * scale
        return self.matrix.to(x.dtype) @ x.flatten(0, 1).t()

    def spread(self, h: Tensor) -> Tensor:
        return (h.t() @ self.matrix.to(h.dtype)).unsqueeze(0)


class Kron:
    """P as two small factors, signs and indices.

    All of H x is made, by two plain products whose outputs are laid out such that an entry of H x is a row of tokens:
    to choose entries is then to copy rows.

        x: (m t A, B)  ->  right x^T: (B, m t A)  ->  left (.)^T: (A, B m t)

    Args:
        drawn: what P is.
        device: where.
        dtype: in which.
    """

    def __init__(self, drawn: SRHT, device: torch.device, dtype: torch.dtype) -> None:
        self.width = drawn.d
        left, right = hadamard.factors(drawn.d)
        powers = [hadamard.power_of_two(len(factor)) for factor in (left, right)]
        self.left, self.right = (f.mul_(p).to(device, dtype) for f, p in zip((left, right), powers, strict=True))
        self._signs = drawn.signs.to(device, dtype)
        self.signs: Tensor | None = self._signs
        # Rows go by the entry of H x first and by the block then.
        self.index = (drawn.index % drawn.d * len(drawn.signs) + drawn.index // drawn.d).to(device)
        self.unit = 1 / (sqrt(drawn.d) * powers[0] * powers[1])
        # What is between the products stays in a second-level cache, while these are large enough to be fast.
        self.piece = max(64, 2**15 // drawn.signs.numel())

    def whole(self) -> Tensor:
        n = len(self.index)
        each = torch.eye(n, dtype=self.left.dtype, device=self.left.device)
        return up(self, each, each.new_empty(1, n, 0))[0]

    def down(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        left, right = self.left.to(x.dtype), self.right.to(x.dtype)
        signs = self._signs.to(x.dtype)[:, None, None]
        y = x * (signs if scale is None else signs * scale)
        y = right @ y.view(-1, len(right)).t()
        y = left @ y.view(-1, len(left)).t()
        return y.view(signs.numel(), -1).index_select(0, self.index)

    def spread(self, h: Tensor) -> Tensor:
        left, right = self.left.to(h.dtype), self.right.to(h.dtype)
        z = h.new_zeros(self._signs.numel(), h.shape[1]).index_copy_(0, self.index, h)
        z = z.view(len(left), -1).t() @ left
        z = z.view(len(right), -1).t() @ right
        return z.view(len(self._signs), -1, self.width)


class SRHT:
    """What one projection is, drawn from names: signs and rows, a few bytes; and the ways to apply it.

    Args:
        d: width.
        n: how many rows.
        seed: see :mod:`lightning_peft.functional.draws`.
        key: names the layer, or what layers share.
        side: "in" or "out"; the two are drawn apart.
        components: which of the n rows it has; ``None`` for all.
    """

    def __init__(
        self, d: int, n: int, seed: int, key: str, side: Literal["in", "out"], components: Sequence[int] | None = None
    ) -> None:
        before = (n - 1) // d  # blocks that have every row
        last = draws.choice(seed, key, f"index_{side}", d, n - before * d)
        index = torch.cat([torch.arange(before * d), before * d + last])
        self.d = d
        self.index = index if components is None else index[torch.tensor(list(components), dtype=torch.int64)]
        self.signs = draws.signs(seed, key, f"sign_{side}", (before + 1) * d).view(before + 1, d)
        self._made: WeakValueDictionary[tuple[torch.device, torch.dtype, Path], Rows | Kron] = WeakValueDictionary()

    def at(self, device: torch.device, dtype: torch.dtype, path: Path | Literal["auto"]) -> Projection:
        """The projection, ready to be applied: made once for all who hold this draw, as long as one of them has it."""
        if path == "auto":
            path = faster_path(self.d, len(self.index), len(self.signs))
        key = (device, dtype, path)
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = (Rows if path == "rows" else Kron)(self, device, dtype)
        return found

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "_made"}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._made = WeakValueDictionary()


def has_small_factors(d: int) -> bool:
    """Whether a Kronecker product can be applied on this width: no factor is larger than :data:`LARGEST`."""
    return max(hadamard.sizes(d)) <= LARGEST


def faster_path(d: int, n: int, blocks: int | None = None) -> Path:
    """Which way is faster for a projection of n rows on this width, forward and backward, on a CPU.

    Rows take n multiplications for each number of a token, and Kronecker products what 100 + 0.7 (left + right) rows
    take, in each block: measured by `benchmarks/rlora.py`, all points of which it gets right within 10 %.

    Args:
        d: width.
        n: how many rows.
        blocks: from how many blocks these are, all of which a Kronecker product goes through; ``None`` for as few as
            have so many.
    """
    if not has_small_factors(d):
        return "rows"
    through = 100 + 0.7 * sum(hadamard.sizes(d))
    return "rows" if n <= (-(-n // d) if blocks is None else blocks) * through else "kron"
