"""A run that is stopped inside an epoch and resumed sees exactly the batches that remain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from quiet import SAVING
from tiny_models import save_decoder, save_translator
from torch import Tensor, nn

from lightning_peft import presets
from lightning_peft.modules import CausalLM, LanguageData, Seq2Seq, Seq2SeqData, TextClassifier, TextData


class Interrupted(RuntimeError):
    pass


class Reader(LightningModule):
    """Notes what it is given; a wrong batch, a batch too many or one too few shows in its weight too."""

    def __init__(self, fail_at: int = -1, fail_in: str = "training_step") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.seen: list[tuple[int, list[int]]] = []
        self.fail_at, self.fail_in = fail_at, fail_in

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.fail("training_step")
        self.seen.append((self.current_epoch, batch["input_ids"].sum(1).tolist()))
        return self.weight * batch["input_ids"].float().mean() + self.weight**2

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.fail("on_train_batch_end")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pass

    def fail(self, where: str) -> None:
        if (self.global_step, where) == (self.fail_at, self.fail_in):
            raise Interrupted

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, momentum=0.9)


@pytest.fixture
def data(write: Any, tiny_bert: str, rows: Any) -> Any:
    """Makes the same data module again and again: 9 batches an epoch, 27 steps in three."""
    train = write("t.tsv", rows)
    return lambda: TextData(train, tokenizer=tiny_bert, batch_size=5, window=3, seed=4, val_share=0.1)


def fit(reader: Reader, data: TextData, ckpt_path: str | None = None, **settings: Any) -> Reader:
    trainer = Trainer(max_epochs=3, **SAVING, **{"enable_checkpointing": False, **settings})
    trainer.fit(reader, datamodule=data, ckpt_path=ckpt_path)
    return reader


# Each resumed run here has no checkpoint callback of its own, which Lightning remarks.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("saved", "settings", "count"),
    [
        pytest.param({"every_n_train_steps": 1}, {}, 27, id="every step"),
        pytest.param({"every_n_epochs": 1, "save_on_train_epoch_end": True}, {}, 3, id="end of epoch"),
        pytest.param(
            {"every_n_epochs": 1, "save_on_train_epoch_end": False}, {"val_check_interval": 4}, 6, id="validation"
        ),
        pytest.param({"every_n_train_steps": 1}, {"accumulate_grad_batches": 2}, 15, id="accumulation"),
    ],
)
def test_resumed_run_sees_exactly_what_remains(
    saved: Any, settings: Any, count: int, data: Any, tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(tmp_path / "all", save_top_k=-1, **saved)
    full = fit(Reader(), data(), callbacks=[checkpoints], enable_checkpointing=True, **settings)
    assert len(full.seen) == 27
    paths = list((tmp_path / "all").glob("*.ckpt"))
    assert len(paths) == count
    steps = set()
    for path in paths[:: 1 if count < 20 else 4]:
        resumed = fit(Reader(), data(), str(path), **settings)
        steps.add(len(resumed.seen))
        assert resumed.seen == full.seen[27 - len(resumed.seen) :], path.name
        assert torch.equal(resumed.weight, full.weight), path.name
    assert len(steps) > 2


# Lightning looks for an older file of that callback first and calls the fit one without a model.
@pytest.mark.filterwarnings("ignore:.*ckpt_path=.(None|last)")
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("fail_in", ["training_step", "on_train_batch_end"])
@pytest.mark.parametrize("fail_at", [3, 9, 13])
def test_run_that_broke_off_goes_on_where_it_was(fail_at: int, fail_in: str, data: Any, tmp_path: Path) -> None:
    full = fit(Reader(), data())
    broken = Reader(fail_at, fail_in)
    with pytest.raises(Interrupted):
        fit(broken, data(), callbacks=[OnExceptionCheckpoint(tmp_path, "broken")], enable_checkpointing=True)
    resumed = fit(Reader(), data(), str(tmp_path / "broken.ckpt"))
    assert broken.seen + resumed.seen == full.seen
    assert torch.equal(resumed.weight, full.weight)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_classifier_resumes_bit_for_bit(data: Any, tiny_bert: str, tmp_path: Path) -> None:
    def run(ckpt_path: str | None = None, **settings: Any) -> TextClassifier:
        torch.manual_seed(1)
        classifier = TextClassifier(tiny_bert, num_labels=3)
        trainer = Trainer(max_epochs=2, **SAVING, **settings)
        trainer.fit(classifier, datamodule=data(), ckpt_path=ckpt_path)
        return classifier

    full = run(callbacks=[ModelCheckpoint(tmp_path / "all", "stop-{step}", every_n_train_steps=5, save_top_k=-1)])
    resumed = run(str(tmp_path / "all" / "stop-step=5.ckpt"), enable_checkpointing=False)
    for (name, a), b in zip(full.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b), name


def of_pairs(kind: str, folder: Path) -> tuple[Any, Any]:
    """A model and data of prompts with answers; each call makes the same again."""
    source = folder / "pairs.csv"
    pairs = [f"{'the ' * (1 + i % 3)}red,{'car ' * (1 + i % 4)}" for i in range(20)]
    source.write_text("source,target\n" + "\n".join(pairs) + "\n")
    settings: dict[str, Any] = {"train": str(source), "batch_size": 3, "window": 2, "seed": 4, "val_share": 0.1}
    if kind == "seq2seq":
        backbone = save_translator(folder / "base")
        return Seq2Seq(backbone, lr=0.02, generation={"max_new_tokens": 4}), Seq2SeqData(tokenizer=backbone, **settings)
    backbone = save_decoder(folder / "base")
    columns = {"prompt": "source", "answer": "target", "separator": "", "block_size": 12}
    data = LanguageData(tokenizer=backbone, packing=kind, **columns, **settings)  # type: ignore[arg-type]
    return CausalLM(backbone, lr=0.02), data


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("kind", ["seq2seq", "none", "documents"])
def test_adapters_resume_bit_for_bit_inside_an_epoch(kind: str, tmp_path: Path) -> None:
    """With validation that writes, and a checkpoint of adapters only."""

    def run(ckpt_path: str | None = None, **settings: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        module, data = of_pairs(kind, tmp_path)
        callbacks = [*presets.lora(rank=2, dropout=0.2), *settings.pop("callbacks", [])]
        trainer = Trainer(max_epochs=2, **SAVING, callbacks=callbacks, **settings)
        trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
        return {name: p.detach().clone() for name, p in module.named_parameters()}

    full = run(callbacks=[ModelCheckpoint(tmp_path / "all", "stop-{step}", every_n_train_steps=2, save_top_k=-1)])
    resumed = run(str(tmp_path / "all" / "stop-step=2.ckpt"), enable_checkpointing=False)
    assert full.keys() == resumed.keys()
    assert [name for name in full if not torch.equal(full[name], resumed[name])] == []


def test_overfitting_repeats_the_same_batches(data: Any) -> None:
    reader = Reader()
    fit(reader, data(), overfit_batches=2)
    assert [epoch for epoch, _ in reader.seen] == [0, 0, 1, 1, 2, 2]
    assert len({str(rows) for _, rows in reader.seen}) == 2
