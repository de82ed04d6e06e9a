from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    DEM,
    AdapterInjection,
    DynamicDoRA,
    LoRA,
    Orthogonality,
    Regularization,
    Regularizer,
    UntilTail,
    presets,
)
from lightning_peft import inject as inject_

LORA = partial(LoRA, rank=2)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))

    def loss(self, batch: Tensor) -> Tensor:
        loss: Tensor = (self.net(batch) - batch.sum(1, keepdim=True).sin()).square().mean()
        return loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


class InDict(Module):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"loss": self.loss(batch), "extra": batch_idx}


class ByHand(Module):
    """The same terms, written by somebody who does not know the callback."""

    def __init__(self, terms: dict[str, Regularizer]) -> None:
        super().__init__()
        self.terms = nn.ModuleDict(terms)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = self.loss(batch)
        step, total = self.trainer.global_step + 1, int(self.trainer.estimated_stepping_batches)
        with torch.autocast("cpu", enabled=False):
            loss = loss.to(torch.promote_types(loss.dtype, torch.float32))
            for term in self.terms.values():
                assert isinstance(term, Regularizer)
                weight = term.weight_at(step, total)
                if weight:
                    loss = loss + weight * term(self, batch, loss)
        return loss


class Pull(Regularizer):
    """A term with a parameter of its own, that looks at what it is given."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__(weight)
        self.center = nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[Any, Any]] = []

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        self.seen.append((batch, outputs))
        return (self.center - 1).square()


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


def data(batches: int = 6) -> DataLoader[Tensor]:
    return DataLoader(torch.randn(batches * 4, 8, generator=torch.Generator().manual_seed(0)), batch_size=4)  # type: ignore[arg-type]


def terms() -> dict[str, Regularizer]:
    return {"dem": DEM(UntilTail(0.3, tail=0.5)), "orthogonality": Orthogonality(0.1), "again": DEM(0.05)}


def adapted(module: Module) -> Module:
    torch.manual_seed(0)
    inject_(module.net, partial(DynamicDoRA, rank=2, dropout=0.2))
    return module


def precision(name: str) -> dict[str, Any]:
    if name == "16-mixed":  # Lightning has no string for it on a CPU
        return {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]}
    return {"precision": name}


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", ["32-true", "bf16-mixed", "16-mixed", "64-true"])
def test_the_callback_is_bitwise_the_loss_written_by_hand(name: str, clip: float | None, accumulate: int) -> None:
    states = []
    for by_hand in (False, True):
        module = adapted(ByHand(terms()) if by_hand else Module())
        torch.manual_seed(1)
        run = trainer(
            *([] if by_hand else [Regularization(terms())]),
            accumulate_grad_batches=accumulate,
            gradient_clip_val=clip,
            **precision(name),
        )
        run.fit(module, data())
        states.append({key: value for key, value in module.state_dict().items() if key.startswith("net.")})
    start = adapted(Module()).state_dict()
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    assert not torch.equal(states[0]["net.0.A"].double(), start["net.0.A"].double())


@pytest.mark.parametrize("kind", [Module, InDict])
def test_terms_change_the_loss_and_nothing_else_that_was_returned(kind: type[Module]) -> None:
    class Look(Callback):
        outputs: list[Any]

        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
            self.outputs = [*getattr(self, "outputs", []), outputs]

    look, pull = Look(), Pull(weight=10.0)
    module = adapted(kind())
    trainer(Regularization({"pull": pull}), look, max_steps=2).fit(module, data())
    assert len(pull.seen) == len(look.outputs) == 2
    batch, outputs = pull.seen[0]
    assert torch.equal(batch, next(iter(data())))
    task = outputs["loss"] if kind is InDict else outputs
    torch.testing.assert_close(look.outputs[0]["loss"], task.detach() + 10.0)
    assert (kind is InDict) == ("extra" in look.outputs[0])


def test_parts_are_logged_by_name() -> None:
    run = trainer(AdapterInjection(LORA), Regularization({"dem": DEM(0.5), "pull": Pull()}), max_steps=1)
    run.fit(Module(), data())
    logged = {name: value.item() for name, value in run.logged_metrics.items()}
    assert set(logged) == {"loss/task", "loss/dem", "loss/pull"}
    assert logged["loss/pull"] == 1.0
    assert logged["loss/task"] == pytest.approx(Module().loss(next(iter(data()))).item())


def test_property_9_in_the_tail_dem_is_not_even_evaluated() -> None:
    class Counted(DEM):
        calls = 0

        def forward(self, *args: Any) -> Tensor:
            self.calls += 1
            return super().forward(*args)

    dem = Counted(UntilTail(0.3, tail=0.5))
    trainer(AdapterInjection(LORA), Regularization({"dem": dem}), accumulate_grad_batches=2).fit(Module(), data())
    assert dem.calls == 2 * 3  # 6 optimizer steps of two batches; half of them are the tail


def test_a_terms_own_parameters_are_trained_and_saved() -> None:
    pull, module = Pull(), adapted(Module())
    trainer(Regularization({"pull": pull})).fit(module, data())
    assert pull.center.item() > 0.05
    assert module.state_dict()["peft_terms.pull.center"] == pull.center


def test_a_terms_parameter_in_no_optimizer_is_named() -> None:
    class Narrow(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.net.parameters() if p.requires_grad], lr=0.01)

    with pytest.raises(
        MisconfigurationException, match=r"'pull.center' of the terms is in no optimizer, so it would not be"
    ):
        trainer(Regularization({"pull": Pull()})).fit(adapted(Narrow()), data())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_batch_that_the_user_skips_stays_skipped() -> None:
    class Skips(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            return None if batch_idx % 2 else super().training_step(batch, batch_idx)

    pull = Pull()
    trainer(Regularization({"pull": pull}), max_epochs=1).fit(adapted(Skips()), data())
    assert len(pull.seen) == 3


class InConfigureModel(Module):
    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.net = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        if self.net is None:
            self.net = Module().net


class InSetup(Module):
    def __init__(self) -> None:
        LightningModule.__init__(self)

    def setup(self, stage: str) -> None:
        if not hasattr(self, "net"):
            self.net = Module().net


@pytest.mark.parametrize("kind", [InConfigureModel, InSetup])
def test_modules_that_are_built_late_have_their_terms_in_the_optimizer(kind: type[Module]) -> None:
    pull, module = Pull(), kind()
    trainer(AdapterInjection(LORA), Regularization({"pull": pull, "dem": DEM(0.1)})).fit(module, data())
    assert pull.center.item() > 0.05
    assert list(vars(module)).count("training_step") == 0


def test_the_module_is_its_own_again_after_fit() -> None:
    module = adapted(Module())
    trainer(Regularization({"dem": DEM()})).fit(module, data())
    assert "training_step" not in vars(module)
    assert module.training_step.__func__ is Module.training_step  # type: ignore[attr-defined]


@pytest.mark.parametrize("where", ["training_step", "on_train_start", "configure_optimizers", "term"])
def test_the_module_is_its_own_again_after_an_exception(where: str) -> None:
    class Breaks(Module):
        def __getattribute__(self, name: str) -> Any:
            if name == where and "training_step" in vars(self):  # once fit is under way

                def broken(*args: Any, **kwargs: Any) -> Any:
                    raise RuntimeError("theirs")

                return broken
            return super().__getattribute__(name)

    class BrokenTerm(Regularizer):
        def forward(self, *args: Any) -> Tensor:
            raise RuntimeError("theirs")

    module = adapted(Module() if where == "term" else Breaks())
    term: Regularizer = BrokenTerm() if where == "term" else DEM()
    with pytest.raises(RuntimeError, match="theirs"):
        trainer(Regularization({"term": term})).fit(module, data())
    assert "training_step" not in vars(module)


def test_validation_and_test_are_as_before() -> None:
    class Evaluated(Module):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val", self.loss(batch))

    module = adapted(Evaluated())
    (before,) = trainer().validate(module, data(), verbose=False)
    run = trainer(Regularization({"pull": Pull(100.0)}))
    (after,) = run.validate(module, data(), verbose=False)
    assert before == after
    assert "training_step" not in vars(module)
    assert "peft_terms.pull.center" in module.state_dict()  # a checkpoint that holds it can be validated


def test_another_trainer_may_bring_terms_of_its_own() -> None:
    module = adapted(Module())
    trainer(Regularization({"pull": Pull()})).fit(module, data())
    second = Pull()
    trainer(Regularization({"other": second})).fit(module, data())
    assert second.seen
    assert [name for name in module.state_dict() if "peft_terms" in name] == ["peft_terms.other.center"]
    for _ in range(2):
        trainer(*presets.dynamic_dora(final_rank=1, initial_rank=2)).fit(module, data())


def test_two_of_them_in_one_trainer_are_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match="there are 2 Regularization callbacks; give all terms to one: Regul"
    ):
        trainer(Regularization({"a": DEM()}), Regularization({"b": DEM()})).fit(adapted(Module()), data())


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Returns(Module):
    def __init__(self, what: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.what = what

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.what(batch)


@pytest.mark.parametrize(
    ("module", "callbacks", "options", "says"),
    [
        (
            Manual,
            lambda: [Regularization({"dem": DEM()})],
            {},
            r"Manual optimizes by hand \(automatic_optimization=False\).* call lightning_peft.regularized\(loss, terms",
        ),
        (
            Module,
            lambda: [Regularization({"dem": DEM()}), AdapterInjection(LORA)],
            {},
            "Regularization comes before AdapterInjection in the Trainer's callbacks; put AdapterInjection first: call",
        ),
        (
            Module,
            lambda: [Regularization({"dem": DEM(UntilTail(0.3, 0.5))})],
            {"max_epochs": -1},
            "the weight of 'dem' follows a schedule, and the Trainer does not know its number of steps. Set max_steps",
        ),
        (
            lambda: Returns(lambda batch: batch),
            lambda: [Regularization({"dem": DEM()})],
            {},
            "training_step of Returns must return a scalar loss, or a dictionary with one under 'loss', for "
            r"terms to be added. Got a tensor of shape \(4, 8\).",
        ),
        (
            lambda: Returns(lambda batch: {"lost": batch.sum()}),
            lambda: [Regularization({"dem": DEM()})],
            {},
            "training_step of Returns must return a scalar loss, .* Got a dict of lost.",
        ),
        (
            lambda: Returns(lambda batch: (batch.sum(), 3)),
            lambda: [Regularization({"dem": DEM()})],
            {},
            "Got a tuple.",
        ),
    ],
)
def test_misuse(module: Callable[[], Module], callbacks: Any, options: dict[str, Any], says: str) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        trainer(*callbacks(), **options).fit(adapted(module()), data())


def test_a_constant_weight_needs_no_number_of_steps() -> None:
    trainer(Regularization({"dem": DEM(0.3)}), max_epochs=-1, max_steps=3).fit(adapted(Module()), data())

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            trainer.should_stop = True

    trainer(Regularization({"dem": DEM(0.3)}), Stop(), max_epochs=-1).fit(adapted(Module()), data())


def test_without_an_adapter_the_term_says_so() -> None:
    with pytest.raises(RuntimeError, match="DEM found no low-rank adapter in the module; inject adapters first."):
        trainer(Regularization({"dem": DEM()})).fit(Module(), data())


@pytest.mark.parametrize("name", ["task", "a/b", "", "a b", "2nd"])
def test_a_name_that_no_log_can_have(name: str) -> None:
    with pytest.raises(ValueError, match=rf"identifier other than 'task', as in loss/<name>. Got '{name}'."):
        Regularization({name: DEM()})


def test_a_term_is_a_regularizer() -> None:
    with pytest.raises(TypeError, match="the term 'dem' must be a Regularizer. Got Linear."):
        Regularization({"dem": nn.Linear(2, 2)})  # type: ignore[dict-item]


def test_a_mistake_is_told_before_the_first_step_also_where_this_callback_is_the_first() -> None:
    class Forgetful(Module):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.net[0].base.parameters(), lr=0.1)  # type: ignore[operator, union-attr]

    module = Forgetful()
    inject_(module, LORA)
    run = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[Regularization({"orthogonality": Orthogonality(0.1)})],
    )  # fmt: skip
    with pytest.raises(MisconfigurationException, match="is in no optimizer"):
        run.fit(module, DataLoader(torch.randn(8, 8), batch_size=4))  # type: ignore[arg-type]
    assert run.global_step == 0
