"""PACBayesBound: the certificate of what has been seen so far, over batches and processes."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_peft.distributed import world_size
from lightning_peft.functional.risk_bounds import certified_risk, effective_units


class PACBayesBound(Metric):
    """The certified risk of a posterior from losses of networks drawn from it, as they are counted.

        q = kl^-1( mean loss, ln(2 / delta') / m_eff )        bound = kl^-1( q, (KL + ln(2 sqrt(n) / delta)) / n )

    Losses lie in [0, 1]: 0-1 errors, or :func:`~lightning_peft.functional.pac_bayes.bounded_cross_entropy`. Each update
    is one draw of the noise, m_eff counts the draws (:func:`~lightning_peft.functional.risk_bounds.effective_units`),
    and n is the number of examples seen: those seen so far are a sample of their own, and the bound one of that sample.
    Sums are over processes by torchmetrics' own sync. It is a statement about one posterior: count it while nothing is
    trained, as in validation, and reset it when training has gone on. Without a reset, KL is the largest that was
    given, and nothing is certified.

    What it does not know: whether the prior was fixed without these examples, and whether all that was fitted to them
    is in the posterior. Of several epochs or runs of which the best bound is taken, each had to hold: `tried`.

    Args:
        examples: the size of the bound set over all processes, where it is passed over more than once; the number seen
            has then to be a multiple of it as soon as it exceeds it. ``None``: every example is seen once, in one
            process; with several it has to be given, because their samplers repeat examples to have equally many.
        delta: probability that the bound fails over the choice of the examples.
        delta_prime: probability that the draws mislead.
        unit: what shares one draw of the noise: each "batch" (each update), or each "example".
        tried: bounds among which one will be chosen, by looking at them.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> bound = PACBayesBound()
        >>> for errors in torch.zeros(50, 40):
        ...     bound.update(errors, kl=3.0)
        >>> round(float(bound.compute()), 4)
        0.1353
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    losses: Tensor
    largest: Tensor
    kl: Tensor
    least: Tensor
    most: Tensor

    def __init__(
        self,
        examples: int | None = None,
        delta: float = 0.025,
        delta_prime: float = 0.01,
        unit: str = "batch",
        tried: int = 1,
    ) -> None:
        super().__init__()
        if unit not in ("batch", "example"):
            raise ValueError(f"unit must be 'batch' or 'example'. Got {unit!r}.")
        certified_risk(0.0, 1, 0.0, 1 if examples is None else examples, delta, delta_prime, tried)  # refuses
        self.examples, self.delta, self.delta_prime = examples, delta, delta_prime
        self.unit, self.tried = unit, tried
        # Counts are exact in float64; a sum of float32 losses would lose whole errors after 16 million.
        zero = torch.zeros((), dtype=torch.float64)
        for name, reduction in (("total", "sum"), ("losses", "sum"), ("largest", "max"), ("kl", "max")):
            self.add_state(name, zero.clone(), dist_reduce_fx=reduction)
        self.add_state("least", zero + torch.inf, dist_reduce_fx="min")
        self.add_state("most", zero - torch.inf, dist_reduce_fx="max")

    def update(self, losses: Tensor, kl: Tensor | float) -> None:
        """Count a batch that was evaluated with one draw of the noise, or one for each of its examples.

        Args:
            losses: (batch,), in [0, 1], or bool: one for each example.
            kl: KL(Q || P) in nats, with what else is paid for.

        Raises:
            ValueError: losses are not one row.
        """
        if losses.ndim != 1:
            raise ValueError(f"losses must be (batch,), one number in [0, 1] for each. Got {tuple(losses.shape)}.")
        if not losses.numel():
            return
        losses = losses.detach().to(self.total)
        # Not in place: states that were moved in inference mode could not be changed in training.
        self.total = self.total + losses.sum()
        self.losses = self.losses + losses.numel()
        self.largest = self.largest.clamp(min=losses.numel() if self.unit == "batch" else 1)
        self.kl = torch.maximum(self.kl, torch.as_tensor(kl).detach().to(self.kl))
        self.least = torch.minimum(self.least, losses.min())
        self.most = torch.maximum(self.most, losses.max())

    def compute(self) -> Tensor:
        """The bound, a scalar in float64.

        Raises:
            RuntimeError: nothing was counted, or not whole passes over the bound set; or there are several processes,
                and the number of examples was not given.
            ValueError: a loss was not in [0, 1].
        """
        seen = round(self.losses.item())
        if not seen:
            raise RuntimeError("PACBayesBound has counted no losses; call update(losses, kl) before compute().")
        if not (self.least.item() >= 0 and self.most.item() <= 1):
            raise ValueError(
                "losses must lie in [0, 1]: 0-1 errors, or bounded_cross_entropy. "
                f"Got losses from {self.least.item():g} to {self.most.item():g}."
            )
        if self.examples is None and world_size() > 1:
            raise RuntimeError(
                f"PACBayesBound has counted {seen} losses on {world_size()} processes, and cannot tell how many of "
                "them a distributed sampler has repeated to give each as many as the others. Give the number of "
                "examples: PACBayesBound(examples=...)."
            )
        n = seen if self.examples is None else min(seen, self.examples)
        if seen % n:
            raise RuntimeError(
                f"PACBayesBound(examples={self.examples}) has counted {seen} losses, which are no whole passes over "
                "them: a distributed sampler that repeats examples to fill its last batch cannot be certified."
            )
        units = effective_units(seen, round(self.largest.item()))
        empirical = min(self.total.item() / seen, 1.0)
        bound = certified_risk(empirical, units, self.kl.item(), n, self.delta, self.delta_prime, self.tried)[1]
        return torch.tensor(bound, dtype=torch.float64, device=self.total.device)
