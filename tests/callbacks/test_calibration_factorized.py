"""Calibration of factorised layers, with a Trainer."""

from __future__ import annotations

import copy
import gc
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import AdapterCheckpoint, AdapterInjection, Calibration, Factorized, RankBudget, WeightedSVD
from lightning_peft.adapters.factorized import Start
from lightning_peft.functional.weighted_svd import scale, weighted_svd
from lightning_peft.rank.weighted_svd import uniform_rank


class Net(L.LightningModule):
    def __init__(self, loss: bool = True) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Dropout(0.3), nn.Linear(12, 10), nn.Linear(10, 2))
        self.loss, self.outputs = loss, list[Tensor]()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        y = self.net(batch[0])
        self.outputs.append(y.detach())
        return nn.functional.mse_loss(y, batch[1]) if self.loss else None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(20, 8, generator=generator), torch.randn(20, 2, generator=generator)
    x *= torch.tensor([1.0, 3.0, 0.1, 0.0, 1.0, 0.3, 2.0, 1.0])
    return DataLoader(TensorDataset(x, y), batch_size=8)  # the last batch has four


def fit(module: L.LightningModule, *callbacks: L.Callback, ckpt_path: Path | None = None, **options: Any) -> L.Trainer:
    torch.manual_seed(5)
    quiet = {
        "accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "max_epochs": 2,
    }  # fmt: skip
    trainer = L.Trainer(callbacks=list(callbacks), **{**quiet, **options})
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def injection(trained: bool = True, start: Start = "svd") -> AdapterInjection:
    return AdapterInjection(partial(Factorized, trained=trained, start=start), ["0", "3"], ["4"], verbose=False)


class AtStart(L.Callback):
    """The factors and masks as the first step finds them."""

    looks = True  # also at what the model gives

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Net)
        budget = RankBudget.of(pl_module)
        self.ranks = budget.ranks()
        self.gains = {name: site.gate.value().detach().clone() for name, site in budget.items()}
        if not self.looks:
            return
        self.same = Net().eval().net(loader().dataset[:][0])
        self.given = pl_module.eval().net(loader().dataset[:][0]).detach()
        pl_module.train()
        assert all(p.grad is None for p in pl_module.parameters())


@pytest.mark.parametrize("trained", [True, False])
def test_fisher_is_that_of_the_dense_model(trained: bool) -> None:
    """Over batches of eight, eight and four, without dropout; the function is what it was, and then it is cut."""
    start = AtStart()
    fit(Net(), injection(trained), Calibration(WeightedSVD("fisher"), batches=9), start)
    torch.testing.assert_close(start.given, start.same, rtol=1e-4, atol=1e-5)
    plain, x, y = Net().eval(), *loader().dataset[:]
    squares = {0: torch.zeros(8), 3: torch.zeros(12)}
    for one, target in zip(x, y, strict=True):
        plain.zero_grad()
        nn.functional.mse_loss(plain.net(one), target).backward()
        for i, total in squares.items():
            total += plain.net[i].weight.grad.square().sum(0)  # type: ignore[union-attr, operator]
    for i, total in squares.items():
        _, s, _ = weighted_svd(plain.net[i].weight, scale(total / len(x)))  # type: ignore[arg-type]
        torch.testing.assert_close(start.gains[f"net.{i}"], s, rtol=1e-4, atol=1e-6)


def test_a_ratio_closes_components_before_the_first_step() -> None:
    start = AtStart()
    net = Net()
    fit(net, injection(), Calibration(WeightedSVD("whiten", ratio=0.5), batches=3), start)
    assert start.ranks == RankBudget.of(net).ranks() == {"net.0": uniform_rank(12, 8, 0.5), "net.3": 2}
    assert not torch.allclose(start.given, start.same, atol=1e-2)


def test_the_plain_one_looks_at_no_batch() -> None:
    net = Net()
    fit(net, injection(), Calibration(WeightedSVD("none", rank=3), data=[]), max_epochs=1)
    assert len(net.outputs) == 3
    assert RankBudget.of(net).ranks() == {"net.0": 3, "net.3": 3}


def test_components_can_be_cut_at_once() -> None:
    masked, cut = Net(), Net()
    for net, compact in ((masked, "never"), (cut, "at_once")):
        fit(net, injection(), Calibration(WeightedSVD("activation", ratio=0.6), 3, compact=compact))  # type: ignore[arg-type]
    assert RankBudget.of(cut).ranks() == RankBudget.of(masked).ranks()
    assert cut.net[0].U.shape == (12, uniform_rank(12, 8, 0.6))
    x = torch.randn(4, 8)
    torch.testing.assert_close(cut.eval().net(x), masked.eval().net(x), rtol=1e-4, atol=1e-5)


class Watches(L.Callback):
    """Whether anybody still holds the factors that were cut, while the fit goes on."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, Net)
        self.factors = [weakref.ref(pl_module.net[i].U) for i in (0, 3)]

    def on_train_batch_end(self, *args: Any) -> None:
        gc.collect()
        self.alive = [factor() is not None for factor in self.factors]


@pytest.mark.parametrize("weighting", ["none", "activation"])
def test_what_is_cut_is_released_at_once(weighting: Any) -> None:
    watches = Watches()
    fit(Net(), injection(), Calibration(WeightedSVD(weighting, ratio=0.6), 3, compact="at_once"), watches, max_epochs=1)
    assert watches.alive == [False, False]


@pytest.mark.parametrize(("start", "compact"), [("svd", "never"), ("exact", "never"), ("exact", "at_once")])
def test_interrupted_is_uninterrupted(start: Start, compact: Any, tmp_path: Path) -> None:
    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "stop.ckpt")

    def callbacks() -> list[L.Callback]:
        calibration = Calibration(WeightedSVD("taylor", ratio=0.6), 3, compact=compact)
        return [injection(start=start), calibration, AdapterCheckpoint()]

    whole, again = Net(), Net()
    fit(whole, *callbacks(), Saves())
    fit(again, *callbacks(), ckpt_path=tmp_path / "stop.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


class Interrupted(WeightedSVD):
    """Stopped once, as by a signal, before or while layers are decomposed."""

    def __init__(self, filled: int) -> None:
        super().__init__("taylor", ratio=0.6)
        self.left = filled

    def _fill(self, *args: Any) -> None:
        if self.left == 0:
            raise RuntimeError("stopped")
        self.left -= 1
        super()._fill(*args)


@pytest.mark.parametrize("filled", [0, 1])
def test_a_run_that_was_stopped_while_it_calibrated_calibrates_again(filled: int, tmp_path: Path) -> None:
    """Bit for bit where no layer was decomposed yet; up to rounding where some were."""

    class Saves(L.Callback):
        def on_exception(self, trainer: L.Trainer, *args: Any) -> None:
            trainer.save_checkpoint(tmp_path / "stop.ckpt")

    stopped = Calibration(Interrupted(filled), 3)
    with pytest.raises(RuntimeError, match="stopped"):
        fit(Net(), injection(start="exact"), stopped, AdapterCheckpoint(), Saves())
    assert not stopped.done
    whole, again = Net(), Net()
    fit(whole, injection(start="exact"), Calibration(WeightedSVD("taylor", ratio=0.6), 3), AdapterCheckpoint())
    calibration = Calibration(WeightedSVD("taylor", ratio=0.6), 3)
    fit(again, injection(start="exact"), calibration, AdapterCheckpoint(), ckpt_path=tmp_path / "stop.ckpt")
    assert calibration.done
    for name, value in whole.state_dict().items():
        rounding = 0.0 if filled == 0 else 1e-4
        torch.testing.assert_close(again.state_dict()[name], value, rtol=rounding, atol=rounding)


class LengthFirst(Net):
    """Positions come before samples inside, as in nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Identity(), nn.Linear(5, 4), nn.Linear(4, 2))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x = batch[0].unflatten(1, (-1, 2)) if batch[0].dim() == 2 else batch[0]
        return nn.functional.mse_loss(self.net(x.transpose(0, 1)).mean(0), batch[1])


def test_of_a_square_batch_one_sample_is_left_out() -> None:
    """As many positions as samples: without the last sample there is no question whose rows are whose."""
    x, y = loader().dataset[:]
    x = x.unflatten(1, (4, 2))
    start, net = AtStart(), LengthFirst()
    plain = copy.deepcopy(net)
    start.looks = False
    square = Calibration(WeightedSVD("fisher"), data=[(x[:4], y[:4]), (x[4:8], y[4:8])])
    fit(net, injection(), square, start, max_steps=1)
    total = torch.zeros(5)
    for one, target in zip(x[[0, 1, 2, 4, 5, 6]], y[[0, 1, 2, 4, 5, 6]], strict=True):
        plain.zero_grad()
        plain.training_step((one[None], target[None]), 0).backward()
        total += plain.net[3].weight.grad.square().sum(0)  # type: ignore[union-attr, operator]
    _, s, _ = weighted_svd(plain.net[3].weight, scale(total / 6))  # type: ignore[arg-type]
    torch.testing.assert_close(start.gains["net.3"], s, rtol=1e-4, atol=1e-6)


class Detached(Net):
    """Its layers are called, and its loss does not see them."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net[4](self.net[:4](batch[0]).detach()), batch[1])


@pytest.mark.parametrize("weighting", ["fisher", "taylor"])
def test_a_loss_that_depends_on_no_layer_is_told_as_such(weighting: Any) -> None:
    with pytest.raises(RuntimeError, match=r"calls adapted layers, and its loss depends on none of the 2, .*'net\.0'"):
        fit(Detached(), injection(), Calibration(WeightedSVD(weighting), batches=2))


@pytest.mark.parametrize("weighting", ["fisher", "taylor"])
def test_a_task_without_a_loss_is_refused(weighting: Any) -> None:
    with pytest.raises(MisconfigurationException, match="training_step of Net returned no loss, and WeightedSVD reads"):
        fit(Net(loss=False), injection(), Calibration(WeightedSVD(weighting), batches=2))


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_inputs_need_no_loss() -> None:
    net = Net(loss=False)
    fit(net, injection(), Calibration(WeightedSVD("whiten", ratio=0.5), batches=2), max_epochs=1)
    assert RankBudget.of(net).ranks()["net.3"] == 2


def test_data_that_are_none_are_refused() -> None:
    with pytest.raises(MisconfigurationException, match="Calibration has no batch to look at"):
        fit(Net(), injection(), Calibration(WeightedSVD("activation"), data=[]))


class Attention(Net):
    """Its output projection is read by the attention and never called."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (2, 4)), nn.TransformerEncoderLayer(4, 2, 8, batch_first=True))
        self.net.extend([nn.Flatten(1), nn.Linear(8, 2)])


@pytest.mark.parametrize("weighting", ["whiten", "fisher"])
def test_layers_that_are_only_read_are_named(weighting: Any) -> None:
    net, calibration = Attention(), Calibration(WeightedSVD(weighting, rank=2), batches=2)
    place = AdapterInjection(Factorized, ["out_proj", "linear1", "linear2"], verbose=False)
    with pytest.warns(
        UserWarning, match=r"nothing of 1 adapted layers, whose start owes nothing to data: net.1.self_attn.out_proj\."
    ):
        fit(net, place, calibration, max_epochs=1)
    assert set(RankBudget.of(net).ranks().values()) == {2}
