"""PAC-tuning's two stages: learn the noise on a bound for unbounded losses, then train under it (Liu et al., 2023)."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite

import torch
from torch import Tensor, nn

from lightning_peft.arguments import require_number
from lightning_peft.functional.pac_tuning import PRIOR_SIGMAS, best_gamma, interpolated, moment_constant, unbounded
from lightning_peft.rank.schedule import share_of
from lightning_peft.regularizers.objectives import Objective
from lightning_peft.regularizers.posterior import Posterior


class PACTuning(Objective):
    """First a bound of the mean loss, by which the noise is learnt; then the loss alone, under the noise as it is.

        stage 1:  R + (KL + 10 + 3 m) / (gamma n) + 3/2 gamma K^2        R, the plain loss at w + sigma eps
        stage 2:  R                                                      sigma and lambda rest

    K says how far losses lie apart for weights of the prior. It is measured before training, at eight widths, by
    :class:`~lightning_peft.callbacks.moments.MomentEstimation`, and read at the geometric mean of lambda.

    Args:
        stage2: share of the run that the second stage takes.
        gamma: (least, largest) that gamma may be; between, it is the best one. The paper's script has 10 and 10.

    Attributes:
        constants: (8,) K at each of the widths; NaN until it is measured.

    Raises:
        TypeError: an argument is no number.
        ValueError: one is out of range.
        RuntimeError: while training: K was not measured.

    Reference:
        Liu et al., PAC-tuning, EMNLP 2023, arXiv 2310.17588 (its code). 10 stands for ln(1 / delta) and 3 m for m
        learnt lambdas (readings). Departures: noise is not clipped at two standard deviations, for which the
        divergence would be another one; it stands in the weights' places, where the code adds and subtracts it.
    """

    is_bound = False
    constants: Tensor
    widths: Tensor

    def __init__(self, stage2: float = 0.2, gamma: tuple[float, float] = (10.0, 10.0)) -> None:
        super().__init__()
        require_number("stage2", stage2)
        if not 0 <= stage2 < 1:
            raise ValueError(f"stage2 is a share of the run, at least 0 and below 1. Got {stage2!r}.")
        for value in gamma:
            require_number("gamma", value)
        least, largest = gamma
        if not 0 < least <= largest:
            raise ValueError(f"gamma is the least and the largest that it may be, positive. Got {gamma!r}.")
        self.stage2, self.gamma = float(stage2), (float(least), float(largest))
        self.register_buffer("widths", torch.tensor(PRIOR_SIGMAS), persistent=False)
        self.register_buffer("constants", torch.full((len(PRIOR_SIGMAS),), torch.nan))
        self._second = False
        self._known = False

    @property
    def is_measured(self) -> bool:
        """Whether K has been measured, in this run or before its checkpoint."""
        if not self._known:
            self._known = bool(self.constants.isfinite().all())
        return self._known

    @property
    def gammas(self) -> tuple[float, ...]:
        """The values of gamma at which the moments are to be met."""
        least, largest = self.gamma
        steps = 5
        return tuple({least * (largest / least) ** (i / (steps - 1)): None for i in range(steps)})

    def measured(self, losses: Tensor) -> None:
        """Take K from losses at each of the widths: (8, draws, examples).

        Raises:
            FloatingPointError: it is no number at one of them.
        """
        found = torch.stack([moment_constant(each, self.gammas) for each in losses])
        odd = [f"{width:.3g}" for width, K in zip(self.widths.tolist(), found.tolist(), strict=True) if not isfinite(K)]
        if odd:
            raise FloatingPointError(
                f"PACTuning's K is no number for weights drawn at a width of {', '.join(odd)}: losses there are "
                "infinite or NaN. Check that the loss is finite without noise, and train in a precision with a larger "
                "range (precision='bf16-mixed' or '32-true')."
            )
        self.constants.copy_(found)
        self._known = True

    def prepare(self, step: int, total: int) -> None:
        self._second = step > total - share_of(self.stage2, total) > 0

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        if self._second:
            # Still a part of the graph: DDP wants a gradient of every parameter.
            return risk + 0.0 * (kl + posterior.prior_cost())
        if not self.is_measured:
            raise RuntimeError(
                "PACTuning does not know how far losses lie apart: put MomentEstimation() after Regularization among "
                "the Trainer's callbacks, as presets.pac_tuning does."
            )
        scales = posterior.prior_scales()
        K = interpolated(scales.log().mean().exp(), self.widths, self.constants)
        union = 3.0 * scales.numel() if posterior.prior_offset is not None else 0.0
        gamma = best_gamma(kl, n, K, union=union, limits=self.gamma).detach()
        return unbounded(risk, kl, n, K=K, gamma=gamma, union=union)

    def resting(self, posterior: Posterior) -> Iterable[nn.Parameter]:
        return posterior.parameters() if self._second else ()
