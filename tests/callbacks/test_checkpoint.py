"""Adapter-only checkpoints, and runs that stop and resume as if they never had."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_peft import (
    AdapterCheckpoint,
    AdapterFileError,
    AdapterInjection,
    LoRA,
    RankBudget,
    adapter_state_dict,
    load,
    presets,
)
from lightning_peft.checkpoint import ENTRY, digest
from lightning_peft.resume import ResumableLoader

STEPS = 60  # 5 epochs of 12 batches


class Net(L.LightningModule):
    """Dropout, a schedule and an adaptive optimizer: all that a resumed run could get wrong."""

    def __init__(self, seed: int = 1, width: int = 32) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.net = nn.Sequential(
                nn.Linear(16, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.2),
                nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4),
            )  # fmt: skip
        self.seen: list[Tensor] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        self.seen.append(batch[0].clone())
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        # Asks for the number of steps, and so for the data loaders, before anything is restored.
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Validated(Net):
    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augmented with the global generator, in the worker that loads it."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(96, 16, generator=generator)
        self.y = torch.randint(0, 4, (96,), generator=generator)

    def __len__(self) -> int:
        return 96

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.1 * torch.randn(16), self.y[i]


def loader(workers: int = 0, shuffle: bool = True) -> DataLoader[Any]:
    return DataLoader(Noisy(), batch_size=8, shuffle=shuffle, num_workers=workers)


class StopAt(L.Callback):
    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            raise SystemExit


def trainer(*extra: L.Callback, **kwargs: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 5, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
        "enable_model_summary": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    callbacks = [*presets.dynamic_dora(final_rank=4, interval=3), *extra]
    return L.Trainer(callbacks=callbacks, **(settings | kwargs))


def everything(net: Net, of: L.Trainer) -> dict[str, Tensor]:
    """All that a run leaves: weights, masks, buffers, optimizer state and the running importance."""
    found = dict(net.state_dict())
    for i, state in of.optimizers[0].state_dict()["state"].items():
        found |= {f"optimizer.{i}.{key}": torch.as_tensor(value) for key, value in state.items()}
    pruning = next(c for c in of.callbacks if hasattr(c, "policy"))
    found |= {f"worth.{name}": worth for name, worth in pruning.policy.state_dict()["importance"]["worth"].items()}
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different


# warm-up (before step 9), soft pruning, an event, the last event (30), the tail, ends of epochs
@pytest.mark.parametrize("stop", [1, 5, 12, 18, 21, 29, 30, 31, 36, 50, 54, 59])
@pytest.mark.parametrize("shuffle", [True, False])
def test_resumed_run_is_bitwise_the_uninterrupted_one(tmp_path: Path, stop: int, shuffle: bool) -> None:
    torch.manual_seed(3)
    whole, uninterrupted = Net(), trainer()
    uninterrupted.fit(whole, loader(shuffle=shuffle))
    assert uninterrupted.global_step == STEPS

    torch.manual_seed(3)
    with pytest.raises(SystemExit):
        trainer(StopAt(stop, tmp_path / "stop.ckpt")).fit(Net(), loader(shuffle=shuffle))
    torch.manual_seed(77)  # another process has other random numbers
    net, resumed = Net(), trainer()
    resumed.fit(net, loader(shuffle=shuffle), ckpt_path=tmp_path / "stop.ckpt")
    assert resumed.global_step == STEPS
    assert len(net.seen) == STEPS - stop
    assert_same(everything(whole, uninterrupted), everything(net, resumed))


@pytest.mark.parametrize(("stop", "settings"), [
    (7, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}),
    (11, {"precision": "bf16-mixed"}),
    (11, {"precision": "bf16-true"}),
    (11, {"precision": "64-true"}),
])  # fmt: skip
def test_resume_is_exact_under_accumulation_clipping_and_autocast(
    tmp_path: Path, stop: int, settings: dict[str, Any]
) -> None:
    torch.manual_seed(3)
    whole, uninterrupted = Net(), trainer(**settings)
    uninterrupted.fit(whole, loader())
    torch.manual_seed(3)
    with pytest.raises(SystemExit):
        trainer(StopAt(stop, tmp_path / "stop.ckpt"), **settings).fit(Net(), loader())
    torch.manual_seed(78)
    net, resumed = Net(), trainer(**settings)
    resumed.fit(net, loader(), ckpt_path=tmp_path / "stop.ckpt")
    assert_same(everything(whole, uninterrupted), everything(net, resumed))


@pytest.mark.parametrize("stop", [5, 17])
def test_resume_is_exact_with_worker_processes(tmp_path: Path, stop: int) -> None:
    short = {"max_epochs": 2}
    torch.manual_seed(3)
    whole, uninterrupted = Net(), trainer(**short)
    uninterrupted.fit(whole, loader(workers=2))
    torch.manual_seed(3)
    with pytest.raises(SystemExit):
        trainer(StopAt(stop, tmp_path / "stop.ckpt"), **short).fit(Net(), loader(workers=2))
    torch.manual_seed(79)
    net, resumed = Net(), trainer(**short)
    resumed.fit(net, loader(workers=2), ckpt_path=tmp_path / "stop.ckpt")
    assert_same(everything(whole, uninterrupted), everything(net, resumed))


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_resume_from_model_checkpoint_beside_validation(tmp_path: Path) -> None:
    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=7, save_top_k=-1)

    torch.manual_seed(3)
    whole, uninterrupted = Validated(), trainer(saver(), enable_checkpointing=True)
    uninterrupted.fit(whole, loader(), loader(shuffle=False))
    for step in (14, 28):
        torch.manual_seed(80)
        net, resumed = Validated(), trainer(saver(), enable_checkpointing=True)
        resumed.fit(net, loader(), loader(shuffle=False), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert_same(everything(whole, uninterrupted), everything(net, resumed))


class Pair(Net):
    """Trained on two loaders at once."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x, _), (_, y) = batch
        return super().training_step((x, y), batch_idx)


@pytest.mark.parametrize(("stop", "saved"), [(12, 2), (15, 2), (12, 1)])
def test_resume_is_exact_with_two_loaders(tmp_path: Path, stop: int, saved: int) -> None:
    """Between epochs all of them begin anew, in the order in which an epoch makes them; also one that is not saved."""
    short = {"max_epochs": 2}
    torch.manual_seed(3)
    whole, uninterrupted = Pair(), trainer(**short)
    uninterrupted.fit(whole, [loader(), loader()])
    torch.manual_seed(3)
    with pytest.raises(SystemExit):
        trainer(StopAt(stop, tmp_path / "stop.ckpt"), **short).fit(Pair(), [loader(), loader()])
    checkpoint = torch.load(tmp_path / "stop.ckpt", weights_only=True)
    del checkpoint["callbacks"]["AdapterCheckpoint"]["ranks"][0]["loaders"][saved:]
    torch.save(checkpoint, tmp_path / "stop.ckpt")
    torch.manual_seed(81)
    net, resumed = Pair(), trainer(**short)
    resumed.fit(net, [loader(), loader()], ckpt_path=tmp_path / "stop.ckpt")
    assert_same(everything(whole, uninterrupted), everything(net, resumed))


def test_a_second_interruption_in_the_same_epoch_is_exact_too(tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole, uninterrupted = Net(), trainer()
    uninterrupted.fit(whole, loader())
    torch.manual_seed(3)
    with pytest.raises(SystemExit):
        trainer(StopAt(15, tmp_path / "a.ckpt")).fit(Net(), loader())
    with pytest.raises(SystemExit):
        trainer(StopAt(20, tmp_path / "b.ckpt")).fit(Net(), loader(), ckpt_path=tmp_path / "a.ckpt")
    net, resumed = Net(), trainer()
    resumed.fit(net, loader(), ckpt_path=tmp_path / "b.ckpt")
    assert_same(everything(whole, uninterrupted), everything(net, resumed))


def test_saving_and_watching_change_nothing_in_a_run(tmp_path: Path) -> None:
    def run(with_checkpoint: bool) -> Net:
        torch.manual_seed(3)
        net = Net()
        callbacks = [c for c in trainer().callbacks if with_checkpoint or not isinstance(c, AdapterCheckpoint)]
        L.Trainer(max_epochs=2, callbacks=callbacks, logger=False, enable_checkpointing=False,
                  enable_progress_bar=False, enable_model_summary=False).fit(net, loader())  # fmt: skip
        return net

    one, other = run(True), run(False)
    assert len(one.seen) == 24
    assert all(map(torch.equal, one.seen, other.seen))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_the_loader_is_the_users_own_again_after_fit() -> None:
    data = loader()
    trainer(max_epochs=1).fit(Net(), data)
    assert type(data) is DataLoader
    assert not [name for name in vars(data) if name in ("_position", "_target")]


def test_iterable_data_is_left_to_its_own_means(tmp_path: Path) -> None:
    class Stream(IterableDataset[tuple[Tensor, Tensor]]):
        def __iter__(self) -> Any:
            return iter([(torch.ones(16), torch.tensor(1))] * 32)

    net = Net()
    trainer(max_steps=4, max_epochs=-1).fit(net, DataLoader(Stream(), batch_size=8))
    assert len(net.seen) == 4


def test_checkpoint_holds_adapters_and_not_the_frozen_base(tmp_path: Path) -> None:
    net, run = Net(width=512), trainer(max_epochs=1)
    run.fit(net, loader())
    run.save_checkpoint(tmp_path / "whole.ckpt")
    run.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    for name in ("whole.ckpt", "weights.ckpt"):
        saved = torch.load(tmp_path / name, weights_only=True)
        keys = set(saved["state_dict"])
        assert "net.4.base.weight" not in keys
        # adapters, masks, the trained head, and buffers that training moves although nothing is trained there
        assert {"net.4.A", "net.4.gate.mask", "net.4.gate.gain", "net.6.weight", "net.1.running_mean"} <= keys
        assert saved[ENTRY]["recipe"]["trained"] == ["net.6.bias", "net.6.weight"] or set(
            saved[ENTRY]["recipe"]["trained"]
        ) == {"net.6.weight", "net.6.bias"}
    base = 512 * 512 * 4
    assert (tmp_path / "weights.ckpt").stat().st_size < base


def test_full_keeps_the_base(tmp_path: Path) -> None:
    net = Net()
    run = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[AdapterInjection(LoRA), AdapterCheckpoint(full=True)],
    )
    net.net[6] = nn.Linear(32, 8)  # rank 8 fits
    net.net[0] = nn.Linear(16, 32)
    run.fit(net, loader())
    run.save_checkpoint(tmp_path / "full.ckpt")
    assert "net.4.base.weight" in torch.load(tmp_path / "full.ckpt", weights_only=True)["state_dict"]
    fresh = Net()
    fresh.net[6], fresh.net[0] = nn.Linear(32, 8), copy.deepcopy(net.net[0].base)
    fresh.net[4] = copy.deepcopy(net.net[4].base)
    loaded = load(fresh, tmp_path / "full.ckpt")  # once refused: its digest was of the adapters alone
    assert torch.equal(loaded.state_dict()["net.4.A"], net.state_dict()["net.4.A"])


def trained(tmp_path: Path) -> tuple[Net, Path]:
    net, run = Net(), trainer()
    run.fit(net, loader())
    path = tmp_path / "trained.ckpt"
    run.save_checkpoint(path)
    return net.eval(), path


def test_load_works_in_a_bare_script_on_the_module_and_on_the_model_inside(tmp_path: Path) -> None:
    net, path = trained(tmp_path)
    x = torch.randn(5, 16)
    for fresh in (Net(), Net().net):
        state = torch.get_rng_state()
        load(fresh, path)
        assert torch.equal(torch.get_rng_state(), state), "loading uses up no random numbers"
        model = fresh.net if isinstance(fresh, Net) else fresh
        assert torch.equal(model.eval()(x), net.net(x))
        assert RankBudget.of(fresh).spent == 8


def test_validation_of_a_checkpoint_brings_masks_back(tmp_path: Path) -> None:
    net, path = trained(tmp_path)
    fresh = Validated()
    trainer().validate(fresh, loader(shuffle=False), ckpt_path=path, verbose=False)
    assert RankBudget.of(fresh).ranks() == RankBudget.of(net).ranks()


def test_another_base_is_refused_and_the_model_stays_as_it_was(tmp_path: Path) -> None:
    _, path = trained(tmp_path)
    fresh = Net(seed=2)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(AdapterFileError, match=r"made for another base model: 'net.0.base.bias' differs"):
        load(fresh, path)
    assert_same(before, dict(fresh.state_dict()))
    assert all(p.requires_grad for p in fresh.parameters())
    with pytest.raises(AdapterFileError, match="made for another base model"):
        trainer().fit(Net(seed=2), loader(), ckpt_path=path)


def test_a_base_in_another_precision_is_the_same_base(tmp_path: Path) -> None:
    net, path = trained(tmp_path)
    fresh = load(Net().to(torch.bfloat16), path)
    assert RankBudget.of(fresh).ranks() == RankBudget.of(net).ranks()


def test_other_adapters_are_refused_by_name(tmp_path: Path) -> None:
    _, path = trained(tmp_path)
    other = L.Trainer(callbacks=[*presets.dynamic_dora(final_rank=3)], max_epochs=5, logger=False,
                      enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    with pytest.raises(
        AdapterFileError, match=r"other adapters than this model has: at 'net.0' it has DynamicDoRA\(rank=6"
    ):
        other.fit(Net(), loader(), ckpt_path=path)


@pytest.mark.parametrize("keep", [0, 100, 5_000, -20])
def test_a_truncated_file_is_named(tmp_path: Path, keep: int) -> None:
    _, path = trained(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(AdapterFileError, match=r"trained.ckpt cannot be read: it is cut short, damaged"):
        load(Net(), path)
    with pytest.raises(AdapterFileError, match=r"trained.ckpt cannot be read: it is cut short, damaged"):
        trainer().fit(Net(), loader(), ckpt_path=path)


def test_a_tampered_file_is_refused(tmp_path: Path) -> None:
    _, path = trained(tmp_path)
    saved = torch.load(path, weights_only=True)
    saved["state_dict"]["net.4.A"][0, 0] += 1
    torch.save(saved, path)
    with pytest.raises(AdapterFileError, match="changed after it was written: its contents do not match their digest"):
        load(Net(), path)
    with pytest.raises(AdapterFileError, match="changed after it was written"):
        trainer().fit(Net(), loader(), ckpt_path=path)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry["recipe"]["adapters"][0]["arguments"].update(alpha=800.0),
        lambda entry: entry["ranks"].update({"net.0": 1}),
        lambda entry: entry["base"]["net.0.base.weight"].add_(1),
        lambda entry: entry.pop("costs"),
    ],
)
def test_the_digest_covers_the_entry(tmp_path: Path, change: Any) -> None:
    _, path = trained(tmp_path)
    saved = torch.load(path, weights_only=True)
    change(saved[ENTRY])
    torch.save(saved, path)
    with pytest.raises(AdapterFileError, match="changed after it was written"):
        load(Net(), path)


def test_freezing_a_trained_module_takes_nothing_away(tmp_path: Path) -> None:
    net, run = Net(), trainer()
    run.fit(net, loader())
    net.freeze()
    run.save_checkpoint(tmp_path / "frozen.ckpt")
    x = torch.randn(5, 16)
    assert torch.equal(load(Net(), tmp_path / "frozen.ckpt").eval().net(x), net.net(x))
    assert {"net.4.A", "net.4.B", "net.6.weight"} <= adapter_state_dict(net).keys()


def test_a_checkpoint_written_without_us_is_not_loaded_in_part(tmp_path: Path) -> None:
    plain = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    plain.fit(Validated(), loader(), loader(shuffle=False))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    net = Validated()
    with pytest.raises(AdapterFileError, match="was not written by AdapterCheckpoint and does not fit this model"):
        trainer().validate(net, loader(shuffle=False), ckpt_path=tmp_path / "plain.ckpt")
    assert net.strict_loading or net.strict_loading is None


def test_validation_of_a_checkpoint_leaves_nothing_for_a_later_fit(tmp_path: Path) -> None:
    _, path = trained(tmp_path)
    drawn = []
    for seed in (1, 2):
        run, net = trainer(max_epochs=1), Validated()
        run.validate(net, loader(shuffle=False), ckpt_path=path, verbose=False)
        torch.manual_seed(seed)
        run.fit(net, loader(), loader(shuffle=False))
        drawn.append(net.seen[0])
    assert not torch.equal(*drawn)


def test_an_argument_that_no_file_can_hold_is_named_when_saving(tmp_path: Path) -> None:
    net, run = Net(), trainer(max_epochs=1)
    run.fit(net, loader())
    net.net[4].alpha = Path("x")
    with pytest.raises(TypeError, match=r"DynamicDoRA at 'net.4' has alpha=.* of type PosixPath"):
        run.save_checkpoint(tmp_path / "odd.ckpt")


def test_numbers_of_numpy_become_plain_ones(tmp_path: Path) -> None:
    adapter = LoRA(nn.Linear(8, 8), rank=np.int64(2), alpha=np.float64(4), dropout=np.float32(0))  # type: ignore[arg-type]
    assert {name: type(value) for name, value in adapter.arguments().items()} == {
        "rank": int,
        "alpha": float,
        "dropout": float,
    }


class SaveFirst(L.Callback):
    """Saves after the optimizer's step and before the rank schedule has looked at it."""

    def __init__(self, step: int, path: Path) -> None:
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("step", [12, 30])  # an event, and the last one
def test_a_checkpoint_from_between_step_and_event_misses_no_event(tmp_path: Path, step: int) -> None:
    def early(*extra: L.Callback) -> L.Trainer:
        run = trainer()
        run.callbacks[:0] = extra
        return run

    whole, uninterrupted = Net(), early(SaveFirst(step, tmp_path / "early.ckpt"))
    uninterrupted.fit(whole, loader())
    net, resumed = Net(), early()
    resumed.fit(net, loader(), ckpt_path=tmp_path / "early.ckpt")
    assert_same(everything(whole, uninterrupted), everything(net, resumed))


@pytest.mark.filterwarnings("ignore:This checkpoint's rank schedule was made for")
def test_a_plan_that_became_shorter_still_ends_at_the_final_budget(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        trainer(StopAt(25, tmp_path / "stop.ckpt")).fit(Net(), loader())
    net = Net()
    trainer(max_epochs=-1, max_steps=36).fit(net, loader(), ckpt_path=tmp_path / "stop.ckpt")  # the last cut was at 18
    assert RankBudget.of(net).spent == 8
    assert all(int(site.gate.mask.sum()) == int(site.gate.open().sum()) for site in RankBudget.of(net).values())


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": {}, ENTRY: Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(AdapterFileError, match="holds more than tensors"):
        load(Net(), tmp_path / "evil.ckpt")
    with pytest.raises(AdapterFileError, match="holds more than tensors"):
        trainer().fit(Net(), loader(), ckpt_path=tmp_path / "evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("change", "sentence"), [
    (lambda s: s.pop(ENTRY), "is no adapter checkpoint: it has no entry 'lightning_peft'"),
    (lambda s: s[ENTRY].update(version=9), "is of format version 9; this release reads 1"),
    (lambda s: s[ENTRY]["recipe"]["adapters"][0].update({"class": "os:system"}), "'os:system', which is not imported"),
    (lambda s: s[ENTRY]["recipe"]["adapters"][0].update({"class": "a.b:C"}), "not imported; import it before loading"),
    (lambda s: s[ENTRY]["recipe"]["adapters"][0].update(layers=["net.9"]), "'net.9', a layer that this model does not"),
    (lambda s: s[ENTRY]["recipe"].update(adapters=[]), "holds no adapter"),
])  # fmt: skip
def test_a_wrong_entry_is_refused_with_a_sentence(tmp_path: Path, change: Any, sentence: str) -> None:
    _, path = trained(tmp_path)
    saved = torch.load(path, weights_only=True)
    change(saved)
    if ENTRY in saved:  # written so by somebody who knows the format: the digest is no signature
        saved[ENTRY]["digest"] = digest(saved["state_dict"], saved[ENTRY])
    torch.save(saved, path)
    with pytest.raises(AdapterFileError, match=sentence):
        load(Net(), path)


def test_missing_file_is_not_called_damaged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load(Net(), tmp_path / "none.ckpt")


def test_a_schedule_for_other_steps_warns(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        trainer(StopAt(12, tmp_path / "stop.ckpt")).fit(Net(), loader())
    with pytest.warns(UserWarning, match="made for 60 optimizer steps and the Trainer now plans 72"):
        trainer(max_epochs=6).fit(Net(), loader(), ckpt_path=tmp_path / "stop.ckpt")


def test_wrong_order_is_refused() -> None:
    wrong = [AdapterCheckpoint(), AdapterInjection(LoRA)]
    run = L.Trainer(max_epochs=1, callbacks=wrong, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(MisconfigurationException, match="AdapterCheckpoint comes before AdapterInjection"):
        run.fit(Net(), loader())


def test_loader_that_a_user_subclassed_is_not_touched() -> None:
    class Mine(DataLoader[Any]):
        pass

    data = Mine(Noisy(), batch_size=8)
    trainer(max_epochs=1).fit(Net(), data)
    assert type(data) is Mine
    assert not isinstance(data, ResumableLoader)
