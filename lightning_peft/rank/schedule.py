"""How much of the cut is done at step t: pure functions of whole steps, with a warm-up and a frozen tail.

Steps are optimizer steps, counted from 1; T is their number in the whole run. Shares of steps become whole steps by
exact arithmetic, so that no rounding of 0.15 T can make one step an event twice, or never.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import ClassVar


def share_of(share: float, total: int) -> int:
    """floor(share * total), with `share` taken as the decimal number that it was written as.

    Example:
        >>> int(0.29 * 100), share_of(0.29, 100)
        (28, 29)
    """
    return floor(Fraction(str(share)) * total)


@dataclass(frozen=True)
class Schedule(ABC):
    """When components are cut, and how fast.

        start = floor(warmup T),  last = T - floor(tail T),  q = (t - start) / (last - start)
        cut(t) = floor(amount * done(q))     for start <= t <= last;  0 before, `amount` after

    A subclass says `done(q)`: the share of the cut that is done after a share q of the window; done(1) must be 1.

    Args:
        warmup: share of the run before the first cut.
        tail: share of the run after the last one, in which the mask is final.

    Raises:
        ValueError: a share is not in [0, 1), or they leave no window.
    """

    warmup: float = 0.1
    tail: float = 0.2

    def __post_init__(self) -> None:
        if not (0 <= self.warmup < 1 and 0 <= self.tail < 1 and self.warmup + self.tail < 1):
            raise ValueError(
                "warmup and tail are shares of the run that leave a window to prune in: each in [0, 1), their sum < 1. "
                f"Got warmup={self.warmup}, tail={self.tail}."
            )

    @abstractmethod
    def done(self, q: Fraction) -> Fraction | float:
        """Which share of the cut a share q of the window has seen: rising from [0, 1] to [0, 1], 1 at q = 1."""

    def window(self, total: int) -> tuple[int, int]:
        """First and last step at which components may be cut."""
        return share_of(self.warmup, total), total - share_of(self.tail, total)

    def is_event(self, step: int, total: int, interval: int) -> bool:
        """Whether components are chosen after this step: every `interval` steps of the window, and at its last."""
        start, last = self.window(total)
        return start <= step <= last and ((step - start) % interval == 0 or step == last)

    def done_at(self, step: int, total: int) -> float:
        """Which share of the whole change is done after `step` of `total` steps: from 0 to 1, never falling."""
        start, last = self.window(total)
        if step < start:
            return 0.0
        return 1.0 if step >= last else float(self.done(Fraction(step - start, last - start)))

    def observes(self, step: int, total: int) -> bool:
        """Whether importance takes in this step: until the last event, it included."""
        return step <= self.window(total)[1]

    def budget(self, step: int, total: int, start: int, end: int) -> int:
        """What may be spent after `step` of `total` steps, on the way from `start` to `end`: it never rises."""
        return start - self.cut(step, total, max(0, start - end))

    def cut(self, step: int, total: int, amount: int) -> int:
        """How much of the amount is cut after `step` of `total` steps: a whole number that never falls."""
        start, last = self.window(total)
        if step < start:
            return 0
        if step >= last:
            return amount
        return min(amount, floor(amount * self.done(Fraction(step - start, last - start))))


@dataclass(frozen=True)
class Constant(Schedule):
    """The whole cut at once, at the end of the warm-up: done(q) = 1."""

    def done(self, q: Fraction) -> Fraction:
        return Fraction(1)


@dataclass(frozen=True)
class Linear(Schedule):
    """The same cut at every step of the window: done(q) = q."""

    def done(self, q: Fraction) -> Fraction:
        return q


@dataclass(frozen=True)
class Cubic(Schedule):
    """Fast first: done(q) = 1 - (1 - q)^3; half of the cut after 21 % of the window.

    Reference:
        Zhang et al., AdaLoRA, ICLR 2023, arXiv 2303.10512, section 3.3.
    """

    def done(self, q: Fraction) -> Fraction:
        return 1 - (1 - q) ** 3


@dataclass(frozen=True)
class SlowCubic(Schedule):
    """Slow first: done(q) = q^3; half of the cut after 79 % of the window.

    Reference:
        Mao et al., DoRA, ACL 2024, arXiv 2405.17357, eq. 9. Departure: eq. 9 as printed never reaches the final budget;
        this is what the authors' code does.
    """

    def done(self, q: Fraction) -> Fraction:
        return q**3


@dataclass(frozen=True)
class Step(Schedule):
    """A stair of equal cuts: done(q) = floor(stairs * q) / stairs.

    Args:
        stairs: number of cuts in the window; at least 1.
    """

    stairs: int = 4
    _least: ClassVar[int] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stairs < self._least:
            raise ValueError(f"stairs must be at least {self._least}. Got {self.stairs}.")

    def done(self, q: Fraction) -> Fraction:
        return Fraction(floor(self.stairs * q), self.stairs)
