"""What a variational autoencoder of sentences minimises, and the two oldest ways to keep its latent space in use.

    L = -E_q[ ln p(x | z) ] + beta_t KL(q(z | x) || N(0, I)),    sums over words, means over sentences

Reference:
    Bowman et al. 2016, "Generating sentences from a continuous space" (annealing), and Kingma et al. 2016, "Improving
    variational inference with inverse autoregressive flow", arXiv 1606.04934 (free bits): both remembered, not read
    again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor
from torch.nn import functional as F

from lightning_peft.arguments import require_finite
from lightning_peft.modules.vocabulary import PAD

Over = Literal["unit", "total"]


def sentence_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p(x | z) of each sentence: the sum over its words, filling left out.

    Args:
        logits: (batch, length, vocabulary), of any float type; computed in float32 at least.
        targets: (batch, length).

    Returns:
        (batch,), in nats.
    """
    flat = logits.flatten(0, 1)
    wide = flat if flat.element_size() >= 4 else flat.float()
    return F.cross_entropy(wide, targets.flatten(), ignore_index=PAD, reduction="none").view(targets.shape).sum(1)


@dataclass(frozen=True)
class LinearAnnealing:
    """A weight of the divergence that rises linearly, and stays.

    Args:
        start: at the first step.
        stop: at the end of the rise, and after.
        share: of the run's steps in which it rises.

    Raises:
        ValueError: a weight is below 0, or share is outside (0, 1].

    Reference:
        0.1 to 1 is an example of He et al. 2019; they rise over 10 of up to 100 epochs.

    Example:
        >>> rise = LinearAnnealing(start=0.1, share=0.5)
        >>> [round(rise(step, 19), 2) for step in (1, 5, 10, 19)]
        [0.1, 0.5, 1.0, 1.0]
    """

    start: float = 0.1
    stop: float = 1.0
    share: float = 0.1

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("stop", self.stop), ("share", self.share)):
            require_finite(name, value)
        if min(self.start, self.stop) < 0:
            raise ValueError(f"start={self.start}, stop={self.stop}: the weight of a divergence is 0 or above.")
        if not 0 < self.share <= 1:
            raise ValueError(f"share={self.share}: it is the share of the steps in which the weight rises, in (0, 1].")

    def __call__(self, step: int, total: int) -> float:
        rising = max(1.0, round(self.share * total) - 1)
        return self.start + (self.stop - self.start) * min(1.0, (step - 1) / rising)


@dataclass(frozen=True)
class FreeBits:
    """A divergence that costs nothing up to a number of nats.

        unit:    sum_k max(nats, mean_i KL_k(x_i))        Kingma et al. 2016
        total:   max(nats, mean_i KL(x_i))                our choice, for a bound on all units together

    The mean is over the global batch, inside the maximum, so that a unit may be silent on some sentences.

    Args:
        nats: that are free, of each unit or of all.
        over: "unit" or "total".

    Raises:
        ValueError: nats is not positive, or over is unknown.
    """

    nats: float = 0.1
    over: Over = "unit"

    def __post_init__(self) -> None:
        require_finite("nats", self.nats)
        if self.nats <= 0:
            raise ValueError(f"nats={self.nats}: it is what the divergence may be for nothing, above 0.")
        if self.over not in get_args(Over):
            raise ValueError(f"over={self.over!r}: choose 'unit' or 'total'.")

    def __call__(self, kl: Tensor) -> Tensor:
        """The divergence that is paid.

        Args:
            kl: (global batch, latent), per unit.

        Returns:
            A scalar, in nats per sentence.
        """
        means = kl.mean(0)
        return (means if self.over == "unit" else means.sum()).clamp(min=self.nats).sum()
