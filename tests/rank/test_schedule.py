from __future__ import annotations

from fractions import Fraction

import pytest

from lightning_peft.rank import Constant, Cubic, Linear, Schedule, SlowCubic, Step
from lightning_peft.rank.schedule import share_of

ALL = [Constant(), Linear(), Cubic(), SlowCubic(), Step(), Step(stairs=1)]
TOTALS = [1, 2, 3, 5, 7, 10, 99, 100, 1000]


@pytest.mark.parametrize("schedule", ALL, ids=repr)
@pytest.mark.parametrize("total", TOTALS)
def test_the_cut_never_falls_and_ends_at_the_whole(schedule: Schedule, total: int) -> None:
    start, last = schedule.window(total)
    cuts = [schedule.cut(step, total, 37) for step in range(total + 1)]
    assert cuts == sorted(cuts)
    assert all(cut == 0 for cut in cuts[:start])
    assert all(cut == 37 for cut in cuts[last:])
    assert schedule.cut(total // 2, total, 0) == 0


@pytest.mark.parametrize("total", range(1, 60))
@pytest.mark.parametrize(("warmup", "tail"), [(0.0, 0.0), (0.15, 0.5), (0.1, 0.2), (0.5, 0.49), (0.0, 0.99)])
def test_the_window_is_never_empty(warmup: float, tail: float, total: int) -> None:
    start, last = Linear(warmup, tail).window(total)
    assert 0 <= start < last <= total


def test_golden_values() -> None:
    """20 components of 30 are cut between steps 10 and 90 of 100; at step 50, half of the window is over."""
    halfway = {
        Constant(0.1, 0.1): 20,
        Linear(0.1, 0.1): 10,
        Cubic(0.1, 0.1): 17,  # floor(20 * 7 / 8)
        SlowCubic(0.1, 0.1): 2,  # floor(20 / 8)
        Step(0.1, 0.1, stairs=3): 6,  # floor(20 / 3)
    }
    for schedule, cut in halfway.items():
        assert schedule.window(100) == (10, 90)
        assert schedule.cut(50, 100, 20) == cut


def test_dynamic_dora_by_the_published_formula() -> None:
    """n_prune(t) = floor(N (r0 - rT) / r0 q^3), q = (t - 0.15 T) / (0.5 T - 0.15 T)."""
    layers, full, final, total = 5, 6, 4, 200
    for step in range(30, 101):
        q = Fraction(step - 30, 70)
        expected = int(Fraction(layers * full * (full - final), full) * q**3)
        assert SlowCubic(0.15, 0.5).cut(step, total, layers * (full - final)) == expected
    assert SlowCubic(0.15, 0.5).cut(29, total, 10) == 0
    assert SlowCubic(0.15, 0.5).cut(101, total, 10) == 10


def test_a_float_that_falls_short_of_one_still_cuts_the_whole() -> None:
    class Tenths(Schedule):
        def done(self, q: Fraction) -> float:
            return sum([0.1 * float(q)] * 10)  # 0.9999999999999999 at the end

    assert [Tenths(0.1, 0.1).cut(step, 100, 20) for step in (89, 90, 91)] == [19, 20, 20]


def test_shares_of_steps_are_exact() -> None:
    assert [share_of(0.29, 100), share_of(0.15, 20), share_of(0.7, 10), share_of(1e-5, 10**6)] == [29, 3, 7, 10]


def test_what_cannot_be() -> None:
    for warmup, tail in ((1.0, 0.0), (-0.1, 0.0), (0.0, 1.0), (0.5, 0.5), (float("nan"), 0.0)):
        with pytest.raises(ValueError, match=f"shares of the run .* Got warmup={warmup}, tail={tail}."):
            Linear(warmup, tail)
    with pytest.raises(ValueError, match=r"stairs must be at least 1. Got 0."):
        Step(stairs=0)
