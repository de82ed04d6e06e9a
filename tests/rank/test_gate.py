from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from lightning_peft import Gate
from lightning_peft.functional.rank_masks import straight_through


def gated(*gain: float) -> Gate:
    return Gate(len(gain), cost=5, gain=torch.tensor(gain))


def test_everything_is_open_at_first_and_the_value_is_gain_times_mask() -> None:
    assert torch.equal(Gate(3, cost=1).value(), torch.ones(3))
    gate = gated(2.0, -3.0)
    assert torch.equal(gate.value(), torch.tensor([2.0, -3.0]))
    assert gate.open().tolist() == [True, True]
    assert len(gate) == 2


def test_a_gain_of_zero_is_not_open() -> None:
    assert gated(0.0, 1.0).open().tolist() == [False, True]


@pytest.mark.parametrize(
    "which", [torch.tensor([True, False, True]), torch.tensor([1, 0, 1]), torch.tensor([0.5, 0, 2])]
)
def test_hard_removal_writes_the_mask_in_place_and_leaves_the_gain(which: Tensor) -> None:
    gate = gated(1.0, 2.0, 3.0)
    mask = gate.mask
    gate.keep(which)
    assert gate.mask is mask
    assert mask.tolist() == [1, 0, 1]
    assert gate.gain is not None
    assert gate.gain.tolist() == [1, 2, 3]
    assert gate.value().tolist() == [1, 0, 3]
    gate.keep(torch.ones(3))
    assert gate.value().tolist() == [1, 2, 3]


def test_hard_removal_holds_whatever_an_optimizer_does_to_the_gain() -> None:
    gate = gated(1.0, 2.0)
    gate.keep(torch.tensor([1, 0]))
    assert gate.gain is not None
    with torch.no_grad():
        gate.gain.fill_(9.0)
    assert gate.open().tolist() == [True, False]


def test_soft_removal_zeroes_the_gain_once_and_the_component_may_return() -> None:
    gate = gated(1.0, 2.0, 3.0)
    assert gate.gain is not None
    optimizer = torch.optim.SGD([gate.gain], lr=1.0)
    gate.keep(torch.tensor([1, 0, 1]), soft=True)
    assert gate.gain.tolist() == [1, 0, 3]
    assert gate.mask.tolist() == [1, 1, 1]
    gate.gain.grad = torch.full((3,), -0.5)
    optimizer.step()
    assert gate.open().tolist() == [True, True, True]


def test_the_mask_is_saved_with_the_model_and_survives_a_deep_copy() -> None:
    gate = gated(1.0, 2.0)
    gate.keep(torch.tensor([0, 1]))
    assert set(gate.state_dict()) == {"mask", "gain"}
    twin = copy.deepcopy(gate)
    twin.keep(torch.ones(2))
    assert gate.mask.tolist() == [0, 1]
    other = gated(0.0, 0.0)
    other.load_state_dict(gate.state_dict())
    assert other.value().tolist() == [0, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_mask_stays_a_float32_leaf_that_may_require_grad(dtype: torch.dtype) -> None:
    gate = gated(1.0, 2.0)
    gate.mask.requires_grad_(True)
    gate.to(dtype)
    assert gate.gain is not None
    assert gate.gain.dtype == dtype
    assert gate.mask.dtype == torch.float32
    assert gate.mask.is_leaf
    assert gate.mask.requires_grad
    assert "mask" in dict(gate.named_buffers())
    gate.keep(torch.tensor([1, 0]))
    assert gate.mask.tolist() == [1, 0]
    h = torch.ones(4, 2, dtype=dtype)
    assert gate(h).dtype == dtype


def test_the_mask_measures_the_worth_of_a_component() -> None:
    """dL/dmask_i = gain_i dL/dgain_i where the component is open."""
    gate = gated(1.5, -2.0)
    gate.mask.requires_grad_(True)
    (gate(torch.tensor([[1.0, 2.0], [3.0, 4.0]])).square().sum()).backward()
    assert gate.gain is not None
    assert gate.gain.grad is not None
    assert torch.equal(gate.mask.grad, gate.gain.detach() * gate.gain.grad)  # type: ignore[arg-type]


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"at least one component of positive cost. Got n=0, cost=1."):
        Gate(0, cost=1)
    with pytest.raises(ValueError, match=r"Got n=1, cost=0."):
        Gate(1, cost=0)
    with pytest.raises(ValueError, match=r"gain must have shape \(3,\), one scalar per component. Got \(2,\)."):
        Gate(3, cost=1, gain=torch.zeros(2))
    with pytest.raises(ValueError, match=r"which must have shape \(3,\). Got \(4,\)."):
        Gate(3, cost=1).keep(torch.ones(4))
    gate = Gate(3, cost=1)
    with pytest.raises(
        ValueError, match=r"soft removal zeroes a component's gain, and this gate has none; use soft=False"
    ):
        gate.keep(torch.zeros(3), soft=True)
    assert gate.mask.tolist() == [1, 1, 1]


def test_it_prints_its_size_and_price() -> None:
    assert repr(Gate(3, cost=8)) == "Gate(n=3, cost=8)"


def drawn(gate: Gate) -> Tensor:
    """A mask in the graph of whatever drew it."""
    logits = torch.tensor([1.0, -1.0, 2.0], requires_grad=True)
    gate.drawn = straight_through(torch.sigmoid(logits))
    return logits


def test_a_drawn_mask_stands_for_the_mask_in_what_is_computed() -> None:
    gate = gated(2.0, 3.0, 4.0)
    gate.keep(torch.tensor([0, 1, 1]))
    logits = drawn(gate)
    assert gate.value().tolist() == [2, 0, 4]
    assert gate.open().tolist() == [False, True, True]
    gate(torch.ones(3)).sum().backward()
    y = torch.sigmoid(logits.detach())
    assert gate.gain is not None
    assert torch.allclose(logits.grad, gate.gain.detach() * y * (1 - y))  # type: ignore[arg-type]
    gate.drawn = None
    assert gate.value().tolist() == [0, 3, 4]


def test_a_drawn_mask_is_of_the_step_alone() -> None:
    gate = gated(2.0, 3.0, 4.0)
    drawn(gate)
    assert set(gate.state_dict()) == {"mask", "gain"}
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert twin.drawn is None
        assert twin.value().tolist() == [2, 3, 4]
    assert gate.drawn is not None
    gate.to(torch.bfloat16)
    assert gate.drawn is not None
    assert gate.drawn.dtype == torch.float32
