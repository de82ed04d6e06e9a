from __future__ import annotations

import pytest

from lightning_peft.functional.blob import kl_cycle, kl_weight


@pytest.mark.parametrize("cycle", [1, 5, 60, 5000])
def test_the_weights_of_a_cycle_double_and_add_up_to_one(cycle: int) -> None:
    weights = [kl_weight(step, cycle) for step in range(2 * cycle)]
    assert weights[:cycle] == weights[cycle:]
    total = 2 ** (cycle + 1) - 1
    if cycle <= 60:
        assert weights[:cycle] == pytest.approx([2**i / total for i in range(1, cycle + 1)], rel=1e-15)
    assert sum(weights[:cycle]) == pytest.approx(1 - 1 / total, rel=1e-12)


def test_the_cycle_grows_with_the_data_and_shrinks_with_the_batch() -> None:
    assert kl_cycle(2490, 4) == 539  # 100 * 2490^(pi / 8) / 4
    assert kl_cycle(2490, 8) == 269
    assert kl_cycle(10, 10_000) == 1


def test_arguments_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="batch_size must be positive. Got 0."):
        kl_cycle(10, 0)
    with pytest.raises(ValueError, match="step must be at least 0 and cycle at least 1. Got step=-1 and cycle=4."):
        kl_weight(-1, 4)
