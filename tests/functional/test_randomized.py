"""The layer with its update between projections: gradients, what is kept for them, one draw per example."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.functional.randomized import Update, randomized_linear, randomized_linear_reference
from lightning_peft.functional.srht import SRHT, Path, Projection

MODES = ("diag", "io", "core", "half")
D_IN, D_OUT, RANK = 20, 24, 5  # 20 is Paley's first construction: its adjoint is another matrix


def projections(path: Path, mode: str, rank: int = RANK, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    place = (torch.device("cpu"), dtype, path)
    out = SRHT(D_OUT, rank, 0, "x", "out").at(*place)
    return SRHT(D_IN, rank, 0, "x", "in").at(*place), None if mode == "half" else out


def an_update(mode: str, examples: int | None = None, rank: int = RANK) -> Update:
    """Random vectors and matrices that want gradients; one of each vector, or one per example."""
    draw = torch.Generator().manual_seed(0)
    lead = () if examples is None else (examples,)

    def some(wanted: bool, *shape: int) -> Tensor | None:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_() if wanted else None

    value = some(True, *lead, rank)
    assert value is not None
    return Update(
        value,
        some(mode == "io", *lead, D_IN),
        some(mode in ("diag", "io"), *lead, D_OUT),
        some(mode == "core", rank, rank),
        some(mode == "half", D_OUT, rank),
    )


def given(update: Update) -> list[Tensor]:
    return [t for t in update if t is not None]


def layer() -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(D_OUT, D_IN, generator=draw).double(), torch.randn(D_OUT, generator=draw).double()


def inputs() -> Tensor:
    return torch.randn(3, 2, D_IN, generator=torch.Generator().manual_seed(2)).double().requires_grad_()


def dense(x: Tensor, into: Projection, out: Projection | None, update: Update) -> Tensor:
    """The update from whole matrices, in one einsum per example."""
    value, a, b = (None if v is None else v.expand(len(x), v.shape[-1]) for v in update[:3])
    assert value is not None
    h = x if a is None else x * a[:, None]
    h = h @ into.whole().t() * value[:, None]
    if update.R is not None:
        h = h @ update.R.t()
    y = h @ (update.U.t() if update.U is not None else out.whole())  # type: ignore[union-attr]
    return y if b is None else y * b[:, None]


@pytest.mark.parametrize("path", ["rows", "kron"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("examples", [None, 3])
def test_property_11_gradients_are_right(mode: str, path: Path, examples: int | None) -> None:
    into, out = projections(path, mode)
    update, (weight, bias), x = an_update(mode, examples), layer(), inputs()
    bias.requires_grad_()

    def call(x: Tensor, bias: Tensor, *tensors: Tensor) -> Tensor:
        left = iter(tensors)
        return randomized_linear(x, weight, bias, into, out, Update(*(t if t is None else next(left) for t in update)))

    assert torch.autograd.gradcheck(call, (x, bias, *given(update)))


@pytest.mark.parametrize("path", ["rows", "kron"])
@pytest.mark.parametrize("apart", [(True, False, False), (False, True, False), (True, False, True)])
def test_property_11_with_one_draw_per_example_of_some_vectors(path: Path, apart: tuple[bool, ...]) -> None:
    """In blocks, so that their signs have to be found beside the examples."""
    into, out = projections(path, "io", 50)
    draw = torch.Generator().manual_seed(0)
    value, a, b = (
        torch.randn(*((3,) if each else ()), n, generator=draw, dtype=torch.float64).requires_grad_()
        for each, n in zip(apart, (50, D_IN, D_OUT), strict=True)
    )

    def call(x: Tensor, *vectors: Tensor) -> Tensor:
        return randomized_linear(x, None, None, into, out, Update(*vectors))

    assert torch.autograd.gradcheck(call, (inputs(), value, a, b))
    torch.testing.assert_close(call(inputs(), value, a, b), dense(inputs(), into, out, Update(value, a, b)))


@pytest.mark.parametrize("rank", [RANK, 50])
@pytest.mark.parametrize("path", ["rows", "kron"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("examples", [None, 3])
def test_fast_and_composed_are_the_dense_product(mode: str, path: Path, examples: int | None, rank: int) -> None:
    into, out = projections(path, mode, rank)
    update, (weight, bias), x = an_update(mode, examples, rank), layer(), inputs()
    whole = dense(x, into, out, update)
    wanted = torch.autograd.grad((F.linear(x, weight, bias) + whole).square().sum(), [x, *given(update)])
    for function in (randomized_linear, randomized_linear_reference):
        torch.testing.assert_close(function(x, None, None, into, out, update), whole)
        y = function(x, weight, bias, into, out, update)
        torch.testing.assert_close(y, F.linear(x, weight, bias) + whole)
        for one, other in zip(torch.autograd.grad(y.square().sum(), [x, *given(update)]), wanted, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("tokens", [1, 1000])
def test_pieces_make_no_difference(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    into, out = projections("kron", "io")
    x = torch.randn(4, tokens, D_IN, dtype=torch.float64, requires_grad=True)
    for examples in (None, 4):
        update, found = an_update("io", examples), []
        for size in (2**30, 3):
            monkeypatch.setattr(into, "piece", size)
            y = randomized_linear(x, None, None, into, out, update)
            found.append((y, *torch.autograd.grad(y.square().sum(), [x, *given(update)])))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("mode", "numbers"), [("diag", RANK), ("core", RANK), ("half", RANK), ("io", RANK + D_IN)])
def test_what_is_kept_per_token(mode: str, numbers: int) -> None:
    """r numbers per token, and the input where it is scaled; composed of torch's functions it is more than d_out."""

    def kept(function: Any) -> float:
        into, out = projections("kron", mode)
        sizes: dict[int, int] = {}

        def note(t: Tensor) -> Tensor:
            if t.numel() > 60 * max(RANK, 1):  # not vectors and matrices, which are there anyway
                sizes[t.untyped_storage().data_ptr()] = t.numel()
            return t

        x = torch.randn(100, D_IN, dtype=torch.float64)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            function(x, *layer(), into, out, an_update(mode))
        return sum(sizes.values()) / 100

    weight = D_IN * D_OUT / 100  # which needs no gradient, so that x needs none, and it is not kept
    assert kept(randomized_linear) in (numbers, numbers + weight)
    assert kept(randomized_linear_reference) > numbers + (D_OUT if mode in ("diag", "io") else RANK) - 1


def test_nothing_is_kept_where_no_backward_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    into, out = projections("kron", "diag")
    monkeypatch.setattr(into, "piece", 2)
    real, made, alive = into.down, [], []

    def down(x: Tensor, scale: Tensor | None = None) -> Tensor:
        alive.append(sum(each() is not None for each in made))
        found = real(x, scale)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(into, "down", down)
    update, x = an_update("diag"), torch.randn(10, D_IN, dtype=torch.float64)
    with torch.no_grad():
        randomized_linear(x, *layer(), into, out, update)
    assert len(alive) == 5
    assert max(alive) <= 1  # the one before, until the next has its name
    randomized_linear(x, *layer(), into, out, update)
    assert max(alive) >= 4


@pytest.mark.parametrize("function", [randomized_linear, randomized_linear_reference])
def test_zero_vectors_leave_the_layers_bits(function: Any) -> None:
    into, out = projections("kron", "diag", dtype=torch.float32)
    x, (weight, bias) = torch.randn(7, D_IN), layer()
    update = Update(torch.ones(RANK), b=torch.zeros(D_OUT))
    assert torch.equal(
        function(x, weight.float(), bias.float(), into, out, update), F.linear(x, weight.float(), bias.float())
    )


def test_draws_that_are_not_one_per_example_are_refused() -> None:
    into, out = projections("rows", "diag")
    for x in (torch.randn(4, 2, D_IN), torch.randn(D_IN)):
        with pytest.raises(
            ValueError, match=r"a vector has 3 draws, one per example, and the layer's input is of shape"
        ):
            randomized_linear(x.double(), None, None, into, out, an_update("diag", 3))
