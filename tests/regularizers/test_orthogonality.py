from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft import AdaLoRA, LoRA, Orthogonality, RankBudget, inject
from lightning_peft.adapters import adalora
from lightning_peft.rank.budget import Budget
from lightning_peft.regularizers import regularized
from lightning_peft.regularizers.orthogonality import Form, _Deviation, deviation


def network() -> nn.Sequential:
    module = nn.Sequential(*(LoRA(nn.Linear(d_in, 6), rank=3) for d_in in (6, 6, 8)))
    for child in module:
        nn.init.normal_(child.B)  # type: ignore[arg-type]
    return module


def test_it_is_the_mean_over_layers_of_the_printed_norms() -> None:
    module, eye = network(), torch.eye(3)
    expected = sum(
        torch.linalg.matrix_norm(layer.A @ layer.A.T - eye) ** 2
        + torch.linalg.matrix_norm(layer.B.T @ layer.B - eye) ** 2  # type: ignore[operator, union-attr]
        for layer in module
    )
    own = [p for p in module.parameters() if p.requires_grad]
    actual = Orthogonality()(module, None, None)
    torch.testing.assert_close(actual, expected / 3)
    for one, other in zip(torch.autograd.grad(actual, own), torch.autograd.grad(expected / 3, own), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_an_orthonormal_set_costs_nothing() -> None:
    rows = torch.linalg.qr(torch.randn(8, 3))[0].T
    torch.testing.assert_close(deviation(rows), torch.tensor(0.0), rtol=0, atol=1e-10)
    torch.testing.assert_close(deviation(2 * rows), torch.tensor(3 * 9.0))
    assert deviation(torch.randn(4, 2, 3, 8)).shape == (4, 2)


def test_without_an_adapter_it_says_so() -> None:
    with pytest.raises(
        RuntimeError, match="Orthogonality found no low-rank adapter in the module; inject adapters first."
    ):
        Orthogonality()(nn.Linear(2, 2), None, None)


def printed(form: Form, rows: tuple[bool, ...], tensors: tuple[Tensor, ...]) -> Tensor:
    """The equation, one tensor after the other."""
    wide = [t if is_row else t.T for is_row, t in zip(rows, tensors, strict=True)]
    norms = [torch.linalg.matrix_norm(P @ P.T - torch.eye(len(P), dtype=P.dtype)) for P in wide]
    return sum(norm if form == "norm" else norm**2 for norm in norms)  # type: ignore[return-value]


ROWS = (True, False, True, False, True, False)
SHAPES = ((3, 8), (6, 3), (3, 8), (6, 3), (2, 5), (7, 2))  # two ranks, three shapes


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_its_gradient_is_autograds(form: Form) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in SHAPES)
    value = _Deviation.apply(form, 0.25, ROWS, *tensors)
    expected = 0.25 * printed(form, ROWS, tensors)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(3 * value, tensors), torch.autograd.grad(3 * expected, tensors), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda *t: _Deviation.apply(form, 0.25, ROWS, *t), tensors, atol=1e-6)


@pytest.mark.parametrize("form", ["squared", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_in_float32_and_gives_gradients_in_the_tensors_dtype(form: Form, dtype: torch.dtype) -> None:
    tensors = tuple(torch.randn(*shape).to(dtype).requires_grad_() for shape in SHAPES)
    value = _Deviation.apply(form, 1.0, ROWS, *tensors)
    assert value.dtype == torch.float32
    wide = tuple(t.detach().double().requires_grad_() for t in tensors)
    slopes = torch.autograd.grad(printed(form, ROWS, wide), wide)
    for ours, slope in zip(torch.autograd.grad(value, tensors), slopes, strict=True):
        assert ours.dtype == dtype
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        torch.testing.assert_close(ours.double(), slope, rtol=tolerance, atol=tolerance * slope.abs().max().item())


def test_at_an_orthonormal_set_the_norm_has_slope_zero_and_not_nan() -> None:
    rows = torch.eye(3, 8, requires_grad=True)
    columns = torch.zeros(6, 3, requires_grad=True)
    value = _Deviation.apply("norm", 1.0, (True, False), rows, columns)
    assert value.item() == pytest.approx(3**0.5)  # of the zero matrix: |0 - I|
    assert not any(slope.any() for slope in torch.autograd.grad(value, (rows, columns)))


@pytest.mark.parametrize("form", ["squared", "norm"])
def test_only_factors_enter_not_the_gain_or_the_mask(form: Form) -> None:
    layer = AdaLoRA(nn.Linear(8, 6), rank=3)
    before = Orthogonality(form=form)(layer, None, None)
    nn.init.constant_(layer.gate.gain, 5.0)  # type: ignore[arg-type]
    layer.gate.keep(torch.tensor([1, 0, 0]))
    after = Orthogonality(form=form)(layer, None, None)
    assert torch.equal(before, after)
    after.backward()
    assert layer.gate.gain is not None
    assert layer.gate.gain.grad is None
    assert layer.A.grad is not None
    assert layer.A.grad[1].any()  # closed


def test_the_norm_form_is_pefts_mean_over_all_factors() -> None:
    module = network()
    norms = [torch.linalg.matrix_norm(layer.A @ layer.A.T - torch.eye(3)) for layer in module]  # type: ignore[operator,union-attr]
    norms += [torch.linalg.matrix_norm(layer.B.T @ layer.B - torch.eye(3)) for layer in module]  # type: ignore[operator,union-attr]
    torch.testing.assert_close(Orthogonality(form="norm")(module, None, None), torch.stack(norms).mean())


def test_an_unknown_form_is_told() -> None:
    with pytest.raises(ValueError, match="form must be 'squared' or 'norm'. Got 'frobenius'."):
        Orthogonality(form="frobenius")  # type: ignore[arg-type]


class Operations(TorchDispatchMode):
    """Counts what reaches the dispatcher: forward, backward and in-place alike; a `_foreach_` call counts once."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def encoder(layers: int, rank: int = 12) -> nn.Module:
    """The six linears of each of RoBERTa's layers, at a fraction of its width: three shapes, as there."""
    d, inner = 24, 96
    shapes = [(d, d)] * 4 + [(d, inner), (inner, d)]
    module = nn.ModuleList(nn.ModuleList(nn.Linear(*shape) for shape in shapes) for _ in range(layers))
    inject(module, partial(AdaLoRA, rank=rank), train=[], targets=[r"\d+\.\d+"])
    return module


def penalised(module: nn.Module, tensors: list[Tensor], term: bool) -> Counter[str]:
    """What a step's loss costs with and without the term; a stand-in for the task uses every factor, as in life."""
    for t in tensors:
        t.grad = None
    task = torch.stack([t.square().sum() for t in tensors]).sum()
    orthogonality = Orthogonality(0.5, form="norm")
    with Operations() as seen:
        values = {"orthogonality": orthogonality(module, None, None)} if term else {}
        regularized(task, values, {"orthogonality": 0.5}).backward()
    return seen.names


def test_a_step_of_allocator_and_penalty_costs_at_most_60_operations_for_72_layers_and_no_sync() -> None:
    """Forward and backward of the term, its weight and sum, and the statistics: what a step without them does not do.

    Not among the 60: autograd adds the term's gradient of a factor to the task's, one sum for each of the 144 factors,
    as it does for any loss of two parts that share a parameter, PEFT's penalty included. They are counted too.
    """
    module = encoder(12)
    sites = RankBudget.of(module)
    assert len(sites) == 72
    factors = [t for site in sites.values() for t in (site.adapter.A, site.adapter.B)]  # type: ignore[list-item]
    penalty = penalised(module, factors, term=True)
    penalty.subtract(penalised(module, factors, term=False))
    for site in sites.values():
        assert site.gate.gain is not None
        site.gate.gain.grad = torch.ones_like(site.gate.gain)
    policy = adalora.policy(Budget(rank=8))
    policy.track(sites)
    assert policy.observes(33, 1000)
    assert not policy.is_event(33, 1000)
    with Operations() as allocator:
        policy.importance.update()
    summed = len(factors)
    assert penalty["aten.add.Tensor"] + penalty["aten.add_.Tensor"] == summed + 1  # and the term to the loss
    assert allocator.names.total() == 25
    assert penalty.total() - summed == 33
    assert allocator.names.total() + penalty.total() - summed <= 60
    assert not [name for name in allocator.names + penalty if "_local_scalar_dense" in name or "item" in name]


def test_the_number_of_operations_does_not_grow_with_the_layers() -> None:
    counts = []
    for layers in (1, 3):
        module = encoder(layers)
        factors = [p for name, p in module.named_parameters() if name.endswith((".A", ".B"))]
        counts.append(penalised(module, factors, True).total() - penalised(module, factors, False).total())
        counts[-1] -= len(factors)
    assert counts[0] == counts[1]
