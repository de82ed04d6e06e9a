from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    AdaLoRA,
    Budget,
    Growth,
    LoRA,
    ModuleSensitivity,
    PartlyOpen,
    RankBudget,
    RankPruning,
    WeightDecomposed,
    inject,
    presets,
)


def module(adapter: Any = None) -> nn.Module:
    net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    inject(net, adapter or PartlyOpen(partial(AdaLoRA, rank=3), 2), targets=["0", "2", "4"])
    for site in RankBudget.of(net).values():
        for _, p in site.adapter.own_parameters():
            nn.init.normal_(p)
    return net


def test_a_modules_score_is_the_papers() -> None:
    net = module()
    budget = RankBudget.of(net)
    importance = ModuleSensitivity(beta1=0.8, beta2=0.6)
    importance.track(budget)
    mean = dict.fromkeys(budget, 0.0)
    uncertainty = dict.fromkeys(budget, 0.0)
    for step in range(5):
        net.zero_grad()
        net(torch.randn(6, 8, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        importance.update()
        for name, site in budget.items():
            own = [p for _, p in site.adapter.own_parameters()]
            now = sum(float((p * p.grad).detach().abs().sum()) for p in own) / sum(p.numel() for p in own) ** 0.5
            mean[name] = 0.8 * mean[name] + 0.2 * now
            uncertainty[name] = 0.6 * uncertainty[name] + 0.4 * abs(now - mean[name])
    for name, row in importance.scores().items():
        assert row.tolist() == pytest.approx([mean[name] * uncertainty[name]] * 3, rel=1e-4)
    assert len({round(float(row[0]), 9) for row in importance.scores().values()}) == 3


def test_a_magnitude_is_no_part_of_the_score() -> None:
    net = module(partial(WeightDecomposed, rank=2, components="adalora"))
    budget = RankBudget.of(net)
    for site in budget.values():
        for _, parameter in site.adapter.own_parameters():
            parameter.grad = torch.ones_like(parameter)
    importance = ModuleSensitivity(beta1=0.0)
    importance.track(budget)
    importance.update()
    for name, site in budget.items():
        parts = [site.adapter.A, site.adapter.B, site.gate.gain]
        expected = sum(p.detach().abs().sum() for p in parts) / sum(p.numel() for p in parts) ** 0.5
        torch.testing.assert_close(importance.statistics()["sensitivity"][name], expected.expand(2))


def test_a_layer_without_gradients_or_with_broken_ones_keeps_its_score() -> None:
    net = module()
    budget = RankBudget.of(net)
    importance = ModuleSensitivity()
    importance.track(budget)
    for site in budget.values():
        for _, p in site.adapter.own_parameters():
            p.grad = torch.ones_like(p)
    budget["4"].adapter.A.grad = None  # type: ignore[union-attr]
    importance.update()
    before = {name: row.clone() for name, row in importance.scores().items()}
    budget["0"].adapter.A.grad[0, 0] = torch.inf  # type: ignore[index]
    importance.update()
    after = importance.scores()
    assert torch.equal(after["0"], before["0"])
    assert not torch.equal(after["4"], before["4"])
    assert importance.diverged() == ["0"]


def test_it_starts_with_some_components_and_room_for_others() -> None:
    gates = [site.gate for site in RankBudget.of(module()).values()]
    assert [gate.mask.tolist() for gate in gates] == [[1, 1, 0]] * 3
    gates[0].keep(torch.ones(3))
    gates[0].reset_parameters()  # as after the meta device
    assert gates[0].mask.tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="were to be open at the start, and LoRA was built with 3: start with"):
        PartlyOpen(partial(LoRA, rank=3), 4)(nn.Linear(8, 8))
    with pytest.raises(ValueError, match="rank is how many components are open at the start, at least 0. Got -1."):
        PartlyOpen(partial(LoRA, rank=3), -1)


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
            self.head = nn.Linear(8, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = (self.head(self.net(batch)) - batch.sum(1, keepdim=True).sin()).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.02)


class Watch(L.Callback):
    """What is shown of the ranks after every batch."""

    def __init__(self) -> None:
        self.bar: list[str] = []
        self.spent: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        self.bar.append(str(trainer.progress_bar_metrics["rank"]))
        self.spent.append(RankBudget.of(pl_module).spent)


def fit(preset: list[L.Callback], tmp_path: Any = None, **options: Any) -> tuple[Net, Watch]:
    torch.manual_seed(1)
    watch, net = Watch(), Net()
    logger: Any = False if tmp_path is None else TensorBoardLogger(tmp_path, name="", version="")
    rows = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
    L.Trainer(
        callbacks=[*preset, watch], accelerator="cpu", logger=logger, max_epochs=2, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=5, **options,
    ).fit(net, DataLoader(rows, batch_size=4))  # type: ignore[arg-type]  # fmt: skip
    return net, watch


def test_a_rising_budget_is_shown_as_it_rises(tmp_path: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    preset = presets.increlora(final_rank=3, interval=4)
    net, watch = fit(preset, tmp_path)
    pruning = next(c for c in preset if isinstance(c, RankPruning))
    events = [step for step in range(1, 41) if pruning.policy.is_event(step, 40)]
    assert events == [4, 8, 12, 16, 20]
    assert watch.bar[0] == "3/9"
    assert watch.bar[-1] == "9/9"
    assert [watch.spent[step - 1] for step in events] == [pruning.policy.budget_at(step, 40) for step in events]
    assert watch.spent == sorted(watch.spent)
    assert set(watch.spent[20:]) == {9}
    board = EventAccumulator(str(tmp_path)).Reload()
    for name in ("rank/budget", "rank/spent"):
        values = {scalar.step: scalar.value for scalar in board.Scalars(name)}
        assert [values[step] for step in (0, *events)] == [3, *(pruning.policy.budget_at(step, 40) for step in events)]
    assert "9/18" in RankBudget.of(net).table()


def test_the_tail_can_run_compacted() -> None:
    masked, _ = fit(presets.increlora(final_rank=2, interval=4, orthogonality=0.0))
    cut, _ = fit(presets.increlora(final_rank=2, interval=4, orthogonality=0.0, compact="final"))
    assert RankBudget.of(cut).ranks() == RankBudget.of(masked).ranks()
    assert {name: len(site.gate) for name, site in RankBudget.of(cut).items()} == RankBudget.of(masked).ranks()
    x = torch.randn(3, 8)
    torch.testing.assert_close(cut.net(x), masked.net(x), rtol=1e-4, atol=1e-5)


def test_the_preset_is_the_method_part_by_part() -> None:
    preset = presets.increlora(final_rank=2.5, each=2)
    injection, pruning = preset[0], preset[1]
    assert isinstance(pruning, RankPruning)
    policy = pruning.policy
    assert isinstance(policy, Growth)
    assert isinstance(policy.importance, ModuleSensitivity)
    assert (policy.final, policy.each) == (Budget(rank=2.5), 2)
    adapter = injection.adapter(nn.Linear(16, 16))  # type: ignore[attr-defined]
    assert (type(adapter), adapter.rank, adapter.scaling) == (AdaLoRA, 5, 32 / 5)
    assert adapter.gate.mask.tolist() == [1, 0, 0, 0, 0]


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match="give final_rank or budget, not both. Got final_rank=2, budget="):
        presets.increlora(2, budget=Budget(share=0.5))
    with pytest.raises(ValueError, match="does not say how many components a layer may have; give max_rank as well."):
        presets.increlora(budget=Budget(share=0.5))
    with pytest.raises(ValueError, match="does not say how many components a layer has; give start_rank and max_rank."):
        presets.elalora(budget=Budget(share=0.5))
    with pytest.raises(ValueError, match="orthogonality is the weight of a penalty, at least 0. Got -1"):
        presets.increlora(2, orthogonality=-1)
    with pytest.raises(ValueError, match="compact=3 would cut at events before the last, and this policy opens there"):
        RankPruning(presets.increlora(2)[1].policy, compact=3)  # type: ignore[attr-defined]
