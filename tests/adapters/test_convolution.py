"""Adapters on nn.Conv1d, Conv2d and Conv3d: every way in which a kernel can move over its input."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_peft import LoRA, RankBudget, eject, inject, merge
from lightning_peft.adapters.layers import is_convolution, is_transformers_conv1d, matrix, stored
from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.functional import convolution

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (lambda: nn.Conv2d(4, 6, 3), (4, 7, 6)),
    "strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), bias=False), (4, 7, 6)),
    "dilated": (lambda: nn.Conv1d(4, 6, 3, dilation=2, padding=2), (4, 9)),
    "same": (lambda: nn.Conv2d(4, 6, (5, 3), padding="same", dilation=(1, 2)), (4, 7, 6)),
    "valid": (lambda: nn.Conv3d(4, 6, (1, 3, 2), padding="valid"), (4, 3, 5, 4)),
    "reflect": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 2), padding_mode="reflect", stride=2), (4, 7, 6)),
    "replicate": (lambda: nn.Conv3d(4, 6, 2, padding=1, padding_mode="replicate"), (4, 3, 4, 3)),
    "circular, same": (lambda: nn.Conv1d(4, 6, 4, padding="same", padding_mode="circular"), (4, 9)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1), (4, 7, 6)),
    "grouped, reflect": (lambda: nn.Conv1d(4, 8, 3, groups=4, padding=1, padding_mode="reflect"), (4, 9)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4, padding="same"), (4, 7, 6)),
    "pointwise": (lambda: nn.Conv2d(4, 6, 1), (4, 7, 6)),
}


def adapted(base: nn.Module, **how: Any) -> LoRA:
    """An adapter off its start, a component closed."""
    adapter = LoRA(base, **{"rank": 3, "alpha": 6.0, **how})
    nn.init.normal_(adapter.B)
    adapter.gate.keep(torch.tensor([1, 0, 1]))
    return adapter.eval()


@pytest.fixture(params=["merged", "apart"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """All of it by either form: what is chosen for a layer's size must not matter."""
    chosen: str = request.param
    monkeypatch.setattr(convolution, "is_merged", lambda *_: chosen == "merged")
    return chosen


@pytest.mark.parametrize("memory", ["plain", "channels last", "one image"])
@pytest.mark.parametrize("kind", LAYERS)
def test_it_is_the_base_with_another_kernel(kind: str, memory: str, form: str) -> None:
    build, shape = LAYERS[kind]
    base = build().double()
    x = torch.randn(*([] if memory == "one image" else [2]), *shape, dtype=torch.float64)
    if memory == "channels last":
        layout = {2: None, 3: torch.channels_last, 4: torch.channels_last_3d}[len(shape)]
        if layout is None:
            pytest.skip("there is no such layout for a Conv1d")
        base, x = base.to(memory_format=layout), x.contiguous(memory_format=layout)
    adapter = adapted(base)
    assert adapter.weight.shape == base.weight.shape  # type: ignore[union-attr]
    assert adapter.gate.cost == sum(matrix(base).shape)
    plain = copy.deepcopy(base)
    plain.weight.data = adapter.weight.data  # type: ignore[union-attr]
    expected = plain(x)
    torch.testing.assert_close(adapter(x), expected, rtol=1e-12, atol=1e-12)
    assert adapter(x).stride() == expected.stride()
    base.register_forward_hook(lambda module, args, output: None)  # somebody listens: it is called
    torch.testing.assert_close(adapter(x), expected, rtol=1e-12, atol=1e-12)


def test_a_kernel_as_a_matrix_and_back() -> None:
    layer = nn.Conv3d(4, 6, (1, 2, 3), groups=2)
    assert matrix(layer).shape == (6, 12)
    assert torch.equal(stored(layer, matrix(layer)), layer.weight)
    assert is_convolution(layer)
    assert not is_transformers_conv1d(nn.Conv1d(2, 2, 1))


def test_components_add_up_also_in_groups(form: str) -> None:
    layer = nn.Conv2d(4, 6, 3, groups=2).double()
    adapter = adapted(layer)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    parts = []
    for i in range(3):
        adapter.gate.keep(torch.arange(3) == i)
        parts.append(adapter(x) - layer(x))
    adapter.gate.keep(torch.ones(3))
    torch.testing.assert_close(layer(x) + sum(parts), adapter(x))


def test_dropout_acts_on_the_adapters_input_alone() -> None:
    adapter = adapted(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), dropout=0.5)
    x = torch.ones(3000, 4, 3, 3)
    with torch.no_grad():
        plain = adapter.base(x)
        update = adapter(x) - plain
        noisy = adapter.train()(x) - plain
        assert not torch.allclose(noisy[0], noisy[1])
        torch.testing.assert_close(noisy.mean(0), update.mean(0), rtol=0.1, atol=0.5)
        nn.init.zeros_(adapter.B)
        assert torch.equal(adapter(x), plain)


@pytest.mark.parametrize("kind", ["plain", "circular, same", "grouped"])
def test_autocast_gives_the_dtype_that_the_base_gives(kind: str) -> None:
    build, shape = LAYERS[kind]
    base = build()
    adapter, x = adapted(base), torch.randn(2, *shape)
    expected = adapter(x)
    with torch.autocast("cpu", torch.bfloat16):
        actual = adapter(x)
        assert actual.dtype == base(x).dtype == torch.bfloat16
    torch.testing.assert_close(actual.float(), expected, rtol=5e-2, atol=0.1)
    actual.float().sum().backward()
    assert adapter.A.grad is not None
    assert adapter.A.grad.dtype == torch.float32


def test_a_wider_adapter_on_a_narrow_base_computes_in_its_own_dtype() -> None:
    adapter = adapted(nn.Conv2d(4, 6, 3).bfloat16())
    assert adapter.A.dtype == torch.float32
    x = torch.randn(2, 4, 5, 5, dtype=torch.bfloat16)
    assert adapter(x).dtype == torch.bfloat16
    torch.testing.assert_close(adapter(x).float(), adapted_twin(adapter)(x.float()), rtol=2e-2, atol=5e-2)


def adapted_twin(adapter: LowRank) -> LowRank:
    return copy.deepcopy(adapter).float()


class Wrapper(nn.Module):
    """As FSDP1 and activation checkpointing wrap a layer, and answer for it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.module, x, use_reentrant=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


@pytest.mark.parametrize("kind", ["strided", "reflect", "grouped"])
def test_a_base_that_was_wrapped_after_injection(kind: str) -> None:
    build, shape = LAYERS[kind]
    adapter, x = adapted(build().double()), torch.randn(2, *shape, dtype=torch.float64)
    expected = adapter(x)
    adapter.base = Wrapper(adapter.base)
    torch.testing.assert_close(adapter(x), expected, rtol=1e-12, atol=1e-12)


def test_a_depthwise_kernel_has_a_rank_of_its_size_at_most() -> None:
    with pytest.raises(ValueError, match="rank=16 is not possible on a layer of 9 inputs and 16 outputs: give a rank"):
        LoRA(nn.Conv2d(16, 16, 3, groups=16), rank=16)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.pointwise(self.depthwise(self.norm(self.stem(x)).relu()))).relu()
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


def test_what_is_adapted_when_nobody_says() -> None:
    network = Network()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    done = inject(network, partial(LoRA, rank=4))
    assert done.adapted == ("stem", "pointwise")
    assert done.trained == ("fc.bias", "fc.weight")
    assert RankBudget.of(network)["stem"].gate.cost == 27 + 8
    eject(network)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert inject(network, partial(LoRA, rank=4), ["depthwise"]).adapted == ("depthwise",)


def test_running_statistics_of_a_frozen_layer_are_torchs_own_affair() -> None:
    """In train mode they follow the data, as without adapters; in eval mode, which the user may choose, they do not."""
    network = Network()
    inject(network, partial(LoRA, rank=4))
    assert not any(p.requires_grad for p in network.norm.parameters())
    before = network.norm.running_mean.clone()  # type: ignore[union-attr]
    network.train()(torch.randn(4, 3, 6, 6) + 1)
    moved = network.norm.running_mean.clone()  # type: ignore[union-attr]
    assert not torch.equal(moved, before)
    network.norm.eval()
    network(torch.randn(4, 3, 6, 6) + 1)
    assert torch.equal(network.norm.running_mean, moved)  # type: ignore[arg-type]


def test_merged_into_a_channels_last_network_it_computes_the_same() -> None:
    network = Network().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    inject(network, partial(LoRA, rank=4), ["stem", "depthwise", "pointwise"])
    for site in RankBudget.of(network).values():
        nn.init.normal_(site.adapter.B)
    x = torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last)
    expected = network(x)
    merge(network)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
