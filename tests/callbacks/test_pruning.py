from __future__ import annotations

import traceback
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft import (
    AdaLoRA,
    AdapterInjection,
    Budget,
    Cubic,
    DynamicDoRA,
    LoRA,
    RankBudget,
    RankPolicy,
    RankPruning,
    Taylor,
    inject,
    presets,
)
from lightning_peft.adapters import adalora, dynamic_dora
from lightning_peft.rank import Linear

LAYERS, FULL, FINAL = 3, 4, 2


class Module(LightningModule):
    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.lr = lr
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)
            )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = (self.net(batch) - batch.sum(1, keepdim=True).sin()).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Recorder(Callback):
    """Notes, after every batch, where the ranks stand."""

    def __init__(self, pruning: RankPruning) -> None:
        self.pruning = pruning
        self.open: dict[int, int] = {}
        self.events: dict[int, int] = {}
        self.masks: dict[int, list[list[float]]] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        budget, step = RankBudget.of(pl_module), trainer.global_step
        if step == 0:
            return  # micro-batches before the first step
        self.open[step] = budget.spent
        self.masks[step] = [site.gate.mask.tolist() for site in budget.values()]
        if self.pruning.event_step == step and step not in self.events:
            self.events[step] = budget.spent


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 2,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def samples(count: int) -> Tensor:
    return torch.randn(count, 8, generator=torch.Generator().manual_seed(0))


def data(batches: int = 20, size: int = 4) -> DataLoader[Tensor]:
    return DataLoader(samples(batches * size), batch_size=size)  # type: ignore[arg-type]


def dora(interval: int = 3) -> list[Callback]:
    policy = dynamic_dora.policy(Budget(rank=FINAL), interval=interval)
    return [AdapterInjection(partial(DynamicDoRA, rank=FULL, dropout=0.0), verbose=False), RankPruning(policy)]


def taylor(interval: int = 3) -> list[Callback]:
    policy = RankPolicy(Cubic(0.1, 0.2), Taylor(), Budget(rank=FINAL), interval)
    return [AdapterInjection(partial(LoRA, rank=FULL), verbose=False), RankPruning(policy)]


def run(
    callbacks: list[Callback], loader: Any = None, module: LightningModule | None = None, **options: Any
) -> Recorder:
    pruning = next(callback for callback in callbacks if isinstance(callback, RankPruning))
    recorder = Recorder(pruning)
    torch.manual_seed(1)
    trainer(*callbacks, recorder, **options).fit(module or Module(), data() if loader is None else loader)
    return recorder


@pytest.mark.parametrize("method", [dora, taylor])
@pytest.mark.parametrize("interval", [1, 3, 100])
def test_after_every_event_the_open_components_are_the_schedules(method: Any, interval: int) -> None:
    callbacks = method(interval)
    pruning = callbacks[1]
    recorder = run(callbacks)
    total = pruning.total_steps
    assert total == 40
    assert list(recorder.events) == [step for step in range(1, total + 1) if pruning.policy.is_event(step, total)]
    for step, spent in recorder.events.items():
        assert spent == pruning.policy.budget_at(step, total)
    last = pruning.policy.schedule.window(total)[1]
    assert list(recorder.events)[-1] == last
    assert {spent for step, spent in recorder.open.items() if step >= last} == {LAYERS * FINAL}
    assert len({str(masks) for step, masks in recorder.masks.items() if step >= last}) == 1
    assert pruning.budget_now() == LAYERS * FINAL


def test_property_3_with_the_preset_and_its_terms() -> None:
    callbacks = presets.dynamic_dora(final_rank=FINAL, initial_rank=FULL, interval=2)
    recorder = run(callbacks)
    pruning = recorder.pruning
    assert len(recorder.events) == 8
    assert all(spent == pruning.policy.budget_at(step, 40) for step, spent in recorder.events.items())
    assert recorder.open[40] == LAYERS * FINAL


def test_soft_removal_lets_components_return_between_events_and_never_in_the_tail() -> None:
    recorder = run(dora(interval=4))  # events at 6, 10, 14, 18, 20
    assert recorder.events[18] == LAYERS * FULL - 3
    assert recorder.open[19] == LAYERS * FULL
    assert {recorder.open[step] for step in range(20, 41)} == {LAYERS * FINAL}


def test_hard_removal_holds_between_events() -> None:
    recorder = run(taylor(interval=7))
    steps = sorted(recorder.open)
    for before, after in pairwise(steps):
        if after not in recorder.events:
            assert recorder.masks[after] == recorder.masks[before]


@pytest.mark.parametrize("method", [dora, taylor])
@pytest.mark.parametrize("accumulate", [2, 4])
def test_property_11_accumulation_changes_no_event(method: Any, accumulate: int) -> None:
    whole = run(method(), DataLoader(samples(160), batch_size=8))  # type: ignore[arg-type]
    parts = run(
        method(),
        DataLoader(samples(160), batch_size=8 // accumulate),
        accumulate_grad_batches=accumulate,  # type: ignore[arg-type]
    )
    assert parts.pruning.total_steps == whole.pruning.total_steps == 40
    assert parts.events == whole.events
    assert parts.open == whole.open


def test_property_11_the_last_batches_of_an_epoch_make_a_step() -> None:
    recorder = run(dora(), data(batches=19), accumulate_grad_batches=4)
    assert recorder.pruning.total_steps == 2 * 5
    assert max(recorder.open) == 10
    assert recorder.open[10] == LAYERS * FINAL


def test_steps_come_from_the_trainer() -> None:
    assert run(dora(), max_steps=30).pruning.total_steps == 30
    assert run(dora(), limit_train_batches=10).pruning.total_steps == 20
    stream = run(dora(), DataLoader(Stream()), max_epochs=-1, max_steps=24)
    assert stream.pruning.total_steps == 24
    assert stream.open[24] == LAYERS * FINAL


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        yield from samples(50)


class Syncs(TorchFunctionMode):
    """Notes what moves values from the device to Python, from a line of ours, and at which step.

    On a CPU nothing stops for `.item()`; on a GPU it waits for all that was queued. What would, is known by name.
    """

    NAMES = frozenset(
        {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "nonzero"}
    )

    def __init__(self) -> None:
        super().__init__()
        self.step: int | str = "start"
        self.found: dict[int | str, set[str]] = {}

    def note(self, name: str) -> None:
        ours = [f for f in traceback.extract_stack() if "lightning_peft" in f.filename.split("tests")[0]]
        ours = [f for f in ours if "/lightning_peft/" in f.filename and "/tests/" not in f.filename]
        if ours:
            self.found.setdefault(self.step, set()).add(f"{name} at {ours[-1].filename}:{ours[-1].lineno}")

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        if name in self.NAMES:
            self.note(name)
        return func(*args, **(kwargs or {}))


class Scalars(TorchDispatchMode):
    """The same below Python: whatever reads a scalar, or makes a shape out of values."""

    NAMES = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.is_nonzero")

    def __init__(self, syncs: Syncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if str(func).startswith(self.NAMES):
            self.syncs.note(str(func))
        return func(*args, **(kwargs or {}))


class Clock(Callback):
    """Tells a :class:`Syncs` which optimizer step is under way."""

    def __init__(self, syncs: Syncs) -> None:
        self.syncs = syncs

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.syncs.step = trainer.global_step + 1

    def on_train_end(self, *args: Any) -> None:
        self.syncs.step = "end"


@pytest.mark.parametrize("method", ["dynamic_dora", "taylor", "taylor_on_dora"])
def test_property_12_no_host_sync_but_at_events(method: str) -> None:
    """All of the package's callbacks under a real Trainer, forward, terms and scoring included."""
    preset = presets.dynamic_dora(final_rank=FINAL, initial_rank=FULL, interval=5)
    if method != "dynamic_dora":
        preset[1] = RankPruning(RankPolicy(Cubic(0.15, 0.5), Taylor(), Budget(rank=FINAL), 5))
    if method == "taylor":
        preset[0] = AdapterInjection(partial(LoRA, rank=FULL))
    syncs = Syncs()
    with Scalars(syncs), syncs:
        recorder_free = trainer(Clock(syncs), *preset, log_every_n_steps=2)
        recorder_free.fit(Module(), data())
    pruning = preset[1]
    assert isinstance(pruning, RankPruning)
    events = {step for step in range(1, 41) if pruning.policy.is_event(step, 40)}
    assert events == {6, 11, 16, 20}
    steps = {step for step in syncs.found if isinstance(step, int)}
    assert events <= steps  # it does see them: a choice is a transfer
    assert {step: syncs.found[step] for step in steps - events} == {}


def test_the_detector_of_syncs_detects() -> None:
    syncs = Syncs()
    budget = RankBudget.of(nn.Sequential(LoRA(nn.Linear(4, 4), 2)))
    with Scalars(syncs), syncs:
        assert budget.spent == 2
    assert any("tolist" in each and "budget.py" in each for each in syncs.found["start"])


def test_taylor_reads_gradients_before_they_are_clipped() -> None:
    scores = []
    for clip in (None, 1e-3):
        callbacks, module = taylor(), Module()
        torch.manual_seed(0)
        inject(module, partial(LoRA, rank=FULL))
        for site in RankBudget.of(module).values():
            nn.init.constant_(site.adapter.B, 0.01)  # type: ignore[arg-type]
        run(callbacks, module=module, max_epochs=1, limit_train_batches=1, gradient_clip_val=clip)
        scores.append(callbacks[1].policy.importance.scores())  # type: ignore[attr-defined]
    assert all(torch.equal(row, scores[1][name]) for name, row in scores[0].items())
    assert any(row.any() for row in scores[0].values())


def scaled(init_scale: float) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale, growth_interval=5))


def test_taylor_sees_unscaled_gradients_under_a_gradient_scaler() -> None:
    """The scale multiplies the mask's gradient, which no optimizer unscales; and it changes in the course of a run."""
    scores = []
    for plugin in (None, scaled(2.0**8)):
        callbacks = taylor()
        run(callbacks, module=Module(lr=1e-3), max_steps=12, plugins=[] if plugin is None else [plugin])
        scores.append(torch.cat(list(callbacks[1].policy.importance.scores().values())))  # type: ignore[attr-defined]
    torch.testing.assert_close(scores[1], scores[0], rtol=0.1, atol=1e-4)


def test_taylor_skips_the_steps_that_a_gradient_scaler_skips() -> None:
    """A scale that is too high overflows in the first steps; what is not finite must not stay in the average."""
    callbacks = taylor()
    recorder = run(callbacks, module=Module(lr=1e-3), plugins=[scaled(2.0**36)])
    scores = torch.cat(list(callbacks[1].policy.importance.scores().values()))  # type: ignore[attr-defined]
    assert scores.isfinite().all()
    assert scores.any()
    assert recorder.open[40] == LAYERS * FINAL


@pytest.mark.parametrize("method", [dora, taylor])
def test_masks_require_grad_during_fit_alone(method: Any) -> None:
    class Look(Callback):
        seen: bool | None = None

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            self.seen = all(site.gate.mask.requires_grad for site in RankBudget.of(pl_module).values())

    look, module = Look(), Module()
    trainer(*method(), look, max_steps=3, limit_train_batches=3, max_epochs=1).fit(module, data())
    assert look.seen is (method is taylor)
    for site in RankBudget.of(module).values():
        assert not site.gate.mask.requires_grad
        assert site.gate.mask.grad is None


def test_masks_are_released_when_training_breaks() -> None:
    class Breaks(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise RuntimeError("theirs")
            return super().training_step(batch, batch_idx)

    module = Breaks()
    with pytest.raises(RuntimeError, match="theirs"):
        trainer(*taylor()).fit(module, data())
    assert not any(site.gate.mask.requires_grad for site in RankBudget.of(module).values())


def test_after_the_last_event_masks_cost_nothing() -> None:
    class Look(Callback):
        seen: dict[int, bool]

        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
            sites = RankBudget.of(pl_module).values()
            self.seen = getattr(self, "seen", {}) | {
                trainer.global_step: any(site.gate.mask.requires_grad for site in sites)
            }

    look = Look()
    trainer(*taylor(), look).fit(Module(), data())
    assert look.seen == {step: step < 32 for step in range(40)}


def test_stopping_early_is_a_warning() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 10

    with pytest.warns(
        UserWarning,
        match="Training stopped at step 10 of 40, before the rank schedule's last cut at step 20: the final",
    ):
        trainer(*dora(), Stop()).fit(Module(), data())


def test_a_fast_dev_run_is_no_early_stop() -> None:
    trainer(*dora(), fast_dev_run=True).fit(Module(), data())
    trainer(*dora(), fast_dev_run=3).fit(Module(), data())


def test_stopping_in_the_tail_is_no_early_stop() -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 21

    trainer(*dora(), Stop()).fit(Module(), data())


class ByHand(Module):
    """Takes two optimizer steps per batch, which the Trainer counts and does not foresee."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:  # type: ignore[override]
        optimizer = self.optimizers()
        for _ in range(2):
            optimizer.zero_grad()  # type: ignore[union-attr]
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()  # type: ignore[union-attr]


@pytest.mark.parametrize("method", [dora, taylor])
@pytest.mark.parametrize("interval", [1, 3])
def test_manual_optimization_with_several_steps_per_batch_misses_no_event(method: Any, interval: int) -> None:
    recorder = run(method(interval), data(batches=40), ByHand(), max_epochs=-1, max_steps=40)
    total, policy = recorder.pruning.total_steps, recorder.pruning.policy
    assert total == 40
    assert set(recorder.events) == {step for step in range(2, 41, 2) if {step - 1, step} & {
        event for event in range(1, 41) if policy.is_event(event, total)
    }}  # fmt: skip
    assert all(spent == policy.budget_at(step, total) for step, spent in recorder.events.items())
    assert recorder.open[40] == LAYERS * FINAL


class Rivals(LightningModule):
    """Two nets with an optimizer each. The second takes its step in every third batch, and its gradients stay there."""

    def __init__(self, whose: tuple[bool, bool] = (True, True)) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.whose = whose
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.a, self.b = (nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)) for _ in "ab")

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        for net, optimizer, mine in zip((self.a, self.b), self.optimizers(), self.whose, strict=True):  # type: ignore[arg-type]
            if mine and (net is self.a or batch_idx % 3 == 0):
                optimizer.zero_grad()
                self.manual_backward((net(batch) - batch.sum(1, keepdim=True).sin()).square().mean())
                optimizer.step()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:  # type: ignore[override]
        return [torch.optim.AdamW([p for p in n.parameters() if p.requires_grad], lr=0.1) for n in (self.a, self.b)]


@pytest.mark.filterwarnings("ignore:Training stopped at step", "ignore:1 adapters took no part in the first loss")
@pytest.mark.parametrize("mode", ["aligned", "peft"])
def test_a_gradient_counts_at_its_own_optimizers_step_alone(mode: Any) -> None:
    """Each net's statistics are what they are where the other takes no step."""

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.is_last_batch

    def statistics(*whose: bool) -> dict[str, dict[str, Tensor]]:
        policy = adalora.policy(Budget(rank=2), warmup=0.9, tail=0.0, mode=mode)
        injection = AdapterInjection(partial(AdaLoRA, rank=3), targets=["a.0", "b.0"], train=["a.2", "b.2"])
        torch.manual_seed(2)
        batches = torch.randn(12, 4, 8, generator=torch.Generator().manual_seed(1))
        trainer(injection, RankPruning(policy), Stop(), max_epochs=-1, max_steps=100).fit(
            Rivals(whose),  # type: ignore[arg-type]
            DataLoader(batches, batch_size=None),  # type: ignore[arg-type]
        )
        return policy.importance.statistics()

    both = statistics(True, True)
    for name, whose in (("a.0", (True, False)), ("b.0", (False, True))):
        alone = statistics(*whose)
        for key, rows in both.items():
            assert rows[name].any()
            assert torch.equal(rows[name], alone[key][name]), key


def test_a_state_that_validation_has_loaded_is_not_for_a_later_fit(tmp_path: Any) -> None:
    class Validated(Module):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.training_step(batch, batch_idx)

    first = trainer(*dora(), max_steps=12)
    first.fit(Validated(), data(), data(2))
    first.save_checkpoint(tmp_path / "some.ckpt")
    callbacks = dora()
    module = Validated()
    second = trainer(*callbacks, max_steps=1)
    second.validate(module, data(2), ckpt_path=tmp_path / "some.ckpt", verbose=False, weights_only=True)
    second.fit(module, data(), data(2))  # another number of steps: would be a warning, which is an error
    pruning = callbacks[1]
    assert isinstance(pruning, RankPruning)
    share = 1 - pruning.policy.importance.beta
    assert all(row.max() <= 2 * share for row in pruning.policy.importance.scores().values())


@pytest.mark.parametrize("method", [dora, taylor])
def test_a_second_fit_reopens_nothing(method: Any) -> None:
    callbacks, module = method(), Module()
    first = run(callbacks, module=module)
    assert first.open[40] == LAYERS * FINAL
    again = run(callbacks, module=module)
    assert all(masks == first.masks[40] for masks in again.masks.values())
    assert again.open[40] == LAYERS * FINAL
    assert again.pruning.event_step == again.pruning.policy.schedule.window(40)[1]


def test_the_parts_of_a_policy_can_be_given_one_by_one() -> None:
    pruning = RankPruning(RankPolicy(Linear(), Taylor(), Budget(rank=FINAL), interval=4, minimum=1))
    assert (pruning.policy.interval, pruning.policy.soft, pruning.policy.minimum) == (4, False, 1)
    recorder = run([AdapterInjection(partial(LoRA, rank=FULL)), pruning])
    assert recorder.open[40] == LAYERS * FINAL


def test_it_can_come_without_the_injection_callback() -> None:
    module = Module()
    inject(module, partial(LoRA, rank=FULL))
    assert run(taylor()[1:], module=module).open[40] == LAYERS * FINAL


@pytest.mark.parametrize(
    ("callbacks", "options", "says"),
    [
        (
            lambda: dora()[::-1],
            {},
            r"RankPruning comes before AdapterInjection in the Trainer's callbacks; put AdapterInj",
        ),
        (
            lambda: dora()[1:],
            {},
            "RankPruning found no adapter to prune. Put AdapterInjection before it in the Trainer's",
        ),
        (
            dora,
            {"max_epochs": -1},
            "needs the number of optimizer steps, and the Trainer expects inf. Set max_steps, or",
        ),
        (
            dora,
            {"loader": DataLoader(Stream())},
            "number of optimizer steps, and the Trainer expects -1. Set max_steps",
        ),
    ],
    ids=["order", "no_adapters", "endless", "stream"],
)
def test_misuse(callbacks: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        run(callbacks(), **options)


def test_a_budget_that_does_not_fit_is_refused_before_training() -> None:
    policy = dynamic_dora.policy(Budget(rank=FULL + 1))
    with pytest.raises(ValueError, match="more than the 12 that the adapters have at full rank"):
        run([AdapterInjection(partial(DynamicDoRA, rank=FULL)), RankPruning(policy)])
    soft = RankPolicy(Cubic(), Taylor(), Budget(rank=1), soft=True)
    with pytest.raises(ValueError, match=r"the adapter at 'net.0' has none; use soft=False"):
        run([AdapterInjection(partial(LoRA, rank=FULL)), RankPruning(soft)])
