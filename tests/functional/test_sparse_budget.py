"""The rules that turn a global budget into a density: the counts that the card's table has, and what is refused."""

from __future__ import annotations

import pytest

from lightning_peft.functional.sparse_budget import density_of_parameters, density_of_sparsity

ROBERTA, T5, LLAMA = (124_645_632, 14_155_776), (222_903_552, 42_467_328), (6_738_415_616, 1_073_741_824)


@pytest.mark.parametrize(
    ("model", "sparsity", "density"),
    [
        (ROBERTA, 0.99, 0.0881),
        (ROBERTA, 0.998, 0.0176),
        (T5, 0.99, 0.0525),
        (T5, 0.998, 0.0105),
        (LLAMA, 0.99, 0.0628),
        (LLAMA, 0.998, 0.0126),
    ],
)
def test_sparsity_is_of_the_whole_base(model: tuple[int, int], sparsity: float, density: float) -> None:
    found = density_of_sparsity(sparsity, *model)
    assert found == pytest.approx(density, abs=5e-5)
    assert found * model[1] == pytest.approx((1 - sparsity) * model[0])


def test_a_sparsity_that_targets_cannot_reach_states_the_least() -> None:
    with pytest.raises(ValueError, match=r"give a sparsity of at least 0\.8865, or more targets"):
        density_of_sparsity(0.85, *ROBERTA)
    assert density_of_sparsity(0.8865, *ROBERTA) < 1
    with pytest.raises(ValueError, match=r"at least 0\.8865"):
        density_of_sparsity(0.8864, *ROBERTA)
    # Exactly all of them is too many as well: then nothing is sparse.
    with pytest.raises(ValueError, match=r"sparsity=0\.75 would train 25 of 100 .* targets have 25: .* 0\.7501"):
        density_of_sparsity(0.75, 100, 25)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, float("nan")])
def test_sparsity_out_of_range(sparsity: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\)"):
        density_of_sparsity(sparsity, *ROBERTA)


def test_parameters() -> None:
    assert density_of_parameters(50, 1000, 3) == 0.05
    assert density_of_parameters(1000, 1000, 3) == 1
    for wrong in (2, 1001):
        with pytest.raises(ValueError, match=r"from 3 to 1,000"):
            density_of_parameters(wrong, 1000, 3)
    with pytest.raises(TypeError, match="must be an integer"):
        density_of_parameters(3.5, 1000, 3)  # type: ignore[arg-type]


def test_a_budget_has_room_for_a_block_in_every_layer() -> None:
    assert density_of_parameters(192, 1200, 3, block=64) == 192 / 1200
    with pytest.raises(ValueError, match=r"each keeps a block of 64 at least\. Give a number from 192 to 1,200"):
        density_of_parameters(100, 1200, 3, block=64)
