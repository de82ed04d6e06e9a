"""Scaled low-rank layers and the norms behind the scale: equal to what is written plainly, in value and gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_peft.functional.low_rank import low_rank_linear
from lightning_peft.functional.weight_decomposition import (
    _PIECE,
    decomposed_linear,
    decomposed_linear_reference,
    rescaled,
    row_norms,
)

D_IN, D_OUT, RANK = 7, 5, 3
Inputs = dict[str, Tensor | None]
Result = tuple[Tensor, Inputs]


@pytest.fixture(autouse=True)
def _own_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def make(*shape: int, bias: bool = True, dtype: torch.dtype = torch.float32, d_out: int = D_OUT) -> Inputs:
    """Inputs of the layer, all with gradient but the base's."""
    g = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": draw(*shape, D_IN).requires_grad_(),
        "weight": draw(d_out, D_IN),
        "bias": draw(d_out) if bias else None,
        "A": draw(RANK, D_IN).requires_grad_(),
        "B": draw(d_out, RANK).requires_grad_(),
        "value": draw(RANK).requires_grad_(),
        "scale": draw(d_out).requires_grad_(),
    }


def gradients(layer: Callable[..., Tensor], inputs: Inputs, dropout: float = 0.0) -> Result:
    """Output, and the gradient of a random weighing of it to every input that wants one."""
    inputs = {k: None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for k, t in inputs.items()}
    torch.manual_seed(1)
    y = layer(**inputs, dropout=dropout)
    weighing = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weighing.to(y.dtype)).sum().backward()
    return y.detach(), {k: None if t is None else t.grad for k, t in inputs.items()}


def is_fused(y: Tensor) -> bool:
    return y.grad_fn is not None and "DecomposedLinear" in type(y.grad_fn).__name__


# Rounding in float32: each number is a sum of at most 40 products of numbers of size 1, added in another order. The
# error of such a sum is below 40 * 2^-24 * sum |products| < 1e-4; what is observed is a tenth of the tolerance.
def assert_same(got: Result, expected: Result) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    for name, grad in expected[1].items():
        if grad is None:
            assert got[1][name] is None, name
        else:
            torch.testing.assert_close(got[1][name], grad, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 2), (), (0,)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_composition(shape: tuple[int, ...], bias: bool) -> None:
    inputs = make(*shape, bias=bias)
    assert is_fused(decomposed_linear(**inputs))
    assert_same(gradients(decomposed_linear, inputs), gradients(decomposed_linear_reference, inputs))


def test_the_composition_is_the_equation() -> None:
    inputs = make(4, dtype=torch.float64)
    x, W, b, A, B, v, s = inputs.values()
    expected = F.linear(x, s[:, None] * (W + (B * v) @ A), b)
    torch.testing.assert_close(decomposed_linear_reference(**inputs), expected)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("tokens", [2, 6])  # fewer or more numbers in the gradient than in the weight
def test_gradcheck(dropout: float, tokens: int) -> None:
    inputs = make(tokens, 3, dtype=torch.float64)
    inputs["bias"].requires_grad_()
    names = [name for name, t in inputs.items() if t is not None and t.requires_grad]

    def layer(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same entries dropped in every evaluation
        return decomposed_linear(**(inputs | dict(zip(names, tensors, strict=True))), dropout=dropout)

    assert names == ["x", "bias", "A", "B", "value", "scale"]
    assert is_fused(layer(*(inputs[name] for name in names)))
    assert gradcheck(layer, [inputs[name] for name in names])


@pytest.mark.parametrize("wanted", list(product([True, False], repeat=6)))
def test_only_what_wants_a_gradient_gets_one(wanted: tuple[bool, ...]) -> None:
    inputs = make(2, 3)
    for name, want in zip(("x", "bias", "A", "B", "value", "scale"), wanted, strict=True):
        inputs[name].requires_grad_(want)
    if not any(wanted):
        assert not decomposed_linear(**inputs).requires_grad
        return
    assert_same(gradients(decomposed_linear, inputs), gradients(decomposed_linear_reference, inputs))


def test_large_outputs_too() -> None:
    # float64: sums over 1100 tokens err by more than the tolerance in float32
    inputs = make(11, 100, dtype=torch.float64, d_out=256)
    assert_same(gradients(decomposed_linear, inputs, 0.3), gradients(decomposed_linear_reference, inputs, 0.3))


def test_a_transposed_weight() -> None:
    inputs = make(2, 3) | {"weight": torch.randn(D_IN, D_OUT).t()}
    assert_same(gradients(decomposed_linear, inputs), gradients(decomposed_linear_reference, inputs))


def test_the_output_is_kept_once_and_only_for_the_scale() -> None:
    inputs = make(64)

    def kept() -> list[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            decomposed_linear(**inputs)
        return shapes

    assert kept().count((64, D_OUT)) == 1
    inputs["scale"].requires_grad_(False)
    assert (64, D_OUT) not in kept()


def test_what_follows_may_change_the_output_in_place() -> None:
    inputs = make(4)
    plain = gradients(lambda **kwargs: decomposed_linear(**kwargs).relu(), inputs)
    assert_same(gradients(lambda **kwargs: decomposed_linear(**kwargs).relu_(), inputs), plain)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(), (65,), (3, 20), (1400,)])
@pytest.mark.parametrize(("d_in", "d_out"), [(384, 384), (1536, 200), (31, 17)])
@pytest.mark.parametrize("wanted", [True, False])
def test_with_scale_one_it_is_its_base_bit_for_bit(
    bias: bool, shape: tuple[int, ...], d_in: int, d_out: int, wanted: bool
) -> None:
    base = nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)
    A, B, value = torch.randn(8, d_in, requires_grad=True), torch.randn(d_out, 8), torch.ones(8)
    x, one = torch.randn(*shape, d_in), torch.ones(d_out, requires_grad=wanted)
    expected = low_rank_linear(x, base.weight, base.bias, A, B, value)
    y = decomposed_linear(x, base.weight, base.bias, A, B, value, one)
    assert is_fused(y)
    assert torch.equal(y, expected)
    y = decomposed_linear(x, base.weight, base.bias, A, torch.zeros_like(B), value, one)
    assert torch.equal(y, F.linear(x, base.weight, base.bias))


@pytest.mark.parametrize("autocast", [True, False])
def test_a_scale_is_not_rounded_to_a_narrow_base(autocast: bool) -> None:
    # 1 + 2^-9 is 1 in bfloat16; times an output of 1.5 it is past the half-way point to the next number.
    dtype = torch.float32 if autocast else torch.bfloat16
    x, W = torch.ones(1, 1, dtype=dtype), torch.tensor([[1.5]], dtype=dtype)
    A, B, value = torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1)
    scale = torch.tensor([1 + 3 * 2**-9], requires_grad=True)
    expected = torch.tensor([[1.5 * (1 + 3 * 2**-9)]]).bfloat16()
    assert expected != (W * scale.bfloat16()).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for layer in (decomposed_linear, decomposed_linear_reference):
            y = layer(x, W, None, A, B, value, scale)
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, expected)


def test_rescaled_leaves_the_bias_alone() -> None:
    y, bias, scale = torch.randn(4, 3).double(), torch.randn(3).double(), torch.randn(3).double()
    torch.testing.assert_close(rescaled(y, bias, scale), scale * (y - bias) + bias)
    torch.testing.assert_close(rescaled(y, None, scale), scale * y)


def update(d_out: int, d_in: int, rank: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(rank, d_in), torch.randn(d_out, rank), torch.randn(rank)


# Longer than a piece in either direction, with a last piece that is shorter; and rows longer than a piece.
@pytest.mark.parametrize(("d_out", "d_in"), [(5, 7), (600, 300), (2, _PIECE + 1), (_PIECE + 1, 2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_norms_are_those_of_the_sum(d_out: int, d_in: int, transposed: bool) -> None:
    A, B, value = update(d_out, d_in)
    weight = torch.randn(d_in, d_out).t() if transposed else torch.randn(d_out, d_in)
    expected = (weight.double() + (B * value).double() @ A.double()).norm(dim=1)
    got = row_norms(weight, A, B, value)
    assert got.dtype == torch.float32
    # Absolute: of 131073 rows of two numbers, a few are almost zero by chance, and their entries are rounded before.
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_norms_where_the_update_almost_undoes_the_weight() -> None:
    A, B, value = update(64, 48)
    rest = 1e-3 * torch.randn(64, 48)
    weight = rest - (B * value) @ A
    expected = (weight.double() + (B * value).double() @ A.double()).norm(dim=1)
    # Rounding of the sum's entries alone, relative to what is left of them: 1e3 times 2^-24, over 48 entries.
    torch.testing.assert_close(row_norms(weight, A, B, value).double(), expected, rtol=2e-4, atol=0)
    squares = weight.square().sum(1) + 2 * (weight * ((B * value) @ A)).sum(1) + ((B * value) @ A).square().sum(1)
    assert ((squares.clamp_min(0).sqrt() / expected) - 1).abs().max() > 1e-2  # what expanding the square would give


@pytest.mark.parametrize("transposed", [False, True])
def test_norms_of_a_narrow_weight_are_computed_in_float32(transposed: bool) -> None:
    A, B, value = update(40, 30)
    weight = torch.randn(40, 30).bfloat16()
    weight = weight.t().contiguous().t() if transposed else weight
    expected = row_norms(weight.float(), A, B, value)
    with torch.autocast("cpu", torch.bfloat16):
        got = row_norms(weight, A, B, value)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert row_norms(weight.double(), A, B, value).dtype == torch.float64


class _Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation makes, views of a known one left out."""

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known, self.numel = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() != self.known:
            self.numel = max(self.numel, result.numel())
        return result


@pytest.mark.parametrize("transposed", [False, True])
def test_norms_make_no_matrix_of_the_weights_size(transposed: bool) -> None:
    A, B, value = update(1024, 768)
    weight = torch.randn(768, 1024).t() if transposed else torch.randn(1024, 768)
    with _Largest(weight) as largest:
        row_norms(weight, A, B, value)
    assert 0 < largest.numel <= _PIECE < weight.numel() / 5


def test_no_gradient_flows_through_norms() -> None:
    A, B, value = update(5, 7)
    assert not row_norms(torch.randn(5, 7), A.requires_grad_(), B.requires_grad_(), value).requires_grad
