"""Lightning's learning-rate and batch-size finders leave no trace in adapters, masks, importance or schedule."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.tuner import Tuner
from quiet import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Cubic,
    LoRA,
    Orthogonality,
    RankBudget,
    RankPolicy,
    RankPruning,
    Regularization,
    Taylor,
    presets,
)
from lightning_peft.testing.processes import run_processes


class Net(L.LightningModule):
    def __init__(self, lr: float = 1e-2, batch_size: int = 8) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 16), nn.ReLU(),
                                     nn.Linear(16, 3))  # fmt: skip
        self.seen: list[Tensor] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch[0].clone())
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(64, 8, generator=generator), torch.randint(0, 3, (64,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=self.batch_size, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


def taylor() -> list[L.Callback]:
    policy = RankPolicy(Cubic(warmup=0.2, tail=0.3), Taylor(), Budget(rank=2), interval=2)
    growing = Orthogonality(weight=lambda step, total: 0.1 * step / total)  # a schedule that needs the total
    return [
        AdapterInjection(partial(LoRA, rank=3, dropout=0.1)),
        RankPruning(policy),
        Regularization({"orthogonality": growing}),
        AdapterCheckpoint(),
    ]


METHODS = {"dynamic-dora": partial(presets.dynamic_dora, final_rank=2, interval=2), "taylor": taylor}
every_method = pytest.mark.parametrize("method", METHODS)


def make(method: str, before: list[L.Callback], after: list[L.Callback], **options: Any) -> L.Trainer:
    return L.Trainer(callbacks=[*before, *METHODS[method](), *after], **{**QUIET, "max_epochs": 3, **options})


def left(net: Net, trainer: L.Trainer) -> dict[str, Any]:
    """All that a run leaves, as something to compare."""
    pruning = next(c for c in trainer.callbacks if isinstance(c, RankPruning))
    found = {name: value.clone() for name, value in net.state_dict().items()}
    for i, entry in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"optimizer {i} {key}": torch.as_tensor(value) for key, value in entry.items()}
    found |= {f"worth {n}": w for n, w in pruning.policy.state_dict()["importance"]["worth"].items()}
    numbers = pruning.total_steps, pruning.event_step, trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]
    return found | {"numbers": torch.tensor(numbers, dtype=torch.float64), "seen": torch.cat(net.seen)}


def plain(method: str, lr: float, batch_size: int = 8, **options: Any) -> dict[str, Any]:
    torch.manual_seed(3)
    net, trainer = Net(lr, batch_size), make(method, [], [], **options)
    trainer.fit(net)
    return left(net, trainer)


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


class Forget(L.Callback):
    """Forgets the batches that a finder has seen."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.seen.clear()  # type: ignore[operator, union-attr]


@every_method
@pytest.mark.parametrize("place", ["before", "after"])
def test_learning_rate_finder_in_the_callbacks_leaves_no_trace(method: str, place: str) -> None:
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    torch.manual_seed(3)
    net = Net()
    trainer = make(method, [finder] if place == "before" else [], [*([finder] if place == "after" else []), Forget()])
    trainer.fit(net)
    assert finder.optimal_lr is not None
    assert len(finder.optimal_lr.results["lr"]) == 20
    assert net.lr != 1e-2
    assert_same(left(net, trainer), plain(method, net.lr))


@every_method
def test_tuner_finds_a_learning_rate_and_leaves_the_module_as_it_was(method: str) -> None:
    torch.manual_seed(3)
    net, trainer = Net(), make(method, [], [])
    tuner = Tuner(trainer)
    found = tuner.lr_find(net, num_training=20, early_stop_threshold=None)
    assert found is not None
    assert len(net.seen) == 20
    assert all(site.gate.mask.all() for site in RankBudget.of(net).values())
    net.seen.clear()
    # The finder has injected, and so drawn the adapters' start: draw it the same for the comparison.
    torch.manual_seed(4)
    trainer.fit(net)
    torch.manual_seed(3)
    other, alone = Net(net.lr), make(method, [], [SeedAgain()])
    alone.fit(other)
    assert_same(left(net, trainer), left(other, alone))


class SeedAgain(L.Callback):
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        torch.manual_seed(4)


@every_method
@pytest.mark.parametrize("place", ["before", "after"])
def test_batch_size_finder_in_the_callbacks_leaves_no_trace(method: str, place: str) -> None:
    finder = BatchSizeFinder(steps_per_trial=3, init_val=4, max_trials=3, margin=0.0)
    torch.manual_seed(3)
    net = Net()
    trainer = make(method, [finder] if place == "before" else [], [*([finder] if place == "after" else []), Forget()])
    trainer.fit(net)
    assert finder.optimal_batch_size == net.batch_size == 16
    assert_same(left(net, trainer), plain(method, net.lr, 16))


@every_method
def test_tuner_scales_the_batch_size_and_leaves_the_module_as_it_was(method: str) -> None:
    torch.manual_seed(3)
    net, trainer = Net(), make(method, [], [])
    assert Tuner(trainer).scale_batch_size(net, steps_per_trial=3, init_val=4, max_trials=3, margin=0.0) == 16
    assert all(site.gate.mask.all() for site in RankBudget.of(net).values())
    net.seen.clear()
    torch.manual_seed(4)
    trainer.fit(net)
    torch.manual_seed(3)
    other, alone = Net(net.lr, 16), make(method, [], [SeedAgain()])
    alone.fit(other)
    assert_same(left(net, trainer), left(other, alone))


def _find_and_train() -> tuple[list[str], float]:
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    options: dict[str, Any] = {"devices": 2, "strategy": DDPStrategy(), "max_epochs": 5}
    torch.manual_seed(3)
    net = Net()
    trainer = make("dynamic-dora", [finder], [Forget()], **options)
    trainer.fit(net)
    found = left(net, trainer)
    alone = plain("dynamic-dora", net.lr, **(options | {"strategy": DDPStrategy()}))
    return [name for name in alone if not torch.equal(alone[name], found[name])], net.lr


@pytest.mark.dist
def test_learning_rate_finder_leaves_no_trace_under_ddp() -> None:
    (first, lr), (second, other) = run_processes(2, _find_and_train)
    assert first == second == []
    assert lr == other != 1e-2
