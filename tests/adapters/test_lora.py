from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from transformers.pytorch_utils import Conv1D

from lightning_peft import LoRA


def adapted(base: nn.Module | None = None, rank: int = 3, alpha: float = 6.0, dropout: float = 0.0) -> LoRA:
    """An adapter off its start."""
    adapter = LoRA(base or nn.Linear(8, 6), rank, alpha, dropout)
    nn.init.normal_(adapter.B)
    return adapter


def test_it_starts_as_in_the_authors_code() -> None:
    adapter = LoRA(nn.Linear(400, 300), rank=50)
    bound = 1 / sqrt(400)
    assert adapter.A.shape == (50, 400)
    assert adapter.B.shape == (300, 50)
    assert adapter.A.abs().max() <= bound
    assert adapter.A.abs().max() > 0.99 * bound
    assert abs(adapter.A.std().item() - bound / sqrt(3)) < 0.02 * bound
    assert not adapter.B.any()
    assert adapter.gate.gain is None
    assert adapter.gate.cost == 700


def test_the_update_is_scaled_by_alpha_over_rank() -> None:
    adapter = adapted()
    assert adapter.scaling == 2.0
    torch.testing.assert_close(adapter.update(), 2.0 * adapter.B @ adapter.A)
    adapter.gate.keep(torch.tensor([0, 1, 0]))
    torch.testing.assert_close(adapter.update(), 2.0 * torch.outer(adapter.B[:, 1], adapter.A[1]))


def test_the_base_is_frozen_and_kept() -> None:
    base = nn.Linear(8, 6)
    adapter = LoRA(base, rank=2)
    assert adapter.base is base
    assert not any(p.requires_grad for p in base.parameters())
    assert {name for name, p in adapter.named_parameters() if p.requires_grad} == {"A", "B"}
    assert [name for name, _ in adapter.own_parameters()] == ["A", "B"]


def test_it_answers_for_its_base() -> None:
    base = nn.Linear(8, 6)
    adapter = adapted(base)
    assert (adapter.in_features, adapter.out_features) == (8, 6)
    assert adapter.bias is base.bias
    assert not torch.equal(adapter.weight, base.weight)
    assert not hasattr(adapter, "no_such_thing")
    with pytest.raises(AttributeError, match="no_such_thing"):
        adapter.no_such_thing  # noqa: B018


def test_an_embedding_answers_with_its_own_words() -> None:
    adapter = adapted(nn.Embedding(8, 6, padding_idx=0))
    assert (adapter.num_embeddings, adapter.embedding_dim, adapter.padding_idx) == (8, 6, 0)
    assert adapter.weight.shape == (8, 6)
    assert adapter.effective_weight().shape == (6, 8)
    x = torch.tensor([[0, 3], [7, 0]])
    torch.testing.assert_close(adapter(x), F.embedding(x, adapter.weight))


def test_dropout_acts_on_the_adapters_input_alone_and_only_in_training() -> None:
    adapter = adapted(dropout=0.5)
    x = torch.ones(2000, 8)
    with torch.no_grad():
        plain = adapter.base(x)
        update = adapter.eval()(x) - plain
        torch.testing.assert_close(update[0], adapter.update() @ x[0])
        noisy = adapter.train()(x) - plain
    assert not torch.allclose(noisy[0], noisy[1])
    torch.testing.assert_close(noisy.mean(0), update[0], rtol=0.1, atol=0.5)
    nn.init.zeros_(adapter.B)
    assert torch.equal(adapter(x), adapter.base(x))


@pytest.mark.parametrize("layer", [lambda: nn.Linear(8, 6), lambda: Conv1D(6, 8)], ids=["linear", "conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hooks_on_the_base_are_heard(layer: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    adapter = adapted(layer()).to(dtype)
    x = torch.randn(5, 8, dtype=dtype, requires_grad=True)
    expected = adapter(x)
    heard: list[Tensor] = []
    handle = adapter.base.register_forward_hook(lambda module, args, output: heard.append(output))
    actual = adapter(x)
    assert torch.equal(heard[0], adapter.base(x))
    assert actual.dtype == dtype
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    handle.remove()
    assert torch.equal(adapter(x), expected)


def test_what_a_hook_makes_of_the_base_counts() -> None:
    adapter = adapted()
    x = torch.randn(5, 8)
    before = adapter(x)
    adapter.base.register_forward_hook(lambda module, args, output: output + 1)
    torch.testing.assert_close(adapter(x), before + 1)


@pytest.mark.parametrize(
    ("base", "own"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_it_is_float32_or_as_wide_as_its_base(base: torch.dtype, own: torch.dtype) -> None:
    adapter = adapted(nn.Linear(8, 6).to(base))
    assert adapter.A.dtype == adapter.B.dtype == adapter.effective_weight().dtype == own
    assert adapter.weight.dtype == base
    assert adapter(torch.randn(2, 8, dtype=base)).dtype == base


@pytest.mark.parametrize("kind", ["linear", "conv1d", "embedding", "hooked"])
def test_autocast_gives_the_dtype_that_the_base_gives(kind: str) -> None:
    base: nn.Module = {"conv1d": Conv1D(6, 8), "embedding": nn.Embedding(8, 6)}.get(kind, nn.Linear(8, 6))
    x = torch.tensor([1, 2]) if kind == "embedding" else torch.randn(2, 8)
    adapter = adapted(base)
    expected = adapter(x)
    if kind == "hooked":
        base.register_forward_hook(lambda module, args, output: None)
    with torch.autocast("cpu", torch.bfloat16):
        actual = adapter(x)
        assert actual.dtype == base(x).dtype
    torch.testing.assert_close(actual.float(), expected, rtol=5e-2, atol=5e-2)
    actual.float().sum().backward()
    assert adapter.A.grad is not None
    assert adapter.A.grad.dtype == torch.float32


def test_the_factors_are_the_open_components_with_all_but_the_scale_in_them() -> None:
    adapter = adapted()
    adapter.gate.keep(torch.tensor([1, 0, 1]))
    A, B = adapter.factors()
    assert (A.shape, B.shape) == ((2, 8), (6, 2))
    torch.testing.assert_close(adapter.scaling * B @ A, adapter.update())
    A.zero_()
    assert adapter.A.any()


def test_cut_to_its_open_components_it_keeps_scale_and_mode() -> None:
    adapter = adapted(dropout=0.25).eval()
    adapter.gate.keep(torch.tensor([1, 0, 1]))
    small = adapter.compacted()
    assert isinstance(small, LoRA)
    assert small.arguments() == {"rank": 2, "alpha": 4.0, "dropout": 0.25}
    assert small.scaling == adapter.scaling
    assert small.base is adapter.base
    assert not small.training
    torch.testing.assert_close(small.effective_weight(), adapter.effective_weight())
    adapter.gate.keep(torch.zeros(3))
    assert adapter.compacted() is None


def test_it_says_what_it_is() -> None:
    assert "rank=3, alpha=6.0, dropout=0.25" in repr(adapted(dropout=0.25))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            {"rank": 7},
            r"rank=7 is not possible on a layer of 8 inputs and 6 outputs: give a rank from 1 to 6, or leave",
        ),
        ({"rank": 0}, "rank=0 is not possible"),
        ({"rank": 2, "alpha": 0.0}, "alpha scales the update and must be positive. Got 0.0."),
        ({"rank": 2, "alpha": float("nan")}, "alpha scales the update and must be positive. Got nan."),
        ({"rank": 2, "dropout": 1.0}, r"dropout is a probability in \[0, 1\). Got 1.0."),
        ({"rank": 2, "dropout": -0.1}, "Got -0.1."),
    ],
)
def test_arguments_that_cannot_be(arguments: dict[str, float], says: str) -> None:
    base = nn.Linear(8, 6)
    with pytest.raises(ValueError, match=says):
        LoRA(base, **arguments)  # type: ignore[arg-type]
    assert all(p.requires_grad for p in base.parameters())


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Renamed(nn.Linear):
    """Only a name."""


class Sideways(Conv1D):
    pass


class SamePadded(nn.Conv2d):
    """As some libraries have it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 1, 1, 1)))


class Flipped(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight.flip(-1), bias)


def _patched() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.forward = lambda input: input  # type: ignore[method-assign]  # what some offloading libraries do
    return layer


def _quantised() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (
            lambda: nn.LayerNorm(4),
            "LoRA cannot adapt this layer: LayerNorm is not a Linear, Conv1d, Conv2d, Conv3d, Embedding or "
            "transformers' Conv1D layer.",
        ),
        (
            lambda: nn.ConvTranspose2d(4, 4, 1),
            "LoRA cannot adapt this layer: ConvTranspose2d is a transposed convolution, for which there is no adapter.",
        ),
        (lambda: Doubled(4, 4), "Doubled computes something else than its base class does."),
        (lambda: Sideways(4, 4), "Sideways computes something else than its base class does."),
        (lambda: nn.Embedding(4, 4, max_norm=1.0), "Embedding computes something else than its base class does."),
        (_patched, "its forward was replaced on the instance"),
        (lambda: parametrizations.weight_norm(nn.Linear(4, 4)), "its weight is parametrized; call torch.nn.utils"),
        (_quantised, "its weight is of dtype torch.int8, which has no gradient."),
        (lambda: SamePadded(4, 4, 3), "SamePadded computes something else than its base class does."),
        (lambda: Flipped(4, 4, 3), "Flipped computes something else than its base class does."),
        (lambda: parametrizations.weight_norm(nn.Conv1d(4, 4, 1)), "its weight is parametrized; call torch.nn.utils"),
        (lambda: nn.LazyConv2d(4, 3), "its shape is not known yet; run one batch through the model first"),
        (lambda: nn.LazyLinear(4), "its shape is not known yet; run one batch through the model first"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_layers_that_cannot_be_adapted(layer: Callable[[], nn.Module], says: str) -> None:
    with pytest.raises(TypeError, match=says):
        LoRA(layer(), rank=1)


def test_a_subclass_that_only_has_another_name_can_be_adapted() -> None:
    LoRA(Renamed(4, 4), rank=1)
    LoRA(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 4), rank=1)


def test_a_padding_vector_stays_what_it_is() -> None:
    adapter = LoRA(nn.Embedding(9, 8, padding_idx=2), rank=4)
    before = adapter.base.weight[2].clone()
    optimizer = torch.optim.AdamW([adapter.A, adapter.B], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapter(torch.tensor([1, 2, 3])).square().sum().backward()
        optimizer.step()
    assert torch.equal(adapter(torch.tensor([2]))[0], before)
    assert torch.equal(adapter.weight[2], before)
    assert not torch.equal(adapter(torch.tensor([1]))[0], adapter.base.weight[1])
