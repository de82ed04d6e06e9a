"""The twelve properties that prove the method right, by number, and what else its file says.

Properties 11 (accumulation) and 12 (no host sync) need a Trainer and are in tests/callbacks/test_pruning.py.
"""

from __future__ import annotations

import copy
from fractions import Fraction
from functools import partial
from itertools import pairwise
from math import floor, sqrt
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_peft import DEM, Budget, DynamicDoRA, NormShare, RankBudget, RankPolicy, SlowCubic, UntilTail, inject
from lightning_peft.adapters import component_shares, dynamic_dora

LAYERS, FULL, FINAL, TOTAL = 5, 6, 4, 40


def network(rank: int = FULL, **arguments: Any) -> nn.Sequential:
    """Five adapted layers of three shapes, and a head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sizes = [8, 8, 8, 12, 12, 8]
        layers: list[nn.Module] = []
        for d_in, d_out in pairwise(sizes):
            layers += [nn.Linear(d_in, d_out), nn.Tanh()]
        module = nn.Sequential(*layers, nn.Linear(8, 3))
        inject(module, partial(DynamicDoRA, rank=rank, **{"dropout": 0.0, **arguments}))
    return module


class Run:
    """The paper's algorithm 1 as a plain loop, which can be stopped and resumed."""

    def __init__(self, policy: RankPolicy, dem: DEM | None = None, lr: float = 0.02, **arguments: Any) -> None:
        self.module = network(**arguments)
        self.policy, self.dem = policy, dem
        self.budget = RankBudget.of(self.module)
        self.policy.track(self.budget)
        trained = [p for p in self.module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=0.1)
        self.step = 0
        self.after_event: dict[int, dict[str, int]] = {}

    def take(self, steps: int = 1) -> Run:
        for _ in range(steps):
            self.step += 1
            generator = torch.Generator().manual_seed(self.step)
            x, y = torch.randn(16, 8, generator=generator), torch.randn(16, 3, generator=generator)
            loss = (self.module(x) - y).square().mean()
            if self.dem is not None and (weight := self.dem.weight_at(self.step, TOTAL)):
                loss = loss + weight * self.dem(self.module, None, None)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if self.policy.observes(self.step, TOTAL):
                self.policy.importance.update()
            if self.policy.is_event(self.step, TOTAL):
                self.policy.apply(self.policy.decide(self.step, TOTAL), self.step, TOTAL)
                self.after_event[self.step] = self.budget.ranks()
        return self

    def state(self) -> dict[str, Any]:
        return copy.deepcopy(
            {
                "module": self.module.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "policy": self.policy.state_dict(),
                "step": self.step,
            }
        )

    def load(self, state: dict[str, Any]) -> Run:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.policy.load_state_dict(state["policy"])
        self.step = state["step"]
        return self


def paper(final: float = FINAL, interval: int = 3, **options: Any) -> RankPolicy:
    return dynamic_dora.policy(Budget(rank=final), interval=interval, **options)


def randomise(module: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in RankBudget.of(module).values():
            for _, parameter in site.adapter.own_parameters():
                parameter.normal_(generator=generator)


def dense_shares(A: Tensor, B: Tensor, c: Tensor, eps: float = 1e-8) -> Tensor:
    """The equation as it is printed, with every outer product."""
    products = c[:, None, None] * B.T[:, :, None] * A[:, None, :]
    return products.flatten(1).norm(dim=1) / (products.sum(0).norm() + eps)


def test_property_1_starts_at_the_base_and_one_step_moves_only_the_gains() -> None:
    module = network()
    plain = nn.Sequential(*(getattr(child, "base", child) for child in module))
    x = torch.randn(5, 8)
    assert torch.equal(module(x), plain(x))
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    trained = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.1, weight_decay=0.0)
    module(x).square().mean().backward()
    optimizer.step()
    changed = {name for name, p in module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {f"{i}.gate.gain" for i in (0, 2, 4, 6, 8)} | {"10.weight", "10.bias"}
    factors = [p for name, p in module.named_parameters() if name.endswith((".A", ".B"))]
    assert all(p.grad is not None and not p.grad.any() for p in factors)


def test_property_1_with_dem_and_decay_the_factors_move_too() -> None:
    run = Run(paper(), DEM(0.3))
    before = {name: p.detach().clone() for name, p in run.module.named_parameters()}
    run.take()
    changed = {name for name, p in run.module.named_parameters() if not torch.equal(p, before[name])}
    assert {f"{i}.{part}" for i in (0, 2, 4, 6, 8) for part in ("A", "B", "gate.gain")} <= changed
    assert not any(".base." in name for name in changed)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("shape", [(6, 40, 24), (12, 64, 64), (1, 9, 5), (3, 5, 9)])
def test_property_2_scores_equal_dense_outer_products(
    shape: tuple[int, int, int], dtype: torch.dtype, tolerance: float
) -> None:
    rank, d_in, d_out = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((rank, d_in), (d_out, rank), (rank,))
    A, B, c = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in sizes)
    expected = dense_shares(A, B, c)
    actual = component_shares(A.to(dtype), B.to(dtype), c.to(dtype))
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


def test_property_2_in_batches_and_through_the_importance() -> None:
    module = network(rank=4)
    randomise(module)
    share = NormShare(beta=0.0)
    share.track(RankBudget.of(module))
    share.update()
    for name, site in RankBudget.of(module).items():
        adapter = site.adapter
        assert isinstance(adapter, DynamicDoRA)
        expected = dense_shares(adapter.A.double(), adapter.B.double(), adapter.gate.value().double())
        torch.testing.assert_close(share.scores()[name].double(), expected.detach(), rtol=1e-5, atol=1e-5)


def test_property_3_counts_follow_the_schedule_exactly() -> None:
    run = Run(paper()).take(TOTAL)
    components, start, last = LAYERS * FULL, floor(0.15 * TOTAL), TOTAL - TOTAL // 2
    assert list(run.after_event) == [6, 9, 12, 15, 18, 20]
    for step, ranks in run.after_event.items():
        q = Fraction(step - start, last - start)
        assert sum(ranks.values()) == components - floor(components * Fraction(FULL - FINAL, FULL) * q**3)
    assert sum(run.after_event[last].values()) == LAYERS * FINAL == 20
    budgets = [run.policy.budget_at(step, TOTAL) for step in range(TOTAL + 1)]
    assert budgets == sorted(budgets, reverse=True)
    assert (budgets[start], budgets[last], budgets[-1]) == (30, 20, 20)
    assert run.budget.spent == 20


def test_property_4_between_events_components_return_and_in_the_tail_none_does() -> None:
    run = Run(paper(), lr=0.5).take(18)
    assert sum(run.after_event[18].values()) < 30
    run.take(1)
    assert run.budget.spent == 30  # momentum and gradients alone
    run.take(1)
    masks = {name: site.gate.mask.clone() for name, site in run.budget.items()}
    final = {name: site.gate.open() for name, site in run.budget.items()}
    assert sum(int(open_.sum()) for open_ in final.values()) == 20
    for _ in range(TOTAL // 2):
        run.take(1)
        for name, site in run.budget.items():
            assert torch.equal(site.gate.mask, masks[name])
            assert torch.equal(site.gate.open(), final[name])


def test_property_5_a_dead_component_goes_first_and_a_strong_one_stays() -> None:
    module = network()
    randomise(module)
    budget = RankBudget.of(module)
    dead, blind, strong = (site.adapter for site in list(budget.values())[:3])
    with torch.no_grad():
        dead.gate.gain[3] = 0.0
        blind.A[2] = 0.0
        strong.gate.gain[1] *= 10
    policy = RankPolicy(SlowCubic(0.0, 0.0), NormShare(beta=0.0), Budget(rank=1), interval=1, soft=True)
    policy.track(budget)
    policy.importance.update()
    scores = policy.importance.scores()
    names = list(budget)
    assert scores[names[0]].argmin() == 3
    assert scores[names[0]][3] == 0
    assert scores[names[1]].argmin() == 2
    first = next(step for step in range(1, 101) if policy.budget_at(step, 100) == 28)
    closed = {name: (~mask).nonzero().flatten().tolist() for name, mask in policy.decide(first, 100).items()}
    assert [closed[name] for name in names] == [[3], [2], [], [], []]
    for step in range(1, 101):
        assert policy.decide(step, 100)[names[2]][1]


def test_property_6_scores_do_not_see_how_a_product_is_split_nor_alpha() -> None:
    A, B, c = torch.randn(5, 8), torch.randn(6, 5), torch.randn(5)
    expected = component_shares(A, B, c)
    torch.testing.assert_close(component_shares(7.0 * A, B / 7.0, c), expected)
    each = torch.rand(5) + 0.5
    torch.testing.assert_close(component_shares(A * each[:, None], B, c / each), expected)
    shares = []
    for alpha in (1.0, 64.0):
        module = network(alpha=alpha)
        randomise(module)
        share = NormShare()
        share.track(RankBudget.of(module))
        share.update()
        shares.append(share.scores())
    for name, row in shares[0].items():
        assert torch.equal(row, shares[1][name])


def test_property_7_a_single_component_is_worth_one() -> None:
    share = component_shares(torch.randn(1, 8), torch.randn(6, 1), torch.tensor([0.3]))
    torch.testing.assert_close(share, torch.ones(1), rtol=0, atol=1e-6)
    last = component_shares(torch.randn(4, 8), torch.randn(6, 4), torch.tensor([0.0, 0.0, -0.2, 0.0]))
    torch.testing.assert_close(last, torch.tensor([0.0, 0.0, 1.0, 0.0]), rtol=0, atol=1e-6)


def test_a_layer_without_an_update_scores_zero() -> None:
    assert not component_shares(torch.randn(4, 8), torch.randn(6, 4), torch.zeros(4)).any()


def test_components_that_cancel_score_above_one() -> None:
    a, b = torch.randn(1, 8), torch.randn(6, 1)
    share = component_shares(a.repeat(2, 1), b.repeat(1, 2), torch.tensor([1.0, -0.5]))
    torch.testing.assert_close(share, torch.tensor([2.0, 1.0]), rtol=1e-4, atol=1e-4)


def test_property_8_merged_truncated_and_exported_agree() -> None:
    """What :func:`merge`, :func:`compact` and the exporter are made of, on a trained and pruned run."""
    run = Run(paper(), lr=0.1).take(TOTAL)
    x = torch.randn(32, 12)
    for site in run.budget.values():
        adapter = site.adapter
        assert isinstance(adapter, DynamicDoRA)
        some = x[:, : adapter.A.shape[1]]
        masked = adapter(some)
        merged = nn.functional.linear(some, adapter.effective_weight(), adapter.bias)
        torch.testing.assert_close(merged, masked, rtol=1e-5, atol=1e-5)
        truncated = adapter.compacted()
        assert truncated is not None
        torch.testing.assert_close(truncated(some), masked, rtol=1e-6, atol=1e-6)
        A, B = adapter.factors()
        k = int(site.gate.open().sum())
        assert A.shape[0] == B.shape[1] == k
        exported = adapter.base(some) + (adapter.alpha * k / FULL) / k * (some @ A.T @ B.T)
        torch.testing.assert_close(exported, truncated(some), rtol=1e-5, atol=1e-5)


def test_property_9_dem_is_off_in_the_tail() -> None:
    """Its value and gradient are in tests/regularizers/test_dem.py."""
    dem = DEM(UntilTail(0.3, tail=0.5))
    assert [dem.weight_at(step, TOTAL) for step in (1, 19, 20, 21, 40)] == [0.3, 0.3, 0.3, 0.0, 0.0]
    assert all(
        (dem.weight_at(step, total) == 0) == (step > SlowCubic(0.15, 0.5).window(total)[1])
        for total in (1, 2, 7, 40, 101)
        for step in range(1, total + 1)
    )


@pytest.fixture(scope="module")
def through() -> dict[str, Any]:
    """The state at the end of a run that was never stopped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Run(paper(), DEM(UntilTail(0.3, 0.5)), dropout=0.1).take(TOTAL).state()


@pytest.mark.parametrize("stop", [3, 6, 13, 20, 21, 33], ids=["warmup", "start", "pruning", "last", "tail", "late"])
def test_property_10_a_resumed_run_is_bit_identical(stop: int, through: dict[str, Any]) -> None:
    def start() -> Run:
        return Run(paper(), DEM(UntilTail(0.3, 0.5)), dropout=0.1)

    torch.manual_seed(0)  # dropout
    saved = start().take(stop).state()
    resumed = start().load(saved).take(TOTAL - stop).state()
    for name, value in through["module"].items():
        assert torch.equal(resumed["module"][name], value), name
    for name, value in through["policy"]["importance"]["worth"].items():
        assert torch.equal(resumed["policy"]["importance"]["worth"][name], value), name


@pytest.mark.parametrize("options", [{"interval": 1}, {"interval": 1000}, {"interval": 1, "minimum": 2}], ids=str)
def test_property_10_edge_cases_of_the_schedule(options: dict[str, int]) -> None:
    run = Run(paper(**options), DEM(0.0)).take(TOTAL)
    assert run.budget.spent == LAYERS * FINAL
    assert min(run.budget.ranks().values()) >= options.get("minimum", 0)


def test_property_10_without_a_cut_nothing_is_pruned() -> None:
    run = Run(paper(final=FULL, interval=1)).take(TOTAL)
    assert all(sum(ranks.values()) == LAYERS * FULL for ranks in run.after_event.values())
    assert all(site.gate.mask.all() for site in run.budget.values())


def test_it_starts_as_in_the_authors_code() -> None:
    adapter = DynamicDoRA(nn.Linear(400, 300), rank=50)
    for factor, bound in ((adapter.A, sqrt(6 / 400)), (adapter.B, sqrt(6 / 50))):
        assert 0.99 * bound < factor.abs().max() <= bound
        assert abs(factor.std().item() - bound / sqrt(3)) < 0.02 * bound
    assert adapter.gate.gain is not None
    assert not adapter.gate.gain.any()
    assert adapter.gate.cost == 700
    assert adapter.scaling == 8.0 / 50
    # ‖a_i‖ = sqrt 2 and ‖b_i‖ = sqrt(2 d_out / R), about
    assert abs(adapter.A.norm(dim=1).mean().item() - sqrt(2)) < 0.05
    assert abs(adapter.B.norm(dim=0).mean().item() - sqrt(2 * 300 / 50)) < 0.1


def test_the_scale_is_never_changed_as_components_close() -> None:
    run = Run(paper(), lr=0.1).take(TOTAL)
    assert {site.adapter.scaling for site in run.budget.values()} == {8.0 / FULL}


def test_the_initial_rank_is_one_and_a_half_times_the_final() -> None:
    assert [dynamic_dora.initial_rank(rank) for rank in (1, 2, 3, 8, 2.5)] == [2, 3, 5, 12, 4]


def test_the_policy_has_the_papers_settings() -> None:
    policy = dynamic_dora.policy(Budget(rank=8))
    assert policy.schedule == SlowCubic(warmup=0.15, tail=0.5)
    assert isinstance(policy.importance, NormShare)
    assert (policy.importance.beta, policy.importance.eps) == (0.9, 1e-8)
    assert (policy.interval, policy.soft, policy.minimum) == (10, True, 0)
    assert policy.importance.reads == "weights"
