"""What a PAC-Bayes term makes of risk and divergence: one class for every objective, a name for its defaults."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_peft.arguments import require_number
from lightning_peft.functional import pac_bayes as paper
from lightning_peft.functional.catoni import catoni, catoni_linear
from lightning_peft.functional.dziugaite_roy import dziugaite_roy
from lightning_peft.functional.pac_tuning import unbounded
from lightning_peft.regularizers.posterior import Posterior


class Objective(nn.Module, ABC):
    """F(R, KL), which is minimised.

    Attributes:
        is_bound: whether F is above the true risk, with probability 1 - delta, for a loss in [0, 1].
    """

    is_bound: ClassVar[bool] = True

    @abstractmethod
    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        """The objective's value.

        Args:
            risk: R of the batch, a scalar.
            kl: the divergence, in nats, times its weight.
            n: examples of the training set.
            posterior: knows what its learnt prior scales cost.
        """

    def require(self, posterior: Posterior) -> None:
        """Check that this objective and that posterior go together."""

    def prepare(self, step: int, total: int) -> None:
        """Be told of the step to come: an optimizer step, counted from 1, of `total`; 0 if that is not known."""

    def resting(self, posterior: Posterior) -> Iterable[nn.Parameter]:
        """What of the posterior, and of the objective, the optimizer step to come leaves as it is."""
        return ()


class _Delta(Objective, ABC):
    """An objective with a failure probability, and no other setting."""

    def __init__(self, delta: float = 0.025) -> None:
        super().__init__()
        self.delta = _share("delta", delta)


class FClassic(_Delta):
    """McAllester's bound; see :func:`~lightning_peft.functional.pac_bayes.f_classic`.

    Args:
        delta: probability that the bound does not hold.
    """

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        return paper.f_classic(risk, kl + posterior.prior_cost(), n, self.delta)


class FQuad(_Delta):
    """The bound for small risks; see :func:`~lightning_peft.functional.pac_bayes.f_quad`.

    Args:
        delta: probability that the bound does not hold.
    """

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        return paper.f_quad(risk, kl + posterior.prior_cost(), n, self.delta)


class FKl(_Delta):
    """The bound that the other ones loosen; see :func:`~lightning_peft.functional.pac_bayes.f_kl`.

    Args:
        delta: probability that the bound does not hold.
    """

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        return paper.f_kl(risk, kl + posterior.prior_cost(), n, self.delta)


class FLambda(Objective):
    """Thiemann's bound; see :func:`~lightning_peft.functional.pac_bayes.f_lambda`.

    Args:
        t: "learned" trains it with everything else, "best" takes the closed optimum, which is
            :class:`FQuad`; or a number in (0, 2).
        delta: probability that the bound does not hold.
        speed: how much faster than the module's learning rate the learnt t moves.

    Raises:
        ValueError: t or delta is out of range.

    Reference:
        Perez-Ortiz et al., JMLR 2021. Departure: t is learnt in the module's own optimizer.
    """

    def __init__(self, t: float | Literal["learned", "best"] = "learned", delta: float = 0.025, speed: float = 10.0):
        super().__init__()
        self.delta, self.t, self.speed = _share("delta", delta), t, float(speed)
        if isinstance(t, str):
            if t not in ("learned", "best"):
                raise ValueError(f"t={t!r}: choose 'learned', 'best', or a number between 0 and 2.")
        elif not 0 < t < 2:
            raise ValueError(f"t={t!r}: it lies strictly between 0 and 2.")
        if not self.speed >= 0:
            raise ValueError(f"speed multiplies the learning rate of t, and is not negative. Got {speed!r}.")
        # As an offset from where the reference code begins, so that weight decay pulls it back there.
        self.offset = nn.Parameter(torch.zeros(())) if t == "learned" else None

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        t: Tensor | float | None = None if isinstance(self.t, str) else self.t
        if self.offset is not None:
            t = paper.learnt_t(6.0 + self.speed * self.offset, n)
        return paper.f_lambda(risk, kl + posterior.prior_cost(), n, self.delta, t)


class FBBB(Objective):
    """The evidence lower bound, not one of the risk; see :func:`~lightning_peft.functional.pac_bayes.f_bbb`.

    Args:
        eta: what the divergence is multiplied by, in (0, 1].

    Raises:
        ValueError: eta is out of range.
    """

    is_bound = False

    def __init__(self, eta: float = 0.1) -> None:
        super().__init__()
        require_number("eta", eta)
        if not 0 < eta <= 1:
            raise ValueError(f"eta must lie in (0, 1]. Got {eta!r}.")
        self.eta = eta

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        return paper.f_bbb(risk, kl + posterior.prior_cost(), n, self.eta)


class DziugaiteRoy(_Delta):
    """The objective in which lambda is learnt; see :func:`~lightning_peft.functional.dziugaite_roy.dziugaite_roy`.

    Args:
        delta: probability that the bound does not hold.
    """

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        return dziugaite_roy(risk, kl, n, self.delta, prior_sigma=posterior.prior_scales())

    def require(self, posterior: Posterior) -> None:
        """Check that there is a lambda to learn.

        Raises:
            ValueError: there is none.
        """
        if posterior.prior_offset is None:
            raise ValueError("dziugaite_roy pays for a learnt lambda: use prior='learned' or 'per_tensor' with it.")


class Catoni(Objective):
    """Catoni's bound; see :func:`~lightning_peft.functional.catoni.catoni`.

    Args:
        a: fixed before the data are seen; of several the best is taken, and paid for.
        delta: probability that the bound does not hold.

    Raises:
        ValueError: a or delta is out of range.
    """

    def __init__(self, a: float | Sequence[float] = 1.0, delta: float = 0.025) -> None:
        super().__init__()
        self.a, self.delta = a, _share("delta", delta)
        values = (a,) if isinstance(a, float | int) else tuple(a)
        if not values or not all(0 < value < math.inf for value in values):
            raise ValueError(f"a must be a positive number or several. Got {a!r}.")

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        return catoni(risk, kl + posterior.prior_cost(), n, self.delta, a=self.a)


class CatoniLinear(Objective):
    """Its linear form; see :func:`~lightning_peft.functional.catoni.catoni_linear`.

    Args:
        t: fixed before the data are seen, in examples.
        delta: probability that the bound does not hold.

    Raises:
        ValueError: t or delta is out of range.
    """

    def __init__(self, t: float, delta: float = 0.025) -> None:
        super().__init__()
        self.t, self.delta = t, _share("delta", delta)
        if not 0 < t < math.inf:
            raise ValueError(f"t must be a positive number. Got {t!r}.")

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        return catoni_linear(risk, kl + posterior.prior_cost(), n, self.delta, t=self.t)


class Unbounded(Objective):
    """The bound for losses without a limit; see :func:`~lightning_peft.functional.pac_tuning.unbounded`.

    A bound of the mean loss, not of the error; and only if K was measured without the training set.

    Args:
        K: how far losses lie apart, a positive number.
        gamma: a positive number; ``None`` for the best one.
        delta: probability that the bound does not hold.

    Raises:
        ValueError: a value is out of range.
    """

    is_bound = False

    def __init__(self, K: float, gamma: float | None = 10.0, delta: float = math.exp(-10)) -> None:
        super().__init__()
        for name, value in (("K", K), ("gamma", gamma)):
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number. Got {value!r}.")
        self.K, self.gamma, self.delta = K, gamma, _share("delta", delta)

    def forward(self, risk: Tensor, kl: Tensor, n: int, posterior: Posterior) -> Tensor:
        return unbounded(risk, kl + posterior.prior_cost(), n, self.delta, K=self.K, gamma=self.gamma)


Name = Literal["f_classic", "f_quad", "f_kl", "f_lambda", "f_bbb", "dziugaite_roy", "catoni"]

NAMED: dict[str, type[Objective]] = {
    "f_classic": FClassic,
    "f_quad": FQuad,
    "f_kl": FKl,
    "f_lambda": FLambda,
    "f_bbb": FBBB,
    "dziugaite_roy": DziugaiteRoy,
    "catoni": Catoni,
}


def objective(given: Name | Objective) -> Objective:
    """The objective of a name, with its defaults; or the one that is given.

    Raises:
        ValueError: no objective has that name.
        TypeError: it is neither.
    """
    if isinstance(given, Objective):
        return given
    name: object = given
    if not isinstance(name, str):
        kind = f"the class {given.__name__}: write {given.__name__}(...)" if isinstance(given, type) else repr(given)
        raise TypeError(f"objective is a name, such as 'f_quad', or an Objective, such as FBBB(0.5). Got {kind}.")
    if given not in NAMED:
        raise ValueError(
            f"objective={given!r}: choose {', '.join(map(repr, NAMED))}; CatoniLinear(t) and Unbounded(K) have no "
            "defaults and are given as objects."
        )
    return NAMED[given]()


def _share(name: str, value: float) -> float:
    require_number(name, value)
    paper.require_share(name, value)
    return float(value)
