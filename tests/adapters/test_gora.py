from __future__ import annotations

from functools import partial
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lightning_peft import AdaLoRA, DynamicDoRA, GoRA, LoRA, RankBudget, inject
from lightning_peft.adapters.gora import apportioned, gradient_start
from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.adapters.sora import SoRA
from lightning_peft.listening import heard, positions
from lightning_peft.rank.probe import Alone


class Net(nn.Module):
    """A Conv1D that is square, so that its layout cannot be told from its shape; one layer matters little."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(10, 8), Conv1D(8, 8), nn.Linear(8, 4)
        self.weak, self.words = nn.Linear(8, 4), nn.Embedding(6, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(self.words(x)))
        return self.third(torch.tanh(self.second(h))) + 1e-3 * self.weak(h)


TARGETS = ["first", "second", "third", "weak"]


def net() -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return Net()


def tokens(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(6, (4, 5), generator=generator) for _ in range(count)]


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - 1).square().mean()


def weight_gradients(data: list[Tensor]) -> dict[str, Tensor]:
    """The mean gradient of every base weight, as (d_out, d_in), by autograd itself."""
    plain = net()
    for x in data:
        (loss_of(plain, x) / len(data)).backward()
    grads = {name: plain.get_submodule(name).weight.grad for name in TARGETS}
    return {name: grad.T if name == "second" else grad for name, grad in grads.items()}  # type: ignore[union-attr, misc]


def calibrated(gora: GoRA, cap: int = 8, targets: list[str] = TARGETS) -> tuple[Net, RankBudget]:
    model = net()
    inject(model, lambda layer: LoRA(layer, rank=min(cap, min(layer.weight.shape)), alpha=6.0), targets, train=[])
    budget = RankBudget.of(model)
    gora.begin(budget, Alone())
    for x in tokens():
        with heard(gora, budget):
            loss_of(model, x).backward()
        gora.fold()
    budget.keep(gora.act())
    return model, budget


def test_ranks_follow_sensitivity_within_the_budget() -> None:
    gora = GoRA(rank=2, minimum=1)
    _, budget = calibrated(gora)
    plain, gradients = net(), weight_gradients(tokens())
    weights = {name: plain.get_submodule(name).weight.detach() for name in TARGETS}
    weights["second"] = weights["second"].T
    sensitivity = {name: float((weights[name] * gradients[name]).abs().mean()) for name in TARGETS}
    costs = {name: site.gate.cost for name, site in budget.items()}
    caps = {name: len(site.gate) for name, site in budget.items()}
    expected = apportioned(sensitivity, costs, caps, 2, 1)
    ranks = budget.ranks()
    assert ranks == {name: int(mask.sum()) for name, mask in expected.items()}
    allowed = 2 * sum(costs.values())
    assert allowed - max(costs.values()) < budget.spent_parameters <= allowed
    assert ranks["weak"] == 1 == min(ranks.values())
    assert max(ranks.values()) > 2


def test_the_first_update_is_a_projected_gradient_step() -> None:
    gamma = 0.02
    gora = GoRA(rank=2, minimum=1, gamma=gamma)
    model, budget = calibrated(gora)
    gradients = weight_gradients(tokens())
    steps, lengths, updates = set(), 0.0, 0.0
    for name, site in budget.items():
        rows = site.adapter.A.detach()[site.gate.mask.bool()].double()
        projector = torch.linalg.pinv(rows) @ rows
        step = gradients[name].double() @ projector
        update = site.adapter.update().detach().double()
        eta = -float((update * step).sum() / step.square().sum())
        torch.testing.assert_close(update, -eta * step, rtol=1e-4, atol=1e-7)
        steps.add(round(eta / gora._step, 4))
        lengths += float(net().get_submodule(name).weight.detach().square().sum())
        updates += float(update.square().sum())
        assert not site.adapter.B[:, ~site.gate.mask.bool()].any()
    assert steps == {1.0}
    assert sqrt(updates / lengths) == pytest.approx(gamma, rel=1e-4)
    # It goes down the loss by about what a gradient step promises: -eta |G P|^2 in each layer.
    data = tokens()
    before = sum(float(loss_of(net(), x).detach()) for x in data) / len(data)
    after = sum(float(loss_of(model, x).detach()) for x in data) / len(data)
    promised = sum(float((site.adapter.update().detach() * gradients[name]).sum()) for name, site in budget.items())
    assert promised < 0
    assert after - before == pytest.approx(promised, rel=0.2)


def test_a_gradient_counts_wherever_it_flows() -> None:
    """A position without a label, as a prompt's, is still what later ones depend on: its part of dW is no less."""
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        plain = LlamaForCausalLM(config)
    ids = torch.arange(1, 13).view(2, 6)
    labels = ids.clone()
    labels[:, :4] = -100  # the prompt
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    plain(**batch).loss.backward()
    expected = plain.model.layers[0].self_attn.v_proj.weight.grad
    model = plain
    inject(model, partial(LoRA, rank=4), targets=["v_proj"])
    (name,) = budget = RankBudget.of(model)
    gradients = []

    class Keep(GoRA):
        def see(self, layer: str, x: Tensor, rows: Any, gradient: Any) -> None:
            gradients.append(gradient().T @ rows())

    keep = Keep(2)
    keep.begin(budget, Alone())
    with heard(keep, budget, [name], positions(batch)):
        model(**batch).loss.backward()
    assert expected is not None
    torch.testing.assert_close(gradients[0], expected)


def test_no_other_start_in_a_s_row_space_is_nearer() -> None:
    G, A, scaling = torch.randn(7, 9), torch.randn(3, 9), 2.5
    B = gradient_start(G, A, scaling)
    best = (scaling * B @ A + G).norm()
    torch.testing.assert_close((scaling * B @ A + G) @ A.T, torch.zeros(7, 3), rtol=0, atol=1e-4)
    for _ in range(5):
        assert (scaling * (B + 0.01 * torch.randn_like(B)) @ A + G).norm() > best


def test_parameters_are_in_the_proportion_of_sensitivity() -> None:
    sensitivity, costs = {"a": 3.0, "b": 1.0, "c": 2.0}, {"a": 10, "b": 20, "c": 5}
    masks = apportioned(sensitivity, costs, dict.fromkeys(costs, 999), rank=100, minimum=0)
    spent = {name: int(mask.sum()) * costs[name] for name, mask in masks.items()}
    assert sum(spent.values()) <= 3500
    for name, s in sensitivity.items():
        assert spent[name] == pytest.approx(3500 * s / 6, abs=costs[name] + 20)


def test_bounds_hold() -> None:
    masks = apportioned({"a": 100.0, "b": 1.0}, {"a": 1, "b": 1}, {"a": 6, "b": 8}, rank=4, minimum=2)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 6, "b": 2}
    masks = apportioned({"a": 100.0, "b": 1.0}, {"a": 1, "b": 1}, {"a": 5, "b": 8}, rank=4, minimum=2)
    assert {name: int(mask.sum()) for name, mask in masks.items()} == {"a": 5, "b": 3}


def test_what_is_not_seen_keeps_its_start() -> None:
    gora = GoRA(rank=2)
    _, budget = calibrated(gora, cap=4, targets=[*TARGETS, "words"])
    assert gora.unseen() == ["words"]
    assert budget.ranks()["words"] == 2
    assert not budget["words"].adapter.B.any()


@pytest.mark.parametrize(("factor", "sentence"), [(0.0, "has no gradient by any"), (float("inf"), "is not finite")])
def test_a_gradient_that_says_nothing_is_told(factor: float, sentence: str) -> None:
    model = net()
    inject(model, partial(LoRA, rank=2), TARGETS, train=[])
    gora, budget = GoRA(rank=1), RankBudget.of(model)
    gora.begin(budget, Alone())
    with heard(gora, budget):
        (loss_of(model, tokens()[0]) * factor).backward()
    gora.fold()
    with pytest.raises(RuntimeError, match=sentence):
        gora.act()
    assert not any(site.adapter.B.any() for site in budget.values())


@pytest.mark.parametrize("kind", [DynamicDoRA, AdaLoRA, SoRA])
def test_a_gain_that_would_undo_the_start_is_told(kind: type[LowRank]) -> None:
    model = net()
    inject(model, partial(kind, rank=2), TARGETS, train=[])
    with pytest.raises(RuntimeError, match=rf"at '{TARGETS[0]}' {kind.__name__} has a gain .*\. Use LoRA, or Weight"):
        GoRA(rank=1).begin(RankBudget.of(model), Alone())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"rank": 0}, "above 0. Got 0"),
        ({"rank": 2, "minimum": 3}, "from 0 to rank=2. Got 3"),
        ({"gamma": 0.0}, "above 0. Got 0.0"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        GoRA(**arguments)
