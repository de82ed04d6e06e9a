from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from lightning_peft import BilinearCritic, ConcatCritic, Critic, CriticFactory, LoRA, SeparableCritic
from lightning_peft.regularizers.widths import output_width

FACTORIES: dict[str, CriticFactory] = {
    "concat": partial(ConcatCritic, hidden=16),
    "in chunks": partial(ConcatCritic, hidden=16, chunk=2),
    "separable": partial(SeparableCritic, hidden=16, width=8),
    "bilinear": BilinearCritic,
}
each = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


def started(factory: CriticFactory, d_x: int = 5, d_z: int = 3) -> Critic:
    """A critic that has left its start."""
    critic = factory(d_x, d_z)
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=0.5)
    return critic


@each
def test_at_the_start_every_score_is_zero_and_can_leave_it(factory: CriticFactory) -> None:
    critic = factory(5, 3)
    scores = critic(torch.randn(4, 5), torch.randn(7, 3))
    assert scores.shape == (4, 7)
    assert not scores.any()
    (scores * torch.randn(4, 7)).sum().backward()
    assert any(p.grad is not None and p.grad.any() for p in critic.parameters())


@each
def test_a_score_is_of_its_own_pair(factory: CriticFactory) -> None:
    critic, x, z = started(factory), torch.randn(4, 5), torch.randn(7, 3)
    scores = critic(x, z)
    for i in range(4):
        for j in range(7):
            torch.testing.assert_close(scores[i, j], critic(x[i : i + 1], z[j : j + 1])[0, 0])


@each
def test_features_may_be_of_another_precision_than_the_critic(factory: CriticFactory) -> None:
    critic, x, z = started(factory), torch.randn(4, 5), torch.randn(7, 3)
    assert torch.equal(critic(x.double(), z), critic(x, z))
    wide = started(factory).double()
    assert wide(x, z).dtype == torch.float64


def test_concat_is_the_network_on_concatenated_pairs() -> None:
    critic, x, z = (
        started(partial(ConcatCritic, hidden=16)).double(),
        torch.randn(4, 5).double(),
        torch.randn(7, 3).double(),
    )
    pairs = torch.cat([x[:, None].expand(4, 7, 5), z.expand(4, 7, 3)], -1)
    network = nn.Sequential(critic.first, nn.ReLU(), critic.second, nn.ReLU(), critic.last)  # type: ignore[arg-type]
    torch.testing.assert_close(critic(x, z), network(pairs).squeeze(-1), rtol=1e-12, atol=1e-12)


def test_chunks_give_the_same_scores_and_gradients() -> None:
    whole, x, z = started(partial(ConcatCritic, hidden=16)), torch.randn(7, 5), torch.randn(6, 3)
    found = []
    for chunk in (None, 2, 7):
        whole.chunk = chunk  # type: ignore[assignment]
        features = x.clone().requires_grad_()
        scores = whole(features, z)
        found.append([scores, *torch.autograd.grad(scores.square().sum(), [features, *whole.parameters()])])
    for other in found[1:]:
        for one, another in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, another)


def test_no_pair_of_features_is_written_out() -> None:
    critic = ConcatCritic(4000, 4000, hidden=8)
    sizes: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        critic(torch.randn(64, 4000), torch.randn(64, 4000))
    assert max(sizes) == 64 * 4000


@pytest.mark.parametrize(
    ("critic", "wanted"),
    [(partial(ConcatCritic, 768, 768), 1_050_113), (partial(SeparableCritic, 768, 768), 459_520)],
)
def test_parameters_are_as_many_as_the_card_says(critic: partial[Critic], wanted: int) -> None:
    assert sum(p.numel() for p in critic().parameters()) == wanted


@each
def test_property_16_scores_are_in_float32_under_autocast_and_in_half_precision(factory: CriticFactory) -> None:
    critic, x, z = started(factory), torch.randn(4, 5), torch.randn(7, 3)
    wanted = critic(x.bfloat16().float(), z)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(critic(x.bfloat16(), z), wanted, rtol=0, atol=0)
    nn.ModuleDict({"term": critic}).to(torch.bfloat16)
    assert {p.dtype for p in critic.parameters()} == {torch.float32}
    torch.testing.assert_close(critic(x.bfloat16(), z), wanted, rtol=0, atol=0)
    assert critic.double()(x.double(), z).dtype == torch.float64


@pytest.mark.parametrize(
    ("shapes", "says"),
    [
        (
            ((4, 6), (4, 3)),
            r"Got shapes \(4, 6\) and \(4, 3\): make it of these widths",
        ),
        (((4, 9, 5), (4, 3)), r"Got shapes \(4, 9, 5\) and \(4, 3\): pool sequences to one row per example"),
    ],
)
def test_features_that_do_not_fit_are_named(shapes: tuple[tuple[int, ...], ...], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SeparableCritic(5, 3)(*map(torch.randn, shapes))


def test_sizes_are_whole_and_positive() -> None:
    with pytest.raises(ValueError, match=r"hidden must be at least 1. Got 0."):
        ConcatCritic(2, 2, hidden=0)
    with pytest.raises(ValueError, match=r"chunk must be at least 1. Got 0."):
        ConcatCritic(2, 2, chunk=0)
    with pytest.raises(TypeError, match=r"d_x must be an integer. Got 2.0."):
        BilinearCritic(2.0, 2)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "width"),
    [
        (nn.Linear(4, 6), 6),
        (LoRA(nn.Linear(4, 6), rank=2), 6),
        (nn.Embedding(9, 6), 6),
        (nn.Conv1d(2, 6, 3), 6),
        (nn.LayerNorm(6), 6),
        (nn.LSTM(4, 3, bidirectional=True), 6),
        (nn.LSTM(4, 9, proj_size=6), 6),
        (nn.TransformerEncoderLayer(6, 2, 12), 6),
        (nn.MultiheadAttention(6, 2), 6),
        (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Dropout()), 6),
        (torch.compile(nn.Linear(4, 6), backend="eager"), 6),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_width_of_a_layers_output(layer: nn.Module, width: int) -> None:
    assert output_width(layer, "layer") == width


def test_a_layer_that_does_not_say_its_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"'net.pool' is a Flatten, which does not say .* features=<their number>"):
        output_width(nn.Flatten(), "net.pool")
