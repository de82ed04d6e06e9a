from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, WeightedRandomSampler
from torchmetrics import MeanMetric

from lightning_peft import (
    EVA,
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Calibration,
    Cubic,
    LoRA,
    Probe,
    RankBudget,
    RankMonitor,
    RankPolicy,
    RankPruning,
    Taylor,
    presets,
)
from lightning_peft.callbacks.apart import apart
from lightning_peft.rank.probe import Processes

# Net keeps its batch norm in eval mode, as a user may.
pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode at the start of training")

CAP = 4


class Listener(Probe):
    """Writes down what it hears, and closes all but the first component."""

    reads = "inputs"

    def __init__(self, enough: int = 99) -> None:
        self.enough = enough

    def begin(self, budget: RankBudget, processes: Processes) -> None:
        self.budget, self.heard, self.folds = budget, list[tuple[str, Tensor, Tensor | None]](), 0
        self.training: set[bool] = set()

    def wanted(self) -> Collection[str]:
        return list(self.budget) if self.folds < self.enough else ()

    def see(self, layer: str, x: Tensor, rows: Callable[[], Tensor], gradient: Callable[[], Tensor] | None) -> None:
        self.heard.append((layer, rows(), None if gradient is None else gradient()))
        self.training.add(self.budget[layer].adapter.training)

    def fold(self) -> None:
        self.folds += 1

    def act(self) -> dict[str, Tensor]:
        return {name: torch.arange(len(site.gate)) < 1 for name, site in self.budget.items()}

    def unseen(self) -> list[str]:
        seen = {name for name, _, _ in self.heard}
        return [name for name in self.budget if name not in seen]


class Gradients(Listener):
    reads = "gradients"


class Noisy(Dataset[Tensor]):
    """Augmented by all the global generators."""

    def __len__(self) -> int:
        return 40

    def __getitem__(self, i: int) -> Tensor:
        x = torch.randn(8, generator=torch.Generator().manual_seed(i))
        return x + 0.1 * torch.randn(8) + 0.1 * random.random() + 0.1 * float(np.random.rand())


class Net(L.LightningModule):
    """All that a step can change beside weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Linear(8, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 6), nn.Linear(6, 2)
            )
        self.mean = MeanMetric()
        self.register_buffer("calls", torch.zeros(()))
        self.seen: list[Tensor] = []
        self.net[1].eval()  # as a user who keeps statistics fixed

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch.clone())
        loss = self.net(batch).square().mean()
        self.calls = self.calls + 1  # another tensor in its place
        self.mean(loss.detach())
        self.log("loss", loss)
        self.log_dict({"mean": self.mean, "calls": self.calls}, on_step=True, on_epoch=True)
        if self.logger is not None:
            self.logger.log_metrics({"by hand": float(self.calls)}, step=self.global_step)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class Lines(Logger):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int | None, dict[str, float]]] = []

    name = "lines"  # type: ignore[assignment]
    version = 0  # type: ignore[assignment]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((step, dict(metrics)))


class Undo(L.Callback):
    """Takes back what the probe has done to the adapters, so that only a disturbance would be left."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Net)
        pl_module.seen.clear()
        budget = RankBudget.of(pl_module)
        assert all(p.grad is None for p in pl_module.parameters())
        budget.keep({name: torch.ones(len(site.gate)) for name, site in budget.items()})


def fit(module: L.LightningModule, loader: Any, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_epochs": 2, "log_every_n_steps": 1,
    }  # fmt: skip
    trainer = L.Trainer(callbacks=list(callbacks), **{**quiet, **options})
    trainer.fit(module, loader)
    return trainer


def injection(rank: int = CAP) -> AdapterInjection:
    return AdapterInjection(partial(LoRA, rank=rank), ["0", "4"], verbose=False)


def weighted() -> DataLoader[Any]:
    sampler = WeightedRandomSampler([1.0] * 20 + [2.0] * 20, 40, generator=torch.Generator().manual_seed(2))
    return DataLoader(Noisy(), batch_size=5, sampler=sampler)


class Batches(Sequence[Tensor]):
    """Batches that are there; Lightning takes a plain list for several loaders."""

    def __init__(self, count: int) -> None:
        self.batches = torch.randn(count, 5, 8, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: Any) -> Tensor:
        return self.batches[i]


LOADERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(), batch_size=5, shuffle=True),
    "generator": lambda: DataLoader(Noisy(), 5, shuffle=True, generator=torch.Generator().manual_seed(3)),
    "sampler with a generator": weighted,
    "batches in a list": lambda: DataLoader(Noisy(), batch_sampler=[[i, i + 1, i + 2] for i in range(0, 36, 3)]),
    "persistent workers": lambda: DataLoader(Noisy(), 5, shuffle=True, num_workers=1, persistent_workers=True),
    "a sequence": lambda: Batches(8),
}


@pytest.mark.parametrize(("kind", "checkpoint"), [*((kind, False) for kind in LOADERS), ("shuffled", True)])
@pytest.mark.parametrize("probe", [Listener, Gradients])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork")
def test_a_run_is_what_it_is_without_calibration(kind: str, probe: type[Listener], checkpoint: bool) -> None:
    """Bit for bit: batches, weights, buffers, metrics, random numbers, and every line that is logged."""
    results = []
    for listening in (False, True):
        net, lines, listener = Net(), Lines(), probe()
        calibration = [Calibration(listener, batches=3)] if listening else []
        last = [AdapterCheckpoint()] if checkpoint else []
        trainer = fit(net, LOADERS[kind](), injection(), *calibration, Undo(), *last, logger=lines)
        if listening:
            assert listener.folds == 3
            assert listener.training == {False}
            assert {name for name, _, _ in listener.heard} == {"net.0", "net.4"}
        drawn = torch.rand(2), random.random(), np.random.rand()
        results.append((net, lines.lines, drawn, trainer.optimizers[0].state_dict()["state"]))
    (plain, plain_lines, plain_drawn, plain_state), (net, lines_, drawn, state) = results
    assert len(net.seen) == len(plain.seen) > 0
    assert all(map(torch.equal, net.seen, plain.seen))
    for name, value in plain.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert all(torch.equal(state[i]["exp_avg_sq"], entry["exp_avg_sq"]) for i, entry in plain_state.items())
    assert lines_ == plain_lines
    assert any("mean_epoch" in line for _, line in lines_)
    assert torch.equal(drawn[0], plain_drawn[0])
    assert drawn[1:] == plain_drawn[1:]
    assert not net.net[1].training
    assert net.net[3].training


def test_gradients_are_those_of_the_base_weights() -> None:
    """Outer products of what is heard add up to the loss's gradient by the effective weight."""
    batches = Batches(1)
    net, listener = Net(), Gradients()
    fit(net, batches, injection(), Calibration(listener, batches=1), max_steps=1)
    plain = Net().eval()
    plain.net(batches[0]).square().mean().backward()
    for name, x, g in listener.heard:
        assert g is not None
        torch.testing.assert_close(g.T @ x, plain.get_submodule(name).weight.grad)
    assert len(listener.heard) == 2


def test_ranks_are_set_and_training_goes_on_with_them() -> None:
    net = Net()
    calibration = Calibration(Listener(enough=2))
    fit(net, LOADERS["shuffled"](), injection(), calibration)
    assert calibration.done
    assert calibration.probe.folds == 2  # type: ignore[attr-defined]
    assert RankBudget.of(net).ranks() == {"net.0": 1, "net.4": 1}
    assert all(site.adapter.B[:, 0].abs().min() > 0 for site in RankBudget.of(net).values())
    assert not any(site.adapter.B[:, 1:].any() for site in RankBudget.of(net).values())


def test_closed_components_can_be_cut_at_once() -> None:
    net = Net()
    preset = presets.eva(rank=2, targets=["0", "4"], compact="at_once")
    trainer = fit(net, LOADERS["shuffled"](), *preset)
    masked = Net()
    other = fit(masked, LOADERS["shuffled"](), *presets.eva(rank=2, targets=["0", "4"]))
    budget = RankBudget.of(net)
    assert budget.ranks() == RankBudget.of(masked).ranks()
    assert sum(budget.ranks().values()) == 4
    assert all(len(site.gate) == budget.ranks()[name] for name, site in budget.items())
    assert {site.adapter.scaling for site in budget.values()} == {1 / 16}  # whatever a layer's rank
    x = torch.randn(4, 8)
    torch.testing.assert_close(net.eval().net(x), masked.eval().net(x))
    sizes = [sum(p.numel() for p in t.optimizers[0].state) for t in (trainer, other)]
    assert sizes[0] < sizes[1]


def test_own_data_are_taken_instead() -> None:
    listener, own = Listener(), [torch.full((2, 8), float(i)) for i in range(3)]
    fit(Net(), LOADERS["shuffled"](), injection(), Calibration(listener, data=own))
    assert [float(x[0, 0]) for name, x, _ in listener.heard if name == "net.0"] == [0.0, 1.0, 2.0]


def test_batches_can_be_run_as_in_training() -> None:
    listener = Listener()
    fit(Net(), LOADERS["shuffled"](), injection(), Calibration(listener, batches=2, mode="train"))
    assert listener.training == {True}


class Stops(L.Callback):
    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == 3
        trainer.fit_loop.epoch_loop.min_steps = 3  # type: ignore[attr-defined]


def test_a_resumed_run_is_not_calibrated_again(tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    def pruned() -> list[L.Callback]:
        policy = RankPolicy(Cubic(0.2, 0.2), Taylor(), Budget(rank=1), interval=2)
        injected, calibration, monitor, checkpoint = presets.eva(rank=2, targets=["0", "4"])
        return [injected, calibration, RankPruning(policy), monitor, checkpoint]

    for callbacks in (pruned, lambda: [*presets.eva(rank=2, targets=["0", "4"], compact="at_once")]):
        whole = Net()
        fit(whole, LOADERS["shuffled"](), *callbacks(), Saves())
        again = callbacks()
        calibration = next(c for c in again if isinstance(c, Calibration))
        calibration.probe.begin = None  # type: ignore[assignment,method-assign]  # to call it would fail
        net = Net()
        trainer = L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, max_epochs=2, callbacks=again,
        )  # fmt: skip
        trainer.fit(net, LOADERS["shuffled"](), ckpt_path=tmp_path / "stop.ckpt")
        assert calibration.done
        for name, value in whole.state_dict().items():
            assert torch.equal(net.state_dict()[name], value), name


def test_a_schedule_begins_with_what_is_open() -> None:
    net, policy = Net(), RankPolicy(Cubic(0.2, 0.2), Taylor(), Budget(rank=1), interval=2)
    injected, calibration, monitor, checkpoint = presets.eva(rank=2, targets=["0", "4"])
    fit(net, LOADERS["shuffled"](), injected, calibration, RankPruning(policy), monitor, checkpoint)
    assert policy.budget_at(0, 16) == 4  # of 8 components
    assert RankBudget.of(net).spent == 2


def test_a_checkpoint_of_an_uncalibrated_run_is_left_alone(tmp_path: Path) -> None:
    first = fit(Net(), LOADERS["shuffled"](), injection(), AdapterCheckpoint(), max_epochs=1)
    first.save_checkpoint(tmp_path / "plain.ckpt")
    net = Net()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, max_epochs=2, callbacks=[injection(), Calibration(EVA(2)), AdapterCheckpoint()],
    )  # fmt: skip
    with pytest.warns(UserWarning, match="This checkpoint is from step 8 of a run that was not calibrated"):
        trainer.fit(net, LOADERS["shuffled"](), ckpt_path=tmp_path / "plain.ckpt")
    assert RankBudget.of(net).ranks() == {"net.0": CAP, "net.4": CAP}


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
def test_validating_afterwards_does_not_unsay_it(tmp_path: Path) -> None:
    class Validated(Net):
        def validation_step(self, x: Tensor, batch_idx: int) -> None:
            self.net(x)

    calibration = Calibration(EVA(2), 2)
    trainer = fit(Validated(), LOADERS["shuffled"](), injection(), calibration, AdapterCheckpoint(), max_epochs=1)
    trainer.validate(trainer.lightning_module, DataLoader(torch.randn(4, 8), batch_size=2), verbose=False)  # type: ignore[arg-type]
    trainer.save_checkpoint(tmp_path / "later.ckpt")
    saved = torch.load(tmp_path / "later.ckpt", weights_only=True)
    assert saved["callbacks"]["Calibration"] == {"done": True}


def test_going_on_with_the_same_trainer_calibrates_once() -> None:
    net, listener = Net(), Listener()
    trainer = fit(net, LOADERS["shuffled"](), injection(), Calibration(listener, 2), max_epochs=1)
    folds = listener.folds
    trainer.fit_loop.max_epochs = 2
    trainer.fit(net, LOADERS["shuffled"]())
    assert (trainer.global_step, listener.folds) == (16, folds)


# dynamo asks a tensor between two graphs for its gradient
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_modules_are_heard() -> None:
    class Compiled(Net):
        def setup(self, stage: str) -> None:
            self.net.compile(backend="eager")

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.net(batch)  # compiled before there is a hook

    net, listener = Compiled(), Listener()
    trainer = L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=2,
        enable_model_summary=False, num_sanity_val_steps=1,
        callbacks=[AdapterInjection(partial(LoRA, rank=CAP), ["0", "4"], verbose=False), Calibration(listener, 2)],
    )  # fmt: skip
    trainer.fit(net, Batches(4), Batches(4))
    assert len(listener.heard) == 4


class Raises(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        super().training_step(batch, batch_idx)
        raise ZeroDivisionError


def test_a_step_that_fails_leaves_nothing_behind() -> None:
    net, lines = Raises(), Lines()
    calibration = Calibration(Listener())
    with pytest.raises(ZeroDivisionError):
        fit(net, LOADERS["shuffled"](), injection(), calibration, logger=lines)
    assert not calibration.done
    assert not lines.lines
    assert not net.calls
    assert "log" not in vars(net)
    assert all(not site.adapter._forward_hooks for site in RankBudget.of(net).values())


class Idle(Net):
    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net[5](batch[:, :6]).square().mean()


def test_layers_that_nobody_calls_are_told() -> None:
    with pytest.raises(RuntimeError, match=r"called none of the 2 adapted layers, the first of them 'net.0'"):
        fit(Idle(), LOADERS["shuffled"](), injection(), Calibration(EVA(2)))


def test_layers_that_are_called_with_indices_alone_are_told() -> None:
    class Words(Net):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(4, 6), nn.Linear(6, 2)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.head(self.words((batch > 0).long())).square().mean()

    words = AdapterInjection(partial(LoRA, rank=CAP), ["words"], ["head"], verbose=False)
    with pytest.raises(RuntimeError, match=r"calls the 1 adapted layers, the first of them 'words', with nothing that"):
        fit(Words(), LOADERS["shuffled"](), words, Calibration(EVA(2)))


def test_an_attentions_projections_keep_their_start() -> None:
    class Attends(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 4)
            self.head = nn.Linear(4, 1)

        def training_step(self, batch: Tensor) -> Tensor:
            batch = batch[:, None]
            return self.head(self.out(self.attention(batch, batch, batch)[0])).square().mean()

        configure_optimizers = Net.configure_optimizers

    net = Attends()
    with pytest.warns(
        UserWarning, match="saw nothing of 2 adapted layers, whose start owes nothing to data: attention.out_proj"
    ):
        fit(net, LOADERS["shuffled"](), AdapterInjection(partial(LoRA, rank=4)), Calibration(EVA(2)), max_steps=1)
    assert RankBudget.of(net).ranks() == {"attention.in_proj": 2, "attention.out_proj": 2, "out": 2}


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randn(20, 8))


class Own:
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.randn(4, 5, 8))


class Strange(torch.utils.data.Sampler[int]):
    """Holds what cannot be copied."""

    def __init__(self) -> None:
        self.stream = (i for i in range(99))

    def __iter__(self) -> Iterator[int]:
        return iter(range(20))

    def __len__(self) -> int:
        return 20


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (lambda: DataLoader(Stream(), batch_size=5), r"Stream, is a stream \(an IterableDataset\)"),
        (Own, "Own is no DataLoader"),
        (lambda: DataLoader(Noisy(), 5, sampler=Strange()), "its sampler cannot be copied .*generator"),
    ],
)
def test_data_that_cannot_be_read_twice_are_refused(loader: Callable[[], Any], reason: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"training is to get the same ones all the same: .*{reason}"):
        fit(Net(), loader(), injection(), Calibration(EVA(2)), max_steps=2)
    own = [torch.randn(5, 8)]
    fit(Net(), loader(), injection(), Calibration(EVA(2), data=own), max_steps=2)


def test_a_copied_loader_shares_the_data_and_nothing_else() -> None:
    loader = weighted()
    twin = apart(loader)
    assert isinstance(twin, DataLoader)
    assert twin.dataset is loader.dataset
    state = loader.sampler.generator.get_state()  # type: ignore[attr-defined]
    assert len(list(twin)) == 8
    assert torch.equal(loader.sampler.generator.get_state(), state)  # type: ignore[attr-defined]


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: fit(Net(), Batches(1), Calibration(EVA(2))), "Calibration found no adapter. Put Adap"),
        (lambda: fit(Net(), Batches(1), Calibration(EVA(2)), injection()), "Calibration comes before AdapterInjection"),
        (
            lambda: fit(Net(), Batches(1), injection(), RankMonitor(), Calibration(EVA(2))),
            "RankMonitor comes before Calibration",
        ),
        (lambda: fit(Manual(), Batches(1), injection(), Calibration(EVA(2))), "optimizes by hand"),
        (
            lambda: fit(Net(), Batches(1), injection(), Calibration(EVA(2)), limit_train_batches=0),
            "no batch to look at: limit_train_batches=0",
        ),
        (
            lambda: fit(Net(), Batches(1), injection(), Calibration(EVA(2), data=[])),
            "no batch to look at: its data are empty",
        ),
        (
            lambda: fit(
                Net(), Batches(1), injection(), Calibration(EVA(2), compact="at_once"),
                enable_checkpointing=True,
            ),
            r"Calibration\(compact='at_once'\) changes the shapes of parameters, and without AdapterCheckpoint",
        ),
    ],
)  # fmt: skip
def test_a_wrong_setup_is_told(wrong: Callable[[], object], sentence: str) -> None:
    with pytest.raises(MisconfigurationException, match=sentence):
        wrong()


def test_gradients_need_a_scale_that_is_known() -> None:
    with pytest.raises(MisconfigurationException, match="GoRA reads gradients, and float16 gradients need"):
        fit(Net(), Batches(1), *presets.gora(rank=2, targets=["0"]), plugins=[MixedPrecision("16-mixed", "cpu")])
    fit(Net(), Batches(1), *presets.eva(rank=2, targets=["0"]), plugins=[MixedPrecision("16-mixed", "cpu")])


@pytest.mark.parametrize(
    ("arguments", "kind", "sentence"),
    [
        ({"probe": EVA}, TypeError, "probe must be a Probe, such as EVA"),
        ({"batches": 0}, ValueError, "at least 1. Got 0"),
        ({"batches": 1.5}, TypeError, "batches must be an integer"),
        ({"mode": "test"}, ValueError, "mode='test': choose 'eval'"),
        ({"compact": True}, ValueError, "compact=True: choose 'never'"),
    ],
)
def test_arguments_are_checked(arguments: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind, match=sentence):
        Calibration(**{"probe": EVA(2), **arguments})


class Rated(Net):
    def __init__(self, lr: float = 1e-2) -> None:
        super().__init__()
        self.lr = lr

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


@pytest.mark.parametrize("place", ["before", "after"])
def test_a_learning_rate_finder_trains_uncalibrated_adapters_and_leaves_no_trace(place: str) -> None:
    finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
    preset = presets.eva(rank=2, targets=["0", "4"])
    found = Rated()
    fit(found, LOADERS["a sequence"](), *([finder, *preset] if place == "before" else [*preset, finder]))
    plain = Rated(found.lr)
    fit(plain, LOADERS["a sequence"](), *presets.eva(rank=2, targets=["0", "4"]))
    assert found.lr != 1e-2
    assert RankBudget.of(found).spent == 4
    for name, value in plain.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
