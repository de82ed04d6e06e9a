"""Any adapter trained on a PAC-Bayes objective, as a list of callbacks; and the data that a prior may see."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

from torch.utils.data import Dataset, Subset

from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.adapters.lora import LoRA
from lightning_peft.arguments import require_integer, require_number
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor, Regularization
from lightning_peft.functional.draws import choice
from lightning_peft.presets.base import Preset
from lightning_peft.regularizers import PACBayes
from lightning_peft.regularizers.base import Weight
from lightning_peft.regularizers.objectives import Name, Objective
from lightning_peft.regularizers.pac_bayes import Risk, Unit
from lightning_peft.regularizers.posterior import Prior, Scale


def pac_bayes(
    objective: Name | Objective = "f_quad",
    *,
    adapter: AdapterFactory | None = None,
    rank: int = 8,
    risk: Risk = "bounded_cross_entropy",
    prior_sigma: Scale = 0.1,
    sigma: Scale = 0.01,
    prior: Prior = "fixed",
    speed: float = 10.0,
    unit: Unit = "batch",
    kl_weight: Weight = 1.0,
    p_min: float = 1e-4,
    examples: int | None = None,
    streams: Literal["apart", "alike"] = "apart",
    seed: int = 0,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
) -> Preset:
    """A Gaussian over adapters and head, trained on what bounds its risk.

    The prior's mean is what the model is when this fit starts. With new adapters it owes nothing to the data. A prior
    that does: train once on :func:`prior_split` of the data, with any preset, then the same module with this one, on
    all of the data; what certifies it is the rest, which the prior has not seen.

    Args:
        objective: see :class:`~lightning_peft.PACBayes`, also for what is not explained here.
        adapter: builds the adapters: `partial(RLoRA, rank=256)`; ``None`` for LoRA.
        rank: components per layer of that LoRA.
        risk: "bounded_cross_entropy", "bounded_next_token", or "loss" for whatever training_step returns.
        prior_sigma: lambda.
        sigma: the start of sigma: a tenth of lambda for accuracy first, lambda for the certificate first.
        prior: "fixed", "learned" or "per_tensor".
        speed: learning rate of log sigma, in units of the module's.
        unit: "batch", "step" or "example".
        kl_weight: what KL is multiplied by: a number or a function of (step, total).
        p_min: the probability below which a bounded loss does not grow.
        examples: n; ``None`` to read it from the data.
        streams: "apart" has every process draw its own noise, "alike" the same.
        seed: of the noise.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them, and is in Q too; ``None`` for the head.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range.

    Reference:
        Perez-Ortiz et al., Tighter risk certificates for neural networks, JMLR 2021, arXiv 2007.12911.
    """
    term = PACBayes(
        objective, risk, p_min, examples, prior_sigma, sigma, prior, speed=speed, unit=unit, kl_weight=kl_weight,
        streams=streams, seed=seed,
    )  # fmt: skip
    factory = partial(LoRA, rank=rank, alpha=16.0) if adapter is None else adapter
    return Preset(
        [
            AdapterInjection(factory, targets, train),
            Regularization({"pac_bayes": term}),
            RankMonitor(),
            AdapterCheckpoint(),
        ]
    )


def prior_split(data: Dataset[Any], share: float = 0.5, seed: int = 0) -> Subset[Any]:
    """The examples that a prior is trained on; the rest are left to certify.

    Which they are is told by the seed and the number of examples, on every machine alike.

    Args:
        data: the training set, of known length.
        share: of its examples.
        seed: another one, another split.

    Raises:
        TypeError: data has no length.
        ValueError: the share leaves nothing on one side.

    Example:
        >>> prior_split(range(8), 0.5).indices
        [0, 1, 5, 6]
    """
    if not hasattr(data, "__len__"):
        raise TypeError(f"prior_split divides a data set of known length, and a {type(data).__name__} has none.")
    require_number("share", share)
    require_integer("seed", seed)
    n = len(data)
    count = round(share * n)
    if not 0 < count < n:
        raise ValueError(f"share={share!r} of {n} examples is {count}, which leaves one side without any.")
    return Subset(data, choice(seed, "prior_split", "index", n, count).tolist())
