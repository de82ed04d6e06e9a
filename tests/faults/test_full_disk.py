"""A disk that is full, for real: the error names the file, what was there before stays, and the run goes on exactly."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import LoRA, inject, presets, save_merged, to_hf_peft

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # the resumed run saves nothing, so it does without the ModelCheckpoint
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system is not allowed here; the test with a limit on a file's size always runs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def fill(disk: Path, leave: int = 8192) -> None:
    """Take all space but `leave` bytes, so that a file is begun and cannot be finished."""
    with open(disk / "ballast", "wb", buffering=0) as ballast:
        with pytest.raises(OSError, match="No space left on device"):
            while True:
                ballast.write(bytes(4096))
        ballast.truncate(max(0, ballast.tell() - leave))


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.2), nn.Linear(16, 8), nn.Linear(8, 1))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = (self.net(batch) - batch.sum(1, keepdim=True).sin()).square().mean()
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
        return DataLoader(x, batch_size=4, shuffle=True)  # type: ignore[arg-type]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


class FillAt(L.Callback):
    def __init__(self, step: int, disk: Path) -> None:
        self.step, self.disk = step, disk

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            fill(self.disk)


def run(*extra: L.Callback, ckpt_path: Path | None = None) -> dict[str, Tensor]:
    torch.manual_seed(5 if ckpt_path is None else 77)
    net = Net()
    L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in extra),
        callbacks=[*presets.dynamic_dora(final_rank=2, interval=2), *extra],
    ).fit(net, ckpt_path=ckpt_path)  # fmt: skip
    return net.state_dict() | {"random": torch.get_rng_state()}


@pytest.mark.parametrize("last", [True, "link"])
def test_while_a_checkpoint_is_written(small_disk: Path, last: Literal["link"] | bool) -> None:
    whole = run()
    folder = small_disk / "checkpoints"
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=5, save_top_k=1, save_last=last)
    says = (
        r"step=15.ckpt could not be written: No space left on device\. What it was before stays\. Free space there, or "
        r"write to another disk\."
    )
    with pytest.raises(OSError, match=says) as caught:
        run(saver, FillAt(12, small_disk))
    assert caught.value.errno == errno.ENOSPC
    # The one before is removed when the new one is there, and only then; the last one still is what it was.
    assert sorted(os.listdir(folder)) == ["last.ckpt", "step=10.ckpt"]
    for name in ("last.ckpt", "step=10.ckpt"):
        assert torch.load(folder / name, weights_only=True)["global_step"] == 10
        resumed = run(ckpt_path=folder / name)
        assert not [key for key in whole if not torch.equal(whole[key], resumed[key])]


class LimitAt(L.Callback):
    """From this step on no file of this process may grow beyond some bytes."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == 12:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_beyond_a_limit_on_the_size_of_files(job: Any, uninterrupted: Any, same: Callable[..., None]) -> None:
    limited = job(1)
    (process,) = limited.start(extra=lambda rank: [LimitAt()])
    limited.finish([process])
    assert process.exitcode == 1
    assert "step=15.ckpt could not be written: File too large. What it was before stays. Free" in limited.logs()
    assert limited.checkpoints() == ["step=10.ckpt", "step=5.ckpt"]
    assert not list(limited.folder.glob(".*"))
    same(limited.run(ckpt_path=limited.folder / "step=10.ckpt"), uninterrupted(1))


@pytest.mark.parametrize("export", [to_hf_peft, save_merged])
def test_while_an_export_is_written(small_disk: Path, export: Callable[..., Any]) -> None:
    config = BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    model = BertForSequenceClassification(config).eval()
    inject(model, partial(LoRA, rank=4))
    export(model, small_disk / "earlier")
    before = {path.name: path.read_bytes() for path in (small_disk / "earlier").iterdir()}
    fill(small_disk)
    for name in ("earlier", "another"):
        with pytest.raises(OSError, match=rf"disk/{name} could not be written: .*No space left on device.*Free space"):
            export(model, small_disk / name)
    assert {path.name: path.read_bytes() for path in (small_disk / "earlier").iterdir()} == before
    assert sorted(os.listdir(small_disk)) == ["ballast", "earlier"]
