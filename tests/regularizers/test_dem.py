from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import DEM, DynamicDoRA, LoRA, inject
from lightning_peft.regularizers import Regularizer


def network(dtype: torch.dtype = torch.float32, rank: int = 3) -> nn.Sequential:
    """Adapted layers of equal and of different shapes, random and with a closed component."""
    module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 9), nn.Embedding(9, 4)).to(dtype)
    inject(module, partial(DynamicDoRA, rank=rank), targets=[r"\d"], train=[])
    for parameter in module.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    module[0].gate.keep(torch.arange(rank) != 0)  # type: ignore[operator, union-attr]
    return module


def by_hand(module: nn.Module) -> Tensor:
    """The definition: the mean over components of half the unbiased variances of its two vectors."""
    adapters = [child for child in module.modules() if isinstance(child, (DynamicDoRA, LoRA))]
    total = torch.stack([(a.A.var(dim=1).sum() + a.B.var(dim=0).sum()) for a in adapters]).sum()
    return total / (2 * sum(len(a.gate) for a in adapters))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_property_9_value_and_gradient_are_those_of_the_variance(dtype: torch.dtype, tolerance: float) -> None:
    module = network(dtype)
    own = [p for p in module.parameters() if p.requires_grad and p.dim() == 2]
    expected = by_hand(module)
    wanted = torch.autograd.grad(3.0 * expected, own)
    actual = DEM()(module, None, None)
    gradients = torch.autograd.grad(3.0 * actual, own)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    for one, other in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_property_9_the_closed_gradient() -> None:
    """dDEM/dA = (A - rowmean A) / (N (d_in - 1)) and dDEM/dB = (B - colmean B) / (N (d_out - 1))."""
    module = nn.Sequential(DynamicDoRA(nn.Linear(6, 9), rank=3, dropout=0.0))
    DEM()(module, None, None).backward()
    A, B = module[0].A, module[0].B
    torch.testing.assert_close(A.grad, ((A - A.mean(1, keepdim=True)) / (3 * 5)).detach())  # type: ignore[operator, union-attr]
    torch.testing.assert_close(B.grad, ((B - B.mean(0, keepdim=True)) / (3 * 8)).detach())  # type: ignore[operator, union-attr]


def test_the_printed_normalizer_is_twice_the_codes() -> None:
    module = network()
    torch.testing.assert_close(DEM(normalizer="components")(module, None, None), 2 * DEM()(module, None, None))


def test_flat_components_cost_nothing() -> None:
    module = network()
    for child in module:
        nn.init.constant_(child.A, 0.7)  # type: ignore[arg-type]
        nn.init.constant_(child.B, -0.2)  # type: ignore[arg-type]
    assert DEM()(module, None, None) < 1e-12  # 0.7 is not exact


def test_at_the_start_it_is_the_variance_of_the_authors_init() -> None:
    """About 0.085 for RANK 12 at d = 768: Var(b) = 2 / R, Var(a) = 2 / d_in, halved (the card's section 9)."""
    module = nn.Sequential(DynamicDoRA(nn.Linear(768, 768), rank=12))
    assert DEM()(module, None, None).item() == pytest.approx((2 / 12 + 2 / 768) / 2, rel=0.02)


def test_a_vector_of_one_entry_has_no_variance() -> None:
    module = nn.Sequential(LoRA(nn.Linear(5, 1), rank=1), LoRA(nn.Linear(1, 5), rank=1))
    for child in module:
        nn.init.normal_(child.B)  # type: ignore[arg-type]
    value = DEM()(module, None, None)
    expected = (module[0].A.var() + module[1].B.var()) / 4  # type: ignore[operator, union-attr]
    torch.testing.assert_close(value, expected)
    value.backward()
    assert module[0].B.grad is None or not module[0].B.grad.any()  # type: ignore[union-attr, operator]
    assert module[1].B.grad.any()  # type: ignore[union-attr, operator]


def test_it_is_computed_in_float32_whatever_the_adapters_are() -> None:
    module = network().to(torch.bfloat16)
    value = DEM()(module, None, None)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, by_hand(module.float()), rtol=1e-5, atol=1e-6)
    module.to(torch.bfloat16)
    DEM()(module, None, None).backward()
    assert all(p.grad.dtype == p.dtype for p in module.parameters() if p.grad is not None)


def test_it_keeps_no_graph_over_the_layers() -> None:
    value = DEM()(network(), None, None)
    assert value.grad_fn is not None
    leaves = [node for node, _ in value.grad_fn.next_functions if node is not None]
    assert all(type(node).__name__ == "AccumulateGrad" for node in leaves)
    assert len(leaves) == 8  # A and B of four layers


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="normalizer must be 'code' or 'components'. Got 'mean'."):
        DEM(normalizer="mean")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="DEM found no low-rank adapter in the module; inject adapters first."):
        DEM()(nn.Linear(2, 2), None, None)
    assert isinstance(DEM(), Regularizer)
