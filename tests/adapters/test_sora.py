from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from lightning_peft import LoRA, RankBudget, RankPruning, SoftThreshold, SoRA, inject, presets
from lightning_peft.adapters.sora import soft_threshold
from lightning_peft.rank import Constant, Linear


def tracked(policy: SoftThreshold, rank: int = 4) -> RankBudget:
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6), nn.Linear(6, 8))
    inject(module, partial(SoRA, rank=rank), targets=["0", "1"])
    budget = RankBudget.of(module)
    policy.track(budget)
    return budget


def gains(budget: RankBudget) -> list[Tensor]:
    return [site.gate.gain for site in budget.values() if site.gate.gain is not None]


def test_it_starts_as_in_the_authors_code() -> None:
    adapter = SoRA(nn.Linear(64, 48), rank=32, alpha=16.0)
    assert adapter.scaling == 0.5
    assert not adapter.B.any()
    assert adapter.A.abs().max() <= 1 / 8
    assert adapter.gate.gain is not None
    assert 0.6 < adapter.gate.gain.std() < 1.5


def test_the_proximal_step_is_the_minimum_of_its_problem() -> None:
    """prox(g) = argmin_z (z - g)^2 / 2 + t |z|, found here on a grid."""
    before = torch.tensor([-2.0, -0.31, -0.3, -0.1, 0.0, 0.29, 0.3, 0.55, 1.7])
    after = before.clone()
    soft_threshold([after], 0.3)
    grid = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for g, z in zip(before, after, strict=True):
        best = grid[((grid - g.double()).square() / 2 + 0.3 * grid.abs()).argmin()]
        assert abs(best - z) < 1e-4
    assert after[before.abs() <= 0.3].eq(0).all()  # exactly


def test_thresholds_add_up_and_a_skipped_step_takes_none() -> None:
    many, once, skipped = torch.randn(50), torch.empty(50), torch.randn(50)
    once.copy_(many)
    for _ in range(4):
        soft_threshold([many], 0.25)
    soft_threshold([once], 1.0)
    torch.testing.assert_close(many, once, rtol=0, atol=1e-6)
    assert torch.equal(many == 0, once == 0)
    before = skipped.clone()
    soft_threshold([skipped], 0.25, skipped=torch.ones(()))
    assert torch.equal(skipped, before)
    soft_threshold([skipped], 0.25, skipped=torch.zeros(()))
    assert not torch.equal(skipped, before)


def test_one_threshold_for_the_whole_run_or_one_that_rises() -> None:
    same = SoftThreshold(0.2)
    assert [same.threshold_at(step, 10) for step in (1, 5, 10)] == [0.2, 0.2, 0.2]
    late = SoftThreshold(0.2, Constant(warmup=0.3, tail=0.4))
    assert [late.threshold_at(step, 10) for step in range(1, 11)] == [0, 0, 0.2, 0.2, 0.2, 0.2, 0, 0, 0, 0]
    rising = SoftThreshold(0.5, Linear(warmup=0.2, tail=0.4), lowest=0.1)
    expected = [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0]
    assert [rising.threshold_at(step, 10) for step in range(1, 8)] == pytest.approx(expected)


def test_steps_that_were_taken_together_are_all_counted() -> None:
    policy = SoftThreshold(0.5, Linear(warmup=0.2, tail=0.4), lowest=0.1)
    budget = tracked(policy)
    before = [gain.detach().clone() for gain in gains(budget)]
    policy.after_steps(3, 4, 10)  # steps 2, 3 and 4
    soft_threshold(before, 0.1 + 0.2 + 0.3)
    assert all(torch.equal(a, b) for a, b in zip(gains(budget), before, strict=True))


class Ops(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_a_step_costs_three_operations_however_many_layers() -> None:
    module = nn.Sequential(*[nn.Linear(8, 8) for _ in range(20)])
    inject(module, partial(SoRA, rank=2), targets=[r"\d+"])
    policy = SoftThreshold(0.1)
    policy.track(RankBudget.of(module))
    with Ops() as ops:
        policy.after_steps(1, 1, 10)
    assert ops.names == [
        "aten._foreach_clamp_min.Scalar", "aten._foreach_clamp_max_.Scalar", "aten._foreach_sub_.List",
    ]  # fmt: skip


def test_zero_gains_are_closed_for_good_at_the_last_event_and_not_before() -> None:
    policy = SoftThreshold(0.6, Constant(0.0, 0.5))
    budget = tracked(policy)
    policy.after_steps(1, 1, 10)
    zero = {name: site.gate.gain == 0 for name, site in budget.items()}  # type: ignore[union-attr]
    assert sum(int(z.sum()) for z in zero.values()) == budget.capacity - budget.spent > 0
    policy.apply(policy.decide(4, 10), 4, 10)
    assert all(site.gate.mask.all() for site in budget.values())
    with torch.no_grad():
        gains(budget)[0].fill_(5.0)  # training brings a layer back
    policy.apply(policy.decide(5, 10), 5, 10)
    first, second = budget.values()
    assert first.gate.mask.tolist() == [1, 1, 1, 1]
    assert torch.equal(second.gate.mask == 0, zero["1"])
    ranks = budget.ranks()
    with torch.no_grad():
        for gain in gains(budget):
            gain.fill_(9.0)
    assert budget.ranks() == ranks
    assert policy.budget_at(1, 10) == policy.budget_at(10, 10) == budget.capacity


class Net(L.LightningModule):
    def __init__(self, lr: float = 0.02, fused: bool = False) -> None:
        super().__init__()
        self.lr, self.fused = lr, fused
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = (self.net(batch) - batch.sum(1, keepdim=True).sin()).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        own = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(own, lr=self.lr, fused=self.fused)


def rows(batch: int = 4) -> DataLoader[Any]:
    samples = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(samples, batch_size=batch)  # type: ignore[arg-type]


def fit(module: L.LightningModule, preset: Any, loader: Any = None, **options: Any) -> RankPruning:
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_epochs": 2,
    }  # fmt: skip
    torch.manual_seed(1)
    L.Trainer(callbacks=[*preset], **{**quiet, **options}).fit(module, loader or rows())
    pruning: RankPruning = next(c for c in preset if isinstance(c, RankPruning))
    return pruning


def sora(threshold: float = 0.04, **options: Any) -> Any:
    return presets.sora(threshold, rank=4, **{"tail": 0.25, "interval": 5, **options})


def by_hand(module: nn.Module, threshold: float, steps: int, last: int, lr: float) -> nn.Module:
    """The method without this package's callbacks."""
    torch.manual_seed(1)
    inject(module, partial(SoRA, rank=4))
    budget = RankBudget.of(module)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr)
    batches = list(rows())
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        module.training_step(batches[(step - 1) % len(batches)], 0).backward()  # type: ignore[operator]
        optimizer.step()
        if step <= last:
            with torch.no_grad():
                for gain in gains(budget):
                    gain.copy_(gain.sign() * (gain.abs() - threshold).clamp_min(0))
        if step == last:
            budget.keep({name: site.gate.gain != 0 for name, site in budget.items()})  # type: ignore[misc]
    return module


def test_under_a_trainer_it_is_the_method_written_by_hand() -> None:
    ours, theirs = Net(), Net()
    pruning = fit(ours, sora())
    by_hand(theirs, 0.04, 40, 30, lr=0.02)
    assert pruning.settled
    assert 0 < RankBudget.of(ours).spent < RankBudget.of(ours).capacity
    assert RankBudget.of(ours).ranks() == RankBudget.of(theirs).ranks()
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


def test_accumulated_micro_batches_are_one_step() -> None:
    seen: list[list[Tensor]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            seen.append([gain.detach().clone() for gain in gains(RankBudget.of(pl_module))])

    preset = sora()
    fit(Net(), [*preset, Look()], accumulate_grad_batches=4)
    moved = [not all(torch.equal(a, b) for a, b in zip(*pair, strict=True)) for pair in itertools.pairwise(seen)]
    assert [i + 2 for i, each in enumerate(moved) if each] == [4 * k for k in range(1, 11)]


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_a_gradient_scaler_skips_shrinks_nothing(fused: bool) -> None:
    from lightning.pytorch.plugins.precision import MixedPrecision

    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40))  # overflows at first
    first: list[Tensor] = []

    class Look(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            first.extend(gain.detach().clone() for gain in gains(RankBudget.of(pl_module)))

    module = Net(fused=fused)
    fit(module, [*sora(tail=0.0), Look()], max_steps=1)
    assert all(torch.equal(a, b) for a, b in zip(gains(RankBudget.of(module)), first, strict=True)) is False
    first.clear()
    module = Net(fused=fused)
    fit(module, [*sora(tail=0.0), Look()], max_steps=1, plugins=[plugin])
    assert all(torch.equal(a, b) for a, b in zip(gains(RankBudget.of(module)), first, strict=True))


def test_the_tail_can_run_compacted() -> None:
    masked, cut = Net(), Net()
    fit(masked, sora())
    fit(cut, sora(compact="final"))
    small = RankBudget.of(cut)
    assert small.ranks() == RankBudget.of(masked).ranks()
    assert {name: len(site.gate) for name, site in small.items()} == {n: k for n, k in small.ranks().items() if k}
    x = torch.randn(3, 8)
    torch.testing.assert_close(cut.net(x), masked.net(x), rtol=1e-4, atol=1e-5)


def test_a_second_fit_reopens_nothing() -> None:
    module = Net()
    fit(module, sora())
    before = RankBudget.of(module).ranks()
    fit(module, sora(threshold=1e-6))
    assert RankBudget.of(module).ranks() == before


def test_a_threshold_that_closes_all_says_so() -> None:
    with pytest.warns(UserWarning, match="the soft threshold of 3 has closed every component, so the adapters do noth"):
        fit(Net(), sora(threshold=3.0))


def test_nor_does_compaction_break_such_a_run_off() -> None:
    module = Net()
    with pytest.warns(UserWarning, match="has closed every component"):
        fit(module, sora(threshold=3.0, compact="final"))
    assert RankBudget.of(module).spent == 0


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="threshold is how far a gain shrinks in one step, at least 0 and finite. Got"):
        SoftThreshold(-1e-3)
    with pytest.raises(ValueError, match="threshold=0 closes nothing at the end of the window; give a positive one"):
        SoftThreshold(0.0)
    with pytest.raises(TypeError, match="threshold must be a number. Got '3e-4'."):
        SoftThreshold("3e-4")  # type: ignore[arg-type]
    module = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    inject(module, partial(LoRA, rank=2), targets=["0"])
    with pytest.raises(ValueError, match="a soft threshold shrinks gains, and the adapter at '0' has none; use an"):
        SoftThreshold(0.1).track(RankBudget.of(module))
    half = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    inject(half, partial(SoRA, rank=2), targets=["0"])
    with pytest.raises(ValueError, match=r"are torch.bfloat16, in which a step of 0.1 is lost. Train with precision="):
        SoftThreshold(0.1).track(RankBudget.of(half.to(torch.bfloat16)))
    with pytest.raises(ValueError, match="compact=2 would cut at events before the last, and a gain that this policy"):
        RankPruning(SoftThreshold(0.1), compact=2)
