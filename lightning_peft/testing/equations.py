"""Laws of the equation: what an adapter computes, what its gate does to it, and what gets a gradient."""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.layers import is_convolution, is_transposed, stored
from lightning_peft.rank.budget import RankBudget
from lightning_peft.rank.gate import Gate
from lightning_peft.rank.importance import Taylor
from lightning_peft.testing.case import Case, Inapplicable, close, holds, same


def starts_as_base(case: Case) -> None:
    """A new adapter gives the base's output bit for bit, in training too, where the class says so.

    Fix: start the update at exactly zero (a factor, or the gate's gain), or set `identity_at_start = False`.
    """
    plain, host, x = case.plain(), case.host(start=True), case.inputs()
    if not case.adapter(host).identity_at_start:
        raise Inapplicable("identity_at_start is False")
    beside = dict(host.named_parameters())
    for name, parameter in plain.named_parameters():
        if name in beside:  # torch chooses kernels by what needs a gradient: frozen there, frozen here
            parameter.requires_grad_(beside[name].requires_grad)
    same(host(x), plain(x), "the output of a new adapter differs from its base's")
    same(host.train()(x), plain.train()(x), "in training the output of a new adapter differs from its base's")


def forward_is_effective_weight(case: Case) -> None:
    """`forward(x)` is `effective_weight() x + bias`, with components open and closed.

    Fix: compute the same equation in both, gate and scale included, or set `mergeable = False` if no weight says all.
    """
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        host = case.host(dtype)
        adapter = case.mergeable(host)
        if adapter.gate is not None and len(adapter.gate) > 1:
            adapter.gate.keep(torch.arange(len(adapter.gate)) != 1)
        x, weight = case.inputs(dtype), adapter.effective_weight()
        if case.kind == "embedding":
            y = F.embedding(x, weight.t())
        elif is_convolution(adapter.base):
            base: Any = adapter.base
            y = base._conv_forward(x, stored(base, weight), adapter.bias)
        else:
            y = F.linear(x, weight, adapter.bias)
        close(adapter(x), y, f"forward is not effective_weight() x + bias in {dtype}", tolerance, tolerance)


def weight_is_what_acts(case: Case) -> None:
    """Code that reads `weight` gets the effective one, in the base's layout: a plain layer with it acts the same.

    Fix: return (d_out, d_in) from `effective_weight` and leave `weight` to the base class, which transposes it.
    """
    host, plain, x = case.host(), case.plain(), case.inputs()
    adapter = case.mergeable(host)
    base_weight: Tensor = adapter.base.weight  # type: ignore[assignment]
    holds(adapter.weight.shape == base_weight.shape, "`weight` is not in the base's layout")
    holds(adapter.weight.dtype == base_weight.dtype, "`weight` is not of the base's dtype")
    close(adapter.weight, stored(adapter.base, adapter.effective_weight()), "`weight` is not the effective weight")
    holds(is_transposed(adapter.base) == (case.kind in ("conv1d", "embedding")), "the base is of another kind")
    names = {"attention_in": "layer.in_proj_weight", "attention_out": "layer.out_proj.weight"}
    with torch.no_grad():
        plain.get_parameter(names.get(case.kind, "layer.weight")).copy_(adapter.weight)
        # Without gradients an attention may take its fast path, which reads weights in its own way.
        close(host(x), plain(x), "the model does not act with the adapter's `weight`")
    close(host(x), plain(x), "with gradients the model does not act with the adapter's `weight`")


def closed_component_changes_nothing(case: Case) -> None:
    """Components add up, each by itself; closing removes one whatever its gain, and opening brings it back.

    Fix: multiply component i by `gate.value()[i]`, once and in every method that computes, and couple no components.
    """
    host = case.host(torch.float64)
    gate, adapter = case.gated(host), case.mergeable(host)
    with adapter.constants_held():
        _add_up(gate, adapter)
    gate.keep(torch.arange(len(gate)) != 0)
    without = adapter.effective_weight().detach()
    if gate.gain is not None:
        with torch.no_grad():
            gate.gain[0] += 7.0
        same(adapter.effective_weight(), without, "a closed component acts through its gain")
    holds(not bool(gate.open()[0]), "a closed component counts as open")


def _add_up(gate: Gate, adapter: Adapter) -> None:
    n = len(gate)
    whole = adapter.effective_weight().detach()
    gate.keep(torch.zeros(n))
    none = adapter.effective_weight().detach()
    total = none.clone()
    for i in range(n):
        gate.keep(torch.arange(n) == i)
        part = adapter.effective_weight().detach() - none
        holds(bool(part.abs().max() > 1e-6), f"component {i} alone adds nothing to the effective weight")
        total += part
    gate.keep(torch.ones(n))
    close(adapter.effective_weight(), whole, "components that were closed and opened again are not what they were")
    close(total, whole, "the components do not add up to the effective weight")


def closed_component_is_scored(case: Case) -> None:
    """The mask's gradient measures a closed component too, so that it may come back.

    Fix: use `gate.value()` in the graph as it is: not detached, not indexed by what is open, not compared.
    """
    host = case.host()
    gate = case.gated(host)
    taylor = Taylor(beta=0.0)
    taylor.track(RankBudget.of(host))
    gate.keep(torch.arange(len(gate)) != 0)
    host(case.inputs()).square().mean().backward()
    taylor.update()
    scores = next(iter(taylor.scores().values()))
    taylor.release()
    holds(bool((scores > 0).all()), f"components without a score: {scores.tolist()}")


def only_adapters_get_gradients(case: Case) -> None:
    """Every trainable parameter of the adapter gets a gradient, and the base none.

    Fix: freeze what is not trained with `requires_grad_(False)`, use what is, and leave the base as `Adapter` froze it.
    """
    host = case.host().train()
    own = {id(p) for _, p in case.adapter(host).own_parameters() if p.requires_grad}
    holds(bool(own), "the adapter has nothing to train")
    host(case.inputs()).square().mean().backward()
    for name, parameter in host.named_parameters():
        wanted = id(parameter) in own
        holds(parameter.requires_grad == wanted, f"{name}.requires_grad is {parameter.requires_grad}")
        holds((parameter.grad is not None) == wanted, f"{name} {'gets no' if wanted else 'gets a'} gradient")


def may_be_called_by_keyword(case: Case) -> None:
    """The adapter takes its input by the name that the base has for it, as well as by position.

    Fix: call the input of `forward` x, and leave `__call__` to the base class, which knows `input`.
    """
    host, x = case.host(), case.inputs()
    adapter = case.adapter(host)
    if case.is_model or case.kind.startswith("attention"):
        raise Inapplicable("it is not called with one input")
    name = next(iter(inspect.signature(adapter.base.forward).parameters))
    same(adapter(**{name: x}), adapter(x), f"called with {name}=, the adapter gives something else")


def output_may_change_in_place(case: Case) -> None:
    """What follows may change the output in place, as it may behind a plain layer, with the same gradients.

    Fix: return a tensor of its own, no view, from a `torch.autograd.Function`, and do not keep it for the backward.
    """
    host, x = case.host(), case.inputs()
    trained = [p for _, p in case.adapter(host).own_parameters() if p.requires_grad]
    expected = torch.autograd.grad((2 * host(x)).square().sum(), trained)
    try:
        found = torch.autograd.grad(host(x).mul_(2).square().sum(), trained)
    except RuntimeError as error:
        raise AssertionError(f"the output cannot be changed in place: {error}") from error
    for gradient, wanted in zip(found, expected, strict=True):
        close(gradient, wanted, "the gradient is another one behind a change in place")


def mask_gradient_is_finite_difference(case: Case) -> None:
    """The mask's gradient is the derivative of the loss, at open and at closed components, in float64.

    Of the loss as the gradient sees it: with the adapter's constants held.

    Fix: let the mask enter the output linearly, in the adapter's dtype; no straight-through estimate, no rounding.
    """
    host, x = case.host(torch.float64), case.inputs(torch.float64)
    gate = case.gated(host)
    gate.keep(torch.arange(len(gate)) != 0)
    mask = gate.mask.requires_grad_(True)

    def loss() -> Tensor:
        y: Tensor = host(x)
        return (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) + y.square()).mean()

    (gradient,) = torch.autograd.grad(loss(), mask)
    step = 2.0**-9  # exact in float32, where the mask lives
    with torch.no_grad(), case.adapter(host).constants_held():
        differences = torch.zeros_like(gradient)
        for i in range(len(gate)):
            here = mask[i].item()
            mask[i] = here + step
            above = loss()
            mask[i] = here - step
            differences[i] = (above - loss()) / (2 * step)
            mask[i] = here
    close(gradient, differences, "the mask's gradient is not the loss's derivative", rtol=1e-3, atol=1e-5)
