"""Noise on word embeddings: random position noise (Yuan et al., 2022), and what it is compared with.

E is what an embedding layer gives, (B, L, d): B examples of L tokens of d numbers. A *cell* is one of these numbers,
and the "position" of the title is that of a cell, not of a token.

Every function takes `mask`, (B, L) bool, the tokens that noise may touch; ``None`` for all. Other tokens are neither
changed nor read. And `generator`: one, or one for each example, whose noise then depends on no other example.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Scope = Literal["batch", "sample", "token", "dim"]
Sources = Literal["independent", "permutation"]
Generators = torch.Generator | Sequence[torch.Generator] | None


def random_position_noise(
    E: Tensor,
    p: float,
    *,
    mask: Tensor | None = None,
    scope: Scope = "sample",
    sources: Sources = "independent",
    causal: bool = False,
    generator: Generators = None,
) -> Tensor:
    """Copy values of cells over other cells.

        E'_j = E_s(j)  with probability p,  else E_j

    ("independent"), s(j) uniform over the cells that `scope` allows. Or, over the whole batch alone ("permutation"):

        E'_j = E_pi(j)  if S_pi(j),  else E_j,         P(S_j = 1) = p

    with one uniform permutation pi of all cells: the form of the paper's code. The two differ by O(1 / cells). Values
    that occur are copied, so the gradient of a cell goes to the cell that its value is from, and none is lost.

    Args:
        E: (B, L, d).
        p: share of the cells that are written over.
        mask: (B, L) bool; ``None`` for all tokens.
        scope: where a value may come from. "batch": any example. "sample": the same example. "token": the same token,
            any dimension. "dim": the same dimension of another token of the example.
        sources: "independent" or "permutation".
        causal: never take a value from a later token, which a causal model must not have seen.
        generator: one, or one for each example; "batch" mixes examples, and takes one.

    Returns:
        (B, L, d) in E's dtype; E itself where p is 0, for which nothing is drawn.

    Raises:
        ValueError: an argument is out of range, or two do not go together.

    Reference:
        Yuan et al., RPN: A Word Vector Level Data Augmentation Algorithm in Deep Learning for Language Understanding,
        2022, arXiv 2212.05961, and its code. Departures: a fresh S at every call, where the code moves one S about; and
        "independent", in which sources are drawn with replacement.
    """
    require_share("p", p)
    require_combination(scope, sources, causal)
    if p == 0:
        return E
    mask = _mask(E, mask)
    if scope == "batch":
        if not (generator is None or isinstance(generator, torch.Generator)):
            raise ValueError("scope='batch' mixes examples, so it takes one generator, not one for each example.")
        flat, allowed = E.reshape(1, -1, E.shape[2]), mask.reshape(1, -1)
        out = _permuted(flat, p, allowed, generator) if sources == "permutation" else None
        if out is None:
            out = _copied(flat, p, allowed, "sample", False, generator)
        return out.view_as(E)
    return _copied(E, p, mask, scope, causal, generator)


def _copied(E: Tensor, p: float, mask: Tensor, scope: Scope, causal: bool, generator: Generators) -> Tensor:
    B, L, d = E.shape
    # Allowed tokens of an example, in order: `place` is a token's place among them, `position` the way back.
    place = (mask.cumsum(1) - 1).clamp(min=0)
    position = torch.argsort((~mask).to(torch.uint8), dim=1, stable=True)
    count = place + 1 if causal else mask.sum(1, keepdim=True).expand(B, L)
    targets = mask & (count > 1) if scope == "dim" else mask

    def source(cell: Tensor, bits: Tensor) -> Tensor:
        """Where the value of a cell comes from; both are counted through the flattened tensor."""
        token, dim = cell // d, cell % d
        if scope == "token":
            return token * d + bits % d
        start = token // L * L
        if scope == "sample":
            n = bits % (count.reshape(-1)[token] * d).clamp(min=1)
            return (start + position.reshape(-1)[start + n // d]) * d + n % d
        other = bits % (count.reshape(-1)[token] - 1).clamp(min=1)
        if not causal:
            other += other >= place.reshape(-1)[token]  # past the token itself
        return (start + position.reshape(-1)[start + other]) * d + dim

    # 63 uniform bits per cell are both draws: the highest say whether it is a target, what is left which source.
    bits = _each(torch.empty(E.shape, dtype=torch.int64, device=E.device), generator, "random_")
    chosen = ((bits <= min(int(p * 2.0**63), 2**63 - 1)) & targets[..., None]).reshape(-1)
    flat, bits = E.reshape(-1), bits.reshape(-1)
    if _counts_at_once(E.device):
        cells = chosen.nonzero().squeeze(1)
        return flat.index_copy(0, cells, flat.gather(0, source(cells, bits[cells]))).view_as(E)
    # Elsewhere to know how many there are waits for the device: all cells are gathered, and most are put back.
    cells = torch.arange(len(flat), device=E.device)
    return torch.where(chosen, flat.gather(0, source(cells, bits)), flat).view_as(E)


def _permuted(E: Tensor, p: float, mask: Tensor, generator: torch.Generator | None) -> Tensor:
    flat, device = E.reshape(-1), E.device
    cells = mask[..., None].expand_as(E).reshape(-1).nonzero().squeeze(1)
    moved = cells[torch.randperm(len(cells), generator=generator, device=device)]
    # S_pi has the law of S, and is independent of pi: it is drawn in S's place.
    chosen = torch.rand(len(cells), generator=generator, device=device) < p
    return flat.index_copy(0, cells[chosen], flat.gather(0, moved[chosen])).view_as(E)


def gaussian_noise(E: Tensor, sigma: float, *, mask: Tensor | None = None, generator: Generators = None) -> Tensor:
    """E' = E + sigma eps,  eps ~ N(0, 1) for every cell.

    Args:
        E: (B, L, d).
        sigma: standard deviation, in the unit of E.
        mask: (B, L) bool; ``None`` for all tokens.
        generator: one, or one for each example.

    Returns:
        (B, L, d) in E's dtype; E itself where sigma is 0.
    """
    _require_size("sigma", sigma)
    if sigma == 0:
        return E
    return E + (sigma * _drawn(E, generator, "normal_") * _mask(E, mask)[..., None]).to(E.dtype)


def neftune_noise(E: Tensor, alpha: float, *, mask: Tensor | None = None, generator: Generators = None) -> Tensor:
    """E' = E + alpha / sqrt(n d) eps,  eps ~ U(-1, 1) for every cell; n is how many tokens of the example have noise.

    Args:
        E: (B, L, d).
        alpha: 5, 10 or 15 in the paper.
        mask: (B, L) bool; ``None`` for all tokens.
        generator: one, or one for each example.

    Returns:
        (B, L, d) in E's dtype; E itself where alpha is 0.

    Reference:
        Jain et al., NEFTune: Noisy embeddings improve instruction finetuning, 2023, arXiv 2310.05914, algorithm 1
        (remembered).
    """
    _require_size("alpha", alpha)
    return E if alpha == 0 else E + uniform_start(E, alpha, mask=mask, generator=generator).to(E.dtype)


def uniform_start(E: Tensor, size: float, *, mask: Tensor | None = None, generator: Generators = None) -> Tensor:
    """size / sqrt(n d) U(-1, 1) for every cell that noise may touch, else 0: (B, L, d) in float32."""
    mask = _mask(E, mask)[..., None]
    cells = (mask.sum(1, keepdim=True) * E.shape[2]).clamp(min=1)
    return size / cells.sqrt() * (2 * _drawn(E, generator, "uniform_") - 1) * mask


def salt_and_pepper(
    E: Tensor, p: float, *, mask: Tensor | None = None, causal: bool = False, generator: Generators = None
) -> Tensor:
    """Half of a share p of the cells become 0, the other half the example's largest value.

    Args:
        E: (B, L, d).
        p: share of the cells.
        mask: (B, L) bool; ``None`` for all tokens.
        causal: the largest value up to the cell's own token, as a causal model must not have seen later ones.
        generator: one, or one for each example.

    Returns:
        (B, L, d); E itself where p is 0.

    Reference:
        The code of arXiv 2212.05961. Departures: there it is the batch's largest value, and no gradient reaches E.
    """
    require_share("p", p)
    if p == 0:
        return E
    mask = _mask(E, mask)[..., None]
    drawn = _drawn(E, generator, "uniform_")
    largest = E.detach().masked_fill(~mask, -torch.inf).amax(2, keepdim=True)  # of every token
    largest = largest.cummax(1).values if causal else largest.amax(1, keepdim=True)
    out = torch.where((drawn < p / 2) & mask, 0.0, E)
    return torch.where((drawn >= p / 2) & (drawn < p) & mask, largest, out)


def token_cutoff(E: Tensor, p: float, *, mask: Tensor | None = None, generator: Generators = None) -> Tensor:
    """Whole tokens become 0, each with probability p.

    Args:
        E: (B, L, d).
        p: share of the tokens.
        mask: (B, L) bool; ``None`` for all tokens.
        generator: one, or one for each example.

    Returns:
        (B, L, d); E itself where p is 0.

    Reference:
        Shen et al., A simple but tough-to-beat data augmentation approach for natural language understanding and
        generation, 2020, arXiv 2009.13818 (remembered). Departure: each token by itself, not a fixed number of them.
    """
    require_share("p", p)
    if p == 0:
        return E
    cut = _drawn(E[..., 0], generator, "uniform_") < p
    return torch.where((cut & _mask(E, mask))[..., None], 0.0, E)


def noisy_tokens(ids: Tensor | None, mask: Tensor | None, protect_ids: Sequence[int] = ()) -> Tensor | None:
    """Which tokens noise may touch.

    Args:
        ids: (B, L) integers, the tokens; ``None`` where they are not known.
        mask: (B, L), not 0 for what is no padding; ``None`` for all.
        protect_ids: tokens to leave alone, such as those of [CLS] and [SEP].

    Returns:
        (B, L) bool; ``None`` for all.
    """
    shown = None if mask is None else mask.bool()
    if not protect_ids or ids is None:
        return shown
    free = ~torch.isin(ids, torch.tensor(list(protect_ids), device=ids.device, dtype=ids.dtype))
    return free if shown is None else shown & free


def require_share(name: str, p: float) -> None:
    """Check a probability.

    Raises:
        ValueError: it is not in [0, 1].
    """
    if not 0 <= p <= 1:
        raise ValueError(f"{name} is the share that noise takes, from 0 to 1. Got {p}.")


def require_combination(scope: str, sources: str, causal: bool) -> None:
    """Check that the settings of random position noise go together.

    Raises:
        ValueError: they do not, or one is unknown.
    """
    if scope not in ("batch", "sample", "token", "dim"):
        raise ValueError(f"scope={scope!r}: choose 'batch', 'sample', 'token' or 'dim'.")
    if sources not in ("independent", "permutation"):
        raise ValueError(f"sources={sources!r}: choose 'independent' or 'permutation' (the paper's code).")
    if sources == "permutation" and scope != "batch":
        raise ValueError(
            f"sources='permutation' moves cells over the whole batch, and scope is {scope!r}. Use scope='batch', or "
            "sources='independent'."
        )
    if causal and scope == "batch":
        raise ValueError(
            "scope='batch' copies from later tokens, which a causal model must not see. Use scope='token', 'sample' or "
            "'dim', which with causal=True look back only."
        )


def _require_size(name: str, size: float) -> None:
    if not 0 <= size < float("inf"):
        raise ValueError(f"{name} is the size of noise, at least 0 and finite. Got {size}.")


def _mask(E: Tensor, mask: Tensor | None) -> Tensor:
    if E.dim() != 3:
        raise ValueError(f"noise is for embeddings of shape (batch, length, d). Got {tuple(E.shape)}.")
    if mask is None:
        return torch.ones(E.shape[:2], dtype=torch.bool, device=E.device)
    if mask.shape != E.shape[:2]:
        raise ValueError(f"the mask is of shape {tuple(mask.shape)}, and the embeddings of {tuple(E.shape)}.")
    return mask.bool()


def _drawn(like: Tensor, generator: Generators, kind: str) -> Tensor:
    return _each(torch.empty(like.shape, dtype=torch.float32, device=like.device), generator, kind)


def _each(empty: Tensor, generator: Generators, kind: str) -> Tensor:
    """Fill in place, example by example where each has a generator of its own."""
    if generator is None or isinstance(generator, torch.Generator):
        filled: Tensor = getattr(empty, kind)(generator=generator)
        return filled
    if len(generator) != len(empty):
        raise ValueError(f"there are {len(generator)} generators for {len(empty)} examples; give one for each.")
    for row, own in zip(empty, generator, strict=True):
        getattr(row, kind)(generator=own)
    return empty


def _counts_at_once(device: torch.device) -> bool:
    """Whether to count on the device makes nobody wait."""
    return device.type == "cpu"
