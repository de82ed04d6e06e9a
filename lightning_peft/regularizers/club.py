"""CLUB: less information between two things, by an upper bound (Cheng et al., ICML 2020)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional.club import categorical_log_densities, club, club_sample
from lightning_peft.functional.gaussian import gaussian_log_densities, gaussian_log_density
from lightning_peft.regularizers.auxiliary import Auxiliary
from lightning_peft.regularizers.base import Weight
from lightning_peft.regularizers.probes import Pool, only_probed, probed_width, require_pool

Negatives = Literal["all", "sample"]
Read = Callable[[Any], Tensor]


class GaussianQ(nn.Module):
    """q(z | x) = N( m(x), exp(v(x)) ): two networks d_x -> hidden -> d_z with ReLU, v through tanh.

    So a standard deviation is between 0.6 and 1.65, and z is to have about unit scale: a normalised layer's output has.

    Args:
        d_x: width of x.
        d_z: width of z.
        hidden: of both networks.

    Shape:
        (N, d_x) -> m, v: (N, d_z) each.

    Reference:
        Cheng et al., 2020, and its code.
    """

    def __init__(self, d_x: int, d_z: int, hidden: int) -> None:
        super().__init__()
        self.mean, self.log_variance = _network(d_x, hidden, d_z), _network(d_x, hidden, d_z)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean(x), self.log_variance(x).tanh()


class CategoricalQ(nn.Module):
    """q(y | x) over K classes: d_x -> hidden -> K with ReLU, logits.

    Args:
        d_x: width of x.
        classes: K.
        hidden: of the network.

    Shape:
        (N, d_x) -> (N, K).
    """

    def __init__(self, d_x: int, classes: int, hidden: int) -> None:
        super().__init__()
        self.logits = _network(d_x, hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.logits(x)
        return logits


class _CLUB(Auxiliary):
    """What both kinds of q have in common."""

    def __init__(
        self,
        weight: Weight,
        layer: str,
        features: int | None,
        pool: Pool,
        hidden: int,
        negatives: Negatives,
        seed: int,
        inner_steps: int,
        lr: float,
        clip: float | None,
    ) -> None:
        super().__init__(weight, inner_steps, lr, clip)
        if not callable(weight):
            require_number("weight", weight)
            self._require_penalty(weight)
        if not isinstance(layer, str):
            raise TypeError(f"layer names one layer, by a pattern as one of targets. Got {layer!r}.")
        for name, value in (("features", features), ("hidden", hidden)):
            if value is not None:
                require_integer(name, value)
                if value < 1:
                    raise ValueError(f"{name} must be at least 1. Got {value}.")
        require_pool(pool)
        if negatives not in ("all", "sample"):
            raise ValueError(f"negatives={negatives!r}: choose 'all' pairs or one 'sample' for each example.")
        require_integer("seed", seed)
        self.layer, self.width, self.pool, self.hidden = layer, features, pool, hidden
        self.negatives, self.seed = negatives, seed
        self.q: nn.Module | None = None

    def weight_at(self, step: int, total: int) -> float:
        weight = super().weight_at(step, total)
        self._require_penalty(weight)
        return weight

    def _require_penalty(self, weight: float) -> None:
        if not (weight >= 0 and isfinite(weight)):
            raise ValueError(
                f"{type(self).__name__} is an upper bound, so it can be made less and says nothing where it is made "
                f"more: its weight is finite and not negative. Got {weight!r}; a lower bound is maximised by "
                "MutualInformation."
            )

    def _q(self) -> nn.Module:
        if self.q is None:
            raise RuntimeError(f"{type(self).__name__} has no q yet: attach(module) makes it, once adapters are in.")
        return self.q

    def _require_width(self, what: str, tensor: Tensor, width: int, argument: str = "features") -> None:
        if tensor.shape[1] != width:
            raise RuntimeError(
                f"{what} is {tensor.shape[1]} wide, and q was made for {width}: say {argument}={tensor.shape[1]}."
            )

    def _require_pairs(self, count: int) -> None:
        if count < 2:
            raise RuntimeError(
                f"{type(self).__name__} compares examples with one another, and this step has {count} over all "
                "processes. Use larger batches, and drop_last=True where the last one may be smaller."
            )

    def _permutation(self, count: int, device: torch.device) -> Tensor:
        return torch.randperm(count, generator=self.next_generator("cpu")).to(device)


class CLUB(_CLUB):
    """An upper bound of the information that a layer's features z have of x, to be made less; q(z | x) is Gaussian.

        term = mean_i ln q(z_i | x_i) - mean_ij ln q(z_j | x_i)

    Before each of the model's steps, q is fitted to the step's pairs by its log-likelihood, in the term's own
    optimizer; see :class:`Auxiliary`. It bounds the information only as far as q is accurate, and is loose at that: a
    penalty, whose value is not information in nats. Both z and x have a gradient.

    Args:
        weight: what the term is multiplied by, positive: a number, or a function of (step, total).
        layer: of z, by a pattern as one of `targets`.
        given: of x: another layer's pattern, or a function of the batch that gives (N, d).
        features: width of z; ``None`` for what the layer says.
        given_features: width of x; ``None`` for what its layer says.
        pool: how positions become one row: "mean", "first" or "last" of those that the batch's `attention_mask` shows.
        hidden: of q's networks.
        negatives: "all" pairs, or one "sample" for each example, by a permutation of its own random numbers.
        seed: of these.
        inner_steps: as in :class:`Auxiliary`.
        lr: likewise.
        clip: likewise.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a value is out of range; a pattern names no layer or several; a width cannot be told.
        RuntimeError: while training: a layer was not called, or `given` gives something else than (N, d).

    Reference:
        Cheng et al., CLUB: A contrastive log-ratio upper bound of mutual information, ICML 2020, arXiv 2006.12013, and
        its code. Our choice: q is 256 wide, and all processes' examples are one batch.

    Example:
        >>> CLUB(0.01, layer="encoder.norm", given=lambda batch: batch["age"], given_features=1).negatives
        'all'
    """

    def __init__(
        self,
        weight: Weight = 0.01,
        *,
        layer: str,
        given: str | Read,
        features: int | None = None,
        given_features: int | None = None,
        pool: Pool = "mean",
        hidden: int = 256,
        negatives: Negatives = "all",
        seed: int = 0,
        inner_steps: int = 1,
        lr: float = 1e-3,
        clip: float | None = 1.0,
    ) -> None:
        super().__init__(weight, layer, features, pool, hidden, negatives, seed, inner_steps, lr, clip)
        if not isinstance(given, str) and not callable(given):
            raise TypeError(f"given names a layer, or is a function of the batch. Got {given!r}.")
        if given_features is not None:
            require_integer("given_features", given_features)
            if given_features < 1:
                raise ValueError(f"given_features must be at least 1. Got {given_features}.")
        if callable(given) and given_features is None:
            raise ValueError(
                "q is made before there is a batch, so it has to be told how wide what `given` reads of one is: "
                f"given_features=<columns>. Got {given_features}."
            )
        self.given, self.given_width = given, given_features

    def build(self, module: nn.Module) -> None:
        names = self.hears(module)
        d_z = probed_width(module, names[0], self.width)
        d_x = self.given_width if callable(self.given) else probed_width(module, names[1], self.given_width)
        assert d_x is not None
        self.q = GaussianQ(d_x, d_z, self.hidden)

    def hears(self, module: nn.Module) -> list[str]:
        names = [only_probed(module, self.layer, "layer")]
        if isinstance(self.given, str):
            names.append(only_probed(module, self.given, "given"))
            if names[0] == names[1]:
                raise ValueError(f"layer and given both name {names[0]!r}, which has all information of itself.")
        return names

    def features(self, module: nn.Module, batch: Any, outputs: Any) -> Sequence[Tensor]:
        z, *others = self.heard(batch).values()
        x = self.given(batch) if callable(self.given) else others[0]
        if not isinstance(x, Tensor) or x.dim() != 2 or not x.is_floating_point():
            kind = f"a tensor of shape {tuple(x.shape)} and {x.dtype}" if isinstance(x, Tensor) else repr(x)
            raise RuntimeError(f"given must give floating-point numbers, (N, d). Got {kind}.")
        q: Any = self._q()
        given = "given" if callable(self.given) else repr(self.given)
        self._require_width(given, x, q.mean[0].in_features, "given_features")
        self._require_width(repr(self.layer), z, q.mean[-1].out_features)
        return x, z

    def fitting(self, *features: Tensor) -> Tensor:
        x, z = features
        mean, log_variance = self._q()(x)
        return -gaussian_log_density(mean, log_variance, z).mean()

    def penalty(self, *features: Tensor) -> Tensor:
        x, z = features
        self._require_pairs(len(z))
        mean, log_variance = self._q()(x)
        if self.negatives == "all":
            return club(gaussian_log_densities(mean, log_variance, z))
        others = z[self._permutation(len(z), z.device)]
        joint = gaussian_log_density(mean, log_variance, z)
        return (joint - gaussian_log_density(mean, log_variance, others)).mean()


class CategoricalCLUB(_CLUB):
    """An upper bound of the information that a layer's features x have of a label y, to be made less: invariance.

        term = mean_i ln q(y_i | x_i) - mean_ij ln q(y_j | x_i)

    As :class:`CLUB`, with a classifier q(y | x) of a nuisance label: a domain, a speaker, an annotator.

    Args:
        weight: what the term is multiplied by, positive; 0.01 to 0.1.
        layer: of x, by a pattern as one of `targets`.
        label: gets y from the batch, (N,) integers; or the key that it has there.
        classes: how many labels there are.
        features: width of x; ``None`` for what the layer says.
        pool: as in :class:`CLUB`.
        hidden: of q's network.
        negatives: as in :class:`CLUB`.
        seed: likewise.
        inner_steps: as in :class:`Auxiliary`.
        lr: likewise.
        clip: likewise.

    Raises:
        TypeError: an argument is of another type.
        ValueError: a value is out of range; the pattern names no layer or several; a width cannot be told.
        RuntimeError: while training: the layer was not called, or the batch has no such label.

    Reference:
        Cheng et al., 2020, arXiv 2006.12013 (its code for labels). As a term against a nuisance, and its weight: our
        choice.

    Example:
        >>> CategoricalCLUB(0.05, layer="pooler", label="domain", classes=4).classes
        4
    """

    def __init__(
        self,
        weight: Weight = 0.05,
        *,
        layer: str,
        label: str | Read,
        classes: int,
        features: int | None = None,
        pool: Pool = "mean",
        hidden: int = 256,
        negatives: Negatives = "all",
        seed: int = 0,
        inner_steps: int = 1,
        lr: float = 1e-3,
        clip: float | None = 1.0,
    ) -> None:
        super().__init__(weight, layer, features, pool, hidden, negatives, seed, inner_steps, lr, clip)
        if not isinstance(label, str) and not callable(label):
            raise TypeError(f"label is a key of the batch, or a function of it. Got {label!r}.")
        require_integer("classes", classes)
        if classes < 2:
            raise ValueError(f"classes is how many labels there are, at least 2. Got {classes}.")
        self.label, self.classes = label, classes

    def build(self, module: nn.Module) -> None:
        self.q = CategoricalQ(probed_width(module, self.hears(module)[0], self.width), self.classes, self.hidden)

    def hears(self, module: nn.Module) -> list[str]:
        return [only_probed(module, self.layer, "layer")]

    def features(self, module: nn.Module, batch: Any, outputs: Any) -> Sequence[Tensor]:
        (x,) = self.heard(batch).values()
        q: Any = self._q()
        self._require_width(repr(self.layer), x, q.logits[0].in_features)
        return x, self._labels(batch)

    def _labels(self, batch: Any) -> Tensor:
        if callable(self.label):
            found: Any = self.label(batch)
        else:
            try:
                found = batch[self.label]
            except (KeyError, TypeError, IndexError):
                keys = ", ".join(map(repr, batch)) if isinstance(batch, dict) else type(batch).__name__
                raise RuntimeError(
                    f"the batch has no {self.label!r}; it has {keys}. Say how to get the nuisance label: "
                    "label=lambda batch: batch[2]."
                ) from None
        if not isinstance(found, Tensor) or found.dim() != 1 or found.is_floating_point():
            kind = f"a tensor of shape {tuple(found.shape)} and {found.dtype}" if isinstance(found, Tensor) else found
            raise RuntimeError(f"the nuisance label must be (N,) integers. Got {kind}.")
        return found

    def require(self, *features: Tensor) -> None:
        # Of the rows of all processes: they stop together.
        for found in torch.stack(features[1].long().aminmax()).tolist():
            if not 0 <= found < self.classes:
                raise RuntimeError(
                    f"nuisance labels go from 0 to {self.classes - 1}, as classes={self.classes} says. Got {found}: "
                    "give as many classes as there are, and one of its own to examples whose label is not known."
                )

    def fitting(self, *features: Tensor) -> Tensor:
        x, y = features
        return F.cross_entropy(self._q()(x), y.long())

    def penalty(self, *features: Tensor) -> Tensor:
        x, y = features
        self._require_pairs(len(y))
        log_densities = categorical_log_densities(self._q()(x), y)
        if self.negatives == "all":
            return club(log_densities)
        return club_sample(log_densities, self._permutation(len(y), y.device))


def _network(d_in: int, hidden: int, d_out: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_in, hidden), nn.ReLU(), nn.Linear(hidden, d_out))
