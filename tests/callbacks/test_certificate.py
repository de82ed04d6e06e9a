"""RiskCertificate: one figure at the end of a fit, however it was come to, and none that would not hold."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset, TensorDataset, default_collate

from lightning_peft import (
    EVA,
    AdapterCheckpoint,
    AdapterInjection,
    Calibration,
    Certificate,
    LoRA,
    PACBayes,
    Regularization,
    RiskCertificate,
    RLoRA,
    inject,
)
from lightning_peft.certification.bound_set import BoundSet
from lightning_peft.certification.counting import count, total
from lightning_peft.functional.pac_bayes import bounded_cross_entropy
from lightning_peft.functional.risk_bounds import certified_risk
from lightning_peft.regularizers import Regularizer
from lightning_peft.regularizers.posterior import Posterior

N, BATCH = 90, 8
LORA = partial(LoRA, rank=2)


def examples(seed: int = 0, count: int = N) -> TensorDataset:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=g)
    return TensorDataset(x, (x[:, 0] + 0.5 * x[:, 1] > 0).long())


class Net(L.LightningModule):
    """Two layers, dropout and a metric's worth of state; it knows nothing of posteriors."""

    def __init__(self, batch_norm: bool | None = False) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            middle: nn.Module = nn.Tanh()
            if batch_norm is not False:
                middle = nn.BatchNorm1d(8, track_running_stats=bool(batch_norm))
            self.body = nn.Sequential(nn.Linear(4, 8), middle, nn.Dropout(0.5))
            self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.body(x))
        return y

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logits = self(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        self.log("train/loss", loss)
        return {"loss": loss, "logits": logits}

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.02)


class Gaussian(Regularizer):
    """A term that holds a posterior and trains its means; what a certificate needs of PACBayes, and no more."""

    def __init__(self, posterior: Posterior) -> None:
        super().__init__()
        self.posterior = posterior

    def watching(self, module: nn.Module) -> Any:
        return self.posterior.sampled(module)

    def forward(self, module: nn.Module, batch: Any, outputs: Any) -> Tensor:
        return self.posterior.kl() / N


def adapted(train: Any = None, kind: Any = Net, **options: Any) -> Any:
    module = kind(**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        inject(module, LORA, train=train)
    return module


def fitted(
    module: Any, *callbacks: Any, data: Any = None, posterior: Any = None, before: Any = (), **options: Any
) -> L.Trainer:
    q = posterior or Posterior(module, prior_sigma=0.1, sigma=0.05)
    torch.manual_seed(3)
    trainer = L.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, callbacks=[
            AdapterInjection(LORA), *before, Regularization({"pac": Gaussian(q)}), *callbacks],
        **{"max_epochs": 4, "logger": False, "enable_checkpointing": False, **options},
    )  # fmt: skip
    trainer.fit(module, data or DataLoader(examples(), BATCH, shuffle=True))
    return trainer


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        yield


@pytest.mark.parametrize("unit", ["batch", "pass"])
def test_the_figure_is_the_one_by_hand(unit: Any) -> None:
    module, made = adapted(), RiskCertificate(passes=5, unit=unit, seed=4)
    fitted(module, made)
    found = made.certificate
    assert found is not None
    posterior = module.peft_terms["pac"].posterior  # type: ignore[index, union-attr]
    module.eval()
    counts = count(
        lambda b: (module(b[0]), b[1]), posterior, module, BoundSet(examples(), BATCH),
        passes=5, unit=unit, seed=4, p_min=1e-4,
    )  # fmt: skip
    errors, loss = total(list(counts))
    assert (found.errors, found.cross_entropy) == (errors, loss / (5 * N))
    kl = float(posterior.kl(torch.float64).detach())
    assert found.kl == kl > 0
    units = 5 * N / (BATCH if unit == "batch" else N)
    assert (found.monte_carlo, found.bound) == certified_risk(errors / (5 * N), units, kl, N)
    assert found.risk < found.monte_carlo < found.bound < 1
    assert Certificate.load("certificate.json") == found
    assert found.prior == {"scale": "fixed", "chosen by": "no data"}
    # Dropout is off and noise is on: neither the mean's loss, nor one with dropout.
    x, y = examples()[:]
    with torch.no_grad():
        assert found.cross_entropy != pytest.approx(float(bounded_cross_entropy(module(x), y).mean()), rel=1e-3)


def test_the_kl_is_that_of_the_final_parameters() -> None:
    """PBB's code keeps the KL of the last forward, which is from before the last step."""
    module, made = adapted(), RiskCertificate(passes=1)
    fitted(module, made, max_steps=1, max_epochs=-1)
    posterior = module.peft_terms["pac"].posterior  # type: ignore[index, union-attr]
    start = Posterior(adapted(), prior_sigma=0.1, sigma=0.05)
    assert made.certificate is not None
    assert made.certificate.kl == posterior.divergence() != start.divergence()


def test_a_longer_look_leaves_training_alone() -> None:
    """The parameters, modes and random numbers after a fit do not depend on who has certified."""
    ends = []
    for callbacks in ([], [RiskCertificate(passes=1)], [RiskCertificate(passes=3, unit="pass")]):
        module = adapted()
        torch.manual_seed(3)
        random.seed(3)
        fitted(module, *callbacks, max_epochs=1)
        modes = [child.training for child in module.modules()]
        ends.append((module.state_dict(), torch.get_rng_state(), random.getstate(), modes))
    for state, noise, python, modes in ends[1:]:
        assert all(torch.equal(value, state[name]) for name, value in ends[0][0].items())
        assert torch.equal(noise, ends[0][1])
        assert (python, modes) == (ends[0][2], ends[0][3])


def test_the_bound_set_is_counted_whole_where_the_last_batch_is_smaller() -> None:
    made = RiskCertificate(passes=2)
    fitted(adapted(), made, max_epochs=1)
    assert made.certificate is not None
    assert (made.certificate.examples, made.certificate.batch_size) == (N, BATCH)
    assert made.certificate.units == 2 * N / BATCH


def test_loggers_and_pictures(tmp_path: Path) -> None:
    made, logger = RiskCertificate(passes=1), TensorBoardLogger(tmp_path, "", "")
    fitted(adapted(), made, logger=logger, max_epochs=2, log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert made.certificate is not None
    for name in ("bound", "risk", "monte_carlo", "kl"):
        (event,) = events.Scalars(f"certificate/{name}")
        assert event.value == pytest.approx(getattr(made.certificate, name))
        assert event.step == 24
    assert [event.step for event in events.Images("kl/heatmap")] == [12, 24]
    assert (tmp_path / "certificate.json").is_file()  # in the folder of logs, where there are no checkpoints


def test_it_is_written_beside_the_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoints"
    callbacks = [AdapterCheckpoint(), ModelCheckpoint(folder), RiskCertificate(passes=1)]
    fitted(adapted(), *callbacks, enable_checkpointing=True, max_epochs=1)
    assert sorted(path.suffix for path in folder.iterdir()) == [".ckpt", ".json"]


def split() -> tuple[Subset[Any], list[int]]:
    places = list(range(0, N, 2))
    return Subset(examples(), places), [i for i in range(N) if i not in places]


def taught() -> Net:
    """A module that has learned from every other example."""
    module = adapted()
    torch.manual_seed(3)
    trainer = L.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False, max_epochs=20,
        enable_checkpointing=False, callbacks=[AdapterInjection(LORA)],
    )  # fmt: skip
    trainer.fit(module, DataLoader(split()[0], BATCH, shuffle=True))
    return module


def test_a_prior_from_half_of_the_examples() -> None:
    half, rest = split()
    made = RiskCertificate(passes=2, prior_data=half)
    fitted(taught(), made, max_epochs=1)
    found = made.certificate
    assert found is not None
    assert found.examples == len(rest) == 45
    assert found.hashes["bound_set"] == BoundSet(Subset(examples(), rest)).digest()
    assert found.prior["chosen by"] == "45 of 90 examples"
    given = RiskCertificate(Subset(examples(), rest), passes=2, prior_data=half, batch_size=BATCH)
    fitted(taught(), given, max_epochs=1)
    assert given.certificate == found
    fresh = RiskCertificate(examples(5), passes=2, prior_data=half)  # which the prior never saw
    fitted(taught(), fresh, max_epochs=1)
    assert fresh.certificate is not None
    assert fresh.certificate.examples == N


def only_its_head_taught() -> Net:
    """A module whose head has learned from every other example, and whose adapters are new."""
    module = taught()
    with torch.no_grad():
        module.body[0].B.zero_()  # type: ignore[union-attr, operator]
    return module


class Named(torch.utils.data.Dataset[Any]):
    """The same examples, in another form than the loader of the fit has them."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        x, y = self.data[index]
        return {"x": x.tolist(), "y": int(y)}


class Masks(L.Callback):
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.body[0].gate.mask[0] = 0


def copied() -> TensorDataset:
    """Other data by the look of it, with three of the same examples."""
    x, y = examples(7, 30)[:]
    same, labels = examples()[:]
    return TensorDataset(torch.cat([x, same[:6]]), torch.cat([y, labels[:6]]))


def first_repeated(items: Any) -> Any:
    return default_collate([items[0]] * len(items))


class Noisy(Net):
    """It draws in a hook, whoever asks."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + torch.randn_like(batch[0]), batch[1]]


class Augmenting(Noisy):
    """It draws in a hook, in training."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return super().on_after_batch_transfer(batch, dataloader_idx) if self.trainer.training else batch


class Overflown(Net):
    def on_train_epoch_end(self) -> None:
        with torch.no_grad():
            self.head.weight.fill_(torch.nan)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (
            lambda: fitted(m := adapted(), RiskCertificate(), posterior=Posterior(m, over=["body.*"])),
            r"'head.weight' and 1 more is trained and not in Q, .* freeze it: AdapterInjection\(..., train=\[\]\)",
        ),
        (
            lambda: fitted(taught(), RiskCertificate()),
            "the adapter at 'body.0' had learned something before the prior was taken from it",
        ),
        (
            lambda: fitted(taught(), RiskCertificate(examples(), prior_data=split()[0])),
            "45 of the bound set's 90 examples chose the prior, so they cannot certify",
        ),
        (
            lambda: fitted(taught(), RiskCertificate(copied(), prior_data=split()[0])),
            "3 of the bound set's 36 examples are among those that chose the prior, by their content",
        ),
        (
            lambda: fitted(taught(), RiskCertificate(prior_data=examples())),
            "all examples of the training set chose the prior",
        ),
        (
            lambda: fitted(
                adapted(), RiskCertificate(), ModelCheckpoint(monitor="train/loss"), enable_checkpointing=True
            ),
            r"checkpoints are kept by 'train/loss', which may be a figure of the bound set, .* \(tried=...\)",
        ),
        (
            lambda: fitted(adapted(), RiskCertificate(), data=DataLoader(examples(), 8, drop_last=True)),
            "drops the last 2 of 90 examples",
        ),
        (
            lambda: fitted(
                adapted(),
                RiskCertificate(),
                data=DataLoader(s := examples(), sampler=torch.utils.data.RandomSampler(s, replacement=True)),
            ),
            "draws 90 of 90 examples, some of them twice",
        ),
        (
            lambda: fitted(adapted(), Masks(), RiskCertificate()),
            "'body.0.gate.mask' was changed while training and is not in Q",
        ),
        (
            lambda: fitted(adapted(batch_norm=True), RiskCertificate()),
            "'body.1' keeps running statistics of the batches that it is trained on, which are not in Q",
        ),
        (
            lambda: fitted(adapted(), RiskCertificate(unit="example")),
            "unit='example' counts every example as a draw of its own, and 'body.0.A' has one draw",
        ),
        (
            lambda: fitted(only_its_head_taught(), RiskCertificate()),
            "Net had been trained before the prior was taken from it, .* RiskCertificate\\(prior_data=<a Dataset>\\)",
        ),
        (
            lambda: fitted(taught(), RiskCertificate(prior_data=Named(split()[0]))),
            "prior_data has other forms of examples than the bound set, .* Give it as the bound set's loader reads it",
        ),
        (
            lambda: fitted(adapted(), RiskCertificate(), StochasticWeightAveraging(swa_lrs=0.01)),
            "put StochasticWeightAveraging first",
        ),
        (
            lambda: fitted(adapted(), RiskCertificate(), before=[Calibration(EVA(rank=2))]),
            "Calibration chooses ranks by what it sees of the training data, .* Train without Calibration",
        ),
        (
            lambda: fitted(adapted(batch_norm=None), RiskCertificate()),
            "'body.1' normalizes by the statistics of a batch, also in eval mode",
        ),
        (
            lambda: fitted(adapted(), RiskCertificate(), data=DataLoader(examples(), BATCH, collate_fn=first_repeated)),
            "its example 1 is not what example 1 gives by itself",
        ),
        (
            lambda: fitted(adapted(kind=Noisy), RiskCertificate()),
            "on_before_batch_transfer or on_after_batch_transfer of Noisy, .* gives another batch each time",
        ),
        (
            lambda: fitted(adapted(kind=Overflown), RiskCertificate(), max_epochs=1),
            r"KL\(Q \|\| P\) is nan: training has diverged; 'head.weight' is no longer finite",
        ),
        (
            lambda: L.Trainer(
                accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, max_epochs=1, callbacks=[AdapterInjection(LORA), RiskCertificate()],
            ).fit(Net(), DataLoader(examples(), 8)),
            "a certificate is of a distribution over what is trained, and Net has none",
        ),
    ],
)  # fmt: skip
def test_what_would_not_hold_is_refused(wrong: Any, says: str) -> None:
    with pytest.raises(MisconfigurationException, match=says):
        wrong()
    assert not Path("certificate.json").exists()


class Frozen(Net):
    """Its normalization stays as it was, as in fine-tuning of vision models."""

    def on_train_epoch_start(self) -> None:
        self.body[1].eval()


def test_running_statistics_are_refused_before_the_first_step() -> None:
    module = adapted(batch_norm=True)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(
        MisconfigurationException, match=r"running statistics .* eval mode in on_train_epoch_start; or .*GroupNorm"
    ):
        fitted(module, RiskCertificate())
    assert module.trainer.global_step == 0
    assert all(torch.equal(module.state_dict()[name], tensor) for name, tensor in before.items())
    fitted(adapted(kind=Frozen, batch_norm=True), made := RiskCertificate(passes=2), max_epochs=1)
    assert made.certificate is not None


def test_what_is_drawn_in_training_alone_is_not_in_what_is_counted() -> None:
    module, made, stages = adapted(kind=Augmenting), RiskCertificate(passes=2), []
    fitted(module, made, LambdaCallback(
        on_train_end=lambda trainer, _: stages.append(trainer.training)), max_epochs=1)  # fmt: skip
    assert stages == [True]  # put back
    plain, by_hand = adapted(), Posterior(module, prior_sigma=0.1, sigma=0.05)
    plain.load_state_dict({n: v for n, v in module.state_dict().items() if not n.startswith("peft_terms")})
    by_hand.load_state_dict(module.peft_terms["pac"].posterior.state_dict())
    by_hand.bind(plain)
    plain.eval()
    counts = count(
        lambda b: (plain(b[0]), b[1]), by_hand, plain, BoundSet(examples(), BATCH),
        passes=2, unit="batch", seed=0, p_min=1e-4,
    )  # fmt: skip
    assert made.certificate is not None
    assert made.certificate.cross_entropy == total(list(counts))[1] / (2 * N)


def test_what_does_hold_is_not() -> None:
    class Validated(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def val_dataloader(self) -> Any:
            return DataLoader(examples(9), BATCH)

    module = adapted(kind=Validated)
    chosen = RiskCertificate(passes=1)  # by figures of other data
    fitted(module, chosen, ModelCheckpoint("one", monitor="val/loss"), enable_checkpointing=True, max_epochs=1)
    assert chosen.certificate is not None
    tried = RiskCertificate(passes=1, tried=4)
    fitted(adapted(), tried, ModelCheckpoint("two", monitor="train/loss"), enable_checkpointing=True, max_epochs=1)
    alone = RiskCertificate(passes=1)
    fitted(adapted(), alone, max_epochs=1)
    assert tried.certificate is not None
    assert alone.certificate is not None
    assert tried.certificate.errors == alone.certificate.errors
    assert tried.certificate.bound > alone.certificate.bound
    frozen = RiskCertificate(passes=1)
    fitted(adapted(train=[]), frozen, max_epochs=1)  # a head that is not trained needs no place in Q
    assert frozen.certificate is not None


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"passes": 0}, ValueError, "passes must be at least 1. Got 0."),
        ({"unit": "token"}, ValueError, "unit='token': choose 'pass', 'batch' or 'example'"),
        ({"delta": 0.0}, ValueError, "delta is a probability and must lie strictly between 0 and 1. Got 0.0."),
        ({"delta": 0.6, "delta_prime": 0.5}, ValueError, "together less than 1. Got 0.6 \\+ 0.5."),
        ({"tried": 1.5}, TypeError, "tried must be an integer. Got 1.5."),
    ],
)
def test_arguments(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        RiskCertificate(**arguments)


def test_a_draw_for_every_example() -> None:
    """Vectors that multiply elementwise have noise of their own in every example, and so has a linear head."""
    made = {unit: RiskCertificate(passes=2, unit=unit) for unit in ("example", "batch")}
    for certificate in made.values():
        module = Net()
        callbacks = [
            AdapterInjection(partial(RLoRA, rank=4)),
            Regularization({"pac": PACBayes(sigma=0.05)}),
            certificate,
        ]
        torch.manual_seed(3)
        trainer = L.Trainer(
            accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False, max_epochs=2,
            enable_checkpointing=False, callbacks=callbacks,
        )  # fmt: skip
        trainer.fit(module, DataLoader(examples(), BATCH, shuffle=True))
    each, batch = made["example"].certificate, made["batch"].certificate
    assert each is not None
    assert batch is not None
    assert each.units == 2 * N > batch.units
    assert (each.kl, each.hashes) == (batch.kl, batch.hashes)
    assert each.monte_carlo - each.risk < batch.monte_carlo - batch.risk
    assert abs(each.risk - batch.risk) < 0.2  # two estimates of one risk


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_certifies_what_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = RiskCertificate(passes=1, path=tmp_path / "whole.json")
    saves = ModelCheckpoint(tmp_path, every_n_epochs=1, save_top_k=-1, filename="{epoch}")
    fitted(adapted(), AdapterCheckpoint(), saves, whole, max_epochs=2, enable_checkpointing=True)
    module, again = adapted(), RiskCertificate(passes=1, path=tmp_path / "again.json")
    q = Posterior(module, prior_sigma=0.1, sigma=0.05)
    trainer = L.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False, max_epochs=2,
        enable_checkpointing=False,
        callbacks=[AdapterInjection(LORA), Regularization({"pac": Gaussian(q)}), AdapterCheckpoint(), again],
    )  # fmt: skip
    trainer.fit(module, DataLoader(examples(), BATCH, shuffle=True), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert again.certificate == whole.certificate
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "whole.json").read_bytes()


def resumed(module: Any, made: RiskCertificate, path: Path) -> None:
    q = Posterior(module, prior_sigma=0.1, sigma=0.05)
    trainer = L.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, logger=False, max_epochs=2,
        enable_checkpointing=False,
        callbacks=[AdapterInjection(LORA), Regularization({"pac": Gaussian(q)}), AdapterCheckpoint(), made],
    )  # fmt: skip
    trainer.fit(module, DataLoader(examples(), BATCH, shuffle=True), ckpt_path=path)


def saving(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, every_n_epochs=1, save_top_k=-1, filename="{epoch}")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_what_the_resumed_run_chose_without_a_certificate_is_seen(tmp_path: Path) -> None:
    fitted(adapted(), Masks(), AdapterCheckpoint(), saving(tmp_path), max_epochs=1, enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match=r"'body.0.gate.mask' was changed while training"):
        resumed(adapted(), RiskCertificate(), tmp_path / "epoch=0.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_knows_what_chose_the_prior(tmp_path: Path) -> None:
    half, rest = split()
    whole = RiskCertificate(passes=1, prior_data=half, path=tmp_path / "whole.json")
    fitted(taught(), AdapterCheckpoint(), saving(tmp_path), whole, max_epochs=2, enable_checkpointing=True)
    again = RiskCertificate(passes=1, path=tmp_path / "again.json")  # does not say it once more
    resumed(adapted(), again, tmp_path / "epoch=0.ckpt")
    assert again.certificate == whole.certificate
    assert again.certificate is not None
    assert again.certificate.examples == len(rest)
    other = RiskCertificate(prior_data=Subset(examples(), [1, 3]))
    with pytest.raises(MisconfigurationException, match="45 of 90 examples had chosen the prior .* names 2 of 90"):
        resumed(adapted(), other, tmp_path / "epoch=0.ckpt")


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_knows_that_its_prior_was_taught(tmp_path: Path) -> None:
    """Nothing but the posterior says so: adapters are at their start, and the run before had no certificate."""
    module = only_its_head_taught()
    fitted(module, AdapterCheckpoint(), saving(tmp_path), max_epochs=1, enable_checkpointing=True)
    with pytest.raises(MisconfigurationException, match="Net had been trained before the prior was taken from it"):
        resumed(adapted(), RiskCertificate(), tmp_path / "epoch=0.ckpt")
    made = RiskCertificate(passes=1, prior_data=split()[0])
    resumed(adapted(), made, tmp_path / "epoch=0.ckpt")
    assert made.certificate is not None
    assert made.certificate.prior["chosen by"] == "45 of 90 examples"


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_resumed_run_knows_how_many_were_tried(tmp_path: Path) -> None:
    first = RiskCertificate(passes=1, tried=50)
    fitted(adapted(), AdapterCheckpoint(), saving(tmp_path), first, max_epochs=1, enable_checkpointing=True)
    again = RiskCertificate(passes=1)
    resumed(adapted(), again, tmp_path / "epoch=0.ckpt")
    assert again.certificate is not None
    assert again.certificate.tried == 50
    assert again.state_dict()["tried"] == 50  # what the next one is told
    more = RiskCertificate(passes=1, tried=60)
    resumed(adapted(), more, tmp_path / "epoch=0.ckpt")
    assert more.certificate is not None
    assert more.certificate.tried == 60
    fitted(adapted(), again, max_epochs=1)  # another fit of the same callback begins anew
    assert again.certificate.tried == 1


def test_csv_loggers_get_the_figures(tmp_path: Path) -> None:
    made = RiskCertificate(passes=1)
    fitted(adapted(), made, logger=CSVLogger(tmp_path), max_epochs=1, log_every_n_steps=1)
    (metrics,) = tmp_path.rglob("metrics.csv")
    assert "certificate/bound" in metrics.read_text().splitlines()[0]
