"""RankPruning(compact=...): the tail runs at the final rank, and nothing else changes; resumed, watched, refused."""

from __future__ import annotations

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quiet import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import (
    AdaLoRA,
    AdapterCheckpoint,
    AdapterFileError,
    AdapterInjection,
    Budget,
    Cubic,
    DynamicDoRA,
    LoRA,
    RankBudget,
    RankMonitor,
    RankPolicy,
    RankPruning,
    Regularization,
    Taylor,
    eject,
    load,
    to_hf_peft,
)
from lightning_peft.adapters import adalora, dynamic_dora
from lightning_peft.callbacks.pruning import Compact
from lightning_peft.checkpoint import CUT, ENTRY, digest
from lightning_peft.inspection import report
from lightning_peft.regularizers import DEM, UntilTail

STEPS, LAST = 32, 16  # 4 epochs of 8 steps; the final mask is there after step 16
LAYERS = ["net.0", "net.3", "net.5"]


class Net(L.LightningModule):
    """Dropout, a schedule, an adaptive optimizer; and a layer that is worth so little that its adapter goes."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 16),
                nn.ReLU(), nn.Linear(16, 4),
            )  # fmt: skip

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        out: Tensor = self.net(batch[0])
        return out

    def configure_optimizers(self) -> Any:
        head = list(self.net[7].parameters())
        own = [p for p in self.parameters() if p.requires_grad and not any(p is q for q in head)]
        optimizer = torch.optim.AdamW([{"params": head, "lr": 2e-2}, {"params": own}], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Validated(Net):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    test_step = validation_step


class Worthless(Taylor):
    """The scores of a layer whose adapter is to go are nothing."""

    def measure(self, group: list[Any]) -> Tensor:
        now = super().measure(group)
        for row, site in zip(now, group, strict=True):
            if site.name == "net.3":
                row.zero_()
        return now


class Shares(dynamic_dora.NormShare):
    def measure(self, group: list[Any]) -> Tensor:
        now = super().measure(group)
        for row, site in zip(now, group, strict=True):
            if site.name == "net.3":
                row.zero_()
        return now


def data(size: int = 64) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(size, 16, generator=generator), torch.randint(0, 4, (size,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)


def still(size: int = 64) -> DataLoader[Any]:
    return DataLoader(data(size).dataset, batch_size=8)


def dora(compact: Compact) -> list[L.Callback]:
    policy = dynamic_dora.policy(Budget(rank=2), tail=0.5, interval=3)
    policy.importance = Shares()
    return [
        AdapterInjection(partial(DynamicDoRA, rank=5, dropout=0.1), verbose=False),
        RankPruning(policy, compact=compact),
        Regularization({"dem": DEM(UntilTail(0.3, 0.25))}),
    ]


def taylor(compact: Compact, dropout: float = 0.1) -> list[L.Callback]:
    policy = RankPolicy(Cubic(0.1, 0.5), Worthless(), Budget(rank=2), interval=3)
    adapter = partial(LoRA, rank=5, dropout=dropout)
    return [AdapterInjection(adapter, verbose=False), RankPruning(policy, compact=compact)]


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    shown = [*callbacks, RankMonitor(), AdapterCheckpoint()]
    return L.Trainer(callbacks=shown, **{**QUIET, "max_epochs": 4, "log_every_n_steps": 1, **options})


def fit(
    *callbacks: L.Callback, module: Net | None = None, seed: int = 3, ckpt_path: Any = None, **options: Any
) -> tuple[Net, L.Trainer]:
    torch.manual_seed(seed)
    net, run = module or Net(), trainer(*callbacks, **options)
    run.fit(net, data(), ckpt_path=ckpt_path)
    return net, run


class At(L.Callback):
    """Saves at a step; stops there if it is told so."""

    def __init__(self, step: int, path: Path, stop: bool = True) -> None:
        self.step, self.path, self.stop = step, path, stop

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            if self.stop:
                raise SystemExit


def note(module: L.LightningModule) -> dict[str, Any]:
    parameter = next(module.parameters())
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1)).to(parameter)
    output = module.net.eval()(x).detach()
    module.net.train()
    return {
        "output": output,
        "numel": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "ranks": RankBudget.of(module).ranks(),
        "random": torch.get_rng_state(),
    }


class Watch(L.Callback):
    """Notes outputs and sizes after each step, as the callbacks before it have left them."""

    def __init__(self) -> None:
        self.notes: dict[int, dict[str, Any]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step not in self.notes:  # an accumulated micro-batch
            self.notes[trainer.global_step] = note(pl_module)


class Noting(RankPruning):
    """Looks right before and right after components are cut."""

    def _cut(self, trainer: L.Trainer) -> None:
        self.before = note(trainer.lightning_module)
        super()._cut(trainer)
        self.after = note(trainer.lightning_module)


def everything(net: Net, run: L.Trainer) -> dict[str, Tensor]:
    found = dict(net.state_dict())
    for i, state in run.optimizers[0].state_dict()["state"].items():
        found |= {f"optimizer.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
    pruning = next(c for c in run.callbacks if isinstance(c, RankPruning))
    found |= {f"worth.{name}": worth for name, worth in pruning.policy.state_dict()["importance"]["worth"].items()}
    rates = [group["lr"] for group in run.optimizers[0].param_groups]
    return found | {"rates": torch.tensor(rates), "step": torch.tensor(run.global_step)}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different


def state_bytes(run: L.Trainer) -> int:
    return sum(t.numel() * t.element_size() for s in run.optimizers[0].state.values() for t in s.values())


@pytest.mark.parametrize("method", [dora, taylor])
@pytest.mark.parametrize("options", [
    {},
    {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5},
    {"precision": "bf16-mixed"},
    {"precision": "bf16-true"},
])  # fmt: skip
def test_the_tail_runs_at_the_final_rank_with_equal_outputs(method: Any, options: dict[str, Any]) -> None:
    watch = Watch()
    injection, pruning, *rest = method("final")
    pruning.__class__ = Noting
    net, run = fit(injection, pruning, *rest, watch, **options)
    last = pruning.policy.schedule.window(pruning.total_steps)[1]
    assert last == run.global_step // 2
    before, after = pruning.before, pruning.after
    atol = 0.02 if options.get("precision") == "bf16-true" else 1e-6
    torch.testing.assert_close(after["output"], before["output"], rtol=0, atol=atol)
    assert before["ranks"] == after["ranks"]
    assert list(after["ranks"]) == LAYERS
    assert after["ranks"]["net.3"] == 0
    assert sum(after["ranks"].values()) == 6
    assert torch.equal(after["random"], before["random"])
    sizes_at = [watch.notes[step]["numel"] for step in range(1, run.global_step + 1)]
    assert sizes_at == [before["numel"]] * (last - 1) + [after["numel"]] * (last + 1)
    assert after["numel"] < before["numel"]
    held = [p for group in run.optimizers[0].param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in net.parameters() if p.requires_grad}
    sizes = {name: 2 * p.numel() * p.element_size() + 4 for name, p in net.named_parameters() if p.requires_grad}
    assert state_bytes(run) == sum(sizes.values())


def test_the_weights_are_those_of_a_run_with_masks_alone() -> None:
    """Without dropout in the adapters: one that has gone draws no random numbers, and a masked one does."""
    watch = Watch()
    masked, one = fit(*taylor("never", dropout=0.0))
    cut, other = fit(*taylor("final", dropout=0.0), watch)
    assert watch.notes[LAST]["ranks"] == RankBudget.of(masked).ranks() == RankBudget.of(cut).ranks()
    x = torch.randn(32, 16)
    torch.testing.assert_close(cut.eval().net(x), masked.eval().net(x), rtol=1e-5, atol=1e-5)
    assert state_bytes(other) < 0.6 * state_bytes(one)
    was = RankBudget.of(masked)
    for name, site in RankBudget.of(cut).items():
        keep = was[name].gate.open()
        torch.testing.assert_close(site.adapter.A, was[name].adapter.A[keep], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("every", [1, 2])
def test_every_kth_event_cuts_and_the_budget_is_the_schedules(every: int) -> None:
    watch, left = Watch(), 15
    _, run = fit(*taylor(every), watch)
    pruning = next(c for c in run.callbacks if isinstance(c, RankPruning))
    steps = [step for step in range(1, STEPS + 1) if pruning.policy.is_event(step, STEPS)]
    for number, step in enumerate(steps, start=1):
        allowed = pruning.policy.budget_at(step, STEPS)
        assert sum(watch.notes[step]["ranks"].values()) == allowed
        due = number % every == 0 or step == LAST
        smaller = watch.notes[step]["numel"] < watch.notes[step - 1]["numel"]
        assert smaller == (due and allowed < left), step
        left = allowed if due else left
    assert pruning.budget_now() == 6


@pytest.mark.parametrize("compact", [True, 0, -1, "always", 1.0])
def test_an_unknown_compact_is_refused(compact: Any) -> None:
    with pytest.raises(ValueError, match=f"compact={compact!r}: choose 'never', 'final' .cut once, at the final mask"):
        taylor(compact)


def test_soft_removal_closes_nothing_for_good_before_its_last_event() -> None:
    with pytest.raises(ValueError, match="compact=2 would cut at events before the last, and this policy removes soft"):
        dora(2)


# warm-up, pruning, an event, right before, at and after the last one, the tail, ends of epochs
@pytest.mark.parametrize("stop", [2, 9, 15, LAST, 17, 24, 27, 31])
@pytest.mark.parametrize("method", [dora, taylor])
def test_interrupted_is_uninterrupted_bit_for_bit(tmp_path: Path, method: Any, stop: int) -> None:
    whole, uninterrupted = fit(*method("final"))
    with pytest.raises(SystemExit):
        fit(*method("final"), At(stop, tmp_path / "stop.ckpt"))
    net, resumed = fit(*method("final"), seed=77, ckpt_path=tmp_path / "stop.ckpt")
    assert resumed.global_step == STEPS
    assert_same(everything(whole, uninterrupted), everything(net, resumed))
    assert RankBudget.of(whole).table() == RankBudget.of(net).table()


@pytest.mark.parametrize("stop", [5, 9, 10, 14])
def test_interrupted_between_cuts_too(tmp_path: Path, stop: int) -> None:
    whole, uninterrupted = fit(*taylor(1))
    with pytest.raises(SystemExit):
        fit(*taylor(1), At(stop, tmp_path / "stop.ckpt"))
    net, resumed = fit(*taylor(1), seed=77, ckpt_path=tmp_path / "stop.ckpt")
    assert_same(everything(whole, uninterrupted), everything(net, resumed))


def test_a_checkpoint_from_between_step_and_cut_misses_neither(tmp_path: Path) -> None:
    early = At(LAST, tmp_path / "early.ckpt", stop=False)
    whole, uninterrupted = fit(early, *dora("final"))
    net, resumed = fit(*dora("final"), seed=77, ckpt_path=tmp_path / "early.ckpt")
    assert_same(everything(whole, uninterrupted), everything(net, resumed))


def test_a_run_that_did_not_compact_is_compacted_when_resumed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(*taylor("never"), At(20, tmp_path / "stop.ckpt"))
    net, run = fit(*taylor("final"), ckpt_path=tmp_path / "stop.ckpt")
    assert sum(len(site.gate) for site in RankBudget.of(net).values()) == 6
    assert run.global_step == STEPS


def test_so_is_one_whose_importance_has_been_forgotten(tmp_path: Path) -> None:
    def method(compact: Compact) -> list[L.Callback]:
        policy = adalora.policy(Budget(rank=2), interval=3)
        return [AdapterInjection(partial(AdaLoRA, rank=5), verbose=False), RankPruning(policy, compact=compact)]

    with pytest.raises(SystemExit):
        fit(*method("never"), At(20, tmp_path / "stop.ckpt"))
    net, run = fit(*method("final"), ckpt_path=tmp_path / "stop.ckpt")
    assert sum(len(site.gate) for site in RankBudget.of(net).values()) == 6
    assert run.global_step == STEPS
    pruning = next(c for c in run.callbacks if isinstance(c, RankPruning))
    assert pruning.policy.state_dict()["importance"] == {}  # nor does it come back


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Net]:
    """Checkpoints from before and after compaction, and the module at the end."""
    folder = tmp_path_factory.mktemp("both")
    with torch.random.fork_rng(devices=[]):
        net, run = fit(*taylor("final"), At(10, folder / "before.ckpt", stop=False))
    run.save_checkpoint(folder / "after.ckpt")
    return folder, net


def outputs(run: L.Trainer, net: Net, path: Path) -> Tensor:
    torch.manual_seed(0)
    return torch.cat(run.predict(net, still(), ckpt_path=path))  # type: ignore[arg-type]


def test_either_checkpoint_loads_into_either_module(both: tuple[Path, Net]) -> None:
    folder, trained = both
    before = outputs(trainer(*taylor("final")), Net(), folder / "before.ckpt")
    after = outputs(trainer(*taylor("final")), Net(), folder / "after.ckpt")
    torch.testing.assert_close(after, torch.cat([trained.eval().net(x) for x, _ in still()]))
    net, run = copy.deepcopy(trained), trainer(*taylor("final"))
    for name, expected, size in [("before", before, 15), ("after", after, 6), ("before", before, 15)]:
        assert torch.equal(outputs(run, net, folder / f"{name}.ckpt"), expected)
        assert sum(len(site.gate) for site in RankBudget.of(net).values()) == size
        assert all(p.requires_grad for site in RankBudget.of(net).values() for _, p in site.adapter.own_parameters())
    other = Validated()
    assert run.validate(other, still(), ckpt_path=folder / "after.ckpt", verbose=False)
    assert run.validate(other, still(), ckpt_path=folder / "before.ckpt", verbose=False)
    assert run.test(other, still(), ckpt_path=folder / "after.ckpt", verbose=False)
    assert RankBudget.of(other).table() == RankBudget.of(trained).table()


def test_validating_an_earlier_checkpoint_in_the_same_process_and_training_on(tmp_path: Path) -> None:
    net, run = fit(*taylor("final"), At(10, tmp_path / "step=10.ckpt", stop=False))
    whole = everything(net, run)
    run.predict(net, still(), ckpt_path=tmp_path / "step=10.ckpt")
    again, other = fit(*taylor("final"), module=net, ckpt_path=tmp_path / "step=10.ckpt")
    fresh, third = fit(*taylor("final"), ckpt_path=tmp_path / "step=10.ckpt")
    assert_same(everything(again, other), everything(fresh, third))
    assert_same(everything(again, other), whole)


def test_a_wrong_checkpoint_leaves_the_sizes_as_they_were(both: tuple[Path, Net]) -> None:
    folder, trained = both
    net = copy.deepcopy(trained)
    with torch.no_grad():
        net.net[0].base.weight.add_(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(AdapterFileError, match="was made for another base model"):
        outputs(trainer(*taylor("final")), net, folder / "before.ckpt")
    assert_same(before, dict(net.state_dict()))
    assert RankBudget.of(net).table() == RankBudget.of(trained).table()


def test_adapters_that_were_others_from_the_start_are_refused(both: tuple[Path, Net]) -> None:
    folder, _ = both
    policy = RankPolicy(Cubic(0.1, 0.5), Taylor(), Budget(rank=2))
    other = [AdapterInjection(partial(LoRA, rank=4, dropout=0.1), verbose=False), RankPruning(policy, compact="final")]
    for name in ("before", "after"):
        with pytest.raises(AdapterFileError, match="holds other adapters than this model has: at 'net.0' it has LoRA"):
            fit(*other, ckpt_path=folder / f"{name}.ckpt")


@pytest.mark.parametrize(("change", "says"), [
    (lambda e: e.update({CUT: 3}), "says that compacted is 3; it must be a dictionary"),
    (lambda e: e[CUT]["net.3"].update(components=-1), r"compacted\['net.3'\] is -1; it must be components, at least 1"),
    (lambda e: e["recipe"]["adapters"][0]["arguments"].update(rank=10**6), "that cannot be: layer 'net.0': rank=100"),
    (lambda e: e[CUT].update({"net.9": e[CUT]["net.3"]}), "holds other adapters than this model has"),
])  # fmt: skip
def test_a_wrong_record_is_refused(both: tuple[Path, Net], tmp_path: Path, change: Any, says: str) -> None:
    saved = torch.load(both[0] / "after.ckpt", weights_only=True)
    change(saved[ENTRY])
    saved[ENTRY]["digest"] = digest(saved["state_dict"], saved[ENTRY])
    torch.save(saved, tmp_path / "odd.ckpt")
    with pytest.raises(AdapterFileError, match=says):
        outputs(trainer(*taylor("final")), Net(), tmp_path / "odd.ckpt")


def test_a_compacted_checkpoint_in_a_bare_script_and_under_the_command_line(both: tuple[Path, Net]) -> None:
    folder, trained = both
    x = torch.randn(5, 16)
    for plain in (Net(), Net().net):
        loaded = load(plain, folder / "after.ckpt").eval()
        assert torch.equal((loaded.net if isinstance(loaded, Net) else loaded)(x), trained.eval().net(x))
        table = RankBudget.of(loaded).table()
        assert table.replace("net.", "").split() == RankBudget.of(trained).table().replace("net.", "").split()
    text = report(folder / "after.ckpt")
    assert "Compacted: closed components were cut out while it trained." in text
    assert "Rank 0, so no component acts: net.3." in text
    assert "6/15" in text


def test_export_and_eject_after_compaction(both: tuple[Path, Net], tmp_path: Path) -> None:
    net = copy.deepcopy(both[1])
    exported = to_hf_peft(net, tmp_path / "adapter", inputs=torch.randn(3, 16), head=False, check="files")
    assert {name: rank for name, rank in exported.ranks.items() if rank} == {
        name: rank for name, rank in RankBudget.of(net).ranks().items() if rank
    }
    eject(net)
    plain = Net()
    assert list(net.state_dict()) == list(plain.state_dict())
    for name, value in plain.state_dict().items():
        assert name.startswith("net.7") or torch.equal(net.state_dict()[name], value), name


def read(folder: Path) -> list[dict[str, str]]:
    import csv

    (file,) = folder.rglob("metrics.csv")
    with file.open() as lines:
        return [row for row in csv.DictReader(lines) if row.get("rank/open")]


@pytest.mark.parametrize("method", [dora, taylor])
def test_what_is_logged_is_what_masks_alone_would_log(tmp_path: Path, method: Any) -> None:
    rows = []
    for compact in ("never", "final"):
        folder = tmp_path / compact
        fit(*method(compact), logger=[CSVLogger(folder), TensorBoardLogger(folder)])
        ranks = [{k: v for k, v in row.items() if k.startswith("rank/") or k == "step"} for row in read(folder)]
        rows.append(ranks)
    assert rows[0] == rows[1]
    last = {name: float(value) for name, value in rows[1][-1].items()}
    assert (last["rank/net.3"], last["rank/spent"], last["rank/budget"]) == (0, 6, 6)


def test_charts_hold_every_layer_when_cut_at_every_event_and_when_resumed(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        fit(*taylor(1), At(20, tmp_path / "stop.ckpt"))
    net, _ = fit(
        *taylor(1), ckpt_path=tmp_path / "stop.ckpt", logger=[CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    )
    assert {float(row["rank/net.3"]) for row in read(tmp_path)} == {0.0}
    assert re.search(r"^net.3 +LoRA +0/5 +0$", RankBudget.of(net).table(), re.MULTILINE)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (events,) = tmp_path.rglob("events.out.tfevents*")
    found = EventAccumulator(str(events), {"images": 0}).Reload()
    assert len(found.Images("rank/heatmap")) == 1  # at the start: no event was left
    hparams = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"adapter/rank" in hparams


class Body(nn.Sequential):
    """A forward of its own, which is compiled as one graph."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_modules_recompile_once() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    net = Net()
    net.net[2] = nn.Identity()  # a compiled dropout draws other random numbers
    net.net = Body(*net.net)
    plain = copy.deepcopy(net)
    net.net.compile(backend=counter, fullgraph=True)
    counts: dict[int, int] = {}

    class Count(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            counts[trainer.global_step] = counter.frame_count

    fit(*taylor("final", dropout=0.0), Count(), module=net)
    fit(*taylor("final", dropout=0.0), module=plain)
    assert counts[LAST] == counts[1] == 1
    assert counts[STEPS] == 2
    x = torch.randn(8, 16)
    torch.testing.assert_close(net.eval().net(x), plain.eval().net(x), rtol=1e-4, atol=1e-5)


class Sharded(FSDPStrategy):
    """Fully sharded on a CPU, where Lightning refuses the class itself by its exact type."""


@pytest.mark.parametrize("strategy", [Sharded(), ModelParallelStrategy()])
def test_sharding_is_refused_with_a_sentence(strategy: Any) -> None:
    callbacks = taylor("final")
    run = trainer(*callbacks, strategy=strategy, devices=1)
    name = type(strategy).__name__
    with pytest.raises(
        MisconfigurationException, match=f"{name} has them sharded or .* compaction happens at export there"
    ):
        callbacks[1].setup(run, Net(), "fit")
    if not isinstance(strategy, ModelParallelStrategy):  # which has no mesh before its processes are there
        callbacks[1].setup(run, Net(), "validate")


@pytest.mark.parametrize("copier", [WeightAveraging(), StochasticWeightAveraging(swa_lrs=0.1)])
def test_callbacks_that_keep_copies_are_refused(copier: L.Callback) -> None:
    with pytest.raises(
        MisconfigurationException, match=f"{type(copier).__name__} keeps a copy of the weights in their old shapes"
    ):
        fit(*taylor("final"), copier)


def test_checkpoints_that_could_not_be_loaded_are_refused(tmp_path: Path) -> None:
    run = L.Trainer(
        callbacks=[*taylor("final"), ModelCheckpoint(tmp_path)], max_epochs=1, logger=False, accelerator="cpu",
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(
        MisconfigurationException, match="without AdapterCheckpoint a checkpoint does not say so: it cou"
    ):
        run.fit(Net(), data())


def test_an_optimizer_that_cannot_be_cut_stops_the_run_with_a_sentence() -> None:
    class Factored(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adafactor([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    with pytest.raises(TypeError, match="Adafactor keeps 'row_var' of shape .* compact after training"):
        fit(*taylor("final"), module=Factored())
