"""What a layer computes is its matrix times the rows of its input, for every kind of layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_peft.adapters.rows import input_rows, output_rows, sample_rows

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


LAYERS = CONVOLUTIONS | {
    "linear": (nn.Linear(4, 6, bias=False), (2, 3, 4)),
    "pooled": (nn.Linear(4, 6, bias=False), (2, 4)),
    "length first": (nn.Linear(4, 6, bias=False), (3, 2, 4)),
    "one vector": (nn.Linear(4, 6, bias=False), (4,)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_are_kept_apart_by_sample(kind: str) -> None:
    """Each sample's product is the weight's gradient by that sample alone."""
    layer, shape = LAYERS[kind]
    samples = 1 if kind in ("no batch", "one vector") else 2
    x = torch.randn(shape)
    y = layer(x)
    g = torch.randn_like(y)
    X, G = sample_rows(layer, x, samples, input_rows), sample_rows(layer, g, samples, output_rows)
    assert X.shape[:2] == G.shape[:2] == (samples, len(input_rows(layer, x)) // samples)
    dim = 1 if kind == "length first" else 0
    for i in range(samples):
        mask = torch.ones_like(y) if samples == 1 else torch.zeros_like(y).index_fill(dim, torch.tensor([i]), 1.0)
        (expected,) = torch.autograd.grad(layer(x), layer.weight, g * mask)
        torch.testing.assert_close(G[i].T @ X[i], expected.flatten(1), rtol=1e-4, atol=1e-5)


def test_rows_of_nobody_are_refused() -> None:
    for layer, shape in ((nn.Linear(4, 6), (8, 4)), (nn.Linear(4, 6), (4,)), (nn.Conv1d(4, 6, 3), (8, 4, 9))):
        with pytest.raises(ValueError, match="are not those of 2 samples"):
            sample_rows(layer, torch.randn(shape), 2, input_rows)
