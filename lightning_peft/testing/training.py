"""Laws of training: an adapter learns, on any shape of batch, in low precision, recomputed, and cut on the way."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from lightning_peft.adapters.base import Adapter
from lightning_peft.testing.case import Case, Inapplicable, close, holds, same


def learns(case: Case) -> None:
    """From its own start, without any help, a few steps of an optimizer lower the loss.

    Fix: let one of two factors that are multiplied start away from zero: where both are zero, so are both gradients.
    """
    host = case.host(start=True)
    before = _loss(case, host, 0).item()
    optimizer = torch.optim.Adam([p for p in host.parameters() if p.requires_grad], lr=0.01)
    for _ in range(20):
        _step(case, host, optimizer, 0)
    after = _loss(case, host, 0).item()
    holds(after < before, f"20 steps of Adam on one batch bring the loss from {before:.6g} to {after:.6g}")


def takes_any_batch(case: Case) -> None:
    """Any leading dimensions give the same rows: one row, many, none at all.

    Fix: work on the last dimension alone (`F.linear`, `@`), without `view`, `bmm` or names for the others.
    """
    host, x = case.host(), case.inputs()
    adapter = case.adapter(host)
    if case.is_model:
        raise Inapplicable("a model takes batches of texts alone")
    weight: Tensor = adapter.base.weight  # type: ignore[assignment]
    if case.kind.startswith("attention") or weight.dim() > 2:
        raise Inapplicable("an attention reads its layers, and a convolution's input has a shape of its own")
    y = adapter(x)
    for name, batch, rows in (
        ("a single row", x[0, 0], y[0, 0]),
        ("one leading dimension", x[0], y[0]),
        ("three leading dimensions", x[None], y[None]),
        ("an empty batch", x[:0], y[:0]),
    ):
        actual = adapter(batch)
        holds(actual.shape == rows.shape, f"the output for {name} is of shape {tuple(actual.shape)}")
        close(actual, rows, f"{name}: other outputs than the same rows have in a batch")


def survives_autocast(case: Case) -> None:
    """Under bfloat16 autocast the output has the dtype that the base's has, and gradients are right up to rounding.

    Fix: cast the update to the dtype of the base's output before adding it; never write `.float()` on the input alone.
    """
    host, plain, x = case.host(), case.plain(), case.inputs()
    own = {name: p for name, p in case.adapter(host).own_parameters() if p.requires_grad}

    def gradients(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad((y.float() - 1).square().mean(), list(own.values()))

    wanted, exact = host(x).detach(), gradients(host(x))
    with torch.autocast("cpu", torch.bfloat16):
        y, dtype = host(x), plain(x).dtype
    holds(y.dtype == dtype, f"under autocast the output is of {y.dtype}, and the base's of {dtype}")
    close(y.float(), wanted, "under autocast the output differs by more than rounding", rtol=0.05, atol=0.1)
    for (name, parameter), rounded, gradient in zip(own.items(), gradients(y), exact, strict=True):
        holds(rounded.dtype == parameter.dtype, f"under autocast the gradient of {name} is of {rounded.dtype}")
        scale = 0.1 * gradient.abs().max().item() + 1e-3
        close(rounded, gradient, f"under autocast the gradient of {name} differs", rtol=0.1, atol=scale)


def survives_recomputation(case: Case) -> None:
    """Activation checkpointing runs the forward twice and gets the same gradients, dropout included.

    Fix: let `forward` change nothing (no counters, no stored activations), and draw from torch's global generator.
    """
    host, x = case.host().train(), case.inputs()
    own = [p for _, p in case.adapter(host).own_parameters() if p.requires_grad]

    def gradients(recompute: bool) -> tuple[Tensor, ...]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            y: Tensor = checkpoint(host, x, use_reentrant=False) if recompute else host(x)
            return torch.autograd.grad(y.square().mean(), own)

    for once, again in zip(gradients(False), gradients(True), strict=True):
        same(again, once, "a gradient differs under activation checkpointing")


def compacts_in_training(case: Case) -> None:
    """Cut together with its optimizer, it trains on as it would with the components closed.

    Fix: let `compacted` give every parameter its name and dtype, cut along one dimension or left whole, bit for bit.
    """
    from lightning_peft.compaction import compact_training

    host = case.host().train()
    gate, adapter = case.gated(host), case.adapter(host)
    if type(adapter).compacted is Adapter.compacted:
        raise Inapplicable(f"{type(adapter).__name__} has no compacted()")
    if len(gate) < 2:
        raise Inapplicable("the gate has one component")
    optimizer = torch.optim.AdamW([p for p in host.parameters() if p.requires_grad], lr=0.01)
    for step in range(2):
        _step(case, host, optimizer, step)
    gate.keep(torch.arange(len(gate)) != 0)
    twin, its = copy.deepcopy((host, optimizer))
    compact_training(host, [optimizer])
    holds(len(case.gated(host)) == len(gate) - 1, "a closed component is left")
    for step in range(2, 4):
        _step(case, host, optimizer, step)
        _step(case, twin, its, step)
    x = case.inputs()
    close(host.eval()(x), twin.eval()(x), "cut, it trains to other outputs than closed", rtol=1e-4, atol=1e-4)


def _loss(case: Case, host: nn.Module, seed: int) -> Tensor:
    y: Tensor = host(case.inputs(seed=seed))
    return (y - 1).square().mean()


def _step(case: Case, host: nn.Module, optimizer: Optimizer, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # dropout
        loss = _loss(case, host, seed)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
