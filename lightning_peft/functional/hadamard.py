"""Hadamard matrices of any size as Kronecker products of two small ones, and how they are applied.

    d = K 2^k,      H_d = H_K (x) Sylvester(2^k) = left (x) right,      H_d H_d^T = d I

K is 1 where d is a power of two. Else, with o the odd part of d, it is the first of 4 o, 8 o, 16 o that divides d and
of which Paley's constructions make a Hadamard matrix: exact, entries +1 and -1. Where there is none, K = o and H_K is
sqrt(o) times the orthonormal cosine transform: then all of the above holds up to rounding, and entries are not +-1.

Where the product is split is a matter of speed alone: left takes as many of the factors of two as make left + right
smallest, while right stays at 32 or more. H x then is two products with small matrices, d (left + right)
multiplications instead of d^2.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt, log2, pi

import torch
from torch import Tensor

_LEAST = 32
"""Columns of `right`: a product with a narrower matrix takes nearly as long."""


def left_core(d: int) -> int:
    """K: the part of d whose matrix is not Sylvester's.

    Raises:
        ValueError: d is below 1.

    Example:
        >>> [left_core(d) for d in (4096, 768, 896, 5120, 11008)]
        [1, 12, 28, 20, 43]
    """
    if d < 1:
        raise ValueError(f"a Hadamard matrix has a size of at least 1. Got {d}.")
    odd = d // (d & -d)
    if odd == 1:
        return 1
    return next((K for K in (4 * odd, 8 * odd, 16 * odd) if d % K == 0 and _paley(K) is not None), odd)


def is_exact(d: int) -> bool:
    """Whether H_d has entries +1 and -1 alone, and no cosines."""
    return left_core(d) == 1 or left_core(d) % 4 == 0


def sizes(d: int) -> tuple[int, int]:
    """Sizes of left and right.

    Example:
        >>> [sizes(d) for d in (384, 768, 1024, 4096)]
        [(12, 32), (24, 32), (32, 32), (64, 64)]
    """
    core = left_core(d)
    rest = d // core
    splits = [(core * 2**j, rest >> j) for j in range(rest.bit_length())]
    return min((s for s in splits if s[1] >= min(_LEAST, rest)), key=sum)


def factors(d: int) -> tuple[Tensor, Tensor]:
    """left and right, in float64: entries +-1 where :func:`is_exact`.

    Returns:
        (A, A) and (B, B) with A B = d.
    """
    A, B = sizes(d)
    core = left_core(d)
    return torch.kron(core_rows(core, torch.arange(core)), sylvester(A // core)), sylvester(B)


def rows(d: int, index: Tensor) -> Tensor:
    """Rows of H_d: row i is row i // 2^k of H_K, (x) row i mod 2^k of Sylvester's; H_d is never made.

    Args:
        d: size of the matrix.
        index: (r,) which rows, on the CPU.

    Returns:
        (r, d) float32; exact where :func:`is_exact`.
    """
    core = left_core(d)
    rest = d // core
    inner = sylvester_rows(rest, index % rest)
    outer = core_rows(core, index // rest).to(inner.dtype)
    return (outer[:, :, None] * inner[:, None, :]).view(len(index), d)


def kron(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """(left (x) right) x for every row x: (..., A B) -> (..., A B). Its adjoint is that of the factors transposed."""
    A, B = len(left), len(right)
    y = x.reshape(-1, B) @ right.t()
    return (left @ y.view(-1, A, B)).view(x.shape)


def sylvester(n: int) -> Tensor:
    """Sylvester's matrix, n a power of two: (n, n) float64, symmetric; entry (i, j) is (-1)^popcount(i & j)."""
    return sylvester_rows(n, torch.arange(n)).double()


def sylvester_rows(n: int, index: Tensor) -> Tensor:
    """Rows of Sylvester's matrix: (r, n) float32."""
    common = index[:, None] & torch.arange(n)
    parity = torch.zeros_like(common)
    while n > 1:
        parity ^= common
        common >>= 1
        n >>= 1
    return (1 - 2 * (parity & 1)).float()


def core_rows(K: int, index: Tensor) -> Tensor:
    """Rows of H_K for a K from :func:`left_core`: (r, K) float64; by Paley's first or second construction, or cosines.

    I   (q = K - 1 = 3 mod 4)       H = I + S,                                     S = [[0, 1^T], [-1, Q]]
    II  (q = K / 2 - 1 = 1 mod 4)   H = C (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]],  C = [[0, 1^T], [1, Q]]

    q is prime and Q_ij = 1 where i - j is a square modulo q, 0 where it is zero, else -1. II is symmetric, I is not.
    """
    if K == 1:
        return torch.ones(len(index), 1, dtype=torch.float64)
    construction = _paley(K) if K % 4 == 0 else None
    return (construction or _cosines)(K, index)


def _paley(K: int) -> Callable[[int, Tensor], Tensor] | None:
    if K % 4 == 0 and (K // 2 - 1) % 4 == 1 and _is_prime(K // 2 - 1):
        return _second
    return _first if K % 4 == 0 and _is_prime(K - 1) else None


def _first(K: int, index: Tensor) -> Tensor:
    S = _bordered(K - 1, index, -1.0)
    S[torch.arange(len(index)), index] += 1
    return S


def _second(K: int, index: Tensor) -> Tensor:
    half = index // 2
    C = _bordered(K // 2 - 1, half, 1.0)
    unit = torch.zeros_like(C)
    unit[torch.arange(len(index)), half] = 1
    on, off = torch.tensor([[1.0, 1], [1, -1]]).double(), torch.tensor([[1.0, -1], [-1, -1]]).double()
    which = index % 2
    return (C[:, :, None] * on[which][:, None] + unit[:, :, None] * off[which][:, None]).view(len(index), K)


def _bordered(q: int, index: Tensor, first: float) -> Tensor:
    """Rows of [[0, 1^T], [first, Q]], of size q + 1."""
    character = -torch.ones(q, dtype=torch.float64)
    character[torch.arange(q).square() % q] = 1
    character[0] = 0
    found = torch.empty(len(index), q + 1, dtype=torch.float64)
    found[:, 0] = first
    found[:, 1:] = character[((index - 1)[:, None] - torch.arange(q)) % q]
    top = index == 0
    found[top] = 1
    found[top, 0] = 0
    return found


def _cosines(o: int, index: Tensor) -> Tensor:
    """Rows of sqrt(o) times the orthonormal DCT-II."""
    # Reduced modulo its period as whole numbers: the cosine of a large angle is a poor one.
    turns = (index[:, None] * (2 * torch.arange(o) + 1)) % (4 * o)
    found = torch.cos(turns.double() * (pi / (2 * o))) * 2**0.5
    found[index == 0] = 1
    return found


def power_of_two(n: int) -> float:
    """The power of two nearest to 1 / sqrt(n): what +-1 can be multiplied by in every dtype without rounding."""
    return float(2.0 ** -round(log2(n) / 2))


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, isqrt(n) + 1))
