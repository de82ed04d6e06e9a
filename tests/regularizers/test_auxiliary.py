from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quiet import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import AdapterCheckpoint, AdapterInjection, Auxiliary, LoRA, Regularization
from lightning_peft.callbacks.undisturbed import undisturbed

ADAPTER = partial(LoRA, rank=2)


class Adversary(Auxiliary):
    """Guesses the label from the first layer's features; the model is to make that hard. With noise of its own."""

    def build(self, module: nn.Module) -> None:
        self.net = nn.Linear(8, 3)

    def features(self, module: nn.Module, batch: Any, outputs: Any) -> Sequence[Tensor]:
        h = module.h  # type: ignore[union-attr]
        noise = torch.randn(h.shape, generator=self.next_generator(h.device)).to(h.dtype)
        return h + 0.1 * noise, batch[1]

    def fitting(self, *features: Tensor) -> Tensor:
        h, y = features
        return F.cross_entropy(self.net(h), y)

    def penalty(self, *features: Tensor) -> Tensor:
        return -self.fitting(*features)


class Module(LightningModule):
    def __init__(self, lr: float = 0.01, batch_size: int = 4) -> None:
        super().__init__()
        self.lr, self.batch_size = lr, batch_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.h = self.first(batch[0]).tanh()
        return F.cross_entropy(self.last(self.h), batch[1])

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(24, 8, generator=generator)
        return DataLoader(TensorDataset(x, x.abs().argmax(1) % 3), batch_size=self.batch_size, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Careless(Module):
    """Takes all parameters, frozen or not, as many modules do."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr, weight_decay=0.1)


class ByHand(Module):
    """The same, written by somebody who knows nothing of the base class."""

    def __init__(self, accumulate: int = 1, steps: int = 1) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.accumulate, self.steps = accumulate, steps

    def on_fit_start(self) -> None:
        self.__dict__["net"] = nn.Linear(8, 3)
        self.__dict__["inner"] = torch.optim.Adam(self.net.parameters(), lr=0.05)
        self.count = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        twin = Adversary()
        twin.draws, self.count = self.count, self.count + 1
        h = self.h + 0.1 * torch.randn(self.h.shape, generator=twin.next_generator())
        for _ in range(self.steps):
            self.inner.zero_grad()
            F.cross_entropy(self.net(h.detach()), batch[1]).backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), 0.1)
            self.inner.step()
        total = loss + 0.5 * -F.cross_entropy(self.net(h), batch[1])
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        if batch_idx % self.accumulate == 0:
            optimizer.zero_grad()
        self.manual_backward(total / self.accumulate)
        if batch_idx % self.accumulate == self.accumulate - 1:
            nn.utils.clip_grad_norm_(list(self.first.parameters()) + list(self.last.parameters()), 0.05)
            optimizer.step()


def adversary(**options: Any) -> Adversary:
    return Adversary(**{"weight": 0.5, "lr": 0.05, "clip": 0.1, **options})


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    return Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 2, **options})


def state(term: Auxiliary) -> dict[str, Any]:
    """All that a run leaves in a term, as something to compare."""
    found: dict[str, Any] = {name: p.detach().clone() for name, p in term.named_parameters()}
    for i, entry in term.progress()["optimizer"]["state"].items():
        found |= {f"{i} {key}": value.clone() for key, value in entry.items()}
    return found | {"draws": torch.tensor(term.draws)}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {key: value for key, value in module.state_dict().items() if not key.startswith(("peft_terms", "net."))}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [key for key, value in one.items() if not torch.equal(value, other[key])]


@pytest.mark.parametrize(("steps", "accumulate"), [(1, 1), (3, 1), (1, 3)])
def test_it_is_bitwise_the_two_loops_written_by_hand(steps: int, accumulate: int) -> None:
    term, module = adversary(inner_steps=steps), Module()
    torch.manual_seed(1)
    trainer(Regularization({"adversary": term}), gradient_clip_val=0.05, accumulate_grad_batches=accumulate).fit(module)
    torch.manual_seed(1)
    other = ByHand(accumulate, steps)
    trainer().fit(other)
    assert differences(weights(module), weights(other)) == []
    assert differences(dict(term.net.named_parameters()), dict(other.net.named_parameters())) == []
    plain = Module()
    trainer(gradient_clip_val=0.05).fit(plain)
    assert differences(weights(module), weights(plain)) != []


def test_an_optimizer_of_all_parameters_does_not_train_them() -> None:
    runs = []
    for kind in (Module, Careless):
        term, module = adversary(weight=1e-30), kind()  # so that decay of the model alone differs
        torch.manual_seed(1)
        run = trainer(Regularization({"adversary": term}), limit_train_batches=1, max_epochs=1)
        run.fit(module)
        runs.append(state(term))
        held = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
        assert all((id(p) in held) == (kind is Careless) for p in term.parameters())
    assert differences(*runs) == []


def test_property_15_neither_step_touches_the_others_gradients() -> None:
    module, term = Module(), adversary()
    term.attach(module)
    batch = next(iter(module.train_dataloader()))
    outputs = module.training_step(batch, 0)
    outputs.backward(retain_graph=True)
    before = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    assert len(before) == 4
    start = copy.deepcopy(term.net.state_dict())
    value = term(module, batch, outputs)
    assert all(torch.equal(p.grad, before[name]) for name, p in module.named_parameters())  # type: ignore[arg-type]
    assert differences(start, term.net.state_dict()) == ["weight", "bias"]
    fitted = copy.deepcopy(term.net.state_dict())
    value.backward()
    assert all(p.grad is None and not p.requires_grad for p in term.parameters())
    assert differences(fitted, term.net.state_dict()) == []
    assert not torch.equal(module.first.weight.grad, before["first.weight"])  # type: ignore[arg-type]


def test_without_gradients_nothing_is_fitted() -> None:
    module, term = Module(), adversary()
    term.attach(module)
    batch = next(iter(module.train_dataloader()))
    start = copy.deepcopy(term.net.state_dict())
    with torch.no_grad():
        value = term(module, batch, module.training_step(batch, 0))
    assert not value.requires_grad
    assert differences(start, term.net.state_dict()) == []


class Saves(Callback):
    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.fit_loop.total_batch_idx + 1 == self.after:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("after", [7, 8])  # between micro-batches, and after a step
def test_interrupted_is_uninterrupted(after: int, tmp_path: Path) -> None:
    found = []
    for seed, path in ((1, None), (2, tmp_path / "stop.ckpt")):
        torch.manual_seed(seed)
        term, module = adversary(inner_steps=2), Module()
        callbacks = [AdapterInjection(ADAPTER), Regularization({"adversary": term}), AdapterCheckpoint()]
        if path is None:
            callbacks.append(Saves(tmp_path / "stop.ckpt", after))  # type: ignore[arg-type]
        trainer(*callbacks, accumulate_grad_batches=2, max_epochs=3).fit(module, ckpt_path=path)
        found.append(state(term) | weights(module))
    assert differences(*found) == []
    checkpoint = torch.load(tmp_path / "stop.ckpt", weights_only=True)
    assert checkpoint["lightning_peft_terms"]["adversary"]["draws"] == after
    assert "peft_terms.adversary.net.weight" in checkpoint["state_dict"]


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("kind", ["lr", "batch"])
def test_finders_leave_no_trace(kind: str, place: str) -> None:
    runs = []
    for searches in (True, False):
        term, module = adversary(), Module() if searches else Module(runs[0][1].lr, runs[0][1].batch_size)
        finder: Callback = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
        if kind == "batch":
            finder = BatchSizeFinder(steps_per_trial=2, init_val=2, max_trials=3, margin=0.0)
        first, last = ([finder] if searches and at == place else [] for at in ("before", "after"))
        torch.manual_seed(1)
        callbacks = [AdapterInjection(ADAPTER), Regularization({"adversary": term}), AdapterCheckpoint()]
        trainer(*first, *callbacks, *last, max_epochs=4).fit(module)
        runs.append((state(term) | weights(module), module))
    assert runs[0][1].lr != 0.01 or runs[0][1].batch_size == 8
    assert differences(runs[0][0], runs[1][0]) == []


def test_a_look_at_a_training_step_leaves_no_trace() -> None:
    term, module = adversary(), Module()

    class Looks(Callback):
        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, i: int
        ) -> None:
            before = state(term)
            with undisturbed(trainer, pl_module):
                trainer.strategy.training_step(batch, i)
                assert differences(before, state(term)) != []
            assert differences(before, state(term)) == []

    torch.manual_seed(1)
    trainer(Regularization({"adversary": term}), Looks()).fit(module)
    other, plain = adversary(), Module()
    torch.manual_seed(1)
    trainer(Regularization({"adversary": other})).fit(plain)
    assert differences(state(term), state(other)) == []


def test_a_second_fit_begins_with_a_new_optimizer_and_another_module_with_a_new_network() -> None:
    term, module = adversary(), Module()
    trainer(Regularization({"adversary": term}), max_epochs=1).fit(module)
    first = copy.deepcopy(term.net.state_dict())
    assert term.progress()["optimizer"]["state"][0]["step"] == 6  # of a checkpoint that is saved after fit
    trainer(Regularization({"adversary": term}), max_epochs=1).fit(module)
    assert term.progress()["optimizer"]["state"][0]["step"] == 6
    assert differences(first, term.net.state_dict()) == ["weight", "bias"]
    before = term.net
    trainer(Regularization({"adversary": term}), max_epochs=1).fit(Module())
    assert term.net is not before


def test_in_mixed_precision_it_is_fitted_in_float32() -> None:
    plugins: list[Any] = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]
    for options in ({"plugins": plugins}, {"precision": "bf16-mixed"}, {"precision": "bf16-true"}):
        term, module = adversary(), Module()
        trainer(Regularization({"adversary": term}), max_epochs=1, **options).fit(module)
        assert {value.dtype for key, value in state(term).items() if key != "draws"} == {torch.float32}
        assert all(value.isfinite().all() for value in state(term).values())


def test_a_gradient_that_is_not_finite_counts_as_zero() -> None:
    module, term = Module(), adversary()
    term.attach(module)
    batch = next(iter(module.train_dataloader()))
    module.h = torch.full((4, 8), float("inf"))
    start = copy.deepcopy(term.net.state_dict())
    term(module, batch, None)
    assert differences(start, term.net.state_dict()) == []


def test_parts_are_logged() -> None:
    run = trainer(Regularization({"adversary": adversary()}), max_epochs=1)
    run.fit(Module())
    assert {"loss/adversary", "adversary/fit", "loss/task"} <= run.logged_metrics.keys()


class Thaws(Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.requires_grad_(True)


class Half(Adversary):
    def optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters[:1], lr=0.1)


class Nothing(Adversary):
    def build(self, module: nn.Module) -> None:
        pass


class Uneven(Adversary):
    def features(self, module: nn.Module, batch: Any, outputs: Any) -> Sequence[Tensor]:
        h, y = super().features(module, batch, outputs)
        return h, y[1:]


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Half, r"optimizer\(\) of Half holds 1 of its 2 own parameters, and nothing else trains the others"),
        (Nothing, "Nothing has no parameters of its own, so there is nothing to fit"),
        (Uneven, "Uneven compares features example by example, and has 3 rows of one and 4 of another"),
    ],
)
def test_what_cannot_work_says_so(kind: type[Adversary], says: str) -> None:
    with pytest.raises(RuntimeError, match=says):
        trainer(Regularization({"adversary": kind()})).fit(Module())


def test_thawed_parameters_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="the term 'adversary' trains its own parameters by itself"):
        trainer(Thaws(), Regularization({"adversary": adversary()})).fit(Module())


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"inner_steps": 0}, ValueError, "inner_steps=0: Adversary says something of the model only where its own"),
        ({"inner_steps": 1.5}, TypeError, "inner_steps must be an integer. Got 1.5."),
        ({"lr": 0}, ValueError, "lr must be positive and finite. Got 0."),
        ({"clip": -1}, ValueError, "clip must be positive and finite. Got -1."),
        ({"lr": "fast"}, TypeError, "lr must be a number. Got 'fast'."),
    ],
)
def test_arguments(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        Adversary(**options)
