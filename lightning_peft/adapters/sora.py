"""SoRA, sparse low-rank adaptation (Ding et al., EMNLP 2023): a gate between the factors that a soft threshold closes.

In the paper's order: the gated update, its proximal step, the rising threshold, and `policy`, which sets them up.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from math import isfinite, sqrt

import torch
from torch import Tensor, nn

from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.arguments import require_number
from lightning_peft.rank.budget import RankBudget, Site
from lightning_peft.rank.gate import Gate
from lightning_peft.rank.importance import Importance
from lightning_peft.rank.policy import Policy
from lightning_peft.rank.schedule import Constant, Linear, Schedule


class SoRA(LowRank):
    """Low-rank adaptation with a trained gate that is made sparse.

        y = W x + b + (alpha / R) B diag(g m) A drop(x)

    A: (R, d_in), uniform in +-1/sqrt(d_in). B: (d_out, R), zero, so that training starts from the base model.
    g: (R,), normal with deviation 1, the gate's gain. m: (R,), the gate's mask. A, B and g are trained, W and b frozen.
    By itself nothing makes g sparse: :class:`SoftThreshold` does.

    Args:
        base: Linear, Conv1d, Conv2d, Conv3d, Embedding or transformers' Conv1D layer; frozen and kept.
        rank: number of components R at the start.
        alpha: update scale; the update is multiplied by alpha / R and never rescaled as components close.
        dropout: probability of dropout on the adapter's input, while training.

    Shape:
        x: (..., d_in) -> (..., d_out); for an embedding (...) indices -> (..., d_out);
        for a convolution ([N,] c_in, *places) -> ([N,] d_out, *places), with d_in = c_in / groups * prod(kernel)

    Raises:
        TypeError: the layer is of a kind that cannot be adapted.
        ValueError: rank, alpha or dropout is out of range.

    Reference:
        Ding et al., Sparse Low-rank Adaptation of Pre-trained Language Models, EMNLP 2023, arXiv 2311.11696. The start,
        alpha / R and dropout are the authors' code's.

    Example:
        >>> SoRA(nn.Linear(8, 4), rank=3).effective_weight().shape
        torch.Size([4, 8])
    """

    def __init__(self, base: nn.Module, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> None:
        super().__init__(base, rank, alpha, dropout)

    def _make_gate(self, d_in: int, d_out: int) -> Gate:
        # The authors count a component as 2 d numbers: g is folded into a factor on export.
        return Gate(self.rank, cost=d_in + d_out, gain=torch.zeros_like(self.A[:, 0]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        bound = 1 / sqrt(self.A.shape[1])
        self.A.uniform_(-bound, bound)
        self.B.zero_()
        if self.gate.gain is not None:
            self.gate.gain.normal_()


@torch.no_grad()
def soft_threshold(gains: list[Tensor], threshold: float, skipped: Tensor | None = None) -> None:
    """The proximal step of threshold * |g|_1, in place, in three operations for all layers together.

        g <- sign(g) max(|g| - threshold, 0)  =  g - clamp(g, -threshold, threshold)

    Args:
        gains: the gates of all layers.
        threshold: how far each moves towards zero; what is nearer becomes zero exactly.
        skipped: a number on the device; if it is not 0 the gains stay as they are.
    """
    shrink = torch._foreach_clamp_min(gains, -threshold)
    torch._foreach_clamp_max_(shrink, threshold)
    if skipped is not None:
        torch._foreach_mul_(shrink, (skipped == 0).to(gains[0]))
    torch._foreach_sub_(gains, shrink)


class GainMagnitude(Importance):
    """The absolute value of a component's gain, read when it is asked for: |gain_i mask_i|."""

    reads = "nothing"

    def __init__(self) -> None:
        super().__init__(beta=0.0)

    @torch.no_grad()
    def measure(self, group: list[Site]) -> Tensor:
        return torch.stack([site.gate.value() for site in group]).abs().float()

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        now = [self.measure(group) for group in self._groups]
        return {
            site.name: row
            for group, rows in zip(self._groups, now, strict=True)
            for site, row in zip(group, rows, strict=True)
        }

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        return {}


class SoftThreshold(Policy):
    """Shrink every gain after every optimizer step; what is zero at the end of the window is closed for good.

        g <- sign(g) max(|g| - lambda(t), 0),     lambda(t) = lowest + (threshold - lowest) done(q)

    The rank is what is left: there is no budget to follow, so `rank/budget` shows the capacity, and `rank/spent` how
    sparse the gates have become. A gain that is zero may leave it again, until the last event. Two numbers decide how
    many do not: a gain without a gradient shrinks by the sum of lambda(t) over the window, which should exceed the
    gains' spread (1 in :class:`SoRA`); and a gain with one is held at zero where lambda is larger than the steps that
    the optimizer takes on it, about the learning rate for Adam.

    Args:
        threshold: lambda at the end of the window, per optimizer step; not multiplied by the learning rate.
        schedule: the window in which gains shrink, and how lambda rises in it. `Constant()` for one lambda throughout.
        lowest: lambda at the start of the window.
        interval: optimizer steps between two events, at which the ranks are shown.

    Raises:
        TypeError: an argument is of another class.
        ValueError: a threshold is negative, none is positive, or interval is below 1.

    Reference:
        Ding et al., SoRA, EMNLP 2023, arXiv 2311.11696. In the authors' code the step that `run_glue.py` takes has
        lambda as it is, another file's has lambda times the learning rate; this is the first. Departures: the code
        first subtracts and then zeroes what is below lambda, so that it closes up to 2 lambda, this is the proximal
        step; it also adds lambda_1 mean|g| to the loss, which is left out here, since the threshold is that penalty
        (remembered: so it is in the paper's equations); a rising lambda takes its values within one run, in the code
        each value trains for some epochs more; after the window the threshold rests (our choice; the default window
        is the whole run, as in the code).
    """

    def __init__(
        self, threshold: float, schedule: Schedule | None = None, lowest: float | None = None, interval: int = 10
    ) -> None:
        for name, value in (("threshold", threshold), ("lowest", threshold if lowest is None else lowest)):
            require_number(name, value)
            if not (value >= 0 and isfinite(value)):
                raise ValueError(f"{name} is how far a gain shrinks in one step, at least 0 and finite. Got {value}.")
        if threshold == 0:
            raise ValueError("threshold=0 closes nothing at the end of the window; give a positive one, such as 3e-4.")
        super().__init__(schedule or Constant(warmup=0.0, tail=0.0), GainMagnitude(), interval)
        self.threshold = float(threshold)
        self.lowest = self.threshold if lowest is None else float(lowest)

    @property
    def returning(self) -> str:
        return "a gain that this policy has brought to zero may leave it again"

    def settings(self) -> dict[str, str]:
        rise = "" if self.lowest == self.threshold else f" from {self.lowest:g}"
        return {"budget": f"soft threshold {self.threshold:g}{rise}", **super().settings()}

    def track(self, budget: RankBudget) -> None:
        """Take on the adapters of `budget`.

        Raises:
            ValueError: an adapter has no gain, or one whose dtype cannot hold a small step.
        """
        for name, site in budget.items():
            gain = site.gate.gain
            if gain is None:
                raise ValueError(
                    f"a soft threshold shrinks gains, and the adapter at {name!r} has none; use an adapter that has, "
                    "such as SoRA."
                )
            if torch.finfo(gain.dtype).bits < 32:
                raise ValueError(
                    f"the gains of the adapter at {name!r} are {gain.dtype}, in which a step of {self.threshold:g} is "
                    "lost. Train with precision='bf16-mixed' or '16-mixed', which leave parameters in float32."
                )
        super().track(budget)

    def threshold_at(self, step: int, total: int) -> float:
        """lambda at this step: 0 before the window and after it."""
        start, last = self.schedule.window(total)
        if not start <= step <= last:
            return 0.0
        return self.lowest + (self.threshold - self.lowest) * self.schedule.done_at(step, total)

    def after_steps(self, count: int, step: int, total: int, skipped: Tensor | None = None) -> None:
        shrink = sum(self.threshold_at(each, total) for each in range(step - count + 1, step + 1))
        gains = [site.gate.gain for site in self._budget.values() if site.gate.gain is not None]
        if shrink and gains:
            by_device: dict[torch.device, list[Tensor]] = {}
            for gain in gains:
                by_device.setdefault(gain.device, []).append(gain)
            for here in by_device.values():
                soft_threshold(here, shrink, skipped)

    def budget_at(self, step: int, total: int) -> int:
        """All components there are: a threshold sets no limit."""
        return self._budget.capacity

    def decide(self, step: int, total: int) -> dict[str, Tensor]:
        """The components whose gain is not zero; of those that are closed already, none."""
        if not self._budget:
            return {}
        gates = [site.gate for site in self._budget.values()]
        flat = torch.cat([gate.open() for gate in gates]).cpu()  # one transfer
        masks = dict(zip(self._budget, flat.split([len(gate) for gate in gates]), strict=True))
        if self.is_final(step, total) and not any(bool(mask.any()) for mask in masks.values()):
            warnings.warn(
                f"the soft threshold of {self.threshold:g} has closed every component, so the adapters do nothing. "
                "Lower it: a gain shrinks by its sum over the steps of the window, and grows by about the learning "
                "rate in one.",
                stacklevel=2,
            )
        return masks

    def apply(self, masks: Mapping[str, Tensor], step: int, total: int) -> None:
        """Write the masks at the last event; before it the gains say what is open, and may change their minds."""
        if self.is_final(step, total):
            super().apply(masks, step, total)


def policy(
    threshold: float = 3e-4,
    lowest: float | None = None,
    warmup: float = 0.0,
    tail: float = 0.0,
    interval: int = 10,
) -> SoftThreshold:
    """The paper's policy: one threshold for the whole run, or one that rises.

    Args:
        threshold: lambda at the end of the window; 3e-4 in a script of the authors, beside a learning rate of 8e-4.
        lowest: lambda at the start of the window, from which it rises in equal steps; ``None`` for one lambda.
        warmup: share of the run before gains shrink.
        tail: share of the run after the mask is final, in which gains no longer shrink.
        interval: optimizer steps between two events, at which the ranks are shown.

    Reference:
        Ding et al., SoRA, EMNLP 2023, arXiv 2311.11696, with the values of the authors' scripts.
    """
    schedule = Constant(warmup, tail) if lowest is None else Linear(warmup, tail)
    return SoftThreshold(threshold, schedule, lowest, interval)
