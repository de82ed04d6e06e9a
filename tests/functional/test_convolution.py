"""The two forms of a convolution with a low-rank update: the same numbers and gradients, each where it belongs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.functional import convolution
from lightning_peft.functional.convolution import is_merged, low_rank_convolution, low_rank_convolution_update


def make(groups: int = 1, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Inputs of a Conv2d of 4 channels, 6 outputs and kernel (3, 2), rank 3."""
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    c = 4 // groups
    return {
        "x": draw(2, 4, 6, 5).requires_grad_(),
        "weight": draw(6, c, 3, 2),
        "bias": draw(6),
        "A": draw(3, c * 6).requires_grad_(),
        "B": draw(6, 3).requires_grad_(),
        "value": draw(3).requires_grad_(),
    }


def gradients(inputs: dict[str, Any], groups: int) -> list[Tensor]:
    def convolve(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        return F.conv2d(x, kernel, bias, stride=(2, 1), padding=(1, 0), groups=groups)

    y = low_rank_convolution(convolve, **inputs, groups=groups)
    weighing = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    wanted = [t for t in inputs.values() if t.requires_grad]
    return [y.detach(), *torch.autograd.grad((y * weighing + y.square()).sum(), wanted)]


@pytest.mark.parametrize("groups", [1, 2])
def test_both_forms_are_the_same_function(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(groups)
    results = []
    for merged in (True, False):
        monkeypatch.setattr(convolution, "is_merged", lambda *_, merged=merged: merged)
        results.append(gradients(inputs, groups))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("merged", [True, False])
def test_without_an_update_it_is_the_base_bit_for_bit(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convolution, "is_merged", lambda *_: merged)
    inputs = make(dtype=torch.float32)
    plain = F.conv2d(inputs["x"], inputs["weight"], inputs["bias"])
    for nothing in ({"B": torch.zeros(6, 3)}, {"value": torch.zeros(3)}):
        assert torch.equal(low_rank_convolution(F.conv2d, **(inputs | nothing)), plain)


def test_the_form_with_fewer_multiplications_is_chosen() -> None:
    def merged(d_out: int, c_in: int, edge: int, rank: int = 8, groups: int = 1) -> bool:
        weight = torch.empty(d_out, c_in // groups, edge, edge, device="meta")
        A = torch.empty(rank, weight[0].numel(), device="meta")
        return is_merged(torch.empty(1, device="meta"), weight, A, groups)

    assert merged(32, 16, 3)
    assert not merged(256, 256, 3)
    assert merged(256, 256, 3, rank=128)  # no longer thin
    assert merged(256, 256, 3, groups=256)  # depthwise
    assert merged(32, 32, 1)
    assert not merged(512, 512, 1)


def test_dropout_and_narrow_numbers_are_never_merged() -> None:
    x, weight, A = torch.empty(1, 4, 5), torch.empty(6, 4, 3), torch.empty(3, 12)
    assert is_merged(x, weight, A)
    assert is_merged(x.double(), weight.double(), A.double())
    assert not is_merged(x, weight, A, dropout=0.1)
    assert not is_merged(x.bfloat16(), weight.bfloat16(), A)
    assert not is_merged(x.bfloat16(), weight.bfloat16(), A.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_merged(x, weight, A)


def test_a_small_update_of_a_narrow_kernel_is_not_rounded_away() -> None:
    x, weight = torch.ones(1, 1, 3, dtype=torch.bfloat16), torch.full((2, 1, 3), 1.0, dtype=torch.bfloat16)
    A, B = torch.full((1, 3), 1e-2), torch.full((2, 1), 1e-2)
    update = low_rank_convolution_update(F.conv1d, x, weight.shape[1:], A, B, torch.ones(1))
    assert update.dtype == torch.float32
    torch.testing.assert_close(update, torch.full((1, 2, 1), 3e-4))
    assert torch.equal((weight + (B @ A).view(2, 1, 3)).bfloat16(), weight)  # what merging would have left
