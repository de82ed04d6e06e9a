from __future__ import annotations

import math
from functools import partial
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    BilinearCritic,
    ConcatCritic,
    LoRA,
    MutualInformation,
    Regularization,
    SeparableCritic,
    Warmup,
)
from lightning_peft.functional import mutual_information as mi

ADAPTER = partial(LoRA, rank=2)


class Module(LightningModule):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(
                nn.Linear(8, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)
            )

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


def data(batches: int = 4, size: int = 12) -> DataLoader[Any]:
    x = torch.randn(batches * size, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader([(row, row.abs().argmax() % 3) for row in x], batch_size=size)  # type: ignore[arg-type]


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


def injection() -> AdapterInjection:
    return AdapterInjection(ADAPTER, targets=["net.0", "net.3"], verbose=False)


def fit(module: LightningModule, *callbacks: Callback, size: int = 12, **options: Any) -> Trainer:
    torch.manual_seed(1)
    run = trainer(injection(), *callbacks, **options)
    run.fit(module, data(size=size))
    return run


def term(*layers: str, **options: Any) -> MutualInformation:
    return MutualInformation(layers or ["net.3"], **{"weight": 0.3, "classes": 3, **options})


def information(scores: Tensor, estimator: str, log_moving: Tensor) -> Tensor:
    match estimator:
        case "info_nce":
            n = len(scores)
            there = scores.log_softmax(1).diagonal().mean()
            return (there + scores.log_softmax(0).diagonal().mean()) / 2 + log(n)
        case "dv":
            return mi.dv(scores).detach() + (
                mi.dv_surrogate(scores, log_moving) - mi.dv_surrogate(scores, log_moving).detach()
            )
        case "nwj":
            return mi.nwj(scores)
        case _:
            return mi.jsd(scores)


class ByHand(Module):
    """The same, written in training_step by somebody who does not know the term."""

    def __init__(self, estimator: str) -> None:
        super().__init__()
        self.estimator, self.log_moving = estimator, torch.tensor(-torch.inf, dtype=torch.float64)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, labels = batch
        h = self.net[3](self.net[2](self.net[1](self.net[0](x))))
        loss = F.cross_entropy(self.net[5](self.net[4](h)), labels)
        with torch.autocast("cpu", enabled=False):
            h = h.to(torch.promote_types(h.dtype, torch.float32))
            if self.estimator == "info_nce":
                z = F.embedding(labels, self.own.weight)
                scores = F.normalize(h, dim=1) @ F.normalize(z.to(h.dtype), dim=1).T / 0.1
            else:
                scores = self.own(h, F.one_hot(labels, 3).float())
            moving = self.log_moving.to(scores.dtype)
            value = information(scores, self.estimator, moving)
            if self.estimator == "dv":
                self.log_moving = mi.next_log_moving(moving, scores.detach(), 0.01)
            return loss.to(h.dtype) + 0.3 * -value


class AddOwn(Callback):
    """Adds what the term would: after the adapters, before the optimizer."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        assert isinstance(pl_module, ByHand)
        pl_module.own = nn.Embedding(3, 6) if pl_module.estimator == "info_nce" else SeparableCritic(6, 3)


def mine(module: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad and name.startswith("net.")}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
@pytest.mark.parametrize("estimator", ["info_nce", "jsd", "dv", "nwj", "smile"])
def test_it_is_bitwise_the_loss_written_by_hand(estimator: Any, precision: Any) -> None:
    options: dict[str, Any] = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    ours, theirs, without = Module(), ByHand(estimator), Module()
    fit(ours, Regularization({"mi": term(estimator=estimator)}), **options)
    fit(theirs, AddOwn(), **options)
    fit(without, **options)
    for name, p in mine(theirs).items():
        assert torch.equal(mine(ours)[name], p), name
    assert not torch.equal(mine(without)["net.0.A"], mine(ours)["net.0.A"])


def heard(mutual: MutualInformation, module: nn.Module, batch: Any) -> Tensor:
    """The term of one step, outside of a Trainer."""
    mutual.attach(module)
    module.add_module("peft_terms", nn.ModuleDict({"mi": mutual}))
    mutual.begin(module)
    with mutual.watching(module):
        module.net(batch[0])  # type: ignore[operator]
    value = mutual(module, batch, None)
    mutual.end()
    return value


def some(size: int = 12) -> Any:
    return next(iter(data(1, size)))


class Scaled(BilinearCritic):
    """Somebody's own, with a buffer and random numbers."""

    scale: Tensor

    def __init__(self, d_x: int, d_z: int) -> None:
        super().__init__(d_x, d_z)
        self.register_buffer("scale", torch.tensor(float(len(_made))))
        _made.append(self)
        self.dropout = nn.Dropout(0.0)

    def scores(self, x: Tensor, z: Tensor) -> Tensor:
        return self.dropout(super().scores(x, z)) * self.scale


_made: list[Scaled] = []


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"of": "halves", "nats": 0.1},
        {"of": "net.5", "estimator": "jsd"},
        {"estimator": "dv"},
        {"estimator": "smile", "critic": partial(ConcatCritic, hidden=8)},
        {"estimator": "nwj", "of": "net.0", "critic": BilinearCritic},
        {"critic": partial(SeparableCritic, hidden=8, width=4)},
        {"critic": partial(ConcatCritic, hidden=8, chunk=4)},
        {"critic": Scaled},
    ],
    ids=str,
)
def test_several_layers_are_each_alone_in_one_pass(options: dict[str, Any]) -> None:
    batch, names = some(), [name for name in ("net.0", "net.3", "net.5") if name != options.get("of")]
    together = term(*names, **options)
    module = Module()
    heard(together, module, batch)  # makes critics
    for p in together.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    together.log_moving.fill_(-torch.inf)
    found = heard(together, module, batch)
    values = []
    for i, name in enumerate(names):
        module_alone, alone = Module(), term(name.replace(".", r"\."), **options)
        heard(alone, module_alone, batch)
        for ours, theirs in ((alone.critics, together.critics), (alone.embeddings, together.embeddings)):
            if len(theirs):
                ours[0].load_state_dict(theirs[i].state_dict())
        alone.log_moving.fill_(-torch.inf)
        values.append(heard(alone, module_alone, batch))
        key = alone.figures()["information"]
        torch.testing.assert_close(together.figures()[name], key, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found, torch.stack(values).mean(), rtol=1e-5, atol=1e-5)


def test_property_14_the_other_layer_is_detached() -> None:
    module, batch = Module(), some()
    value = heard(term("net.3", of="net.5", estimator="jsd", critic=Started), module, batch)
    value.backward()
    assert module.net[5].weight.grad is None
    assert module.net[3].weight.grad is not None
    assert module.net[3].weight.grad.abs().sum() > 0


class Started(BilinearCritic):
    """One that does not begin with scores of zero."""

    def __init__(self, d_x: int, d_z: int) -> None:
        super().__init__(d_x, d_z)
        nn.init.normal_(self.W)


@pytest.mark.parametrize("estimator", ["info_nce", "jsd", "dv", "nwj", "smile"])
def test_property_16_it_is_in_float32_in_a_module_of_bfloat16(estimator: Any) -> None:
    module, batch = Module().bfloat16(), some()
    batch = [batch[0].bfloat16() * 30, batch[1]]
    mutual = term(estimator=estimator).bfloat16()
    value = heard(mutual, module, batch)
    assert value.dtype == torch.float32
    assert value.isfinite()
    assert all(p.dtype == torch.float32 for p in mutual.parameters())
    mutual.bfloat16()
    assert mutual.log_moving.dtype == torch.float32


class Configured(LightningModule):
    """Its layers are built where Lightning has set the default dtype to that of the run."""

    def configure_model(self) -> None:
        self.net = Module().net.to(torch.get_default_dtype())

    training_step, configure_optimizers = Module.training_step, Module.configure_optimizers


@pytest.mark.parametrize("options", [{"estimator": "dv"}, {}], ids=str)
def test_property_16_critics_are_in_float32_whatever_the_default_is(options: dict[str, Any]) -> None:
    mutual = term(**options)
    fit(Configured(), Regularization({"mi": mutual}), precision="bf16-true", max_steps=1)
    assert [p.dtype for p in mutual.parameters()] == [torch.float32] * len(list(mutual.parameters()))
    assert mutual.log_moving.dtype == torch.float32


def test_views_of_another_dropout_mask_are_two_passes_of_the_model() -> None:
    module = Module(dropout=0.3)
    calls: list[Tensor] = []
    module.net.register_forward_hook(lambda net, x, y: calls.append(x[0]))
    run = fit(module, Regularization({"mi": term(of="dropout", temperature=0.05)}), max_steps=3)
    assert len(calls) == 2 * 3
    assert all(torch.equal(one, other) for one, other in zip(calls[::2], calls[1::2], strict=True))
    assert -10 < run.logged_metrics["mi/information"] < log(12)
    with pytest.raises(RuntimeError, match="two dropout masks, and both gave the same features"):
        fit(Module(), Regularization({"mi": term(of="dropout")}))
    assert "training_step" not in vars(module)


def test_information_grows_and_is_logged_with_its_ceiling() -> None:
    found = []
    for weight in (0.0, 2.0):
        module = Module()
        mutual = term(weight=weight)
        run = fit(module, Regularization({"mi": mutual}), max_epochs=20)
        heard(mutual, module, some())
        found.append(float(mutual.figures()["information"]))
        if weight:
            assert run.logged_metrics["mi/ceiling"] == pytest.approx(log(12))
            assert run.logged_metrics["mi/examples"] == 12
    assert found[1] > found[0] + 0.3
    assert found[1] < log(3) + 0.1  # the labels have no more, but for the few examples


class StopAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise SystemExit


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("options", [{"estimator": "dv"}, {"of": "dropout"}, {"weight": Warmup(0.3, 0.5)}], ids=str)
def test_interrupted_is_uninterrupted(options: dict[str, Any], tmp_path: Path) -> None:
    def callbacks() -> list[Callback]:
        return [Regularization({"mi": term("net.0", "net.3", **options)}), AdapterCheckpoint()]

    whole, stopped, resumed = Module(0.2), Module(0.2), Module(0.2)
    fit(whole, *callbacks())
    with pytest.raises(SystemExit):
        fit(stopped, *callbacks(), StopAt(5, tmp_path / "stop.ckpt"))
    trainer(injection(), *callbacks()).fit(resumed, data(), ckpt_path=tmp_path / "stop.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    assert "peft_terms.mi.log_moving" in whole.state_dict()


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (
            {"layers": "net.3"},
            TypeError,
            r"not one string. Write layers=\['net.3'\]",
        ),
        ({"layers": []}, ValueError, "layers=\\[\\] names no layer"),
        ({"layers": ["("]}, ValueError, "is not a regular expression"),
        (
            {"weight": -0.1},
            ValueError,
            "at least 0. Got -0.1. To have less .*: CLUB or VIB",
        ),
        ({"estimator": "club"}, ValueError, "estimator='club': choose 'info_nce', 'jsd', 'dv', 'nwj', 'smile'"),
        ({"classes": None}, ValueError, r"say how many there are, MutualInformation\(classes=...\)"),
        ({"classes": 1}, ValueError, "classes must be at least 2"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"rate": 1.5}, ValueError, "rate must be positive, at most 1. Got 1.5"),
        ({"critic": BilinearCritic(2, 2)}, TypeError, "critic makes a critic for each layer from two widths"),
        ({"of": 3}, TypeError, "of must be 'labels', 'dropout', 'halves' or a pattern of a layer. Got 3"),
        ({"pool": "max"}, ValueError, "pool='max'"),
        ({"weight": math.nan}, ValueError, "is at least 0. Got nan"),
        ({"weight": "0.1"}, TypeError, "weight must be a number. Got '0.1'"),
        ({"temperature": math.inf}, ValueError, "temperature must be positive and finite. Got inf"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive and finite. Got nan"),
        ({"nats": math.nan}, ValueError, "nats is an amount of information, at least 0 and finite. Got nan"),
        ({"nats": math.inf}, ValueError, "at least 0 and finite. Got inf"),
        ({"nats": -1}, ValueError, "at least 0 and finite. Got -1"),
        ({"called": "net"}, ValueError, "called='net' names what is called again, which is done with of='dropout'"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        MutualInformation(**{"layers": ["net.3"], "classes": 3, **options})


@pytest.mark.parametrize(
    ("options", "size", "error", "text"),
    [
        ({"layers": ["pooler"]}, 12, ValueError, "layers='pooler' matches no layer of Module; there are 'net'"),
        ({"of": "pooler"}, 12, ValueError, "of='pooler' matches no layer of Module"),
        ({"weight": lambda step, total: -1.0}, 12, ValueError, "at least 0. Got -1.0. .*CLUB or VIB"),
        (
            {"nats": 3.0},
            12,
            RuntimeError,
            r"its ceiling, ln 12 = 2.48 nats, .*show 3.00. .*21 pairs or more",
        ),
        (
            {"of": "halves"},
            12,
            RuntimeError,
            "ln 6 = 1.79 nats, .*show 2.08. Use batches of 8 pairs",
        ),
        ({"of": "halves", "nats": 0.0}, 11, RuntimeError, "pairs the first half of a batch with the second, .* 11 ex"),
        ({}, 1, RuntimeError, "this step has 1 over all processes"),
        ({"of": "net.5"}, 12, RuntimeError, "'net.3' gives 6 features, 'net.5' 3. Give a critic"),
        ({"critic": lambda d_x, d_z: nn.Linear(d_x, d_z)}, 12, TypeError, "critic must make a Critic, .* Got a Linear"),
        (
            {"layers": ["net.3", "net.5"], "of": "net.5"},
            12,
            ValueError,
            "layers and of both name 'net.5', which has all",
        ),
        ({"layers": ["net.0", "net.2"], "critic": Started}, 12, ValueError, "'net.2' is a Dropout, which does not say"),
    ],
)
def test_what_cannot_be_estimated_is_told(
    options: dict[str, Any], size: int, error: type[Exception], text: str
) -> None:
    mutual = MutualInformation(**{"layers": ["net.3"], "classes": 3, **options})
    with pytest.raises(error, match=text):
        fit(Module(), Regularization({"mi": mutual}), size=size)


def test_a_batch_that_an_epoch_leaves_over_may_come_first_and_after_a_checkpoint() -> None:
    module, mutual = Module(), term("net.3", nats=1.5)  # 5 pairs
    heard(mutual, module, some(4))
    heard(mutual, module, some(12))
    for _ in range(2):
        heard(mutual, module, some(4))
    again = term("net.3", nats=1.5)
    again.go_on(mutual.progress())
    for _ in range(2):
        heard(again, Module(), some(4))
    small = term("net.3", nats=1.5)
    heard(small, module_of_its_own := Module(), some(4))
    resumed = term("net.3", nats=1.5)
    resumed.go_on(small.progress())
    for each, owner in ((small, module_of_its_own), (resumed, Module())):
        with pytest.raises(RuntimeError, match=r"ln 4 = 1.39 nats, .*show 1.50. Use batches of 5 pairs"):
            heard(each, owner, some(4))


def test_what_overflows_for_once_does_no_lasting_harm() -> None:
    """As under a scaler of gradients, which skips the step."""
    module, mutual = Module(), term("net.3", estimator="dv")
    x, labels = some()
    heard(mutual, module, [x, labels])
    before = mutual.log_moving.clone()
    heard(mutual, module, [x * math.nan, labels])
    assert torch.equal(mutual.log_moving, before)
    assert heard(mutual, module, [x, labels]).isfinite()


def test_labels_are_needed_for_labels() -> None:
    with pytest.raises(RuntimeError, match=r"needs a label for each of 12 examples, and the batch, a list"):
        heard(term(), Module(), [some()[0]])
    x, labels = some()
    for estimator in ("info_nce", "jsd"):
        for wrong in (-100, -1, 3):
            labels[5] = wrong
            says = rf"classes=3 takes labels from 0 to 2, and this step has {wrong}\. Say how many there are"
            with pytest.raises(RuntimeError, match=says):
                heard(term(estimator=estimator), Module(), [x, labels])
    with pytest.raises(RuntimeError, match=r"hears no layer yet: begin\(module\) comes before a step"):
        term()(Module(), some(), None)
