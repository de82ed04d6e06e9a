"""BLoB as a list of callbacks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

from lightning_peft.adapters.lora import LoRA
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor, Regularization
from lightning_peft.presets.base import Preset
from lightning_peft.regularizers import PACBayes
from lightning_peft.regularizers.blob import BLoB


def blob(
    rank: int = 8,
    *,
    batch_size: int = 8,
    gamma: float = 8.0,
    prior_sigma: float = 0.2,
    sigma: float = 0.0018,
    speed: float = 10.0,
    alpha: float = 16.0,
    dropout: float = 0.0,
    examples: int | None = None,
    streams: Literal["apart", "alike"] = "apart",
    seed: int = 0,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
) -> Preset:
    """BLoB: Bayesian LoRA, with a Gaussian over A and a number for each entry of B.

    Args:
        rank: components per layer.
        batch_size: examples per optimizer step, of all processes; what the cycle of the divergence is made of.
        gamma: the larger, the shorter that cycle and the heavier the divergence.
        prior_sigma: of the prior, N(0, prior_sigma^2) for every entry of A.
        sigma: the start of A's standard deviations.
        speed: learning rate of log sigma, in units of the module's.
        alpha: update scale; the update is multiplied by alpha / rank.
        dropout: dropout on the adapters' input.
        examples: size of the training set; ``None`` to read it from the data.
        streams: "apart" has every process draw its own noise, "alike" the same.
        seed: of the noise.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range.

    Reference:
        Wang et al., BLoB, NeurIPS 2024, arXiv 2406.11675. Departures: one draw of A per batch, where the paper's noise
        has random signs for every token (Flipout), a pass more for each layer and less variance; log sigma is trained
        where sigma is a square there, from the middle of the range that it begins in; and that of
        :class:`~lightning_peft.regularizers.blob.BLoB`.
    """
    term = PACBayes(
        BLoB(batch_size, gamma), risk="loss", examples=examples, prior_sigma=prior_sigma, sigma=sigma,
        prior_mean="zero", speed=speed, over=["A"], streams=streams, seed=seed,
    )  # fmt: skip
    adapter = partial(LoRA, rank=rank, alpha=alpha, dropout=dropout)
    return Preset(
        [
            AdapterInjection(adapter, targets, train),
            Regularization({"blob": term}),
            RankMonitor(),
            AdapterCheckpoint(),
        ]
    )
