from __future__ import annotations

import copy
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from quiet import QUIET
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from lightning_peft import (
    AdapterCheckpoint,
    AdapterFileError,
    AdapterInjection,
    BudgetPenalty,
    Factorized,
    LoRA,
    MaskAlignment,
    RankBudget,
    RankMonitor,
    RankSelection,
    Regularization,
    UntilTail,
)
from lightning_peft.adapters import ars
from lightning_peft.functional.rank_masks import prefix

# Runs of a few steps learn little, and say so.
pytestmark = pytest.mark.filterwarnings("ignore:masks have learned to keep")


class Net(L.LightningModule):
    lr = 0.01

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.body = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.5), nn.Linear(12, 8), nn.Tanh())
            self.head = nn.Linear(8, 1)
        self.seen: list[tuple[int, list[list[float]]]] = []
        self.validated: list[list[list[float]]] = []
        self.modes: list[bool] = []

    def loss(self, x: Tensor) -> Tensor:
        loss: Tensor = (self.head(self.body(x)) - x.sum(1, keepdim=True).sin()).square().mean()
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        drawn = [site.gate.drawn for site in RankBudget.of(self).values()]
        if all(mask is not None for mask in drawn):
            self.seen.append((self.trainer.global_step, [mask.tolist() for mask in drawn]))  # type: ignore[union-attr]
        self.modes.append(self.body[2].training)
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr)


class Validated(Net):
    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        assert all(site.gate.drawn is None for site in RankBudget.of(self).values())
        self.validated.append([site.gate.value().tolist() for site in RankBudget.of(self).values()])


def data(batches: int = 12) -> DataLoader[Tensor]:
    return DataLoader(torch.randn(batches * 4, 8, generator=torch.Generator().manual_seed(0)), batch_size=4)  # type: ignore[arg-type]


def selection(tail: float = 0.0, compact: Any = "never", mode: Any = "eval", **also: Any) -> RankSelection:
    """With draws that are undecided from the start, so that masks differ."""
    also = {"ratio": 0.5, "interval": 3, "shift": -0.2, **also}
    return RankSelection(ars.policy(tail=tail, **also), compact, mode)


def terms(tail: float = 0.0) -> Regularization:
    return Regularization({"ars_budget": BudgetPenalty(0.5, UntilTail(16.0, tail)),
                           "ars_align": MaskAlignment(UntilTail(10.0, tail))})  # type: ignore[dict-item]  # fmt: skip


def method(tail: float = 0.0, train: list[str] | None = None, **also: Any) -> list[L.Callback]:
    factory = partial(Factorized, trained=False)
    return [AdapterInjection(factory, ["body.*"], train or []), selection(tail, **also), terms(tail)]


def trainer(*callbacks: L.Callback, **options: Any) -> L.Trainer:
    return L.Trainer(callbacks=list(callbacks), **{**QUIET, "max_epochs": 1, **options})


def test_one_mask_for_a_step_and_another_for_the_next() -> None:
    net = Net()
    trainer(*method(), accumulate_grad_batches=3).fit(net, data())
    assert [step for step, _ in net.seen] == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    for step in range(4):
        first, *others = [masks for at, masks in net.seen if at == step]
        assert others == [first, first]
    masks = dict(net.seen)
    assert len({str(each) for each in masks.values()}) == 4
    assert any(0 < sum(row) < 8 for rows in masks.values() for row in rows)


def test_validation_sees_the_prefixes_of_the_last_event() -> None:
    net = Validated()
    written: list[list[list[float]]] = []

    class Look(L.Callback):
        def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            written.append([site.gate.mask.tolist() for site in RankBudget.of(pl_module).values()])

    run = trainer(*method(), Look(), val_check_interval=4, limit_val_batches=1)
    run.fit(net, data(), data(1))
    assert len(written) == 3
    for masks, values in zip(written, net.validated, strict=True):
        for mask, value in zip(masks, values, strict=True):
            assert torch.equal(torch.tensor(mask), prefix(torch.tensor(mask)))
            assert [bool(v) for v in value] == [bool(m) for m in mask]
    assert 0 < sum(written[0][0]) < 8  # after the event of step 3
    assert all(site.gate.drawn is None for site in RankBudget.of(net).values())


def test_the_final_ranks_are_within_the_budget() -> None:
    net = Net()
    trainer(*method()).fit(net, data())
    budget = RankBudget.of(net)
    P = 0.5 * 2 * 8 * 12
    assert P - 20 < budget.spent_parameters <= P
    for site in budget.values():
        assert torch.equal(site.gate.mask, prefix(site.gate.mask))


def test_nothing_but_what_draws_is_trained() -> None:
    net = Net()
    before: dict[str, Tensor] = {}

    class Start(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            before.update(copy.deepcopy(pl_module.state_dict()))

    trainer(*method(), Start()).fit(net, data())
    moved = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert {name for name in moved if not name.startswith("peft_masks.")} == {"body.0.gate.mask", "body.3.gate.mask"}
    assert {name for name in before if name.startswith("peft_masks.")} - moved == {"peft_masks.z"}


def test_terms_and_ranks_are_logged(tmp_path: Path) -> None:
    net = Net()
    run = trainer(*method(), RankMonitor(), logger=CSVLogger(tmp_path), log_every_n_steps=1)
    run.fit(net, data())
    (file,) = tmp_path.rglob("metrics.csv")
    header, *rows = file.read_text().splitlines()
    found: dict[str, list[float]] = {}
    for name, *values in zip(header.split(","), *(row.split(",") for row in rows), strict=True):
        found[name] = [float(value) for value in values if value]
    assert len(found["loss/ars_budget"]) == len(found["loss/ars_align"]) == 12
    assert found["loss/ars_budget"][0] > 0 < found["loss/ars_align"][0]
    budget = RankBudget.of(net)
    assert found["rank/spent"][0] == budget.capacity_parameters == 2 * 8 * 20
    assert found["rank/spent"][-1] == budget.spent_parameters <= found["rank/budget"][-1] == 96
    assert {name: found[f"rank/{name}"][-1] for name in budget} == budget.ranks()
    assert len(set(found["rank/spent"])) > 2  # what was learned so far, on the way


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_masks_are_learned_without_dropout(mode: Any) -> None:
    net = Validated()
    trainer(*method(tail=0.5, mode=mode, train=["head"]), val_check_interval=4).fit(net, data(), data(1))
    assert net.modes == [mode == "train"] * 6 + [True] * 6
    assert net.training


def test_what_was_cut_trains_in_the_tail_as_the_rest_does() -> None:
    net = Net()
    trainer(*method(tail=0.5, train=["head"], compact="final")).fit(net, data())
    assert [name for name, child in net.named_modules() if not child.training] == []


def test_in_a_tail_what_draws_rests_and_the_rest_goes_on() -> None:
    net = Net()
    states: list[dict[str, Tensor]] = []

    class Look(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
            states.append(copy.deepcopy(pl_module.state_dict()))

    trainer(*method(tail=0.5, train=["head"]), Look()).fit(net, data())
    settled, end = states[5], states[-1]
    for name, value in end.items():
        assert torch.equal(value, settled[name]) == (not name.startswith("head.")), name
    assert not torch.equal(states[4]["peft_masks.heads.0"], settled["peft_masks.heads.0"])


def test_what_is_closed_is_cut_out_at_the_last_event() -> None:
    nets = []
    for compact in ("never", "final"):
        net = Net()
        trainer(*method(tail=0.5, train=["head"], compact=compact)).fit(net, data())
        nets.append(net.eval())
    masked, cut = nets
    assert RankBudget.of(cut).ranks() == RankBudget.of(masked).ranks()
    assert sum(len(site.gate) for site in RankBudget.of(cut).values()) == RankBudget.of(masked).spent
    x = torch.randn(5, 8)
    assert torch.allclose(cut.body(x), masked.body(x), atol=1e-6)


class StopAt(L.Callback):
    def __init__(self, batch: int, path: Path) -> None:
        self.left, self.path = batch, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.left -= 1
        if not self.left:
            trainer.save_checkpoint(self.path)
            raise SystemExit


class Noisy(Net):
    """Whoever goes on must draw what the uninterrupted run draws."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return super().training_step(batch + 0.1 * torch.randn_like(batch), batch_idx)


def resumable(compact: str, masks: Any, *extra: L.Callback, path: Path | None = None) -> dict[str, Any]:
    torch.manual_seed(0 if path is None else 99)
    net = Noisy()
    callbacks = method(tail=0.25, train=["head"], compact=compact, masks=masks)
    run = trainer(*callbacks, *extra, AdapterCheckpoint(), accumulate_grad_batches=2, max_epochs=2)
    run.fit(net, data(8), ckpt_path=path)
    state: dict[str, Any] = dict(net.state_dict())
    for i, entry in run.optimizers[0].state_dict()["state"].items():
        state |= {f"optimizer {i} {key}": value for key, value in entry.items()}
    return state | {"ranks": RankBudget.of(net).ranks()}


# 8 steps of two batches; events after steps 3 and 6, the last; the tail is steps 7 and 8
@pytest.mark.parametrize("compact", ["never", "final"])
@pytest.mark.parametrize("masks", ["hypernetwork", "monotone"])
def test_interrupted_is_uninterrupted(compact: str, masks: Any, tmp_path: Path) -> None:
    whole = resumable(compact, masks)
    for batch in (1, 4, 6, 7, 12, 13, 14):
        path = tmp_path / f"{batch}.ckpt"
        with pytest.raises(SystemExit):
            resumable(compact, masks, StopAt(batch, path))
        rest = resumable(compact, masks, path=path)
        assert rest.keys() == whole.keys()
        assert rest["ranks"] == whole["ranks"]
        different = [k for k, v in whole.items() if isinstance(v, Tensor) and not torch.equal(v, rest[k])]
        assert not different, (batch, different)


def test_a_checkpoint_is_validated_with_its_masks(tmp_path: Path) -> None:
    net = Net()
    run = trainer(*method(), AdapterCheckpoint())
    run.fit(net, data())
    run.save_checkpoint(tmp_path / "end.ckpt")
    other = Validated()
    again = trainer(*method(), AdapterCheckpoint())
    again.validate(other, data(1), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert RankBudget.of(other).ranks() == RankBudget.of(net).ranks()
    for name, value in net.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


def test_a_model_that_was_cut_is_validated_with_its_own_checkpoint(tmp_path: Path) -> None:
    net = Validated()
    run = trainer(*method(tail=0.5, train=["head"], compact="final"), AdapterCheckpoint())
    run.fit(net, data(), data(1))
    run.save_checkpoint(tmp_path / "end.ckpt")
    end = copy.deepcopy(net.state_dict())
    run.validate(net, data(1), ckpt_path=tmp_path / "end.ckpt", verbose=False)
    assert net.state_dict().keys() == end.keys()
    for name, value in net.state_dict().items():
        assert torch.equal(value, end[name]), name


@pytest.mark.parametrize("step", [3, 9])
def test_a_model_object_that_was_cut_is_no_place_to_resume(step: int, tmp_path: Path) -> None:
    """What draws was made for the sizes that are left; a model that is built anew goes on from either checkpoint."""

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    def callbacks() -> list[L.Callback]:
        return [*method(tail=0.5, train=["head"], compact="final"), AdapterCheckpoint()]

    net, again = Net(), Net()
    trainer(*callbacks(), Saves()).fit(net, data())
    with pytest.raises(
        AdapterFileError, match=r"does not fit 'peft_masks\..*has cut\. Build the model anew, and resume"
    ):
        trainer(*callbacks()).fit(net, data(), ckpt_path=tmp_path / "stop.ckpt")
    trainer(*callbacks()).fit(again, data(), ckpt_path=tmp_path / "stop.ckpt")
    assert all(len(site.gate) == RankBudget.of(again).ranks()[name] for name, site in RankBudget.of(again).items())


@pytest.mark.parametrize("before", [False, True])
def test_a_learning_rate_finder_tries_masks_and_leaves_no_trace(before: bool, tmp_path: Path) -> None:
    tried: list[bool] = []

    class Tried(Validated):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            tried.append(all(site.gate.drawn is not None for site in RankBudget.of(self).values()))
            return super().training_step(batch, batch_idx)

    states = []
    for search in (False, True):
        net = Tried()
        finder = LearningRateFinder(num_training_steps=20, early_stop_threshold=None)
        callbacks = method() if not search else [finder, *method()] if before else [*method(), finder]

        class Same(L.Callback):
            def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
                trainer.optimizers[0].param_groups[0]["lr"] = 0.01

        run = trainer(*callbacks, Same(), default_root_dir=tmp_path, num_sanity_val_steps=1)
        run.fit(net, data(24), data(1))
        states.append(net.state_dict())
    assert len(tried) == 24 + 44
    assert all(tried)
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_a_model_can_be_copied_in_the_middle_of_a_step() -> None:
    class Copies(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            self.twin = [copy.deepcopy(self.body)]
            return loss

    net = Copies()
    trainer(*method(), max_steps=2).fit(net, data())
    assert all(site.gate.drawn is None for site in RankBudget.of(net.twin[0]).values())


class Compiled(Validated):
    def __init__(self) -> None:
        super().__init__()
        self.body.compile(backend="eager")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # hidden by torch, where it is no error
def test_a_compiled_model_is_not_compiled_for_every_draw() -> None:
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    plain, compiled = Validated(), Compiled()
    for net in (plain, compiled):
        trainer(*method(), val_check_interval=6).fit(net, data(), data(1))
    assert counters["stats"]["unique_graphs"] - before <= 3  # with a drawn mask, and without
    for name, value in plain.state_dict().items():
        assert torch.equal(compiled.state_dict()[name], value), name


class Checkpointed(Net):
    reentrant = False

    def loss(self, x: Tensor) -> Tensor:
        h = x.clone().requires_grad_(self.reentrant)
        for layer in self.body:
            h = checkpoint(layer, h, use_reentrant=self.reentrant)  # type: ignore[assignment]
        loss: Tensor = (self.head(h) - x.sum(1, keepdim=True).sin()).square().mean()
        return loss


class Reentrant(Checkpointed):
    reentrant = True


def test_activation_checkpointing_changes_nothing() -> None:
    states = []
    for kind in (Net, Checkpointed):
        net = kind()
        trainer(*method()).fit(net, data())
        states.append(net.state_dict())
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_what_draws_stays_precise(precision: Any) -> None:
    net = Net()
    wide = torch.float64 if precision == "64-true" else torch.float32
    seen: list[Any] = []

    class Look(L.Callback):
        def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            seen.extend(p.dtype for p in pl_module.peft_masks.parameters())  # type: ignore[union-attr]
            seen.extend(site.gate.drawn.dtype for site in RankBudget.of(pl_module).values())  # type: ignore[union-attr]

    trainer(*method(), Look(), precision=precision).fit(net, data())
    assert set(seen) == {wide}
    assert RankBudget.of(net).spent_parameters <= 96


class Late(Net):
    """Its layers come where precision has set the default dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.later = [self.body, self.head]
        del self.body, self.head

    def configure_model(self) -> None:
        if self.later:
            self.body, self.head = self.later
            self.later = []


def test_what_draws_is_as_precise_where_layers_come_late() -> None:
    nets: list[Net] = [Net(), Late()]
    for net in nets:
        trainer(*method(), precision="bf16-true").fit(net, data())
    drawn = [{n: v for n, v in net.state_dict().items() if n.startswith("peft_masks.")} for net in nets]
    assert {value.dtype for value in drawn[1].values()} == {torch.float32}
    for name, value in drawn[0].items():
        assert torch.equal(drawn[1][name], value), name


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class HeadOnly(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.head.parameters(), lr=0.01)


def test_wrong_set_ups_are_told() -> None:
    frozen = AdapterInjection(partial(Factorized, trained=False), ["body.*"], [])
    for callbacks, net, options, says in (
        ([selection()], Net(), {}, "RankSelection found no adapter to prune. Put AdapterInjection before it"),
        (method(), Manual(), {"max_steps": 3}, "Manual optimizes by hand .* and masks are drawn for a training step"),
        (
            [AdapterInjection(Factorized, ["body.*"], []), selection(), terms()],
            Net(),
            {},
            "'U' of the adapter at 'body.0' is trained, and RankSelection learns what of the adapters stays as they",
        ),
        (method(train=["head"]), HeadOnly(), {}, r"what draws the masks \(`self.peft_masks`\) is in no optimizer"),
        (method(), Reentrant(), {}, "masks are drawn once for a whole step, and re-entrant .* use_reentrant=False"),
        ([selection(), frozen], Net(), {}, "RankSelection comes before AdapterInjection in the Trainer's callbacks"),
    ):
        with pytest.raises(MisconfigurationException, match=says), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer(*callbacks, **options).fit(net, data())  # type: ignore[arg-type]
        assert "training_step" not in net.__dict__
        assert all(site.gate.drawn is None for site in RankBudget.of(net).values())


def test_other_adapters_and_ratios_that_cannot_be_are_told() -> None:
    with pytest.raises(ValueError, match="the adapter at 'body.0', a LoRA, has none. Factorise the layers"):
        trainer(AdapterInjection(partial(LoRA, rank=2), ["body.*"], []), selection()).fit(Net(), data())
    with pytest.raises(ValueError, match="ratio=0.1 keeps 19 of the 192 parameters of 2 layers"):
        trainer(*method(ratio=0.1)).fit(Net(), data())
    with pytest.raises(TypeError, match="policy must be a SamplingPolicy, such as a LearnedRanks. Got 'ars'."):
        RankSelection("ars")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"mode='test': choose 'eval' \(no dropout\) or 'train'."):
        selection(mode="test")
    with pytest.raises(ValueError, match="compact=2 would cut at events before the last, and this policy draws masks"):
        selection(compact=2)


def test_terms_without_draws_are_told() -> None:
    frozen = AdapterInjection(partial(Factorized, trained=False), ["body.*"], ["head"])
    with pytest.raises(RuntimeError, match="no mask is drawn for layer 'body.0', .* put RankSelection"):
        trainer(frozen, terms()).fit(Net(), data())


def test_masks_that_have_not_learned_the_budget_are_told() -> None:
    net = Net()
    net.lr = 1e-5
    with pytest.warns(UserWarning, match="masks have learned to keep 320 parameters, and the budget is 96"):
        trainer(*method(shift=3.0)).fit(net, data())
    assert RankBudget.of(net).spent_parameters <= 96  # all the same
