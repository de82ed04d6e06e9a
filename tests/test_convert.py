from __future__ import annotations

import copy
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lightning_peft import Budget, DynamicDoRA, LoRA, RankBudget, convert, eject, inject, merge, to_hf_peft
from lightning_peft.adapters.base import Adapter
from lightning_peft.adapters.low_rank import LowRank
from lightning_peft.compaction import compact_training
from lightning_peft.surgery import adapters
from lightning_peft.testing.case import LAYERS, Case

R = 6


def net(factory: Any = None, layers: tuple[str, ...] = ("0", "2")) -> nn.Sequential:
    """Two layers of different size with updates whose components differ in strength; a head."""
    module = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 2))
    inject(module, factory or partial(LoRA, rank=R, alpha=9.0), list(layers))
    with torch.no_grad():
        for site in RankBudget.of(module).values():
            strength = 0.6 ** torch.arange(len(site.gate))
            site.adapter.B.copy_(torch.randn_like(site.adapter.B) * strength)
            if site.gate.gain is not None:
                site.gate.gain.uniform_(0.5, 1.5)
    return module


def updates(module: nn.Module) -> dict[str, Tensor]:
    return {name: adapter.update().detach().double() for name, adapter in adapters(module).items()}  # type: ignore[operator]


def best(update: Tensor, k: int) -> Tensor:
    U, S, V = torch.linalg.svd(update, full_matrices=False)
    return U[:, :k] @ torch.diag(S[:k]) @ V[:k]


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("factory", [LoRA, partial(DynamicDoRA, dropout=0.0)])
@pytest.mark.parametrize("k", [1, 3, 5])
def test_it_is_the_best_approximation_of_its_rank(kind: str, factory: Any, k: int) -> None:
    case = Case(partial(factory, rank=R), kind)
    host = case.host()
    before = case.adapter(host).update().detach().double()  # type: ignore[operator]
    report = convert(host, k)
    after = case.adapter(host)
    assert type(after) is LoRA
    (layer,) = report.layers.values()
    assert (layer.before, layer.after, after.rank) == (R, k, k)
    torch.testing.assert_close(after.update().double(), best(before, k), rtol=1e-5, atol=1e-6)
    S = torch.linalg.svdvals(before)
    assert layer.norm == pytest.approx(float(S.norm()))
    assert layer.error == pytest.approx(float(S[k:].norm()), rel=1e-5)
    assert layer.error == pytest.approx(float((before - after.update().detach()).norm()), rel=1e-4)
    assert report.error == layer.error
    assert layer.kept == pytest.approx(1 - float(S[k:].square().sum() / S.square().sum()))
    # factors of equal size, and the scaling that was there
    torch.testing.assert_close(after.A.norm(dim=1), after.B.norm(dim=0))


def test_the_whole_rank_changes_nothing_but_the_factors() -> None:
    module, x = net(partial(DynamicDoRA, rank=R, dropout=0.0)), torch.randn(5, 20)
    scaling = adapters(module)["0"].scaling
    before = module(x)
    report = convert(module, R)
    torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-5)
    assert max(layer.error for layer in report.layers.values()) < 1e-6
    assert adapters(module)["0"].scaling == pytest.approx(scaling)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.filterwarnings("ignore:Converting a PEFT adapter to LoRA that is already")
def test_ranks_by_energy_are_pefts(share: float) -> None:
    ours = net()
    theirs = nn.Sequential(nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 30), nn.Tanh(), nn.Linear(30, 2))
    model = get_peft_model(theirs, LoraConfig(r=R, lora_alpha=9, target_modules=["0", "2"]))  # type: ignore[arg-type]
    with torch.no_grad():
        for name, adapter in adapters(ours).items():
            layer = theirs.get_submodule(name)
            layer.lora_A["default"].weight.copy_(adapter.A)
            layer.lora_B["default"].weight.copy_(adapter.B)
    conversion = pytest.importorskip("peft.tuners.lora.conversion", reason="PEFT before 0.19 converts nothing")
    _, state = conversion.convert_to_lora(model, share if share < 1 else 0.999999)
    expected = {name: state[f"base_model.model.{name}.lora_A.weight"].shape[0] for name in ("0", "2")}
    report = convert(ours, share if share < 1 else 0.999999)
    assert {name: layer.after for name, layer in report.layers.items()} == expected
    assert all(layer.kept >= share - 2e-6 for layer in report.layers.values())
    for name, update in updates(ours).items():
        A, B = (state[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        torch.testing.assert_close((B @ A).double(), update, rtol=1e-4, atol=1e-5)


def test_an_average_rank_is_shared_by_singular_values() -> None:
    module = net()
    with torch.no_grad():
        RankBudget.of(module)["2"].adapter.B.mul_(4)
    values = torch.cat([torch.linalg.svdvals(update)[:R] for update in updates(module).values()])
    report = convert(module, Budget(rank=2))
    assert sum(layer.after for layer in report.layers.values()) == 4
    assert report.error == pytest.approx(float(values.sort(descending=True).values[4:].norm()), rel=1e-5)
    assert len({layer.after for layer in report.layers.values()}) == 2


@pytest.mark.parametrize("budget", [Budget(parameters=150), Budget(share=0.4), Budget(megabytes=0.0011)], ids=str)
def test_a_budget_of_parameters_is_kept_and_weighs_layers(budget: Budget) -> None:
    module = net()
    sites = RankBudget.of(module)
    amount = budget.amount(sites)
    worth = sorted(
        ((float(s) ** 2 / sites[n].gate.cost, sites[n].gate.cost) for n, u in updates(module).items()
         for s in torch.linalg.svdvals(u)[:R]), reverse=True,
    )  # fmt: skip
    expected = 0
    for _, cost in worth:
        expected += cost if expected + cost <= amount else 0
    report = convert(module, budget)
    assert report.parameters == (6 * 32 + 6 * 42, expected)
    assert expected <= amount
    assert RankBudget.of(module).spent_parameters == RankBudget.of(module).capacity_parameters == expected


def test_a_layer_that_keeps_nothing_gets_its_base_back() -> None:
    module = net()
    base = adapters(module)["2"].base
    with torch.no_grad():
        RankBudget.of(module)["2"].adapter.B.mul_(1e-4)
    report = convert(module, Budget(rank=1))
    assert {name: layer.after for name, layer in report.layers.items()} == {"0": 2, "2": 0}
    assert module[2] is base
    assert list(RankBudget.of(module)) == ["0"]
    eject(module)
    assert all(p.requires_grad for p in module.parameters())


def test_closed_components_are_left_out() -> None:
    module, x = net(), torch.randn(5, 20)
    RankBudget.of(module).keep({"0": torch.tensor([0, 1, 0, 0, 1, 0]), "2": torch.zeros(R)})
    before = module(x)
    report = convert(module, 4)
    assert {n: (layer.before, layer.after) for n, layer in report.layers.items()} == {"0": (2, 2), "2": (0, 0)}
    torch.testing.assert_close(module(x), before, rtol=1e-5, atol=1e-6)


def test_a_padding_vector_stays_where_it_is() -> None:
    module = nn.Sequential(nn.Embedding(10, 8, padding_idx=3), nn.Linear(8, 2))
    inject(module, partial(LoRA, rank=4), ["0"])
    with torch.no_grad():
        RankBudget.of(module)["0"].adapter.B.normal_()
    convert(module, 2)
    adapter = RankBudget.of(module)["0"].adapter
    assert not adapter.A[:, 3].any()
    assert adapter.A[:, 4].all()


def test_it_trains_on_and_draws_nothing() -> None:
    module, x = net(), torch.randn(5, 20)
    before = torch.get_rng_state()
    convert(module, 3)
    assert torch.equal(torch.get_rng_state(), before)
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = module(x).square().mean()
        loss.backward()
        assert all(p.grad.abs().max() > 0 for a in adapters(module).values() for _, p in a.own_parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_what_is_frozen_cast_or_set_to_eval_stays_so() -> None:
    module = net().to(torch.bfloat16).eval()
    adapters(module)["0"].B.requires_grad_(False)
    convert(module, 2)
    small = adapters(module)["0"]
    assert (small.A.dtype, small.B.dtype, small.training) == (torch.bfloat16, torch.bfloat16, False)
    assert (small.A.requires_grad, small.B.requires_grad) == (True, False)


def test_it_merges_and_exports(tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)
    model = BertModel(config, add_pooling_layer=False).eval()
    inject(model, partial(LoRA, rank=4), ["query", "value"], train=[])
    with torch.no_grad():
        for site in RankBudget.of(model).values():
            site.adapter.B.normal_()
    report = convert(model, Budget(rank=2))
    inputs = {"input_ids": torch.randint(40, (2, 6))}
    export = to_hf_peft(model, tmp_path / "adapter", check="peft", inputs=inputs)
    assert export.ranks == {name: layer.after for name, layer in report.layers.items() if layer.after}
    before = model(**inputs).last_hidden_state
    merge(model)
    torch.testing.assert_close(model(**inputs).last_hidden_state, before, rtol=1e-5, atol=1e-5)


def test_what_was_cut_in_training_is_forgotten() -> None:
    module = net()
    RankBudget.of(module).keep({"0": torch.arange(R) < 3})
    compact_training(module)
    assert RankBudget.of(module).capacity == 2 * R
    convert(module, 2)
    assert RankBudget.of(module).capacity == 4


def test_the_report_prints_well() -> None:
    text = str(convert(net(), Budget(rank=2)))
    lines = text.splitlines()
    assert lines[0].split() == ["layer", "rank", "energy", "kept", "error"]
    assert [line.split()[:4] for line in lines[2:4]] == [
        [name, "6", "->", str(after)] for name, after in (("0", lines[2].split()[3]), ("2", lines[3].split()[3]))
    ]
    assert lines[-2].split()[:5] == ["2", "layers", "12", "->", "4"]
    assert lines[-1].startswith("444 adapter parameters are ")
    assert len({len(line) for line in lines[:-1]}) == 1


class Scaled(LowRank):
    """A weight that is not its base's plus a low-rank update."""

    def __init__(self, base: nn.Module, rank: int = 2) -> None:
        super().__init__(base, rank, 1.0, 0.0)

    _make_gate = LoRA._make_gate
    reset_parameters = LoRA.reset_parameters

    def effective_weight(self) -> Tensor:
        return 2 * super().effective_weight()


class Dense(Adapter):
    """No low-rank adapter."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__(base)
        self.delta = nn.Parameter(torch.zeros_like(base.weight))  # type: ignore[arg-type]

    def effective_weight(self) -> Tensor:
        return self.base.weight + self.delta  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.effective_weight(), self.base.bias)  # type: ignore[arg-type]


def dense() -> nn.Module:
    module = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 2))
    inject(module, Dense, ["0"])
    return module


def untrained() -> nn.Module:
    module = nn.Sequential(nn.Linear(20, 12), nn.Linear(12, 2))
    inject(module, LoRA, ["0"])
    return module


@pytest.mark.parametrize(
    ("build", "rank", "kind", "sentence"),
    [
        (net, True, TypeError, r"a number of components \(8\), a share .* or a Budget. Got True"),
        (net, "8", TypeError, "Got '8'"),
        (net, 0, ValueError, "at least 1. Got 0"),
        (net, 8.0, ValueError, "rank=8.0 is no whole number"),
        (net, 0.0, ValueError, r"in \(0, 1\]"),
        (net, Budget(parameters=9999), ValueError, "more than the 444 that the adapters have"),
        (lambda: nn.Linear(3, 3), 2, ValueError, "convert found no adapter in Linear"),
        (lambda: LoRA(nn.Linear(9, 9)), 2, ValueError, "got a single LoRA"),
        (untrained, 2, ValueError, "no adapter of Sequential has an update"),
        (dense, 2, TypeError, "layer '0': Dense is not low-rank"),
        (partial(net, Scaled), 1, TypeError, "layer '0': the weight of Scaled is not its base's plus a low-rank"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_told_and_left(build: Any, rank: Any, kind: type[Exception], sentence: str) -> None:
    module = build()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(kind, match=sentence):
        convert(module, rank)
    assert module.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_errors_add_up() -> None:
    report = convert(net(), 2)
    assert report.error == pytest.approx(sqrt(sum(layer.error**2 for layer in report.layers.values())))
