"""The fast path of low-rank layers: equal to the plain composition in value, gradient and draws; bitwise its base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.utils.checkpoint import checkpoint

from lightning_peft.functional.low_rank import (
    _drop,
    _drop_gradient,
    is_fast,
    low_rank_linear,
    low_rank_linear_reference,
    low_rank_update,
)

D_IN, D_OUT, RANK = 7, 5, 3
Inputs = dict[str, Tensor | None]
Result = tuple[Tensor, Inputs]


@pytest.fixture(autouse=True)
def _own_draws() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def make(*shape: int, bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """Inputs of the layer, all with gradient but the base's."""
    g = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": draw(*shape, D_IN).requires_grad_(),
        "weight": draw(D_OUT, D_IN),
        "bias": draw(D_OUT) if bias else None,
        "A": draw(RANK, D_IN).requires_grad_(),
        "B": draw(D_OUT, RANK).requires_grad_(),
        "value": draw(RANK).requires_grad_(),
    }


def copied(inputs: Inputs) -> Inputs:
    return {k: None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for k, t in inputs.items()}


def gradients(layer: Callable[..., Tensor], inputs: Inputs, dropout: float = 0.0, seed: int = 1) -> Result:
    """Output, and the gradient of a random weighing of it to every input that wants one."""
    inputs = copied(inputs)
    torch.manual_seed(seed)
    y = layer(**inputs, dropout=dropout)
    weighing = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weighing.to(y.dtype)).sum().backward()
    return y.detach(), {k: None if t is None else t.grad for k, t in inputs.items()}


def is_fused(y: Tensor) -> bool:
    return y.grad_fn is not None and "LowRankLinear" in type(y.grad_fn).__name__


# Rounding in float32: each number is a sum of at most 40 products of numbers of size 1, added in another order. The
# error of such a sum is below 40 * 2^-24 * sum |products| < 1e-4; what is observed is a tenth of the tolerance.
def assert_same(got: Result, expected: Result) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=1e-5)
    for name, grad in expected[1].items():
        if grad is None:
            assert got[1][name] is None, name
        else:
            torch.testing.assert_close(got[1][name], grad, rtol=1e-5, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 2), ()])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_composition(shape: tuple[int, ...], bias: bool) -> None:
    inputs = make(*shape, bias=bias)
    assert is_fused(low_rank_linear(**inputs))
    assert_same(gradients(low_rank_linear, inputs), gradients(low_rank_linear_reference, inputs))


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout: float) -> None:
    inputs = make(2, 3, dtype=torch.float64)
    inputs["bias"].requires_grad_()
    names = [name for name, t in inputs.items() if t is not None and t.requires_grad]

    def layer(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same entries dropped in every evaluation
        return low_rank_linear(**(inputs | dict(zip(names, tensors, strict=True))), dropout=dropout)

    assert names == ["x", "bias", "A", "B", "value"]
    assert is_fused(layer(*(inputs[name] for name in names)))
    assert gradcheck(layer, [inputs[name] for name in names])


@pytest.mark.parametrize("wanted", list(product([True, False], repeat=5)))
def test_only_what_wants_a_gradient_gets_one(wanted: tuple[bool, ...]) -> None:
    inputs = make(2, 3)
    for name, want in zip(("x", "bias", "A", "B", "value"), wanted, strict=True):
        inputs[name].requires_grad_(want)
    if not any(wanted):
        assert not low_rank_linear(**inputs).requires_grad
        return
    assert_same(gradients(low_rank_linear, inputs), gradients(low_rank_linear_reference, inputs))


def test_nothing_is_kept_that_no_gradient_needs() -> None:
    inputs = make(64)

    def kept() -> set[tuple[int, ...]]:
        shapes: list[tuple[int, ...]] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: shapes.append(tuple(t.shape)) or t, lambda t: t):
            low_rank_linear(**inputs)
        return set(shapes)

    everything = kept()
    assert {(64, D_IN), (RANK, 64), (D_OUT, D_IN)} <= everything
    assert not any(64 in shape and D_OUT in shape for shape in everything)
    inputs["x"].requires_grad_(False)
    assert (D_OUT, D_IN) not in kept()
    inputs["A"].requires_grad_(False)
    assert (64, D_IN) not in kept()


def test_gradient_of_value_is_the_finite_difference() -> None:
    inputs = make(4, dtype=torch.float64)
    _, grads = gradients(low_rank_linear, inputs)
    weighing = torch.randn(4, D_OUT, generator=torch.Generator().manual_seed(2)).double()
    for i, eps in product(range(RANK), [1e-5]):
        shifted = []
        for sign in (1, -1):
            moved = copied(inputs)
            moved["value"] = inputs["value"].detach().clone()
            moved["value"][i] += sign * eps
            shifted.append((low_rank_linear(**moved) * weighing).sum().item())
        # The layer is linear in value: the difference has no truncation error, only rounding / eps.
        assert grads["value"][i].item() == pytest.approx((shifted[0] - shifted[1]) / (2 * eps), rel=1e-7)


@pytest.mark.parametrize("zero", ["B", "value"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("d_in", "d_out"), [(384, 384), (1536, 200), (31, 17)])
@pytest.mark.parametrize("shape", [(), (1,), (65,), (3, 20), (2, 3, 4), (1400,), (20, 70)])
@pytest.mark.parametrize("layout", ["rows", "strided"])
def test_is_its_base_bit_for_bit_without_an_update(
    zero: str, bias: bool, d_in: int, d_out: int, shape: tuple[int, ...], layout: str
) -> None:
    base = nn.Linear(d_in, d_out, bias=bias).requires_grad_(False)
    factors = {"A": torch.randn(8, d_in), "B": torch.randn(d_out, 8), "value": torch.ones(8)}
    factors[zero].zero_()
    x = torch.randn(*shape, d_in)
    if layout == "strided":
        x = torch.randn(*shape, 2 * d_in)[..., ::2]
    y = low_rank_linear(x, base.weight, base.bias, **{k: t.requires_grad_() for k, t in factors.items()})
    assert is_fused(y)
    assert torch.equal(y, F.linear(x, base.weight, base.bias))


@pytest.mark.parametrize("shape", [(1100,), (11, 100)])
def test_large_outputs_are_written_in_one_pass_less(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    # float64: sums over 1100 tokens err by more than the tolerance in float32
    inputs = make(*shape, dtype=torch.float64) | {"weight": torch.randn(256, D_IN, dtype=torch.float64)}
    inputs["bias"] = torch.randn(256, dtype=torch.float64)
    inputs["B"] = torch.randn(256, RANK, dtype=torch.float64, requires_grad=True)
    assert_same(gradients(low_rank_linear, inputs, 0.3), gradients(low_rank_linear_reference, inputs, 0.3))
    called = []
    monkeypatch.setattr(F, "linear", lambda *args: called.append(args))
    low_rank_linear(**inputs)
    assert not called


def test_a_transposed_weight_is_the_conv1d_of_transformers() -> None:
    pytransformers = pytest.importorskip("transformers.pytorch_utils")
    conv = pytransformers.Conv1D(D_OUT, D_IN).requires_grad_(False)
    inputs = make(2, 3) | {"weight": conv.weight.t(), "bias": conv.bias}
    assert_same(gradients(low_rank_linear, inputs), gradients(low_rank_linear_reference, inputs))
    inputs["B"] = torch.zeros(D_OUT, RANK, requires_grad=True)
    assert torch.equal(low_rank_linear(**inputs), conv(inputs["x"]))


@pytest.mark.parametrize("view", ["transposed", "expanded", "sliced"])
def test_inputs_and_gradients_of_any_strides(view: str) -> None:
    inputs = make(3, 4)
    x = inputs["x"].detach()
    strided = {
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "expanded": x[:1].expand(3, 4, D_IN),
        "sliced": torch.cat([x, x], -1)[..., ::2],
    }[view]
    results = []
    for layer in (low_rank_linear, low_rank_linear_reference):
        leaf = strided.detach().requires_grad_()
        y = layer(**(inputs | {"x": leaf}), dropout=0.0)
        # The gradient that arrives is transposed, then expanded from one number.
        grad = torch.autograd.grad(y.transpose(0, 1).square().sum(), leaf, retain_graph=True)[0]
        results.append((y.detach(), {"x": grad, "A": torch.autograd.grad(y.sum(), inputs["A"])[0]}))
    assert_same(results[0], results[1])


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)])
def test_empty_batch(shape: tuple[int, ...]) -> None:
    y, grads = gradients(low_rank_linear, make(*shape), dropout=0.3)
    assert y.shape == (*shape, D_OUT)
    assert grads["x"].shape == (*shape, D_IN)
    assert all(grads[name].count_nonzero() == 0 for name in ("A", "B", "value"))


@pytest.mark.parametrize("dropout", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("layout", ["rows", "transposed"])
def test_dropout_of_both_paths_draws_the_same(dropout: float, layout: str) -> None:
    inputs = make(6, 8)
    if layout == "transposed":
        inputs["x"] = inputs["x"].detach().transpose(0, 1).requires_grad_()
    got = gradients(low_rank_linear, inputs, dropout)
    state = torch.get_rng_state()
    assert_same(got, gradients(low_rank_linear_reference, inputs, dropout))
    if dropout < 1:  # then nothing is left to draw
        assert torch.equal(state, torch.get_rng_state())
        assert not torch.equal(got[0], gradients(low_rank_linear, inputs, dropout, seed=5)[0])


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_in_one_kernel_as_on_accelerators(p: float) -> None:
    x = torch.randn(3, 8, D_IN)
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    expected = F.dropout(leaf, p)
    expected.backward(x)
    torch.manual_seed(1)
    dropped, noise = _drop(x, p, fused=True)
    assert noise.dtype == torch.bool
    torch.testing.assert_close(dropped, expected.detach())
    torch.testing.assert_close(_drop_gradient(x.clone(), noise, p), leaf.grad)


@pytest.mark.parametrize("p", [0.1, 0.37, 0.5, 0.999])
def test_dropout_on_a_cpu_drops_the_share_that_it_should(p: float) -> None:
    x = torch.ones(401, 997)  # odd: the last draw is not used up
    dropped, noise = _drop(x, p, fused=False)
    values = dropped.unique()
    assert len(values) == 2
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / (1 - p)]), rtol=2**-16 / (1 - p), atol=0)
    deviation = (p * (1 - p) / (x.numel() / 4)) ** 0.5
    for lane in range(4):  # each of the four parts of a draw
        assert abs(float((dropped.flatten()[lane::4] == 0).double().mean()) - p) < 5 * deviation
    both = ((dropped[:, 1:] == 0) & (dropped[:, :-1] == 0)).double().mean()  # neighbours know nothing of each other
    assert abs(float(both) - p * p) < 5 * (2 * p * p * (1 - p * p) / x.numel()) ** 0.5 + 2**-15
    torch.testing.assert_close(_drop_gradient(x.clone(), noise, p), dropped)


def test_dropout_leaves_the_base_alone() -> None:
    inputs = make(50)
    base = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    update = low_rank_linear(**inputs, dropout=0.5) - base
    torch.manual_seed(0)
    low_rank_linear(**make(50), dropout=0.0)
    assert torch.equal(low_rank_linear(**(inputs | {"value": torch.zeros(RANK)}), dropout=0.5), base)
    assert (update.abs().sum(-1) > 0).all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_autocast_computes_as_f_linear_does(dropout: float) -> None:
    inputs = make(4, 6)
    exact = gradients(low_rank_linear, inputs, dropout)
    with torch.autocast("cpu", torch.bfloat16):
        fused = is_fused(low_rank_linear(**inputs))
        expected_dtype = F.linear(inputs["x"], inputs["weight"]).dtype
        inside = gradients(low_rank_linear, inputs, dropout)  # backward under autocast too
        torch.manual_seed(1)
        run = copied(inputs)
        y = low_rank_linear(**run, dropout=dropout)
        no_update = low_rank_linear(**(inputs | {"B": torch.zeros(D_OUT, RANK)}))
        base = F.linear(inputs["x"], inputs["weight"], inputs["bias"])
    weighing = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    (y * weighing.to(y.dtype)).sum().backward()  # and outside, as Lightning calls it
    assert fused
    assert y.dtype == expected_dtype == torch.bfloat16
    assert torch.equal(no_update, base)
    for name in ("x", "A", "B", "value"):
        assert inside[1][name].dtype == torch.float32
        assert torch.equal(inside[1][name], run[name].grad)
        # bfloat16 has 8 bits: each of three roundings in a row errs by 2^-9 of the largest term.
        size = exact[1][name].abs().max().item()
        torch.testing.assert_close(run[name].grad, exact[1][name], rtol=0.05, atol=0.02 * size)
    torch.testing.assert_close(y.detach().float(), exact[0], rtol=0.05, atol=0.1)


def test_a_backward_inside_autocast_of_a_forward_outside_keeps_its_precision() -> None:
    inputs = make(4)
    expected = gradients(low_rank_linear, inputs)
    run = copied(inputs)
    y = low_rank_linear(**run, dropout=0.0)
    weighing = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        (y * weighing).sum().backward()
    assert all(torch.equal(run[name].grad, expected[1][name]) for name in ("x", "A", "B", "value"))


def test_float32_adapters_beside_a_bfloat16_base_keep_their_precision() -> None:
    inputs = make(4, 6)
    low = inputs | {k: inputs[k].detach().bfloat16() for k in ("weight", "bias")}
    low["x"] = inputs["x"].detach().bfloat16().requires_grad_()
    assert is_fused(low_rank_linear(**low))
    got = gradients(low_rank_linear, low, 0.2)
    expected = gradients(low_rank_linear_reference, low, 0.2)
    assert got[0].dtype == torch.bfloat16
    assert got[1]["A"].dtype == torch.float32
    # Both round once, at the end, from float32; the adapter's own gradients never pass through bfloat16 inside.
    torch.testing.assert_close(got[0], expected[0], rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(got[1]["x"], expected[1]["x"], rtol=2**-6, atol=2**-5)
    for name in ("A", "B", "value"):
        torch.testing.assert_close(got[1][name], expected[1][name], rtol=1e-5, atol=2e-5)
    low["B"] = torch.zeros(D_OUT, RANK)
    assert torch.equal(low_rank_linear(**low), F.linear(low["x"], low["weight"], low["bias"]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_one_dtype_throughout(dtype: torch.dtype) -> None:
    inputs = make(4, dtype=dtype)
    got, expected = gradients(low_rank_linear, inputs), gradients(low_rank_linear_reference, inputs)
    assert all(grad.dtype == dtype for grad in got[1].values() if grad is not None)
    tolerance = 0.06 if dtype == torch.bfloat16 else 1e-12
    for name in ("x", "A", "B", "value"):
        size = expected[1][name].abs().max().item()
        torch.testing.assert_close(got[1][name], expected[1][name], rtol=tolerance, atol=tolerance * size)


def test_a_layer_used_twice_in_a_step() -> None:
    inputs = make(4) | {"weight": torch.randn(D_IN, D_IN), "bias": None}
    inputs["B"] = torch.randn(D_IN, RANK, requires_grad=True)

    def twice(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, dropout: float, **rest: Tensor) -> Tensor:
            return layer(layer(x, **rest, dropout=dropout).tanh(), **rest, dropout=dropout)

        return run

    got, expected = (gradients(twice(layer), inputs, 0.2) for layer in (low_rank_linear, low_rank_linear_reference))
    assert_same(got, expected)


def test_the_graph_may_be_walked_twice_and_the_output_changed_in_place() -> None:
    inputs = make(4)
    y = low_rank_linear(**inputs)
    first = torch.autograd.grad(y.sum(), inputs["A"], retain_graph=True)[0]
    y += 1.0
    assert torch.equal(torch.autograd.grad(y.sum(), inputs["A"])[0], first)


def test_non_reentrant_checkpointing_is_exact() -> None:
    def saved(**arguments: object) -> Tensor:
        return checkpoint(lambda x: low_rank_linear(x, **arguments).tanh(), arguments.pop("x"), use_reentrant=False)

    def direct(**arguments: object) -> Tensor:
        return low_rank_linear(**arguments).tanh()

    inputs = make(4, 6)
    expected, got = gradients(direct, inputs, 0.3), gradients(saved, inputs, 0.3)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][name], expected[1][name]) for name in ("x", "A", "B", "value"))


def test_a_tensor_changed_before_the_backward_is_noticed() -> None:
    inputs = make(4)
    y = low_rank_linear(**inputs)
    with torch.no_grad():
        inputs["A"].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient(mode: type) -> None:
    inputs = make(4)
    with mode():
        y = low_rank_linear(**inputs)
    assert not y.requires_grad
    assert torch.equal(y, low_rank_linear(**inputs))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_steps_aside_under_compile(backend: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(low_rank_linear, backend=backend, fullgraph=True)
    inputs = make(4)
    assert not is_fused(compiled(**inputs, dropout=0.0))
    assert_same(gradients(compiled, inputs), gradients(low_rank_linear_reference, inputs))


def test_a_base_that_wants_a_gradient_gets_it() -> None:
    inputs = make(4)
    inputs["weight"].requires_grad_()
    got = gradients(low_rank_linear, inputs)
    assert got[1]["weight"].shape == (D_OUT, D_IN)
    assert_same(got, gradients(low_rank_linear_reference, inputs))
    with torch.no_grad():
        assert is_fast(*inputs.values())


# torch: loading its own forward-mode decompositions still calls torch.jit.script
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_steps_aside_for_functional_transforms_and_forward_derivatives() -> None:
    inputs = {k: None if t is None else t.detach() for k, t in make(4).items()}
    x = inputs.pop("x")
    one_by_one = torch.vmap(lambda row: low_rank_linear(row, **inputs))(x)
    torch.testing.assert_close(one_by_one, low_rank_linear(x, **inputs), rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda t: low_rank_linear(t, **inputs), (x,), (direction,))
    torch.testing.assert_close(tangent, low_rank_linear(direction, **(inputs | {"bias": None})), rtol=1e-5, atol=1e-5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, direction)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(low_rank_linear(dual, **inputs)).tangent, tangent)


def test_steps_aside_for_tensor_subclasses() -> None:
    class Marked(Tensor):
        pass

    inputs = make(4)
    assert is_fast(*inputs.values())
    for name in ("x", "weight", "bias", "A", "B", "value"):
        marked = inputs | {name: inputs[name].detach().as_subclass(Marked)}
        assert not is_fast(*marked.values()), name
        assert type(low_rank_linear(**marked)) is Marked


def test_autocast_leaves_float64_alone() -> None:
    inputs = make(4, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(inputs["x"], inputs["weight"]).dtype == torch.float64
        got = gradients(low_rank_linear, inputs, 0.3)
    expected = gradients(low_rank_linear, inputs, 0.3)
    assert torch.equal(got[0], expected[0])
    assert all(torch.equal(got[1][name], expected[1][name]) for name in ("x", "A", "B", "value"))


def test_a_second_derivative_is_refused_and_the_reference_has_it() -> None:
    def penalty(layer: Callable[..., Tensor]) -> None:
        inputs = make(4)
        (gradient,) = torch.autograd.grad(layer(**inputs).square().sum(), inputs["x"], create_graph=True)
        gradient.square().sum().backward()
        assert inputs["A"].grad is not None

    penalty(low_rank_linear_reference)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty(low_rank_linear)


def test_update_is_what_is_added() -> None:
    inputs = make(4)
    update = low_rank_update(*(inputs[name] for name in ("x", "A", "B", "value")))
    weight = (inputs["B"] * inputs["value"]) @ inputs["A"]
    torch.testing.assert_close(update, inputs["x"] @ weight.t(), rtol=1e-5, atol=1e-5)
