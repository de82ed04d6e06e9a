"""Any adapter with a variational information bottleneck before the classifier, as a list of callbacks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor

from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.adapters.lora import LoRA
from lightning_peft.callbacks import AdapterCheckpoint, AdapterInjection, RankMonitor, Regularization
from lightning_peft.presets.base import Preset
from lightning_peft.regularizers import VIB
from lightning_peft.regularizers.base import Weight


def vib(
    head: str | None = None,
    *,
    adapter: AdapterFactory | None = None,
    rank: int = 8,
    features: int = 128,
    beta: Weight = 1e-5,
    growth: Literal["linear", "none"] = "linear",
    samples: int = 5,
    loss: Callable[[Tensor, Any], Tensor] | None = None,
    seed: int = 0,
    targets: Sequence[str] | None = None,
    train: Sequence[str] | None = None,
) -> Preset:
    """Adapters, and a classifier that sees a noisy sample of few numbers, with adapter-only checkpoints.

    Args:
        head: a pattern of the linear layer that gives the logits; ``None`` for the last one of the head.
        adapter: builds the adapters: `partial(DynamicDoRA, rank=8)`; ``None`` for LoRA.
        rank: components per layer of that LoRA.
        features: how many numbers the classifier sees.
        beta: weight of the divergence; see :class:`~lightning_peft.VIB`, also for the next four.
        growth: "linear" multiplies it by the epoch, "none" leaves it.
        samples: per input and step.
        loss: of the other samples; ``None`` for the cross-entropy.
        seed: of the noise.
        targets: layers to adapt; ``None`` for all linear layers and convolutions except the head. See
            :func:`lightning_peft.inject`.
        train: what stays trainable beside them; ``None`` for the head.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range.

    Reference:
        Karimi Mahabadi, Belinkov, Henderson, ICLR 2021, arXiv 2106.05469. Departure: there the whole model is trained.
    """
    term = VIB(head, features, beta, growth, samples, loss=loss, seed=seed)
    factory = partial(LoRA, rank=rank, alpha=16.0) if adapter is None else adapter
    return Preset(
        [AdapterInjection(factory, targets, train), Regularization({"vib": term}), RankMonitor(), AdapterCheckpoint()]
    )
