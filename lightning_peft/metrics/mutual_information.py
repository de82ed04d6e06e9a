"""MutualInformation: estimates over a whole set and all processes, each with the number of samples behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_peft.functional.mutual_information import (
    info_nce,
    log_mean_exp_off_diagonal,
    score_estimator,
)
from lightning_peft.functional.score_blocks import estimate_in_blocks, read_out

Critic = Callable[[Tensor, Tensor], Tensor]


def inner_products(x: Tensor, z: Tensor) -> Tensor:
    """Scores of features that are a separable critic's already: x_i . z_j, never in less than float32.

    Args:
        x: (N, d).
        z: (M, d).

    Returns:
        (N, M).
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, z.dtype), torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return x.to(dtype) @ z.to(dtype).T


class MutualInformation(Metric):
    """Information between two kinds of features of all examples seen, with all their pairs as negatives.

    Features are kept, gathered from all processes and scored in blocks at the end: the value is that of one score
    matrix of the whole set, never a mean of values of batches or processes, which would be another, larger one.

        found = metric.compute()      # {"mi/dv": value, "mi/dv_n": n, "mi/dv_ceiling": the largest value n could give}
        self.log_dict(found)          # in on_validation_epoch_end; then metric.reset()

    n^2 pairs are scored: a fixed subset of a few thousand examples will do. Examples that a distributed sampler repeats
    to fill its last batch count twice, and are negatives of themselves: choose a set that the processes share evenly.

    Args:
        estimator: "dv", "nwj", "jsd" (its NWJ read-out), "info_nce" or "smile"; for what each can be trusted see
            :data:`~lightning_peft.functional.mutual_information.ESTIMATORS`. CLUB is none: it is loose, a penalty to
            train on and never a number to report.
        critic: x (n, ...) and z (m, ...) to scores (n, m), as it is at compute; it is not part of the metric's state.
            ``None``: features are a separable critic's, of which the inner product is taken.
        tau: of SMILE.
        chunk: chunk x chunk pairs are scored at once.
        name: key of the value, and start of the other keys; ``None`` is "mi/" and the estimator.

    Raises:
        ValueError: there is no such estimator of scores, tau is not positive, or chunk less than 1.

    Example:
        >>> metric = MutualInformation("info_nce")
        >>> metric.update(9 * torch.eye(4), torch.eye(4))
        >>> {key: round(float(value), 3) for key, value in metric.compute().items()}
        {'mi/info_nce': 1.386, 'mi/info_nce_n': 4.0, 'mi/info_nce_ceiling': 1.386}
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    critic: Critic
    x: Any
    z: Any

    def __init__(
        self,
        estimator: str = "dv",
        critic: Critic | None = None,
        tau: float = 5.0,
        chunk: int = 256,
        name: str | None = None,
    ) -> None:
        super().__init__()
        _refuse(estimator, tau)
        if chunk < 1:
            raise ValueError(f"chunk must be at least 1, the rows and columns of a block of pairs. Got {chunk!r}.")
        self.estimator, self.tau, self.chunk = estimator, tau, chunk
        self.name = name or f"mi/{estimator}"
        # Not as a submodule, which would save and train it a second time.
        object.__setattr__(self, "critic", inner_products if critic is None else critic)
        self.add_state("x", [], dist_reduce_fx="cat")
        self.add_state("z", [], dist_reduce_fx="cat")

    def update(self, x: Tensor, z: Tensor) -> None:
        """Keep the features of a batch.

        Args:
            x: (n, ...).
            z: (n, ...), of the same examples.

        Raises:
            ValueError: there is not one z for each x.
        """
        if not x.ndim or not z.ndim or len(x) != len(z):
            raise ValueError(f"x and z must have a row for each example. Got {tuple(x.shape)} and {tuple(z.shape)}.")
        self.x.append(x.detach())
        self.z.append(z.detach())

    def compute(self) -> dict[str, Tensor]:
        """Value, number of examples and ceiling; scalars.

        Raises:
            RuntimeError: fewer than 2 examples were seen.
            ValueError: the critic's scores are of the wrong shape.
        """
        n = rows_seen(self, self.x, "update(x, z)")
        x, z = dim_zero_cat(self.x), dim_zero_cat(self.z)
        value = estimate_in_blocks(self.estimator, self.critic, x, z, self.tau, self.chunk)
        return reported(self.name, value, n=n, ceiling=score_estimator(self.estimator).ceiling(n))


class BatchMutualInformation(Metric):
    """Information from the score matrices of batches, where features are not kept: negatives are of the same batch.

    The joint and the marginal samples of all batches and processes are pooled, and the logarithm is taken once, of the
    mean exponential of all; InfoNCE is the mean over samples, and its ceiling that of the batches. To be compared with
    values of batches of the same size; :class:`MutualInformation` is the tighter one.

    Args:
        estimator: as of :class:`MutualInformation`.
        tau: of SMILE.
        name: as of :class:`MutualInformation`.

    Raises:
        ValueError: there is no such estimator of scores, or tau is not positive.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    n: Tensor
    pairs: Tensor
    joint: Tensor
    ceilings: Tensor
    log_sums: Any

    def __init__(self, estimator: str = "dv", tau: float = 5.0, name: str | None = None) -> None:
        super().__init__()
        _refuse(estimator, tau)
        self.estimator, self.tau, self.name = estimator, tau, name or f"mi/{estimator}"
        for state in ("n", "pairs", "joint", "ceilings"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("log_sums", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor) -> None:
        """Count a batch.

        Args:
            scores: (N, N), [i, j] = T(x_i, z_j).

        Raises:
            ValueError: they are not square, or fewer than 2 x 2.
        """
        scores = scores.detach()
        marginal = scores.clamp(-self.tau, self.tau) if self.estimator == "smile" else scores
        log_mean_exp, n = log_mean_exp_off_diagonal(marginal), len(scores)
        capped = score_estimator(self.estimator).capped
        joint = info_nce(scores) if capped else scores.to(log_mean_exp).diagonal().mean()
        self.n = self.n + n
        self.pairs = self.pairs + n * (n - 1)
        self.joint = self.joint + n * joint.to(self.joint)
        self.ceilings = self.ceilings + n * score_estimator(self.estimator).ceiling(n)
        self.log_sums.append(log_mean_exp.to(self.joint).reshape(1) + math.log(n * (n - 1)))

    def compute(self) -> dict[str, Tensor]:
        """Value, number of examples, and ceiling (of batches of that size); scalars.

        Raises:
            RuntimeError: nothing was counted.
        """
        if not self.n:
            raise RuntimeError("BatchMutualInformation has counted no scores; call update(scores) before compute().")
        joint = self.joint / self.n
        if not score_estimator(self.estimator).capped:
            joint = read_out(self.estimator, joint, dim_zero_cat(self.log_sums).logsumexp(0) - self.pairs.log())
        return reported(self.name, joint, n=self.n, ceiling=self.ceilings / self.n)


def reported(name: str, value: Tensor, **beside: Tensor | float) -> dict[str, Tensor]:
    """A value under its name, and what is to be read with it under "name_...", as `log_dict` takes them.

    Args:
        name: key of the value.
        value: a scalar.
        **beside: further numbers, as n=64.
    """
    rest = {f"{name}_{key}": torch.as_tensor(of, dtype=value.dtype, device=value.device) for key, of in beside.items()}
    return {name: value, **rest}


def _refuse(estimator: str, tau: float) -> None:
    if estimator in ("club", "club_sample"):
        raise ValueError(
            f"{estimator} is a loose upper bound, several times the information even with the best q: a penalty to "
            "train on, not a value to report. Use 'nwj' or 'info_nce' for a lower bound."
        )
    score_estimator(estimator)
    if not tau > 0:
        raise ValueError(f"tau must be positive, the largest score of a marginal sample; inf is plain DV. Got {tau!r}.")


def rows_seen(metric: Metric, state: list[Tensor] | Tensor, call: str) -> int:
    """How many rows a state of concatenated batches has."""
    n = len(state) if isinstance(state, Tensor) else sum(map(len, state))
    if n < 2:
        raise RuntimeError(f"{type(metric).__name__} needs at least 2 examples; call {call} before compute(). Got {n}.")
    return n
