"""VIB: a variational information bottleneck in front of a classifier (Karimi Mahabadi et al., ICLR 2021)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from math import isfinite
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.arguments import require_number
from lightning_peft.functional.latent import gaussian_kl_to
from lightning_peft.head_modules import find_linear_head, head_modules, replace_head
from lightning_peft.patterns import matches
from lightning_peft.regularizers.base import Regularizer, Weight, weight_at
from lightning_peft.regularizers.bottleneck import Activation, BottleneckHead, Passed, require_bottleneck
from lightning_peft.regularizers.labels import labels_of


class VIB(Regularizer):
    """Compress what a classifier sees: only what helps to predict is worth its nats.

        loss = mean over samples of CE  +  beta_e E_x KL( N(mu, std^2) || N(mu_p, std_p^2) )

    A :class:`~lightning_peft.regularizers.bottleneck.BottleneckHead` comes in the place of the head's last linear layer
    before adapters are put in, for every entry point, and stays. It is trained beside them. With one sample
    `training_step` may return any loss of the logits. With more its loss is that of the first sample, and the term
    brings in the others':

        term = ( loss + sum_(s > 1) CE_s ) / S - loss + beta_e KL

    Gradients of the sum are those of the equation above, bit for bit. Outside of training the mean is used, without
    noise. Logged beside the term: `kl`, in nats per example, an upper bound on what z tells of x; and `beta`.

    A :class:`~lightning_peft.Distillation` in the same run comes before it among the terms: its teacher then is the
    model with the head that it had.

    :func:`lightning_peft.merge` and :func:`lightning_peft.head_modules.fold_heads` leave plain layers of the mean.

    Args:
        head: a pattern of the linear layer; ``None`` for the last one of the head. What has no child of that name is an
            error that lists what there is.
        features: K.
        beta: a number, or a function of (step, total), optimizer steps counted from 1.
        growth: "linear" multiplies `beta` by the epoch, counted from 1, up to a weight of 1; "none" takes it as it is,
            which a function always is.
        samples: S, how often z is drawn for each input in training.
        hidden: width of the layer before; 0 for (d + K) / 2.
        activation: "relu", "tanh" or "sigmoid".
        loss: of the other samples, a function of (logits, batch) that gives a scalar and must be what `training_step`
            computes; ``None`` for the mean cross-entropy with the batch's labels.
        seed: of the noise.

    Raises:
        TypeError: an argument is of another type, or the head is no linear layer.
        ValueError: one is out of range; no layer matches, or several do.
        RuntimeError: while training: the head was not called, or it is frozen; with several samples, there are no
            labels, or the loss is not that of the first sample.

    Reference:
        Karimi Mahabadi, Belinkov, Henderson, Variational information bottleneck for effective low-resource
        fine-tuning, ICLR 2021, arXiv 2106.05469, and its code. Departures: see
        :class:`~lightning_peft.regularizers.bottleneck.BottleneckHead`. Epochs are counted from 1 in
        beta_e = min(1, epoch beta): our choice.

    Example:
        >>> VIB("classifier", features=64, beta=1e-4, samples=1).samples
        1
    """

    def __init__(
        self,
        head: str | None = None,
        features: int = 128,
        beta: Weight = 1e-5,
        growth: Literal["linear", "none"] = "linear",
        samples: int = 5,
        hidden: int = 0,
        activation: Activation = "relu",
        loss: Callable[[Tensor, Any], Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(1.0)
        require_bottleneck(features, hidden, activation, samples, seed)
        if head is not None and not isinstance(head, str):
            raise TypeError(f"head must be the name of one layer, or None. Got {head!r}.")
        if growth not in ("linear", "none"):
            raise ValueError(f"growth={growth!r}: choose 'linear' (per epoch, as in the paper's runs) or 'none'.")
        if not callable(beta):
            require_number("beta", beta)
            _require_penalty(beta)
        self.head, self.features, self.beta, self.growth = head, features, beta, growth
        self.samples, self.hidden, self.activation, self.loss, self.seed = samples, hidden, activation, loss, seed
        self._beta = 0.0
        self._checked = False
        self._heard: list[Passed] = []
        self._figures: dict[str, Tensor] = {}

    def before_adapters(self, module: nn.Module) -> None:
        """Put the bottleneck in, if it is not there."""
        found = self._found(module)
        if found is None:
            name, _ = find_linear_head(module, self.head)
            replace_head(module, name, lambda layer: BottleneckHead(layer, **self._settings()))
        elif (has := found[1].arguments()) != self._settings():
            raise ValueError(
                f"the head {found[0]!r} has a bottleneck already, with {_difference(has, self._settings())}. Give VIB "
                "the settings that it was trained with, or build the model anew."
            )

    def begin(self, module: nn.Module) -> None:
        """Check that the bottleneck is trained."""
        name, head = self._bottleneck(module)
        frozen = next((n for n, p in head.named_parameters() if not p.requires_grad), None)
        if frozen is not None:
            raise RuntimeError(
                f"'{name}.{frozen}' of the bottleneck is frozen, so it would stay as random as it is. It is trained "
                f"beside adapters where nobody says otherwise; with a list of patterns, name it: train=[{name!r}]."
            )
        head.restored()
        head.rank, head.world = self.everyone.rank, self.everyone.world
        self._checked = False

    def end(self) -> None:
        self._heard = []

    def prepare(self, module: nn.Module, batch: Any, step: int, total: int) -> None:
        self._beta = weight_at(self.beta, step, total)
        _require_penalty(self._beta)
        if self.growth == "linear" and not callable(self.beta):
            epoch: int = getattr(module, "current_epoch", 0) + 1
            self._beta = min(1.0, epoch * self._beta)

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Hear what goes through the bottleneck inside the block."""
        _, head = self._bottleneck(module)
        head.heard = []
        try:
            yield
        finally:
            self._heard, head.heard = head.heard, None

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        heard, self._heard = self._heard, []
        name, head = self._bottleneck(module)
        if not heard:
            raise RuntimeError(
                f"training_step did not call the head {name!r} in training mode, so nothing went through the "
                "bottleneck. Name the layer that gives the logits: VIB(head=...)."
            )
        prior = head.prior()
        kl = torch.cat([gaussian_kl_to(each.mean, each.std, *prior) for each in heard]).mean()
        penalty = self._beta * kl
        self._figures = {"kl": kl.detach(), "beta": torch.tensor(self._beta)}
        if self.samples == 1:
            return penalty
        if len(heard) > 1:
            raise RuntimeError(
                f"training_step called the head {name!r} {len(heard)} times, and there is no telling which logits its "
                "loss is of. Use VIB(samples=1)."
            )
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        logits = heard[0].logits.to(torch.promote_types(loss.dtype, torch.float32))
        if not self._checked:
            self._require_alike(loss.detach(), self._loss_of(logits[:1], batch).detach())
            self._checked = True
        value = (loss + (self.samples - 1) * self._loss_of(logits[1:], batch)) / self.samples + penalty
        # Made last: the loss has its gradient from here, and the opposite one from the sum, before any other.
        difference: Tensor = value - loss
        return difference

    def figures(self) -> Mapping[str, Tensor]:
        return self._figures

    def _loss_of(self, logits: Tensor, batch: Any) -> Tensor:
        """The mean over samples: (S, N, classes) -> ()."""
        if self.loss is not None:
            return torch.stack([self.loss(each, batch) for each in logits]).mean()
        labels = labels_of(batch)
        if labels is None:
            raise RuntimeError(
                f"the loss of each sample is computed from labels, and the batch, a {type(batch).__name__}, has no "
                "integers under 'labels' nor for the second of two. Give VIB(loss=lambda logits, batch: ...), or use "
                "samples=1."
            )
        return F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))

    def _require_alike(self, loss: Tensor, own: Tensor) -> None:
        # Once in a fit: to compare waits for the device.
        close = 1e-4 if loss.dtype in (torch.float32, torch.float64) else 2e-2
        if not torch.isclose(loss.reshape(()).to(own), own, rtol=close, atol=close / 10):
            what = "VIB's loss gives" if self.loss is not None else "their cross-entropy with the labels is"
            raise RuntimeError(
                f"training_step returned a loss of {float(loss):.6g}, and of the same logits {what} {float(own):.6g}: "
                "the samples would not be trained on one loss. Give VIB(loss=lambda logits, batch: ...) that "
                "computes what training_step does, or use samples=1, with which any loss will do."
            )

    def _settings(self) -> dict[str, Any]:
        return {
            "features": self.features, "hidden": self.hidden, "activation": self.activation,
            "samples": self.samples, "seed": self.seed,
        }  # fmt: skip

    def _found(self, module: nn.Module) -> tuple[str, BottleneckHead] | None:
        made = {n: child for n, child in head_modules(module).items() if isinstance(child, BottleneckHead)}
        named = {n: child for n, child in made.items() if self.head is None or matches([self.head], n)}
        return next(iter(named.items()), None)

    def _bottleneck(self, module: nn.Module) -> tuple[str, BottleneckHead]:
        found = self._found(module)
        if found is None:
            raise RuntimeError(
                f"{type(module).__name__} has no bottleneck: before_adapters(module) puts it in, as the Regularization "
                "callback does, before there is an optimizer."
            )
        return found


def _require_penalty(beta: float) -> None:
    if not (beta >= 0 and isfinite(beta)):
        raise ValueError(f"beta is the weight of a divergence, at least 0 and finite. Got {beta}.")


def _difference(has: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    name = next(name for name in wanted if has.get(name) != wanted[name])
    return f"{name}={has.get(name)!r}, where this VIB has {wanted[name]!r}"
