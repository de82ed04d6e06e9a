"""Steps that are skipped move neither importance nor schedule; what is not finite stays out of the running average."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Cubic,
    DynamicDoRA,
    LoRA,
    RankBudget,
    RankPolicy,
    RankPruning,
    Taylor,
)
from lightning_peft.adapters import dynamic_dora

STEPS, LAYERS, FULL, FINAL = 40, 2, 4, 2
BAD = frozenset({1, 4, 5, 13})  # steps of the Trainer; 4 and 5 are before the first event, 13 is where one would be


class Net(LightningModule):
    def __init__(
        self, spoil: Callable[[Tensor], Tensor | None], bad: frozenset[int] = BAD, fused: bool = False
    ) -> None:
        super().__init__()
        self.spoil, self.bad, self.fused = spoil, bad, fused
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        loss: Tensor = (self.net(batch) - batch.sum(1, keepdim=True).sin()).square().mean()
        self.log("loss", loss, on_epoch=True)
        return self.spoil(loss) if self.trainer.global_step + 1 in self.bad else loss

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(80, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(x, batch_size=4)  # type: ignore[arg-type]  # two epochs of 20 steps

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2, fused=self.fused)


class Recorder(Callback):
    """After every batch: the running importance, the open components, and whether an event was made."""

    def __init__(self, pruning: RankPruning) -> None:
        self.pruning = pruning
        self.worth: dict[int, Tensor] = {}
        self.open: dict[int, int] = {}
        self.events: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = trainer.global_step
        self.worth[step] = torch.cat(list(self.pruning.policy.importance.scores().values())).clone()
        self.open[step] = RankBudget.of(pl_module).spent
        if self.pruning.event_step == step:
            self.events.append(step)


def weights() -> list[Callback]:
    policy = dynamic_dora.policy(Budget(rank=FINAL), interval=3)
    return [AdapterInjection(partial(DynamicDoRA, rank=FULL), verbose=False), RankPruning(policy)]


def gradients() -> list[Callback]:
    policy = RankPolicy(Cubic(0.15, 0.5), Taylor(), Budget(rank=FINAL), 3)
    return [AdapterInjection(partial(LoRA, rank=FULL), verbose=False), RankPruning(policy)]


def scaled() -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=7))


def run(net: Net, callbacks: list[Callback], scaler: bool, *extra: Callback, ckpt_path: Any = None) -> Recorder:
    pruning = next(callback for callback in callbacks if isinstance(callback, RankPruning))
    recorder = Recorder(pruning)
    torch.manual_seed(3 if ckpt_path is None else 77)
    Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, plugins=[scaled()] if scaler else [],
        callbacks=[*callbacks, recorder, AdapterCheckpoint(), *extra],
    ).fit(net, ckpt_path=ckpt_path)  # fmt: skip
    return recorder


def assert_skipped_steps_count_for_nothing(recorder: Recorder, bad: frozenset[int] = BAD) -> None:
    policy = recorder.pruning.policy
    last_event = max(recorder.events)
    before = torch.zeros_like(recorder.worth[1])
    for step, worth in recorder.worth.items():
        assert worth.isfinite().all()
        if step <= last_event:
            # Where B is still 0, at the first step that is taken, a gradient is worth 0 as well.
            assert torch.equal(worth, before) == (step in bad) or step <= 2, step
        before = worth
    expected, taken = [], 0
    for step in range(1, STEPS + 1):
        taken += step not in bad
        if step not in bad and policy.is_event(taken, STEPS):
            expected.append(step)
            assert recorder.open[step] == policy.budget_at(taken, STEPS)
    assert len(expected) > 4
    assert recorder.events == expected


infinite = partial(torch.mul, other=float("inf"))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", [weights, gradients])
def test_steps_that_a_gradient_scaler_skips(method: Callable[[], list[Callback]], fused: bool) -> None:
    net = Net(infinite, fused=fused)
    assert_skipped_steps_count_for_nothing(run(net, method(), True))
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("method", [weights, gradients])
def test_steps_whose_training_step_returns_none(method: Callable[[], list[Callback]], scaler: bool) -> None:
    assert_skipped_steps_count_for_nothing(run(Net(lambda loss: None), method(), scaler))


class SaveAt(Callback):
    """Saves when our callbacks are done with a batch, or, first in the list, before they saw it."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(("method", "fused"), [(weights, True), (gradients, False)])
def test_resuming_after_skipped_steps_is_exact(
    method: Callable[[], list[Callback]], fused: bool, first: bool, tmp_path: Path
) -> None:
    whole = Net(infinite, fused=fused)
    path, callbacks = tmp_path / "saved.ckpt", method()
    save = SaveAt(13, path)  # right after a step that was skipped where an event would have been
    if first:
        callbacks = [save, *callbacks]
    recorder = run(whole, callbacks, True, *([] if first else [save]))
    net = Net(infinite, fused=fused)
    resumed = run(net, method(), True, ckpt_path=path)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in whole.state_dict().items())
    assert resumed.events == [event for event in recorder.events if event > 13]
    assert all(torch.equal(recorder.worth[step], worth) for step, worth in resumed.worth.items())


@pytest.mark.parametrize("method", [weights, gradients])
def test_the_last_cut_is_made_however_many_steps_were_skipped(method: Callable[[], list[Callback]]) -> None:
    bad = frozenset(range(8, 38))  # 10 steps are taken, and the last event is after 20
    recorder = run(Net(infinite, bad), method(), True)
    assert recorder.open[39] > recorder.open[STEPS] == LAYERS * FINAL
    assert recorder.events[-1] == STEPS
    assert recorder.pruning.settled
    assert recorder.pruning.budget_now() == recorder.pruning.budget_at_event() == LAYERS * FINAL


@pytest.mark.parametrize("method", [weights, gradients])
def test_without_a_scaler_the_optimizer_steps_and_the_user_is_told(method: Callable[[], list[Callback]]) -> None:
    net = Net(infinite, frozenset({7}))
    with pytest.warns(UserWarning, match=r"training has diverged in net\.0, net\.2: a gradient or weight there was"):
        recorder = run(net, method(), False)
    assert not all(p.isfinite().all() for p in net.parameters())
    assert torch.equal(recorder.worth[6], recorder.worth[7])  # the last finite worth stands
    assert all(worth.isfinite().all() for worth in recorder.worth.values())
    assert recorder.open[STEPS] == LAYERS * FINAL or method is weights  # a gain that is not a number is not open


def test_early_stopping_ends_a_diverged_run() -> None:
    stop = EarlyStopping("loss_epoch", patience=9, check_on_train_epoch_end=True)
    with pytest.warns(UserWarning, match=r"training has diverged in net\.0"):
        recorder = run(Net(infinite, frozenset({7})), gradients(), False, stop)
    assert max(recorder.worth) == 20  # the first epoch's end
