"""PosteriorSampling: predictions are averages over networks drawn from the posterior."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from lightning_peft.arguments import require_integer
from lightning_peft.callbacks.order import require_before
from lightning_peft.callbacks.placement import AdapterPlacement
from lightning_peft.callbacks.preflight import Preflight
from lightning_peft.callbacks.regularization import Regularization
from lightning_peft.certification.accounting import posterior_of
from lightning_peft.prediction import posterior_predict
from lightning_peft.regularizers.calls import with_logits
from lightning_peft.seams import wrap_method


class PosteriorSampling(Preflight):
    """In `validate`, `test` and `predict`, average the predictions of networks drawn from the posterior.

        p = 1/k sum_i softmax(logits_i),   w_i ~ Q

    Without this callback they are those of the mean of Q, which cost one forward. The average is often better
    calibrated: compare `test/ece` and `test/nll` of `TextClassifier(..., calibration_bins=15)`.

    The forward of a module is run k times in place of once, and its logits become ln p, of which a softmax is p; a loss
    that it returns is the mean of the draws' losses. Validation during a fit is left at the mean. The random numbers
    are private, and begin anew with every run.

    Args:
        samples: k, networks per batch.
        of: name of the module inside whose output has the logits; "" for the LightningModule, where its steps call
            `self(...)`. ``None`` for the only child that has parameters.
        seed: of the draws.

    Raises:
        TypeError: samples or seed is no integer.
        ValueError: samples is below 1, or there is no module of that name.
        MisconfigurationException: there is no posterior, or the callbacks are in the wrong order.

    Example:
        >>> PosteriorSampling(samples=4).samples
        4
    """

    def __init__(self, samples: int = 8, of: str | None = None, seed: int = 0) -> None:
        require_integer("samples", samples)
        require_integer("seed", seed)
        if samples < 1:
            raise ValueError(f"samples is how many networks are drawn for a batch, at least 1. Got {samples}.")
        self.samples, self.of, self.seed = samples, of, seed
        self._remove: Callable[[], None] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        require_before(trainer, self, AdapterPlacement, Regularization)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":
            self._begin(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(pl_module)

    def _begin(self, module: LightningModule) -> None:
        self._end()
        posterior = posterior_of(module)
        device = next(posterior.parameters()).device
        generator = torch.Generator(device).manual_seed(self.seed)

        def sampled(call: Callable[..., Any], owner: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return posterior_predict(lambda: call(*args, **kwargs), module, posterior, self.samples, generator)

        self._remove = wrap_method(with_logits(module, self.of, "PosteriorSampling"), "forward", sampled)

    def _end(self) -> None:
        if self._remove is not None:
            self._remove()
            self._remove = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_end(trainer, pl_module)
        self._end()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end()
