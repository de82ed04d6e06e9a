"""Mistakes in how a Trainer and a module are set up."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytorch_lightning
import torch
from lightning.pytorch import Trainer, callbacks
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.warnings import PossibleUserWarning
from misuse.setups import LORA, Encoder, Once, Rows, adapted, fit, pruning
from pytorch_lightning.callbacks import EarlyStopping
from pytorch_lightning.loggers import CSVLogger
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset

from lightning_peft import (
    CLUB,
    DEM,
    EVA,
    AdapterCheckpoint,
    AdapterInjection,
    BudgetPenalty,
    Calibration,
    CategoricalCLUB,
    Distillation,
    Factorized,
    PACBayes,
    RankBudget,
    RankMonitor,
    RankSelection,
    Regularization,
    WeightedSVD,
    eject,
    inject,
    presets,
)
from lightning_peft.adapters import ars
from lightning_peft.callbacks.moments import MomentEstimation
from lightning_peft.regularizers.pac_tuning import PACTuning


class Manual(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class HeadOnly(Encoder):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.classifier.parameters(), lr=1e-3)


class AdaptersOnly(Encoder):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for n, p in self.named_parameters() if n.endswith((".A", ".B"))], lr=1e-3)


class BuiltTooEarly(Encoder):
    def __init__(self) -> None:
        super().__init__()
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=1e-3)

    def configure_optimizers(self) -> Any:
        return self.optimizer


class Thaws(callbacks.Callback):
    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module.requires_grad_(True)


class NoLoss(Encoder):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return {"logits": self.classifier(self.value(batch))}


class WithLogits(Encoder):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        logits = self.classifier(self.value(batch))
        return {"loss": logits.square().mean(), "logits": logits}


class Tokens(Encoder):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return super().training_step(batch[:, None], batch_idx)


class Reentrant(Encoder):
    def __init__(self, inputs: bool = False) -> None:
        super().__init__()
        self.inputs = inputs

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        batch = batch.requires_grad_(self.inputs)
        h = checkpoint(lambda x: self.value(self.query(x)), batch, use_reentrant=True)
        return self.classifier(self.norm(h)).square().mean()


def selection() -> RankSelection:
    return RankSelection(ars.policy(0.5))


class Unused(Encoder):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.classifier(self.norm(self.value(batch))).square().mean()


class Diverges(Encoder):
    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) * float("nan")


class OtherModule(pytorch_lightning.LightningModule):
    """Of the package that our Trainer does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Linear(8, 8)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


class Own(Strategy):
    """A strategy of somebody's own, on one device."""

    root_device = SingleDeviceStrategy.root_device
    reduce = SingleDeviceStrategy.reduce
    all_gather = SingleDeviceStrategy.all_gather
    broadcast = SingleDeviceStrategy.broadcast
    barrier = SingleDeviceStrategy.barrier
    is_global_zero = SingleDeviceStrategy.is_global_zero

    def __init__(self) -> None:
        super().__init__()
        self._root_device = torch.device("cpu")

    def model_to_device(self) -> None:
        pass


class FreezesAll(callbacks.BaseFinetuning):
    """As a user's own: the backbone is frozen, whatever is in it."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze([pl_module.query, pl_module.value])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        pass


def other(callback: Any, module: Any = OtherModule) -> object:
    """A Trainer of `pytorch_lightning` with one callback of ours."""
    return fit(module(), callback, kind=pytorch_lightning.Trainer)


def own_teacher(module: Any) -> object:
    return fit(module, AdapterInjection(LORA), Regularization({"t": Distillation(of="query", teacher=module.query)}))


def stop(trainer: Trainer, module: Any) -> None:
    trainer.should_stop = True


def pretrained() -> Encoder:
    """Adapters that have learned something."""
    module = adapted()
    with torch.no_grad():
        for site in RankBudget.of(module).values():
            site.adapter.B.fill_(0.1)
    return module


def factors(ratio: float = 0.5) -> list[Any]:
    """Layers that are decomposed by the Fisher information."""
    return [AdapterInjection(Factorized), Calibration(WeightedSVD("fisher", ratio=ratio))]


def compressed() -> Encoder:
    """Factorised layers of which little is left."""
    module = Encoder()
    inject(module, Factorized)
    RankBudget.of(module).keep({"query": torch.arange(8) < 2})
    return module


def stream(*also: Any) -> object:
    """Training data that can be read once."""

    class Stream(IterableDataset[Tensor]):
        def __iter__(self) -> Any:
            return iter(torch.randn(24, 8))

    trainer = Trainer(accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False, callbacks=list(also))  # fmt: skip
    trainer.fit(Encoder(), DataLoader(Stream(), batch_size=2))
    return trainer


FROZEN = AdapterInjection(partial(Factorized, trained=False), train=["classifier"])

ROWS: Rows = {
    "a preset that is not unpacked": (lambda: fit(Encoder(), presets.lora(rank=4)), MisconfigurationException),
    "a Trainer from `pytorch_lightning`": (lambda: other(AdapterInjection(LORA)), MisconfigurationException),
    "a Trainer from `pytorch_lightning`, with `RankPruning` alone": (
        lambda: other(pruning(rank=2)),
        MisconfigurationException,
    ),
    "a Trainer from `pytorch_lightning`, with `Regularization` alone": (
        lambda: other(Regularization({"dem": DEM()})),
        MisconfigurationException,
    ),
    "a Trainer from `pytorch_lightning`, with `RankMonitor` alone": (
        lambda: other(RankMonitor()),
        MisconfigurationException,
    ),
    "a Trainer from `pytorch_lightning`, with `AdapterCheckpoint` alone": (
        lambda: other(AdapterCheckpoint()),
        MisconfigurationException,
    ),
    "a module from `pytorch_lightning`": (lambda: fit(OtherModule(), *presets.lora(rank=4)), TypeError),
    "a Trainer from `pytorch_lightning` and a module that is not": (
        lambda: other(AdapterInjection(LORA), Encoder),
        TypeError,
    ),
    "another callback from `pytorch_lightning`": (
        lambda: fit(Encoder(), *presets.lora(rank=4), EarlyStopping("loss")),
        MisconfigurationException,
    ),
    "a logger from `pytorch_lightning`": (
        lambda: fit(Encoder(), *presets.lora(rank=4), logger=CSVLogger(".")),
        MisconfigurationException,
    ),
    "a strategy that is not tested": (
        lambda: fit(Encoder(), *presets.lora(rank=4), strategy=Own()),
        MisconfigurationException,
    ),
    "two `AdapterInjection`": (
        lambda: fit(Encoder(), AdapterInjection(LORA, ["query"]), AdapterInjection(LORA, ["value"])),
        MisconfigurationException,
    ),
    "two presets": (
        lambda: fit(Encoder(), *presets.lora(rank=4), *presets.dynamic_dora(final_rank=2)),
        RuntimeError,
    ),
    "two `RankPruning`": (
        lambda: fit(Encoder(), AdapterInjection(LORA), pruning(rank=2), pruning(rank=3)),
        RuntimeError,
    ),
    "two `Regularization`": (
        lambda: fit(adapted(), Regularization({"one": DEM()}), Regularization({"two": DEM()})),
        MisconfigurationException,
    ),
    "`RankPruning` before `AdapterInjection`": (
        lambda: fit(Encoder(), pruning(rank=2), AdapterInjection(LORA)),
        MisconfigurationException,
    ),
    "`Regularization` before `AdapterInjection`": (
        lambda: fit(Encoder(), Regularization({"dem": DEM()}), AdapterInjection(LORA)),
        MisconfigurationException,
    ),
    "`RankMonitor` before `RankPruning`": (
        lambda: fit(Encoder(), AdapterInjection(LORA), RankMonitor(), pruning(rank=2)),
        MisconfigurationException,
    ),
    "`AdapterCheckpoint` before `AdapterInjection`": (
        lambda: fit(Encoder(), AdapterCheckpoint(), AdapterInjection(LORA)),
        MisconfigurationException,
    ),
    "`StochasticWeightAveraging` before `AdapterInjection`": (
        lambda: fit(Encoder(), callbacks.StochasticWeightAveraging(1e-2), *presets.lora(rank=4)),
        MisconfigurationException,
    ),
    "`ModelPruning` beside adapters": (
        lambda: fit(Encoder(), *presets.lora(rank=4), callbacks.ModelPruning("l1_unstructured", amount=0.5)),
        MisconfigurationException,
    ),
    "`Calibration` before `AdapterInjection`": (
        lambda: fit(Encoder(), Calibration(EVA(2)), AdapterInjection(LORA)),
        MisconfigurationException,
    ),
    "`RankMonitor` before `Calibration`": (
        lambda: fit(Encoder(), AdapterInjection(LORA), RankMonitor(), Calibration(EVA(2))),
        MisconfigurationException,
    ),
    "`Calibration` without adapters": (lambda: fit(Encoder(), Calibration(EVA(2))), MisconfigurationException),
    "calibration of adapters that are trained": (
        lambda: fit(pretrained(), Calibration(EVA(2))),
        RuntimeError,
    ),
    "calibration with manual optimization": (
        lambda: fit(Manual(), *presets.eva(rank=2)),
        MisconfigurationException,
    ),
    "calibration without a batch": (
        lambda: fit(Encoder(), *presets.eva(rank=2), limit_train_batches=0),
        MisconfigurationException,
    ),
    "calibration on a stream": (lambda: stream(*presets.eva(rank=2)), MisconfigurationException),
    "calibration by layers that are not used": (
        lambda: fit(Unused(), *presets.eva(rank=2, targets=["query"])),
        RuntimeError,
    ),
    "gradients of a task without a loss": (lambda: fit(NoLoss(), *factors()), MisconfigurationException),
    "a weighted decomposition of adapters that are not factorised": (
        lambda: fit(Encoder(), AdapterInjection(LORA), Calibration(WeightedSVD())),
        RuntimeError,
    ),
    "a ratio that leaves a layer nothing": (lambda: fit(Encoder(), *factors(ratio=0.1)), RuntimeError),
    "a layer that is compressed already": (lambda: fit(compressed(), *factors()), RuntimeError),
    "`RankPruning` without adapters": (lambda: fit(Encoder(), pruning(rank=2)), MisconfigurationException),
    "`RankMonitor` without adapters": (lambda: fit(Encoder(), RankMonitor()), MisconfigurationException),
    "`CLUB` on a layer that does not exist": (
        lambda: fit(Encoder(), Regularization({"club": CLUB(layer="pooler", given="query")})),
        ValueError,
    ),
    "`CLUB` on a pattern that names two layers": (
        lambda: fit(Encoder(), Regularization({"club": CLUB(layer="query|value", given="norm")})),
        ValueError,
    ),
    "`CategoricalCLUB` of a label that the batch does not have": (
        lambda: fit(Encoder(), Regularization({"domain": CategoricalCLUB(layer="norm", label="domain", classes=2)})),
        RuntimeError,
    ),
    "a term's own network is thawed with the module": (
        lambda: fit(Encoder(), Thaws(), Regularization({"club": CLUB(layer="norm", given="query")})),
        MisconfigurationException,
    ),
    "`Regularization` without adapters": (lambda: fit(Encoder(), Regularization({"dem": DEM()})), RuntimeError),
    "distillation where several children have parameters": (
        lambda: fit(Encoder(), AdapterInjection(LORA), Regularization({"teacher": Distillation()})),
        ValueError,
    ),
    "distillation of adapters that are in already": (
        lambda: fit(adapted(), Regularization({"teacher": Distillation(of="query")})),
        RuntimeError,
    ),
    "a student that is its own teacher": (lambda: own_teacher(Encoder()), ValueError),
    "distillation of a module that is not called": (
        lambda: fit(Unused(), AdapterInjection(LORA), Regularization({"teacher": Distillation(of="query")})),
        RuntimeError,
    ),
    "a hidden state that there is not": (
        lambda: fit(
            Encoder(),
            AdapterInjection(LORA),
            Regularization({"teacher": Distillation(of="query", loss=None, hidden=["dense"])}),
        ),
        ValueError,
    ),
    "a teacher of other classes": (
        lambda: fit(
            Encoder(),
            AdapterInjection(LORA),
            Regularization({"teacher": Distillation(of="query", teacher=torch.nn.Linear(8, 3))}),
        ),
        RuntimeError,
    ),
    "an optimizer of the head alone": (lambda: fit(HeadOnly(), *presets.lora(rank=4)), MisconfigurationException),
    "an optimizer of the adapters alone": (lambda: fit(AdaptersOnly(), *presets.lora(rank=4)), UserWarning),
    "an optimizer that is built in `__init__`": (
        lambda: fit(BuiltTooEarly(), *presets.lora(rank=4)),
        MisconfigurationException,
    ),
    "a freezing callback that freezes the adapters": (
        lambda: fit(Encoder(), *presets.lora(rank=4), FreezesAll()),
        MisconfigurationException,
    ),
    "`requires_grad_(False)` after injection": (
        lambda: fit(Encoder(), *presets.lora(rank=4), Once("on_fit_start", lambda t, m: m.requires_grad_(False))),
        MisconfigurationException,
    ),
    "`model.eval()` before `fit`": (lambda: fit(Encoder().eval(), *presets.lora(rank=4)), PossibleUserWarning),
    "adapters that are taken out while training": (
        lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=2), Once("on_train_start", lambda t, m: eject(m))),
        RuntimeError,
    ),
    "a layer that the model does not use": (lambda: fit(Unused(), *presets.lora(rank=4)), UserWarning),
    "re-entrant checkpointing of frozen layers": (lambda: fit(Reentrant(), *presets.lora(rank=4)), UserWarning),
    "a step that returns no loss": (
        lambda: fit(NoLoss(), AdapterInjection(LORA), Regularization({"dem": DEM()})),
        MisconfigurationException,
    ),
    "manual optimization with terms": (
        lambda: fit(Manual(), AdapterInjection(LORA), Regularization({"dem": DEM()})),
        MisconfigurationException,
    ),
    "manual optimization with a rank schedule and no max_steps": (
        lambda: fit(Manual(), AdapterInjection(LORA), pruning(rank=2)),
        MisconfigurationException,
    ),
    "a run without end": (
        lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=2), max_epochs=-1),
        MisconfigurationException,
    ),
    "a run without a batch": (
        lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=2), limit_train_batches=0),
        MisconfigurationException,
    ),
    "training stops before the last cut": (
        lambda: fit(Encoder(), *presets.dynamic_dora(final_rank=2), Once("on_train_batch_end", stop)),
        UserWarning,
    ),
    "ranks to be learned without adapters": (lambda: fit(Encoder(), selection()), MisconfigurationException),
    "ranks to be learned of adapters that are trained": (
        lambda: fit(Encoder(), AdapterInjection(Factorized), selection()),
        MisconfigurationException,
    ),
    "ranks to be learned of adapters without singular values": (
        lambda: fit(Encoder(), AdapterInjection(LORA), selection()),
        ValueError,
    ),
    "ranks to be learned with manual optimization": (
        lambda: fit(Manual(), FROZEN, selection(), max_steps=4),
        MisconfigurationException,
    ),
    "ranks to be learned with re-entrant checkpointing": (
        lambda: fit(Reentrant(inputs=True), FROZEN, selection()),
        MisconfigurationException,
    ),
    "learned masks that no optimizer has": (lambda: fit(HeadOnly(), FROZEN, selection()), MisconfigurationException),
    "terms of learned masks without `RankSelection`": (
        lambda: fit(Encoder(), FROZEN, Regularization({"budget": BudgetPenalty(0.5)})),
        RuntimeError,
    ),
    "a ratio below one component per layer": (
        lambda: fit(Encoder(), *presets.ars(0.1, weighting="none")),
        ValueError,
    ),
    "a run too short for masks to learn their budget": (
        lambda: fit(Encoder(), *presets.ars(0.5, weighting="none")),
        UserWarning,
    ),
    "a bounded risk, and a step that returns its loss alone": (
        lambda: fit(Encoder(), *presets.pac_bayes(rank=4)),
        RuntimeError,
    ),
    "a bounded risk, and a batch without labels": (lambda: fit(WithLogits(), *presets.pac_bayes(rank=4)), RuntimeError),
    "a bound over data of unknown length": (
        lambda: stream(*presets.pac_bayes(rank=4, risk="loss")),
        MisconfigurationException,
    ),
    "a posterior, and nothing that is trained": (
        lambda: fit(Encoder().requires_grad_(False), Regularization({"pac": PACBayes(risk="loss")})),
        RuntimeError,
    ),
    "a posterior over the head alone that is to be complete": (
        lambda: fit(adapted(), Regularization({"pac": PACBayes(risk="loss", over=["classifier"], complete=True)})),
        RuntimeError,
    ),
    "a posterior whose components are to be cut": (
        lambda: fit(
            Encoder(),
            *presets.dynamic_dora(final_rank=2, dem_weight=0, compact="final"),
            Regularization({"pac": PACBayes(risk="loss")}),
        ),
        MisconfigurationException,
    ),
    "noise for every example of a head that sees tokens": (
        lambda: fit(Tokens(), *presets.pac_bayes(rank=4, risk="loss", unit="example")),
        RuntimeError,
    ),
    "`PACTuning` without `MomentEstimation`": (
        lambda: fit(adapted(), Regularization({"pac": PACBayes(PACTuning(), risk="loss", prior="per_tensor")})),
        RuntimeError,
    ),
    "`MomentEstimation` without `PACTuning`": (
        lambda: fit(adapted(), Regularization({"dem": DEM()}), MomentEstimation()),
        MisconfigurationException,
    ),
    "training diverges": (lambda: fit(Diverges(), *presets.dynamic_dora(final_rank=2)), UserWarning),
}
