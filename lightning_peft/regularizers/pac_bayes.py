"""PACBayes: train a distribution over weights on what bounds its risk."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional.pac_bayes import bounded_cross_entropy, require_share
from lightning_peft.regularizers.base import Regularizer, Weight
from lightning_peft.regularizers.labels import labels_of
from lightning_peft.regularizers.objectives import Name, Objective, objective
from lightning_peft.regularizers.posterior import Posterior, Prior, PriorMean, Scale, require_settings

Risk = Literal["bounded_cross_entropy", "bounded_next_token", "loss"]
Unit = Literal["step", "batch", "example"]


class PACBayes(Regularizer):
    """Train Q = N(w, diag sigma^2) on F(R, KL) in place of the loss.

        R     the risk of the batch at w + sigma eps, with a loss in [0, 1]
        KL    KL(Q || P) of the parameters as they are, P = N(w_0, diag lambda^2)
        F     f_quad and its like, see `objective`

    The training step runs with noise, in the parameters' places, and what it returns becomes F: the term is F minus the
    loss. Gradients are those of F alone, bit for bit. Validation, tests and predictions are at the mean w. The learnt
    sigma, and what else is learnt, are children of this term: optimizer, strategy and checkpoint have them.

    Logged beside the term: `kl`, `kl_per_example`, `risk`, `sigma` (its mean) and `objective`, which is called `bound`
    if it is an estimate of one: all that is trained is in Q, the loss is in [0, 1], KL counts in full and there is no
    dropout. What is reported of a trained Q is a certificate, not this.

    Args:
        objective: "f_quad", "f_classic", "f_kl", "f_lambda", "f_bbb", "dziugaite_roy" or "catoni" with its defaults; or
            an :class:`~lightning_peft.regularizers.objectives.Objective`.
        risk: "bounded_cross_entropy" of `outputs["logits"]` and the batch's labels, for classes and for a label at each
            place of a sequence; "bounded_next_token" for a causal language model, whose label is the next token;
            "loss" for what the training step returns, whose objective is no bound; or a function of (module, batch,
            outputs) that gives a scalar.
        p_min: the probability below which a bounded loss does not grow.
        examples: n; ``None`` for the length of the training set, over all processes.
        prior_sigma: lambda; see :class:`~lightning_peft.regularizers.posterior.Posterior` for this and the next five.
        sigma: the start of sigma.
        prior: "fixed", "learned" or "per_tensor".
        prior_mean: "start" is w_0, what the parameters are at the start; "zero" is 0.
        speed: learning rate of log sigma and lambda, in units of the module's.
        over: patterns of what is in Q; ``None`` for all that is trained.
        complete: demand that all that is trained is in Q, as a certificate will.
        unit: "batch" draws once for each micro-batch, "step" once for the accumulated ones of an optimizer step,
            "example" for every example where that costs no further pass.
        kl_weight: what KL is multiplied by: a number, or a function of (step, total), optimizer steps counted from 1.
        streams: "apart" has every process draw differently, which averages more noise; "alike" the same, to debug.
        seed: of the draws.

    Raises:
        TypeError: an argument is of another type.
        ValueError: one is out of range.
        RuntimeError: while training: nothing is trained, or a parameter is left out of Q and `complete` is demanded;
            there are no logits or labels, or the risk is no scalar.

    Reference:
        Perez-Ortiz et al., JMLR 2021, arXiv 2007.12911. Departures: see
        :class:`~lightning_peft.regularizers.posterior.Posterior`; inside a square root, the risk of a batch is biased,
        which is accepted.

    Example:
        >>> PACBayes("f_bbb", prior_sigma=0.2).objective
        FBBB()
    """

    def __init__(
        self,
        objective: Name | Objective = "f_quad",  # the module's function is called as `_objective`
        risk: Risk | Callable[[nn.Module, Any, Any], Tensor] = "bounded_cross_entropy",
        p_min: float = 1e-4,
        examples: int | None = None,
        prior_sigma: Scale = 0.1,
        sigma: Scale = 0.01,
        prior: Prior = "fixed",
        prior_mean: PriorMean = "start",
        speed: float = 10.0,
        over: Sequence[str] | None = None,
        complete: bool = False,
        unit: Unit = "batch",
        kl_weight: Weight = 1.0,
        streams: Literal["apart", "alike"] = "apart",
        seed: int = 0,
    ) -> None:
        super().__init__(1.0)
        require_settings(prior_sigma, sigma, speed, prior, prior_mean, over, seed)
        if not callable(risk) and risk not in ("bounded_cross_entropy", "bounded_next_token", "loss"):
            raise ValueError(
                f"risk={risk!r}: choose 'bounded_cross_entropy', 'bounded_next_token' or 'loss', or give a function."
            )
        require_number("p_min", p_min)
        require_share("p_min", p_min)
        if examples is not None:
            require_integer("examples", examples)
            if examples < 2:
                raise ValueError(f"examples is how many the training set has, at least 2. Got {examples}.")
        if unit not in ("step", "batch", "example"):
            raise ValueError(f"unit={unit!r}: choose 'step', 'batch' or 'example'.")
        if streams not in ("apart", "alike"):
            raise ValueError(f"streams={streams!r}: choose 'apart' or 'alike'.")
        if not callable(kl_weight):
            require_number("kl_weight", kl_weight)
            if not kl_weight >= 0:
                raise ValueError(f"kl_weight multiplies a divergence and is not negative. Got {kl_weight!r}.")
        self.objective = _objective(objective)
        self._unused = (copy.deepcopy(self.objective),)  # in a tuple: no child
        self.risk, self.p_min, self.examples = risk, float(p_min), examples
        self.counts_examples = examples is None
        self.complete, self.unit, self.kl_weight, self.streams = complete, unit, kl_weight, streams
        self.posterior: Posterior | None = None
        self._settings: dict[str, Any] = {
            "prior_sigma": prior_sigma, "sigma": sigma, "speed": speed, "prior": prior,
            "prior_mean": prior_mean, "over": over, "seed": seed,
        }  # fmt: skip
        self._step, self._weight, self._rows = 1, 1.0, 0
        self._estimates: bool | None = None  # whether the objective is an estimate of a bound, at a full weight of KL
        self._figures: dict[str, Tensor] = {}

    perturbs = True

    def attach(self, module: nn.Module) -> None:
        """Make the posterior, of a module that was not seen before."""
        mine = any(child is self for child in module.modules())
        if mine and self.posterior is not None and self.posterior.bind(module):
            return
        if self.posterior is not None:
            self.objective = copy.deepcopy(self._unused[0])  # what was learnt with another model is not this one's
        self.posterior = Posterior(module, **self._settings)
        self.objective.require(self.posterior)

    def begin(self, module: nn.Module) -> None:
        """Check what is in Q."""
        self._estimates = None
        self._posterior().restored()
        missing = self._posterior().missing(module)
        if missing and self.complete:
            raise RuntimeError(
                f"{missing[0]!r}{f' and {len(missing) - 1} more' if len(missing) > 1 else ''} is trained and not in "
                "Q, so a certificate could not count it. Freeze it, leave `over` out, or set complete=False."
            )

    def prepare(self, module: nn.Module, batch: Any, step: int, total: int) -> None:
        self._step = step
        self.objective.prepare(step, total)
        self._weight = self.kl_weight(step, total) if callable(self.kl_weight) else float(self.kl_weight)
        self._rows = _examples(batch) if self.unit == "example" else 0

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Around the training step: noise."""
        posterior = self._posterior()
        if self._estimates is None:
            self._estimates = self._is_bound(module)
        stream = getattr(module, "global_rank", 0) if self.streams == "apart" else 0
        generator = posterior.generator(stream, self._step if self.unit == "step" else None)
        posterior.draw(module, generator, "example" if self.unit == "example" else "batch", self._rows or None)
        with posterior.held():
            yield

    @contextmanager
    def recomputing(self, module: nn.Module) -> Iterator[None]:
        """Around backward: the same noise, for what is computed again."""
        posterior = self._posterior()
        if not posterior.drawn:
            yield
            return
        try:
            with posterior.held():
                yield
        finally:
            posterior.forget()

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        posterior, n = self._posterior(), self._examples()
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        risk = self._risk(module, batch, outputs, loss)
        kl = posterior.kl()
        value = self.objective(risk, self._weight * kl, n, posterior)
        self._figures = {
            "kl": kl.detach(),
            "kl_per_example": kl.detach() / n,
            "risk": risk.detach(),
            "sigma": posterior.mean_sigma(),
            "bound" if self._estimates and self._weight >= 1 else "objective": value.detach(),
        }
        # Made last: the loss has its gradient from here, and the opposite one from the sum, before any other.
        difference: Tensor = value - loss
        return difference

    def resting(self) -> Iterable[nn.Parameter]:
        return self.objective.resting(self._posterior())

    def figures(self) -> Mapping[str, Tensor]:
        return self._figures

    def _is_bound(self, module: nn.Module) -> bool:
        bounded = self.objective.is_bound and self.risk in ("bounded_cross_entropy", "bounded_next_token")
        dropout = any(isinstance(m, _DropoutNd) and m.training and m.p for m in module.modules())
        return bounded and not dropout and not self._posterior().missing(module)

    def _risk(self, module: nn.Module, batch: Any, outputs: Any, loss: Tensor) -> Tensor:
        if callable(self.risk):
            value = self.risk(module, batch, outputs)
            if not isinstance(value, Tensor) or value.numel() != 1:
                shape = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
                raise RuntimeError(f"risk must give a scalar tensor for a batch. Got {shape}.")
            return value.reshape(())
        if self.risk == "loss":
            return loss.to(torch.promote_types(loss.dtype, torch.float32))
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if not isinstance(logits, Tensor):
            raise RuntimeError(
                "a bounded risk is computed from logits, and training_step returned none: have it return {'loss': "
                "loss, 'logits': logits}; or use risk='loss', with which the objective is no bound."
            )
        labels = _labels(batch)
        if self.risk == "bounded_next_token":
            logits, labels = logits[:, :-1], labels[:, 1:]
        return bounded_cross_entropy(logits, labels, self.p_min).mean()

    def _posterior(self) -> Posterior:
        if self.posterior is None:
            raise RuntimeError("PACBayes has no posterior yet: attach(module) makes it, once adapters are in.")
        return self.posterior

    def _examples(self) -> int:
        if self.examples is None:
            raise RuntimeError("PACBayes does not know the size of the training set: give PACBayes(examples=...).")
        return self.examples


_objective = objective


def _examples(batch: Any) -> int:
    """How many examples a batch has: the first dimension of its first tensor."""
    first = next((leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), None)
    if first is None:
        raise RuntimeError("unit='example' draws for every example, and the batch has no tensor to count them by.")
    return len(first)


def _labels(batch: Any) -> Tensor:
    found = labels_of(batch)
    if found is None:
        raise RuntimeError(
            f"a bounded risk is computed from labels, and the batch, a {type(batch).__name__}, has no integers under "
            "'labels' nor for the second of two. Say how to get the risk: PACBayes(risk=lambda module, batch, "
            "outputs: ...)."
        )
    return found
