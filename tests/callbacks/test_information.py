from __future__ import annotations

from functools import partial
from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from transformers.pytorch_utils import Conv1D

from lightning_peft import AdapterCheckpoint, AdapterInjection, Factorized, InformationMonitor, LoRA
from lightning_peft.functional.kept_information import kept_information
from lightning_peft.functional.mutual_information import info_nce
from lightning_peft.heat_map import information_heat_map


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.first, self.second, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.second(self.first(x).relu()).relu().mean(1))
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return F.cross_entropy(self(batch["x"]), batch["labels"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", F.cross_entropy(self(batch["x"]), batch["labels"]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


def data(size: int = 6) -> DataLoader[Any]:
    x = torch.randn(24, 5, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([1, 1, 1, 0, 0])
    rows = [{"x": one, "labels": int(one.sum() > 0), "attention_mask": mask} for one in x]
    return DataLoader(rows, batch_size=size)  # type: ignore[arg-type]


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 3,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **options})


def injection() -> AdapterInjection:
    return AdapterInjection(partial(LoRA, rank=2), ["first", "second"], verbose=False)


def fit(*callbacks: Callback, **options: Any) -> tuple[Module, Trainer]:
    torch.manual_seed(1)
    module, run = Module(), trainer(injection(), *callbacks, **options)
    run.fit(module, data(), data())
    return module, run


def last_values(folder: Path) -> dict[str, float]:
    (file,) = folder.rglob("metrics.csv")
    header, *lines = [line.split(",") for line in file.read_text().splitlines()]
    return {c: float([line[i] for line in lines if line[i]][-1]) for i, c in enumerate(header)}


def test_values_are_those_of_the_rows_one_by_one() -> None:
    before, after = torch.randn(3, 7, 4), torch.randn(3, 7, 4)
    for chunk in (1, 2, 16):
        found = kept_information(before, after, 0.2, chunk)
        for i in range(3):
            scores = F.cosine_similarity(before[i][:, None], after[i][None], dim=2) / 0.2
            torch.testing.assert_close(found[i], info_nce(scores, symmetric=True))
    same = kept_information(before.bfloat16(), before.bfloat16(), 1e-3)
    torch.testing.assert_close(same, torch.full((3,), log(7)))
    assert same.dtype == torch.float32
    with pytest.raises(ValueError, match=r"of at least 2 examples. Got \(3, 1, 4\)"):
        kept_information(before[:, :1], after[:, :1])


def test_it_is_measured_at_every_validation_and_does_not_touch_the_run(tmp_path: Path) -> None:
    monitor = InformationMonitor(examples=16)
    module, run = fit(monitor, logger=CSVLogger(tmp_path))
    assert list(monitor.history) == [0, 4, 8, 12]
    batch = next(iter(data(16)))
    with torch.no_grad():
        outputs = [module.first.base(batch["x"]), module.first(batch["x"])]  # type: ignore[operator]
        before, after = (output[:, :3].mean(1) for output in outputs)
    wanted = kept_information(before[None], after[None]).item()
    assert monitor.history[12]["first"] == pytest.approx(wanted, rel=1e-5)
    for name in ("first", "second"):
        assert monitor.history[12][name] < monitor.history[0][name] < log(16)
    last = last_values(tmp_path)
    assert last["mi/kept/ceiling"] == pytest.approx(log(16))
    assert last["mi/kept/examples"] == 16
    assert last["mi/kept/second"] == pytest.approx(monitor.history[12]["second"])
    plain, _ = fit()
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), module.parameters(), strict=True))
    assert not any(child._forward_hooks for child in module.modules())
    run.validate(module, data(), verbose=False)
    assert list(monitor.history) == [0, 4, 8, 12]


def test_layers_that_are_called_by_keyword_are_heard() -> None:
    class Positional(Module):
        def __init__(self) -> None:
            super().__init__()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self.first, self.second = Conv1D(6, 8), Conv1D(6, 6)

    class Named(Positional):
        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.second(x=self.first(x=x).relu()).relu().mean(1))
            return logits

    found = []
    for module in (Positional(), Named()):
        torch.manual_seed(1)
        monitor = InformationMonitor()
        trainer(injection(), monitor).fit(module, data(), data())
        found.append(monitor.history)
    assert found[0] == found[1]
    assert {name for values in found[1].values() for name in values} == {"first", "second"}


def test_it_is_measured_every_so_many_steps(tmp_path: Path) -> None:
    monitor = InformationMonitor(["first"], every=3, examples=100)
    fit(monitor, accumulate_grad_batches=2, max_epochs=4, logger=CSVLogger(tmp_path))
    assert list(monitor.history) == [3, 6]
    assert set(monitor.history[3]) == {"first"}
    assert last_values(tmp_path)["mi/kept/examples"] == 12  # both micro-batches of the step


def test_every_step_is_measured_once_and_whole(tmp_path: Path) -> None:
    monitor = InformationMonitor(every=1)
    fit(monitor, accumulate_grad_batches=2, max_epochs=1, logger=CSVLogger(tmp_path))
    assert list(monitor.history) == [1, 2]
    assert last_values(tmp_path)["mi/kept/examples"] == 12


class Checkpointed(Module):
    """Its second layer is called again in the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = checkpoint(lambda h: self.second(h).relu(), self.first(x).relu(), use_reentrant=False)  # type: ignore[assignment]
        logits: Tensor = self.head(hidden.mean(1))
        return logits


def test_what_is_computed_again_is_not_measured_twice() -> None:
    found = []
    for kind in (Module, Checkpointed):
        monitor = InformationMonitor(every=2)
        torch.manual_seed(1)
        trainer(injection(), monitor, max_epochs=1).fit(kind(), data(), data())
        found.append(monitor.history)
    assert found[0] == found[1]


def test_a_picture_grows_with_training(tmp_path: Path) -> None:
    fit(InformationMonitor(), logger=TensorBoardLogger(tmp_path))
    (folder,) = {path.parent for path in tmp_path.rglob("events.*")}
    read = EventAccumulator(str(folder), size_guidance={"images": 0})
    read.Reload()
    assert [picture.step for picture in read.Images("mi/heatmap")] == [0, 4, 8, 12]
    assert {"mi/kept/first", "mi/kept/second", "mi/kept/ceiling", "mi/kept/examples"} <= set(read.Tags()["scalars"])


def test_a_picture_of_many_moments_shows_the_first_and_the_last() -> None:
    history = {step: {"net.0": float(step), "net.1": 1.0} for step in range(0, 4000, 100)}
    axes = information_heat_map(history, 4000.0).axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert (len(labels), labels[0], labels[-1]) == (16, "0", "3900")
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    with pytest.raises(ValueError, match="needs values at one step or more, and a positive top"):
        information_heat_map({}, 1.0)


class StopAt(Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise SystemExit


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_its_history_resumes(tmp_path: Path) -> None:
    whole, stopped, resumed = (InformationMonitor(examples=20) for _ in range(3))
    fit(whole, AdapterCheckpoint())
    with pytest.raises(SystemExit):
        fit(stopped, AdapterCheckpoint(), StopAt(6, tmp_path / "stop.ckpt"))
    run = trainer(injection(), resumed, AdapterCheckpoint())
    run.fit(Module(), data(), data(), ckpt_path=tmp_path / "stop.ckpt")
    assert resumed.history == whole.history
    assert resumed.state_dict() == whole.state_dict()
    trainer(injection(), resumed, max_epochs=1).fit(Module(), data(), data())  # another run
    assert list(resumed.history) == [0, 4]


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"layers": "first"}, TypeError, "layers must be a list of patterns, not one string"),
        ({"every": 0}, ValueError, "every must be at least 1. Got 0"),
        ({"examples": 1}, ValueError, "examples must be at least 2. Got 1"),
        ({"temperature": 0}, ValueError, "temperature divides cosines and must be positive. Got 0"),
        ({"pool": "max"}, ValueError, "pool='max'"),
    ],
)
def test_arguments_are_checked(options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        InformationMonitor(**options)


def test_what_cannot_be_watched_is_told() -> None:
    with pytest.raises(MisconfigurationException, match=r"\('third',\)\) has no adapted layer .*'first', 'second'"):
        fit(InformationMonitor(["third"]))
    factorized = AdapterInjection(Factorized, ["first", "second"], verbose=False)
    with pytest.raises(MisconfigurationException, match="keeps its base's weight; there are 'first', 'second'"):
        trainer(factorized, InformationMonitor()).fit(Module(), data(), data())
    with pytest.raises(MisconfigurationException, match=r"this fit has none. .*InformationMonitor\(every=100\)"):
        fit(InformationMonitor(), limit_val_batches=0)
