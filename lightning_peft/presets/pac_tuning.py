"""PAC-tuning as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from torch import Tensor

from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.adapters.lora import LoRA
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor, Regularization
from lightning_peft.callbacks.moments import MomentEstimation
from lightning_peft.presets.base import Preset
from lightning_peft.regularizers import PACBayes
from lightning_peft.regularizers.pac_tuning import PACTuning


def pac_tuning(
    rank: int = 8,
    *,
    adapter: AdapterFactory | None = None,
    stage2: float = 0.2,
    gamma: tuple[float, float] = (10.0, 10.0),
    least_sigma: float = 0.01,
    speed: float = 10.0,
    draws: int = 10,
    measured: int = 100,
    alpha: float = 16.0,
    dropout: float = 0.0,
    examples: int | None = None,
    streams: Literal["apart", "alike"] = "apart",
    seed: int = 0,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
) -> Preset:
    """PAC-tuning: noise that is learnt on a bound, then training under that noise; for few examples.

    Args:
        rank: components per layer, of LoRA.
        adapter: builds other adapters: `partial(RLoRA, rank=256)`; ``None`` for LoRA of that rank.
        stage2: share of the run in which the noise is no longer learnt.
        gamma: (least, largest) gamma of the bound; see :class:`~lightning_peft.regularizers.pac_tuning.PACTuning`.
        least_sigma: sigma and lambda begin at a tensor's mean absolute value, and not below this.
        speed: learning rate of log sigma and lambda, in units of the module's.
        draws: of weights, at each width at which K is measured.
        measured: examples that K is measured on.
        alpha: LoRA's update scale.
        dropout: LoRA's dropout.
        examples: size of the training set; ``None`` to read it from the data.
        streams: "apart" has every process draw its own noise, "alike" the same.
        seed: of all noise.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range.

    Reference:
        Liu et al., PAC-tuning, EMNLP 2023, arXiv 2310.17588. Departures: adapters in place of the whole model; one
        start per tensor, with a floor, for an adapter's B begins at zero; and those of
        :class:`~lightning_peft.regularizers.pac_tuning.PACTuning`.
    """
    if not 0 < least_sigma < 0.3:
        raise ValueError(f"least_sigma is a standard deviation, positive and below 0.3. Got {least_sigma!r}.")
    start = _MeanAbsolute(least_sigma)
    term = PACBayes(
        PACTuning(stage2, gamma), risk="loss", examples=examples, prior_sigma=start, sigma=start, prior="per_tensor",
        speed=speed, streams=streams, seed=seed,
    )  # fmt: skip
    factory = partial(LoRA, rank=rank, alpha=alpha, dropout=dropout) if adapter is None else adapter
    return Preset(
        [
            AdapterInjection(factory, targets, train),
            Regularization({"pac_tuning": term}),
            MomentEstimation(draws, measured, seed),
            RankMonitor(),
            AdapterCheckpoint(),
        ]
    )


class _MeanAbsolute:
    """The mean absolute value of a tensor, within what a learnt lambda may be."""

    def __init__(self, least: float) -> None:
        self.least = least

    def __call__(self, name: str, value: Tensor) -> Tensor:
        return value.abs().mean().clamp(self.least, 0.3)
