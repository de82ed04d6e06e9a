"""Constants from names: signs and indices that are the same everywhere, drawn from a seed, a layer's key and a role.

No device's generator promises the same numbers on another device, release or platform, and numpy's does so for one
build alone. SHAKE-256 is a standard, in Python's own library, and gives the same bytes everywhere:

    bytes = SHAKE-256( "lightning_peft/rlora/v1|{seed}|{key}|{role}" )        in UTF-8

A longer draw begins with the shorter one. Nothing here touches a generator, so nothing has to be sent to other
processes or saved: who has the seed has the constants, and :func:`digest` tells whether they are the same.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

_DOMAIN = "lightning_peft/rlora/v1"


def signs(seed: int, key: str, role: str, n: int) -> Tensor:
    """n random signs: sign_i = 1 - 2 bit_i, bits little-endian within bytes.

    Args:
        seed: any whole number.
        key: names the layer, or what layers share.
        role: what the draw is for, such as "sign_in".
        n: how many.

    Returns:
        (n,) int8 on the CPU, 1 or -1.

    Example:
        >>> signs(0, "layer", "sign_in", 8).tolist()
        [-1, 1, 1, -1, 1, -1, -1, 1]
    """
    raw = _bytes(seed, key, role, -(-n // 8))
    bits = (raw[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    return (1 - 2 * bits.view(-1)[:n].to(torch.int8)).contiguous()


def order(seed: int, key: str, role: str, n: int) -> Tensor:
    """A random order of n positions: those of n words of 64 bits, little-endian, sorted; ties by position.

    Args:
        seed: any whole number.
        key: names the layer, or what layers share.
        role: what the draw is for, such as "index_in".
        n: how many.

    Returns:
        (n,) int64 on the CPU.

    Example:
        >>> order(0, "layer", "index", 8).tolist()
        [2, 7, 4, 3, 1, 5, 0, 6]
    """
    # Unsigned words in a signed type: turned over, their order is that of signed ones.
    return torch.argsort(words(seed, key, role, n) ^ -(2**63), stable=True)


def words(seed: int, key: str, role: str, n: int) -> Tensor:
    """n words of 64 random bits, little-endian: (n,) int64 on the CPU."""
    raw = _bytes(seed, key, role, 8 * n).view(n, 8).to(torch.int64)
    return (raw << (8 * torch.arange(8))).sum(1)


def choice(seed: int, key: str, role: str, n: int, count: int) -> Tensor:
    """`count` distinct ones of n positions, ascending: the first of :func:`order`, sorted.

    Returns:
        (count,) int64 on the CPU.

    Example:
        >>> choice(0, "layer", "index", 8, 3).tolist()
        [2, 4, 7]
    """
    return order(seed, key, role, n)[:count].sort().values


def digest(*tensors: Tensor) -> str:
    """64 bits that tell these constants from others: 16 hexadecimal digits, the same on every machine.

    Args:
        tensors: of whole numbers.
    """
    total = hashlib.sha256()
    for tensor in tensors:
        numbers = tensor.detach().cpu().flatten().to(torch.int64)
        # Byte by byte, the lowest first, whatever the machine's own order is.
        each = (numbers[:, None] >> (8 * torch.arange(8))) & 255
        total.update(f"{len(numbers)}|".encode() + bytes(each.to(torch.uint8).flatten().tolist()))
    return total.hexdigest()[:16]


def _bytes(seed: int, key: str, role: str, n: int) -> Tensor:
    name = f"{_DOMAIN}|{seed}|{key}|{role}"
    return torch.frombuffer(bytearray(hashlib.shake_256(name.encode()).digest(max(1, n))), dtype=torch.uint8)[:n]
