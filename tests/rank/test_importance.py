from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import DynamicDoRA, Importance, LoRA, NormShare, RankBudget, Site, Taylor, inject
from lightning_peft.adapters import component_shares
from lightning_peft.rank.importance import by_shape


def network(kind: type[LoRA] | type[DynamicDoRA] = LoRA, rank: int = 3) -> nn.Sequential:
    """Two layers of one shape around one of another; parameters away from their start."""
    module = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 6), nn.Linear(6, 6))
    inject(module, partial(kind, rank=rank, dropout=0.0), targets=["0", "2", "5"])
    for site in RankBudget.of(module).values():
        for _, parameter in site.adapter.own_parameters():
            nn.init.normal_(parameter)
    return module


class Counter(Importance):
    """Says 1, 2, 3, ... for every component, plus the layer's place in its group."""

    reads = "weights"

    def __init__(self, beta: float) -> None:
        super().__init__(beta)
        self.calls: list[list[str]] = []

    def measure(self, group: list[Site]) -> Tensor:
        self.calls.append([site.name for site in group])
        n = len(group[0].gate)
        return torch.arange(1.0, n + 1).expand(len(group), n) + torch.arange(len(group))[:, None]


def test_layers_of_one_shape_are_measured_together() -> None:
    counter = Counter(beta=0.0)
    counter.track(RankBudget.of(network()))
    counter.update()
    assert counter.calls == [["0", "5"], ["2"]]
    assert {name: row.tolist() for name, row in counter.scores().items()} == {
        "0": [1, 2, 3],
        "5": [2, 3, 4],
        "2": [1, 2, 3],
    }


def test_groups_differ_in_kind_rank_and_shape() -> None:
    kinds = [partial(LoRA, rank=2), partial(DynamicDoRA, rank=2), partial(LoRA, rank=3), partial(LoRA, rank=2)]
    module = nn.Sequential(*(kind(nn.Linear(6, 6)) for kind in kinds), LoRA(nn.Linear(6, 4), rank=2))
    names = [[site.name for site in group] for group in by_shape(RankBudget.of(module).values())]
    assert names == [["0", "3"], ["1"], ["2"], ["4"]]


def test_the_average_starts_at_zero_and_is_not_corrected() -> None:
    counter = Counter(beta=0.75)
    counter.track(RankBudget.of(network()))
    expected = torch.zeros(3)
    for _ in range(4):
        counter.update()
        expected = 0.75 * expected + 0.25 * torch.tensor([1.0, 2.0, 3.0])
        torch.testing.assert_close(counter.scores()["0"], expected)
    counter.track(RankBudget.of(network()))
    assert not counter.scores()["0"].any()


def test_its_state_is_tensors_by_layer_and_restores_it() -> None:
    module = network()
    counter = Counter(beta=0.5)
    counter.track(RankBudget.of(module))
    counter.update()
    state = counter.state_dict()
    counter.update()
    assert set(state["worth"]) == {"0", "2", "5"}
    assert state["worth"]["0"].tolist() == [0.5, 1, 1.5]  # a copy: the second update is not in it
    other = Counter(beta=0.5)
    other.track(RankBudget.of(module))
    other.load_state_dict(state)
    other.update()
    for name, row in counter.scores().items():
        assert torch.equal(other.scores()[name], row)


def test_a_state_of_other_adapters_is_refused() -> None:
    counter = Counter(beta=0.5)
    counter.track(RankBudget.of(network()))
    with pytest.raises(ValueError, match="saved importance does not fit the adapters .* first difference at '2'"):
        counter.load_state_dict({"worth": {"0": torch.zeros(3), "5": torch.zeros(3)}})
    other = Counter(beta=0.5)
    other.track(RankBudget.of(network(rank=2)))
    with pytest.raises(ValueError, match="first difference at '0'"):
        counter.load_state_dict(other.state_dict())


@pytest.mark.parametrize("beta", [-0.1, 1.0, float("nan")])
def test_beta_is_a_share(beta: float) -> None:
    with pytest.raises(ValueError, match=rf"share of the running average that is kept, in \[0, 1\). Got {beta}"):
        Taylor(beta)


def test_norm_share_is_the_share_of_each_layer() -> None:
    module = network(DynamicDoRA)
    share = NormShare(beta=0.0)
    share.track(RankBudget.of(module))
    share.update()
    for name, site in RankBudget.of(module).items():
        expected = component_shares(site.adapter.A, site.adapter.B, site.gate.value())  # type: ignore[arg-type]
        torch.testing.assert_close(share.scores()[name], expected.detach())


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_out_of_the_average_and_is_told_once(broken: float) -> None:
    counter = Counter(beta=0.5)
    counter.track(RankBudget.of(network()))
    counter.update()
    before = {name: row.tolist() for name, row in counter.scores().items()}
    now = counter.worth_now()
    now[0] = now[0].clone()
    now[0][1, 2] = broken  # layer "5"
    counter.fold(now)
    after = {name: row.tolist() for name, row in counter.scores().items()}
    assert after["5"][2] == before["5"][2] == 2.0
    assert after["5"][:2] == [1.5, 2.25]
    assert after["0"] == [0.75, 1.5, 2.25]
    assert counter.diverged() == ["5"]
    assert counter.diverged() == []
    counter.fold(now, expect_overflow=True)
    assert counter.diverged() == []


def test_a_step_that_the_device_skipped_moves_nothing() -> None:
    counter = Counter(beta=0.5)
    counter.track(RankBudget.of(network()))
    counter.fold(counter.worth_now(), skipped=torch.tensor(1.0))
    assert not any(row.any() for row in counter.scores().values())
    counter.fold(counter.worth_now(), skipped=torch.tensor(0.0))
    assert counter.scores()["0"].tolist() == [0.5, 1.0, 1.5]


@pytest.mark.parametrize("kind", [LoRA, DynamicDoRA])
def test_taylor_is_the_first_order_worth_of_a_component(kind: type[LoRA] | type[DynamicDoRA]) -> None:
    """|dL/dm_i| = |<b_i, dL/db_i>| = |<a_i, dL/da_i>|, summed over the micro-batches of a step."""
    module = network(kind)
    taylor = Taylor(beta=0.0)
    taylor.track(RankBudget.of(module))
    for _ in range(2):
        module(torch.randn(5, 6)).square().mean().backward()
    taylor.update()
    for name, site in RankBudget.of(module).items():
        A, B = site.adapter.A, site.adapter.B
        by_b = (B * B.grad).sum(0).abs()  # type: ignore[operator]
        by_a = (A * A.grad).sum(1).abs()  # type: ignore[operator]
        torch.testing.assert_close(taylor.scores()[name], by_b.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(taylor.scores()[name], by_a.detach(), rtol=1e-4, atol=1e-5)


def test_taylor_counts_each_gradient_once_and_leaves_nothing_behind() -> None:
    module = network()
    sites = RankBudget.of(module).values()
    taylor = Taylor(beta=0.0)
    taylor.track(RankBudget.of(module))
    assert all(site.gate.mask.requires_grad for site in sites)
    module(torch.randn(5, 6)).square().mean().backward()
    taylor.update()
    assert all(site.gate.mask.grad is None for site in sites)
    taylor.update()  # no backward since
    assert all(not row.any() for row in taylor.scores().values())
    taylor.release()
    assert not any(site.gate.mask.requires_grad for site in sites)


def test_taylor_scores_a_closed_component_by_what_it_would_do() -> None:
    module = network(DynamicDoRA)
    budget = RankBudget.of(module)
    x = torch.randn(5, 6)
    taylor = Taylor(beta=0.0)
    taylor.track(budget)
    budget.keep({"0": torch.tensor([0, 1, 1])})
    module(x).square().mean().backward()
    taylor.update()
    with torch.no_grad():
        mask = budget["0"].gate.mask
        mask[0] = 1e-2
        above = module(x).square().mean()
        mask[0] = -1e-2
        slope = (above - module(x).square().mean()) / 2e-2
    torch.testing.assert_close(taylor.scores()["0"][0], slope.abs(), rtol=1e-2, atol=1e-4)
    assert taylor.scores()["0"][0] > 0
