"""Posterior: a Gaussian over what is trained, and the module run with weights drawn from it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isfinite, log
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_peft.arguments import require_integer, require_number
from lightning_peft.functional.dziugaite_roy import prior_sigma_cost, prior_sigma_neighbours
from lightning_peft.functional.pac_bayes import gaussian_kl
from lightning_peft.functional.perturbation import HIGHEST, LOWEST, log_sigma
from lightning_peft.regularizers.counted import CountedDraws, told_by
from lightning_peft.regularizers.noise import Draw
from lightning_peft.regularizers.places import chosen, parts, require_whole, trained

TRAINED = "_lightning_peft_trained"
"""What a module has among its attributes, as true, once something has trained it."""
Scale = float | Callable[[str, Tensor], Tensor | float]
"""A standard deviation: a number, or a function of a parameter's name and values that gives one, or one per entry."""
Prior = Literal["fixed", "learned", "per_tensor"]
PriorMean = Literal["start", "zero"]
Unit = Literal["batch", "example"]

_WIDEST = (log(0.1) - 1 / 100) / 2  # log lambda of j = 1 on the grid of learnt scales, with its default b and c


class Posterior(CountedDraws):
    """Q = N(w, diag sigma^2) over the trained parameters of a module, beside a prior P = N(w_0, diag lambda^2).

        log sigma = start + speed * v,  v trained from 0;     -12 <= log sigma <= 0

    The means are the module's own parameters, and stay what its optimizer makes of them: noise stands in their places
    within :meth:`sampled`, and nowhere else. v moves with the module's learning rate, `speed` times as fast; weight
    decay pulls log sigma back to its start. w_0 are the values that the parameters have now, in float32.

    Every draw has random numbers of its own, told by the seed, the process and how many draws were before it; that
    number is in the state dict, so that a run that is resumed draws on as it would have.

    `after_training` says whether the module had been trained, as far as is known, before w_0 were taken from it: then
    they owe something to data. It is in the state dict beside them.

    A component that a mask has closed stays in Q: the divergence still counts it, and draws it back to the prior.

    Args:
        module: has what is trained, whole and with values; its adapters are in.
        prior_sigma: lambda.
        sigma: the start of sigma.
        speed: how much faster than the module's learning rate log sigma moves.
        prior: "fixed" leaves lambda as it is, "learned" learns one lambda for all of Q, "per_tensor" one for every
            parameter; what is learnt is paid for in :meth:`divergence`.
        prior_mean: "start" is w_0, "zero" is 0 in its place.
        over: regular expressions of what is in Q: they match a parameter's name or what holds it, whole or the end
            after a dot. ``None`` for all that requires a gradient.
        seed: of the draws.

    Raises:
        ValueError: a value is out of range, or a pattern matches nothing.
        TypeError: an argument is of another type.
        RuntimeError: nothing is trained; or a parameter is split over processes, or held by a recurrent layer, which
            computes with references of its own.

    Reference:
        Perez-Ortiz et al., Tighter risk certificates for neural networks, JMLR 2021. Departures: log sigma within
        limits, in place of softplus; sigma begins below lambda.
    """

    start: Tensor
    prior_mean: Tensor
    prior_start: Tensor
    taught: Tensor

    def __init__(
        self,
        module: nn.Module,
        prior_sigma: Scale = 0.1,
        sigma: Scale = 0.01,
        speed: float = 10.0,
        prior: Prior = "fixed",
        prior_mean: PriorMean = "start",
        over: Sequence[str] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_settings(prior_sigma, sigma, speed, prior, prior_mean, over, seed)
        self.speed, self.prior, self.seed = float(speed), prior, int(seed)
        self._parts = parts(module, chosen(module, over))
        if not self._parts:
            raise RuntimeError(
                f"nothing of {type(module).__name__} requires a gradient, so there is nothing for a posterior to be "
                "over. Inject adapters first, with AdapterInjection before Regularization."
            )
        for part in self._parts:
            require_whole(part)
        self._unknown = next((part.name for part in self._parts if part.value.is_meta), None)
        self._sizes = [part.value.numel() for part in self._parts]
        self._module = weakref.ref(module)
        self._draw: Draw | None = None
        self._inside = False
        self._count = 0
        device = self._parts[0].value.device
        self.offset = nn.Parameter(torch.zeros(sum(self._sizes), device=device))
        self.register_buffer("start", self._log(sigma, "sigma").clamp(LOWEST, HIGHEST))
        mean = torch.cat([p.value.detach().float().reshape(-1) for p in self._parts])
        self.register_buffer("prior_mean", mean if prior_mean == "start" else torch.zeros_like(mean))
        scale = self._log(prior_sigma, "prior_sigma", self.prior == "per_tensor")
        self.register_buffer("prior_start", scale if prior == "fixed" else scale.clamp(max=_WIDEST))
        learnt = None if prior == "fixed" else torch.zeros_like(self.prior_start)
        self.prior_offset = None if learnt is None else nn.Parameter(learnt)
        self.register_buffer("taught", torch.tensor(bool(getattr(module, TRAINED, False)), device=device))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64, device=device))

    def _log(self, scale: Scale, called: str, per_tensor: bool = False) -> Tensor:
        """log of a scale: () for a number, (k,) for a function; (m,) where every tensor is to have one."""
        device = self._parts[0].value.device
        if not callable(scale):
            value = torch.tensor(log(scale), device=device)
            return value.repeat(len(self._parts)) if per_tensor else value
        found = []
        for part in self._parts:
            value = torch.as_tensor(scale(part.name, part.value.detach().float()), dtype=torch.float32, device=device)
            if per_tensor and value.numel() != 1:
                raise ValueError(
                    f"{called} gave {value.numel()} numbers for {part.name!r}, and prior='per_tensor' has one for each."
                )
            if not value.is_meta and not bool((value >= 0).all()):  # NaN as well
                raise ValueError(f"{called} gave {part.name!r} a standard deviation that is negative or no number.")
            found.append(value.reshape(1) if per_tensor else value.expand(part.shape).reshape(-1))
        return torch.cat(found).log().clamp(min=LOWEST)

    @property
    def after_training(self) -> bool:
        """Whether the prior's means came from a module that had been trained, as far as is known."""
        return bool(self.taught)

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters in Q."""
        return tuple(part.name for part in self._parts)

    def arguments(self) -> dict[str, Any]:
        """What it takes, beside its tensors, to build it again: plain values, for a checkpoint."""
        return {"names": list(self.names), "speed": self.speed, "prior": self.prior, "seed": self.seed}

    def require_values(self) -> None:
        """Check that the prior's mean has values: of a module on the meta device a posterior has shapes alone.

        Raises:
            RuntimeError: it has none, wherever the module may be by now.
        """
        if self._unknown is not None:
            raise RuntimeError(
                f"{self._unknown!r} had no values (it was on the meta device), and the prior's mean is what it begins "
                "with. Build the module with its values."
            )

    def missing(self, module: nn.Module) -> tuple[str, ...]:
        """The module's parameters that require a gradient and are not in Q."""
        known = set(self.names)
        return tuple(name for name in trained(module) if name not in known)

    def shared(self) -> tuple[str, ...]:
        """The parameters in Q whose noise examples share also with unit="example"."""
        return tuple(part.name for part in self._parts if part.kind == "shared")

    def sigma(self) -> Tensor:
        """(k,) sigma of all entries of Q, differentiable."""
        return log_sigma(self.offset, self.start, self.speed).exp()

    def prior_scales(self) -> Tensor:
        """Lambda, differentiable where it is learnt.

        (): one for all of Q. (k,): fixed, one per entry. (m,): one for each of the m parameters.
        """
        if self.prior_offset is None:
            return self.prior_start.exp()
        return (self.prior_start + self.speed * self.prior_offset).clamp(LOWEST, _WIDEST).exp()

    def kl(self, dtype: torch.dtype | None = None) -> Tensor:
        """KL(Q || P) in nats, differentiable: of the parameters as they are now.

        Args:
            dtype: to compute in; ``None`` for float32, or float64 where the module is in that.
        """
        return gaussian_kl(self._means(), self.sigma(), self.prior_mean, self._entries(self.prior_scales()), dtype)

    @torch.no_grad()
    def kl_by_name(self) -> dict[str, Tensor]:
        """What every parameter adds to KL(Q || P), in nats and float64."""
        scale = self._entries(self.prior_scales()).expand_as(self.offset)
        return dict(zip(self.names, self._divided(scale), strict=True))

    def prior_cost(self) -> Tensor:
        """What learnt lambdas cost, in nats, differentiable; 0 where they are fixed.

        A bound holds for all lambdas of a grid at once, for this price; see
        :func:`~lightning_peft.functional.dziugaite_roy.prior_sigma_cost`.
        """
        if self.prior_offset is None:
            return self.offset.new_zeros(())
        return prior_sigma_cost(self.prior_scales())

    @torch.no_grad()
    def divergence(self) -> float:
        """What a certificate pays for Q, in nats: KL(Q || P) in float64, and what learnt lambdas cost.

        Each of these stands on its grid then, below or above where it was learnt to be: where the sum is less.
        """
        if self.prior_offset is None:
            return float(self.kl(torch.float64))
        sides = torch.tensor([prior_sigma_neighbours(float(s)) for s in self.prior_scales().reshape(-1)]).double()
        sides = sides.to(self.offset.device)
        found = []
        for side in sides.unbind(1):
            cost = torch.stack([prior_sigma_cost(scale) for scale in side])
            scale = side.repeat_interleave(torch.tensor(self._sizes, device=side.device)) if len(side) > 1 else side
            kl = torch.stack(self._divided(scale.expand_as(self.offset)))
            found.append(cost + (kl if len(side) > 1 else kl.sum()))
        return float(torch.minimum(*found).sum())

    def mean_sigma(self) -> Tensor:
        """The mean of sigma over Q, without a gradient."""
        return log_sigma(self.offset.detach(), self.start, self.speed).exp().mean()

    def _means(self) -> Tensor:
        if self._inside:
            raise RuntimeError(
                "the divergence was asked for inside sampled(), where noise stands in the parameters' places. Ask for "
                "it outside of the block."
            )
        dtype = self.offset.dtype
        return torch.cat([part.value.reshape(-1).to(dtype) for part in self._parts])

    def _entries(self, scales: Tensor) -> Tensor:
        if self.prior != "per_tensor":
            return scales
        sizes = torch.tensor(self._sizes, device=scales.device)
        return scales.repeat_interleave(sizes, output_size=self.offset.numel())

    def _divided(self, scale: Tensor) -> list[Tensor]:
        four = (self._means(), self.sigma(), self.prior_mean, scale)
        each = zip(*(flat.split(self._sizes) for flat in four), strict=True)
        return [gaussian_kl(mean, sigma, prior, wide, torch.float64) for mean, sigma, prior, wide in each]

    def bind(self, module: nn.Module) -> bool:
        """Take on the parameters of `module`, if all of Q's are there, by name and shape."""
        here = {part.name: part for part in parts(module, self.names)}
        if any(part.name not in here or here[part.name].shape != part.shape for part in self._parts):
            return False
        self._parts = [here[part.name] for part in self._parts]
        self._module = weakref.ref(module)
        return True

    @property
    def drawn(self) -> bool:
        """Whether there is a draw to be held."""
        return self._draw is not None

    def generator(self, stream: int = 0, step: int | None = None) -> torch.Generator:
        """The random numbers of the next draw.

        Args:
            stream: processes that give different numbers draw differently.
            step: the same again wherever this number is the same; ``None`` for others than ever before.
        """
        place = f"step {step}"
        if step is None:
            place = f"{self.next_draw()}"
        return told_by(f"lightning_peft/posterior/v1|{self.seed}|{stream}|{place}", self.offset.device)

    @contextmanager
    def sampled(
        self,
        module: nn.Module,
        generator: torch.Generator | None = None,
        unit: Unit = "batch",
        examples: int | None = None,
    ) -> Iterator[None]:
        """Inside, the module runs with w + sigma eps in place of w; outside nothing has changed, bit for bit.

        Call backward inside if activations are checkpointed: what is computed again has the same noise then.

        Args:
            module: the one that Q is over.
            generator: on the parameters' device; ``None`` for :meth:`generator`.
            unit: "batch" is one draw for all that runs inside. "example" draws for every example where that costs no
                further pass: vectors that an adapter calls `elementwise`, and linear layers on (batch, d) inputs. For
                others, see :meth:`shared`, it is one draw all the same.
            examples: with "example", how many there are: the first dimension of what these layers get.

        Raises:
            ValueError: unit is unknown, or examples is missing.
            RuntimeError: the module is not the one, or is sampled already; with "example", a linear layer in Q was not
                called, or with inputs of another shape.
        """
        self.draw(module, generator, unit, examples)
        try:
            with self.held():
                yield
        finally:
            self.forget()

    @contextmanager
    def widened(self, module: nn.Module, sigma: float, generator: torch.Generator) -> Iterator[None]:
        """As :meth:`sampled`, with one standard deviation for all of Q in place of its own; without gradients."""
        self._require_bound(module)
        start = torch.tensor(log(sigma), device=self.offset.device)
        with torch.no_grad():
            self._draw = Draw(self._parts, torch.zeros_like(self.offset), start, 0.0, generator, 0)
        try:
            with self.held():
                yield
        finally:
            self.forget()

    def draw(
        self,
        module: nn.Module,
        generator: torch.Generator | None = None,
        unit: Unit = "batch",
        examples: int | None = None,
    ) -> None:
        """Draw the noise of :meth:`held`, which may be entered several times; arguments as of :meth:`sampled`."""
        if unit not in ("batch", "example"):
            raise ValueError(f"unit={unit!r}: choose 'batch' or 'example'.")
        if unit == "example" and (examples is None or examples < 1):
            raise ValueError(f"unit='example' draws for every example: say how many there are. Got {examples!r}.")
        self._require_bound(module)
        rows = examples if unit == "example" and examples is not None else 0
        self._draw = Draw(self._parts, self.offset, self.start, self.speed, generator or self.generator(), rows)

    def _require_bound(self, module: nn.Module) -> None:
        self.require_values()
        if self._inside:
            raise RuntimeError("this posterior is being sampled already: leave one block before you enter another.")
        if self._module() is not module and not self.bind(module):
            raise RuntimeError(
                f"{type(module).__name__} does not have all parameters that this posterior is over, such as "
                f"{self.names[0]!r}: sample the module that it was made for."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, the noise of the last :meth:`draw` stands in the parameters' places."""
        if self._draw is None or self._inside:
            raise RuntimeError("held() comes after draw(module), and not inside another block of the same posterior.")
        self._inside = True
        try:
            with self._draw.held():
                yield
        finally:
            self._inside = False

    def forget(self) -> None:
        """Let go of the last draw, and of the graph behind it."""
        self._draw = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Posterior:
        # `module.to(bfloat16)` casts all: steps of sigma would be lost. The prior's mean is rounded as the means are.
        before = {name: p.data for name, p in self.named_parameters()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, p in self.named_parameters():
            if p.dtype not in (torch.float32, torch.float64):
                p.data = before[name].to(p.device)
        for name, buffer in self.named_buffers():
            if buffer.is_floating_point() and buffer.dtype not in (torch.float32, torch.float64):
                setattr(self, name, buffer.float())
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A draw is inside the graph of a step; a copy finds its own module when it is asked to.
        return self.__dict__ | {"_draw": None, "_inside": False, "_module": _nothing}


def _nothing() -> None:
    """A reference to a module that has gone."""


def require_settings(
    prior_sigma: Scale,
    sigma: Scale,
    speed: float,
    prior: str,
    prior_mean: str,
    over: Sequence[str] | None,
    seed: int,
) -> None:
    """Check the settings of a :class:`Posterior`, before there is a module.

    Raises:
        ValueError: one is out of range.
        TypeError: one is of another type.
    """
    for name, scale in (("prior_sigma", prior_sigma), ("sigma", sigma)):
        if callable(scale):
            continue
        require_number(name, scale)
        if not (scale > 0 and isfinite(scale)):
            raise ValueError(f"{name} is a standard deviation, a positive number. Got {scale!r}.")
    if not callable(sigma) and sigma > 1:
        raise ValueError(f"sigma begins within (0, 1]: noise beyond 1 leaves nothing of a weight. Got {sigma!r}.")
    require_number("speed", speed)
    if not (speed >= 0 and isfinite(speed)):
        raise ValueError(f"speed multiplies the learning rate of log sigma, and is not negative. Got {speed!r}.")
    if prior not in ("fixed", "learned", "per_tensor"):
        raise ValueError(f"prior={prior!r}: choose 'fixed', 'learned' (one scale) or 'per_tensor'.")
    if prior_mean not in ("start", "zero"):
        raise ValueError(f"prior_mean={prior_mean!r}: choose 'start' (the values at the start) or 'zero'.")
    if prior == "learned" and callable(prior_sigma):
        raise TypeError("prior='learned' learns one lambda for all of Q: give prior_sigma as the number it begins at.")
    if prior != "fixed" and not callable(prior_sigma) and log(prior_sigma) > _WIDEST:
        raise ValueError(
            f"a learnt lambda lies below {0.1**0.5:.3f} (lambda^2 < 0.1, the grid that pays for it). Got "
            f"prior_sigma={prior_sigma!r}: start lower, or use prior='fixed'."
        )
    if isinstance(over, str):
        raise TypeError(f"over must be a list of patterns, not one string. Write over=[{over!r}].")
    require_integer("seed", seed)
