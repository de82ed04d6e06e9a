"""What a layer computes is its matrix times the rows of its input, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft.adapters.rows import input_rows, output_rows

CONVOLUTIONS = {
    "1d": (nn.Conv1d(4, 6, 3, bias=False), (2, 4, 9)),
    "2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, bias=False), (2, 4, 7, 5)),
    "3d": (nn.Conv3d(4, 6, (1, 2, 3), bias=False), (2, 4, 3, 4, 5)),
    "dilated": (nn.Conv1d(4, 6, 3, dilation=2, padding="same", padding_mode="circular", bias=False), (2, 4, 9)),
    "groups": (nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), (2, 4, 5, 5)),
    "depthwise": (nn.Conv1d(4, 4, 3, groups=4, bias=False), (2, 4, 9)),
    "no batch": (nn.Conv2d(4, 6, 3, bias=False), (4, 5, 6)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_a_convolution_multiplies_patches(kind: str) -> None:
    conv, shape = CONVOLUTIONS[kind]
    x = torch.randn(shape)
    y = conv(x)
    rows, out = input_rows(conv, x), output_rows(conv, y)
    product = rows @ conv.weight.flatten(1).T
    assert product.shape == out.shape
    own = out != 0  # a group's rows hold its own outputs
    assert own.sum() == y.numel()
    torch.testing.assert_close(product[own], out[own], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_the_weights_gradient_is_a_product_of_rows(kind: str) -> None:
    conv, shape = CONVOLUTIONS[kind]
    x = torch.randn(shape)
    y = conv(x)
    g = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, conv.weight, g)
    torch.testing.assert_close(output_rows(conv, g).T @ input_rows(conv, x), gradient.flatten(1), rtol=1e-4, atol=1e-4)


def test_a_linear_layer_multiplies_positions() -> None:
    layer, x = nn.Linear(4, 6), torch.randn(2, 3, 4)
    torch.testing.assert_close(input_rows(layer, x) @ layer.weight.T + layer.bias, output_rows(layer, layer(x)))
