from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft import LoRA, Orthogonality
from lightning_peft.regularizers.orthogonality import deviation


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
