"""A few entries of a weight: which ones are drawn, and their gradient alone.

    W.flat[I] = original + value * delta                    I: (k,) flat positions, ascending
    dL/dentry_j = sum_t a[t, r_j] b[t, c_j]                 (r_j, c_j) = divmod(I_j, n)

For y = x W^T the rows a are dL/dy and the columns b are x; the two change places where W is stored transposed. Only k
numbers are wanted of an m x n product, so :func:`entry_gradient` has three kernels that give the same ones.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from math import ceil, floor, log1p, sqrt
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional import draws

Kernel = Literal["sampled", "dense", "chunked"]
_NARROW = 2**31  # from here on flat positions need 64 bits
_TOKENS = 64  # of which a core's cache holds a transposed copy
_SAMPLED = (torch.float32, torch.float64)  # what torch.sparse.sampled_addmm takes
CAP = 64 * 2**20
"""Bytes of a dense gradient above which it is made in parts, each of a quarter of them."""
_ROWS = 256  # of a part where parts are asked for, also of a small weight


def draw_indices(numel: int, k: int, seed: int, name: str) -> Tensor:
    """k distinct flat positions out of `numel`, each set of k equally likely; the same on every machine.

        the first k distinct ones of w_0 mod N, w_1 mod N, ...      w: words of 63 bits from (seed, name)

    Above half of all, those that are left out are drawn instead.

    Args:
        numel: N, entries of the tensor.
        k: how many, from 0 to N.
        seed: any whole number.
        name: the tensor's canonical name, so that tensors of one shape have other positions.

    Returns:
        (k,) ascending, on the CPU: int32, or int64 where N >= 2^31.

    Raises:
        ValueError: k is negative or above N.

    Example:
        >>> draw_indices(100, 4, 0, "layer")
        tensor([27, 83, 88, 92], dtype=torch.int32)
    """
    require_integer("numel", numel)
    require_integer("k", k)
    if not 0 <= k <= numel:
        raise ValueError(f"k={k} distinct entries cannot be drawn from {numel}: give a number from 0 to {numel}.")
    if k > numel // 2:
        left_out = draw_indices(numel, numel - k, seed, name)
        kept = torch.ones(numel, dtype=torch.bool)
        kept[left_out.long()] = False
        return kept.nonzero().flatten().to(left_out.dtype)
    count = ceil(-numel * log1p(-k / numel) * 1.02) + 16 if k else 0
    while True:
        # A longer draw begins with the shorter one, so how many words are tried changes nothing.
        values = (draws.words(seed, name, "sparse", count) & (2**63 - 1)) % max(1, numel)
        order = torch.argsort(values, stable=True)
        ordered = values[order]
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        found = order[first].sort().values[:k]  # by when each value came up for the first time
        if len(found) == k:
            return values[found].sort().values.to(_index_dtype(numel))
        count = ceil(count * 1.1) + 16


def draw_bernoulli(numel: int, density: float, seed: int, name: str) -> Tensor:
    """Flat positions of which each one is there with probability `density`, independently of the others.

        gap_i = floor( log u_i / log(1 - q) )

    Args:
        numel: N, entries of the tensor.
        density: q, in [0, 1].
        seed: any whole number.
        name: the tensor's canonical name.

    Returns:
        (k,) ascending, on the CPU, k random with mean q N: int32, or int64 where N >= 2^31.

    Raises:
        ValueError: density is not in [0, 1].
    """
    require_integer("numel", numel)
    require_density(density)
    if density == 0 or density == 1:
        return torch.arange(numel if density else 0, dtype=_index_dtype(numel))
    count = ceil(numel * density + 6 * sqrt(numel * density)) + 16
    while True:
        bits = (draws.words(seed, name, "bernoulli", count) & (2**63 - 1)) >> 10
        gaps = ((bits + 1).double() * 2.0**-53).log_().div_(log1p(-density)).floor_()
        at = (gaps + 1).cumsum(0) - 1  # exact: a double counts to 2^53
        if at[-1] >= numel:
            return at[at < numel].to(_index_dtype(numel))
        count = ceil(count * 1.1) + 16


def require_density(density: float, name: str = "density") -> None:
    """Check a share of entries.

    Raises:
        TypeError: it is no number.
        ValueError: it is not in [0, 1].
    """
    require_number(name, density)
    if not 0 <= density <= 1:
        raise ValueError(f"{name} is a share of a tensor's entries, in [0, 1]. Got {density}.")


def _index_dtype(numel: int) -> torch.dtype:
    return torch.int32 if numel < _NARROW else torch.int64


def index_fault(indices: Tensor, numel: int) -> str | None:
    """What is wrong with flat positions, as the end of a sentence; ``None`` if they ascend within [0, numel).

    Args:
        indices: (k,). Its values are read: not for every step.
        numel: N, entries of the tensor.
    """
    if indices.numel() and (int(indices[0]) < 0 or int(indices[-1]) >= numel):
        return f"they run from {int(indices[0])} to {int(indices[-1])}, outside of 0 to {numel - 1}"
    if not bool((indices[1:] > indices[:-1]).all()):
        return "they do not ascend, or one of them is there twice"
    return None


@dataclass(frozen=True)
class Pattern:
    """Where entries are in a matrix, in compressed rows; made once for many products.

    Attributes:
        indices: (k,) flat positions, ascending.
        shape: (m, n) of the matrix.
        crow: (m + 1,) int32, where each row begins among the entries.
        col: (k,) int32, the column of each entry.
    """

    indices: Tensor
    shape: tuple[int, int]
    crow: Tensor
    col: Tensor
    _bounds: dict[int, list[int]] = field(default_factory=dict)
    _csr: dict[torch.dtype, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, indices: Tensor, shape: tuple[int, int]) -> Pattern:
        """The pattern of flat positions in a matrix of this shape."""
        m, n = shape
        starts = torch.arange(m + 1, device=indices.device) * n
        crow = torch.searchsorted(indices.long(), starts, out_int32=True)
        return cls(indices, shape, crow, torch.remainder(indices, n).to(torch.int32))

    def bounds(self, rows: int) -> list[int]:
        """Where blocks of so many rows begin and end among the entries; read from the device once."""
        if rows not in self._bounds:
            m = self.shape[0]
            at = torch.tensor([*range(0, m, rows), m], device=self.crow.device)
            self._bounds[rows] = self.crow[at].tolist()
        return self._bounds[rows]

    def csr(self, dtype: torch.dtype) -> Tensor:
        """A sparse matrix of zeros at these places; made once for a dtype."""
        if dtype not in self._csr:
            # Zeros: what is not finite here would come through, though it is multiplied by beta = 0.
            zeros = torch.zeros(len(self.col), dtype=dtype, device=self.col.device)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                made = torch.sparse_csr_tensor(self.crow, self.col, zeros, self.shape, check_invariants=False)
            self._csr[dtype] = made
        return self._csr[dtype]


def choose_kernel(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int], density: float, tokens: int
) -> Kernel:
    """The fastest kernel, as far as it was measured: on one thread of a CPU, and by what is known of accelerators.

    Args:
        device: where the product is computed.
        dtype: in which it is computed.
        shape: (m, n) of the weight.
        density: k / (m n).
        tokens: t, rows of what is multiplied.
    """
    # Sampled costs 2 t k and two transposed copies, dense 2 t m n; what is sampled jumps about.
    if device.type == "cpu" and dtype in _SAMPLED and density <= (0.1 if tokens <= 1024 else 0.05):
        return "sampled"
    return "dense" if shape[0] * shape[1] * dtype.itemsize <= CAP else "chunked"


def entry_gradient(a: Tensor, b: Tensor, pattern: Pattern, kernel: Kernel | None = None) -> Tensor:
    """The wanted entries of a^T b.

        e_j = sum_t a[t, r_j] b[t, c_j]

    Args:
        a: (t, m), of b's dtype or another floating one.
        b: (t, n).
        pattern: of an (m, n) matrix.
        kernel: "sampled" computes these k numbers in float32 or wider, without the matrix; "dense" has the whole
            product and picks; "chunked" has at most 256 of its rows at a time, and never more than 16 MiB. ``None`` is
            :func:`choose_kernel`'s, with parts of 16 MiB.

    Returns:
        (k,), in float32 or wider for "sampled", else in a's dtype.

    Raises:
        ValueError: there is no such kernel.
    """
    m, n = pattern.shape
    k, tokens, most = len(pattern.col), a.shape[0], _ROWS
    if kernel is None:
        most = m
        kernel = choose_kernel(a.device, a.dtype, pattern.shape, k / max(1, m * n), tokens)
    require_kernel(kernel)
    if k == 0 or tokens == 0:
        return a.new_zeros(k)
    if kernel == "sampled":
        return _sampled(a, b, pattern)
    b = b.to(a.dtype)
    if kernel == "dense":
        return (a.t() @ b).view(-1)[pattern.indices]
    rows = max(1, min(most, CAP // 4 // (n * a.element_size())))
    bounds = pattern.bounds(rows)
    parts = []
    for i, first in enumerate(range(0, m, rows)):
        product = a[:, first : first + rows].t() @ b
        parts.append(product.view(-1)[pattern.indices[bounds[i] : bounds[i + 1]] - first * n])
    return torch.cat(parts)


def require_kernel(kernel: str) -> None:
    """Check the name of a kernel.

    Raises:
        ValueError: there is no such kernel.
    """
    if kernel not in get_args(Kernel):
        raise ValueError(f"kernel={kernel!r}: choose {', '.join(map(repr, get_args(Kernel)))}.")


def _sampled(a: Tensor, b: Tensor, pattern: Pattern) -> Tensor:
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    tokens = a.shape[0]
    # It goes through columns, which are rows of transposed copies. On a CPU a few tokens at a time, so that these stay
    # in the cache, and with them what is gathered from all over them.
    on_cpu = a.device.type == "cpu"
    step = min(tokens, _TOKENS) if on_cpu else tokens
    transposed = _shuffled if on_cpu else _copied
    found: Tensor = pattern.csr(wide)
    for first in range(0, tokens, step):
        rows = transposed(a[first : first + step].to(wide))
        columns = transposed(b[first : first + step].to(wide)).t()
        if first == 0:
            found = torch.sparse.sampled_addmm(found, rows, columns, beta=0.0)
        else:
            torch.sparse.sampled_addmm(found, rows, columns, out=found)
    values: Tensor = found.values()
    return values


def _copied(x: Tensor) -> Tensor:
    return x.t().contiguous()


def _shuffled(x: Tensor) -> Tensor:
    """x^T as it lies in memory, twice to three times as fast as by copying it on a CPU.

    Channels in t groups of n, shuffled into n groups of t: to transpose (t, n) is just that.
    """
    (t, n), size = x.shape, x.numel()
    pixel = x.contiguous().as_strided((1, size, 1, 1), (size, 1, size, size))  # channels last
    return F.channel_shuffle(pixel, t).as_strided((n, t), (t, 1))


def embedding_entry_gradient(grad: Tensor, ids: Tensor, pattern: Pattern, padding: int | None = None) -> Tensor:
    """The wanted entries of the gradient of an embedding's weight, without that gradient.

        e_j = sum over the places t with ids_t = r_j of grad[t, c_j]

    Args:
        grad: (t, n), of the output.
        ids: (t,), which row each place has looked up.
        pattern: of an (m, n) weight.
        padding: a row that gets no gradient.

    Returns:
        (k,), in grad's dtype.
    """
    m, n = pattern.shape
    tokens = len(ids)
    if tokens == 0 or len(pattern.col) == 0:
        return grad.new_zeros(len(pattern.col))
    # Of all places with one id, one stands for all: whichever it is, the sum is the same.
    slot = torch.full((m,), -1, device=ids.device)
    slot[ids] = torch.arange(tokens, device=ids.device)
    sums = grad.new_zeros(tokens, n).index_add_(0, slot[ids], grad)
    if padding is not None:
        slot[padding] = -1
    at = slot[torch.div(pattern.indices, n, rounding_mode="floor")]
    return torch.where(at >= 0, sums[at, pattern.col], 0)


def share_of(numel: int, density: float, block: int = 1) -> int:
    """k = density N, rounded to whole blocks, at least one of them and at most as many as there is room for."""
    return block * min(max(1, round(density * numel / block)), floor(numel / block))
