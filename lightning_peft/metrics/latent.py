"""Measures of a latent variable over a whole set and all processes, each with the number of samples behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_peft.functional.latent import (
    active_units,
    aggregate_mutual_information,
    gaussian_kl_to,
    importance_weighted_nll,
    perplexity,
)
from lightning_peft.functional.mutual_information import ESTIMATORS
from lightning_peft.metrics.mutual_information import reported, rows_seen


class AggregateMutualInformation(Metric):
    """Information I(x; z) of a Gaussian posterior, by the mixture of the posteriors of all examples seen.

    The value is that of the whole set, :func:`~lightning_peft.functional.latent.aggregate_mutual_information`: with n
    examples never above ln n, so take 1024 or more. Published values are means over batches of 32 or 50, at most 3.5
    or 3.9: `batch_size` gives that measure, for comparison. Examples that a distributed sampler repeats put it too low.

        self.log_dict(metric.compute())      # "mi/aggregate", "mi/aggregate_n", "mi/aggregate_ceiling"

    Args:
        batch_size: the mean over sets of this size, in the order seen, in place of the whole set's value; weighted by
            size, and a last one of a single example left out. n is then the batch size.
        chunk: draws whose densities under all posteriors are in memory at once.
        closed_entropy: see the function.
        name: key of the value, and start of the other keys.

    Raises:
        ValueError: batch_size is less than 2.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    mean: Any
    log_variance: Any
    z: Any

    def __init__(
        self,
        batch_size: int | None = None,
        chunk: int = 1024,
        closed_entropy: bool = False,
        name: str = "mi/aggregate",
    ) -> None:
        super().__init__()
        if batch_size is not None and batch_size < 2:
            raise ValueError(f"batch_size must be at least 2, or None for the whole set. Got {batch_size!r}.")
        self.batch_size, self.chunk, self.closed_entropy, self.name = batch_size, chunk, closed_entropy, name
        for state in ("mean", "log_variance", "z"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, mean: Tensor, log_variance: Tensor, z: Tensor) -> None:
        """Keep a batch's posteriors.

        Args:
            mean: (n, d).
            log_variance: (n, d).
            z: (n, d), one draw from each.

        Raises:
            ValueError: the shapes differ.
        """
        if mean.ndim != 2 or not mean.shape == log_variance.shape == z.shape:
            raise ValueError(
                "mean, log_variance and z must be (n, d), with one draw z for each example. "
                f"Got {tuple(mean.shape)}, {tuple(log_variance.shape)} and {tuple(z.shape)}."
            )
        self.mean.append(mean.detach())
        self.log_variance.append(log_variance.detach())
        self.z.append(z.detach())

    def compute(self) -> dict[str, Tensor]:
        """Value, number of examples and ceiling ln n; scalars.

        Raises:
            RuntimeError: fewer than 2 examples were seen.
        """
        n = rows_seen(self, self.z, "update(mean, log_variance, z)")
        whole = [dim_zero_cat(state) for state in (self.mean, self.log_variance, self.z)]
        size = min(self.batch_size or n, n)
        parts = [part for part in zip(*(state.split(size) for state in whole), strict=True) if len(part[0]) > 1]
        with torch.no_grad():
            values = [
                aggregate_mutual_information(mean, log_variance, z, self.chunk, self.closed_entropy)
                for mean, log_variance, z in parts
            ]
        sizes = torch.tensor([len(part[0]) for part in parts], dtype=values[0].dtype, device=values[0].device)
        value = (torch.stack(values) * sizes).sum() / sizes.sum()
        return reported(self.name, value, n=size, ceiling=ESTIMATORS["aggregate"].ceiling(size))


class ActiveUnits(Metric):
    """Units whose posterior mean varies over the examples: in two passes over the means of the whole set.

        self.log_dict(metric.compute())      # "au", "au_n"

    Args:
        threshold: least variance.
        name: key of the value, and start of the other key.

    Raises:
        ValueError: threshold is not positive.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    means: Any

    def __init__(self, threshold: float = 0.01, name: str = "au") -> None:
        super().__init__()
        if not threshold > 0:
            raise ValueError(f"threshold must be positive, the least variance of a unit in use. Got {threshold!r}.")
        self.threshold, self.name = threshold, name
        self.add_state("means", [], dist_reduce_fx="cat")

    def update(self, means: Tensor) -> None:
        """Keep a batch's posterior means.

        Args:
            means: (n, d).

        Raises:
            ValueError: they are not (n, d).
        """
        if means.ndim != 2:
            raise ValueError(f"means must be (n, d), one row for each example. Got {tuple(means.shape)}.")
        self.means.append(means.detach())

    def compute(self) -> dict[str, Tensor]:
        """Units in use, as a floating-point number, and number of examples; scalars.

        Raises:
            RuntimeError: fewer than 2 examples were seen.
        """
        n = rows_seen(self, self.means, "update(means)")
        # A whole number that is no floating-point one would be logged with a warning.
        return reported(self.name, active_units(dim_zero_cat(self.means), self.threshold).float(), n=n)


class PriorDivergence(Metric):
    """Mean divergence of posteriors from a prior: an upper bound of I(x; z), for any prior and without a ceiling.

        self.log_dict(metric.compute())      # "kl", "kl_n"

    Args:
        name: key of the value, and start of the other key.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = None
    total: Tensor
    n: Tensor

    def __init__(self, name: str = "kl") -> None:
        super().__init__()
        self.name = name
        for state in ("total", "n"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(
        self, mean: Tensor, std: Tensor, prior_mean: Tensor | float = 0.0, prior_std: Tensor | float = 1.0
    ) -> None:
        """Count a batch.

        Args:
            mean: (n, d).
            std: (n, d).
            prior_mean: (d,), or one number.
            prior_std: (d,), or one number; positive.

        Raises:
            ValueError: mean and std are not both (n, d).
        """
        if mean.ndim != 2 or mean.shape != std.shape:
            raise ValueError(f"mean and std must both be (n, d). Got {tuple(mean.shape)} and {tuple(std.shape)}.")
        kl = gaussian_kl_to(mean.detach(), std.detach(), prior_mean, prior_std)
        # Not in place: states that were moved in inference mode could not be changed in training.
        self.total = self.total + kl.detach().to(self.total).sum()
        self.n = self.n + len(kl)

    def compute(self) -> dict[str, Tensor]:
        """Mean over examples in nats, and their number; scalars.

        Raises:
            RuntimeError: nothing was counted.
        """
        if not self.n:
            raise RuntimeError("PriorDivergence has counted no examples; call update(mean, std) before compute().")
        return reported(self.name, self.total / self.n, n=self.n)


class ImportanceWeightedNLL(Metric):
    """Negative log-likelihood of examples by importance weighting, and their perplexity: of totals over the set.

        self.log_dict(metric.compute())      # "nll", "nll_n", "nll_draws", and "ppl", "ppl_n" if tokens were counted

    An upper bound of the negative log-likelihood in expectation; of perplexity as well. n of "ppl" is in tokens.

    Args:
        name: key of the value, and start of the other keys.
        perplexity_name: the same for the perplexity.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    n: Tensor
    tokens: Tensor
    least_draws: Tensor

    def __init__(self, name: str = "nll", perplexity_name: str = "ppl") -> None:
        super().__init__()
        self.name, self.perplexity_name = name, perplexity_name
        for state in ("total", "n", "tokens"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("least_draws", torch.tensor(torch.inf, dtype=torch.float64), dist_reduce_fx="min")

    def update(self, log_joint: Tensor, log_posterior: Tensor, tokens: Tensor | int = 0) -> None:
        """Count a batch.

        Args:
            log_joint: ln p(x, z_s), (n, S).
            log_posterior: ln q(z_s | x), (n, S).
            tokens: how many were predicted in these examples, together or (n,): the start symbol does not count.

        Raises:
            ValueError: the shapes differ, or are not (n, S).
        """
        nll = importance_weighted_nll(log_joint.detach(), log_posterior.detach())
        # Not in place: states that were moved in inference mode could not be changed in training.
        self.total = self.total + nll.to(self.total).sum()
        self.n = self.n + len(nll)
        self.tokens = self.tokens + torch.as_tensor(tokens).detach().to(self.tokens).sum()
        self.least_draws = self.least_draws.clamp(max=log_joint.shape[1])

    def compute(self) -> dict[str, Tensor]:
        """Mean over examples in nats, their number, the least number of draws; perplexity and tokens; scalars.

        Raises:
            RuntimeError: nothing was counted.
        """
        if not self.n:
            raise RuntimeError(
                "ImportanceWeightedNLL has counted no examples; call update(log_joint, log_posterior) before compute()."
            )
        found = reported(self.name, self.total / self.n, n=self.n, draws=self.least_draws)
        if self.tokens:
            found |= reported(self.perplexity_name, perplexity(self.total, self.tokens), n=self.tokens)
        return found
