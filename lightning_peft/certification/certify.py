"""From a module with a posterior, and a bound set, to a certificate: the same for a callback and the command line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.certification.accounting import PriorData, in_q, require_finite, sha256
from lightning_peft.certification.bound_set import BoundSet
from lightning_peft.certification.counting import Predict, count, total
from lightning_peft.certification.record import Certificate, Unit
from lightning_peft.distributed import gather_objects, rank, world_size
from lightning_peft.regularizers.posterior import Posterior

_PACKAGES = ("lightning-peft", "torch", "lightning", "transformers")


@dataclass(frozen=True)
class Settings:
    """How a certificate is made.

    Args:
        passes: how often the bound set is gone through, with fresh noise.
        unit: what shares a draw: a whole "pass", a "batch", or nothing ("example").
        delta: probability that the bound fails over the choice of the bound set.
        delta_prime: probability that the draws mislead.
        tried: distributions among which this one was chosen by looking at the bound set.
        seed: of the noise.
        p_min: the probability at which the bounded cross-entropy is cut, in (0, 1).

    Raises:
        TypeError: an argument is of another kind.
        ValueError: a value is out of range, or unit is unknown.
    """

    passes: int = 10
    unit: Unit = "batch"
    delta: float = 0.025
    delta_prime: float = 0.01
    tried: int = 1
    seed: int = 0
    p_min: float = 1e-4

    def __post_init__(self) -> None:
        for name, least in (("passes", 1), ("tried", 1), ("seed", 0)):
            value = getattr(self, name)
            require_integer(name, value)
            if value < least:
                raise ValueError(f"{name} must be at least {least}. Got {value}.")
        for name in ("delta", "delta_prime", "p_min"):
            value = getattr(self, name)
            require_number(name, value)
            if not 0 < value < 1:
                raise ValueError(f"{name} is a probability and must lie strictly between 0 and 1. Got {value}.")
        if self.delta + self.delta_prime >= 1:
            raise ValueError(
                f"delta and delta_prime are what may fail, together less than 1. Got {self.delta} + {self.delta_prime}."
            )
        if self.unit not in ("pass", "batch", "example"):
            raise ValueError(f"unit={self.unit!r}: choose 'pass', 'batch' or 'example', what shares one draw of noise.")


@torch.no_grad()
def certify(
    module: nn.Module,
    posterior: Posterior,
    data: BoundSet,
    predict: Predict,
    settings: Settings,
    *,
    base: Mapping[str, Tensor],
    prior_data: PriorData | None,
    precision: str,
    advance: Callable[[], object] = lambda: None,
) -> Certificate:
    """Count the errors of networks drawn from Q, and say what follows. Several processes share the work.

    The module has to be in eval mode; the caller's random numbers are left alone.

    Args:
        module: has its adapters and the posterior.
        posterior: Q.
        data: the bound set.
        predict: gives logits and labels of a batch, by a forward of `module`.
        settings: how.
        base: fingerprint of the frozen base.
        prior_data: what chose the prior, if anything did.
        precision: what the module is run in, by name.
        advance: called after each batch.

    Raises:
        MisconfigurationException: training has diverged.
    """
    kl = require_finite(module, posterior)  # first, since to count takes long
    counts = list(
        count(
            predict, posterior, module, data,
            passes=settings.passes, unit=settings.unit, seed=settings.seed, p_min=settings.p_min,
            process=(rank(), world_size()), advance=advance,
        )
    )  # fmt: skip
    errors, cross_entropy = total([each for part in gather_objects(counts) for each in part])
    predictions = len(data) * settings.passes
    prior: dict[str, Any] = {"scale": posterior.prior, "chosen by": "no data"}
    if prior_data is not None:
        prior |= {"chosen by": f"{len(prior_data.places)} of {prior_data.size} examples", "dataset": prior_data.dataset}
    return Certificate.of(
        errors=errors,
        cross_entropy=cross_entropy / predictions,
        p_min=settings.p_min,
        examples=len(data),
        passes=settings.passes,
        unit=settings.unit,
        batch_size=data.batch_size,
        kl=kl,
        parameters=posterior.offset.numel(),
        delta=settings.delta,
        delta_prime=settings.delta_prime,
        tried=settings.tried,
        seed=settings.seed,
        precision=precision,
        hashes={
            "mean": sha256(in_q(module, posterior).values()),
            "sigma": sha256([posterior.sigma()]),
            "prior_mean": sha256([posterior.prior_mean]),
            "prior_sigma": sha256([posterior.prior_scales()]),
            "bound_set": data.digest(),
            "base": sha256(base[name] for name in sorted(base)),
        },
        prior=prior,
        versions={package: version(package) for package in _PACKAGES},
    )
