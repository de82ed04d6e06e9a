"""From a global budget to the share of entries that every target keeps."""

from __future__ import annotations

from fractions import Fraction
from math import floor

from lightning_peft.arguments import require_integer, require_number


def require_sparsity(sparsity: float) -> None:
    """Check a share of parameters that stay.

    Raises:
        TypeError: it is no number.
        ValueError: it is not in [0, 1).
    """
    require_number("sparsity", sparsity)
    if not 0 <= sparsity < 1:
        raise ValueError(
            f"sparsity is the share of the base's parameters that stay as they are, in [0, 1). Got {sparsity}."
        )


def density_of_sparsity(sparsity: float, total: int, eligible: int) -> float:
    """The keep probability in the targets that leaves a share 1 - s of all parameters trainable.

        q = (1 - s) N / N_targets

    Args:
        sparsity: s, share of the base's parameters that stay as they are, in [0, 1).
        total: N, the base's parameters, the task's head not counted.
        eligible: N_targets, entries of the tensors that are sampled.

    Returns:
        q, in (0, 1).

    Raises:
        TypeError: sparsity is no number.
        ValueError: it is out of range, or the targets are too small for it; the least that they allow is said.

    Reference:
        Rios et al., SpaRTA, Findings of EMNLP 2025, arXiv 2502.15975, and the rule of the authors' first code, where
        N - N_frozen is what is here N_targets.
    """
    require_sparsity(sparsity)
    q = (1 - Fraction(str(sparsity))) * total / eligible
    if q < 1:
        return float(q)
    least = (floor((1 - Fraction(eligible, total)) * 10_000) + 1) / 10_000
    raise ValueError(
        f"sparsity={sparsity} would train {round((1 - sparsity) * total):,} of {total:,} parameters, and the targets "
        f"have {eligible:,}: give a sparsity of at least {least:g}, or more targets."
    )


def density_of_parameters(parameters: int, eligible: int, layers: int, block: int = 1) -> float:
    """The keep probability in the targets that trains so many scalars.

        q = k / N_targets

    Args:
        parameters: k, scalars to train, the head's not counted; at least one block per layer.
        eligible: N_targets, entries of the tensors that are sampled.
        layers: how many tensors these are.
        block: entries that go together.

    Returns:
        q, in (0, 1].

    Raises:
        TypeError: parameters is no whole number.
        ValueError: there are fewer than layers, or more than the targets have.
    """
    require_integer("parameters", parameters)
    if not layers * block <= parameters <= eligible:
        least = "one" if block == 1 else f"a block of {block}"
        raise ValueError(
            f"parameters={parameters:,} cannot be had: the {layers} targets have {eligible:,} entries, and each keeps "
            f"{least} at least. Give a number from {layers * block:,} to {eligible:,}, or other targets."
        )
    return parameters / eligible
