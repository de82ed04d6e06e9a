"""Signals that ask a run to stop: what Lightning's own callbacks save then is enough to go on exactly."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    # Lightning, when there is an OnExceptionCheckpoint and no file of it yet
    pytest.mark.filterwarnings("ignore:.*was called without a model"),
    pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available"),
    # the resumed run is not interrupted again, so it does without the callbacks that are there for that
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]
STEP = 13  # in the middle of the second epoch; the last regular checkpoint is of step 10


class Signal(L.Callback):
    """Sends its own process a signal when a step begins, as a cluster would from outside."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == STEP - 1:
            os.kill(os.getpid(), self.number)


class SaveOnException(L.Callback):
    """A callback of somebody else, which is no Checkpoint and so keeps its place in the list."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        trainer.save_checkpoint(self.path)


def saved_by(saver: str, folder: Path) -> tuple[L.Callback, Path]:
    if saver == "OnExceptionCheckpoint":
        return OnExceptionCheckpoint(folder), folder / "on_exception.ckpt"
    if saver == "ModelCheckpoint":
        every = ModelCheckpoint(folder, filename="caught-{step}", save_on_exception=True, every_n_train_steps=100)
        return every, folder / f"caught-step={STEP}.ckpt"
    return SaveOnException(folder / "theirs.ckpt"), folder / "theirs.ckpt"


@pytest.mark.parametrize("saver", ["OnExceptionCheckpoint", "ModelCheckpoint", "theirs", "theirs, before ours"])
def test_sigterm(saver: str, job: Any, uninterrupted: Any, same: Callable[..., None]) -> None:
    run = job(1)
    callback, path = saved_by(saver, run.folder)
    (process,) = run.start(extra=lambda rank: [callback, Signal(signal.SIGTERM)], ours_last="before" in saver)
    run.finish([process])
    assert process.exitcode == 0, run.logs()  # Lightning's SIGTERMException is a SystemExit
    assert torch.load(path, weights_only=True)["global_step"] == STEP  # the step that was under way is in it
    same(run.run(ckpt_path=path), uninterrupted(1))


@pytest.mark.dist
def test_sigterm_of_two_processes(job: Any, uninterrupted: Any, same: Callable[..., None]) -> None:
    run = job(2)
    path = run.folder / "on_exception.ckpt"
    processes = run.start(extra=lambda rank: [OnExceptionCheckpoint(run.folder), Signal(signal.SIGTERM)])
    run.finish(processes)
    assert torch.load(path, weights_only=True)["global_step"] == STEP
    same(run.run(ckpt_path=path), uninterrupted(2))


def test_a_requeued_slurm_job_finds_its_checkpoint(job: Any, uninterrupted: Any, same: Callable[..., None]) -> None:
    """Lightning saves in the signal's handler, wherever the step is, and looks for the newest file itself."""
    run = job(1)
    run.environment = {
        "SLURM_JOB_ID": "7",
        "SLURM_NTASKS": "1",
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS_PER_NODE": "1",
    }
    (run.folder / f".{'0123456789abcdef' * 2}.part").write_bytes(b"half a checkpoint")  # of a process that was killed
    (process,) = run.start(extra=lambda rank: [Signal(signal.SIGUSR1), Signal(signal.SIGTERM), Stop()])
    run.finish([process])
    path = run.folder / "hpc_ckpt_1.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == STEP - 1
    same(run.run(), uninterrupted(1))


class Raise(L.Callback):
    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == STEP - 1:
            raise RuntimeError("theirs")


def test_an_exception_in_the_middle_of_a_batch(job: Any, uninterrupted: Any, same: Callable[..., None]) -> None:
    """The batch that was taken from the loader and not trained on is the first of the resumed run."""
    run = job(1)
    (process,) = run.start(extra=lambda rank: [OnExceptionCheckpoint(run.folder), Raise()])
    run.finish([process])
    assert process.exitcode == 1
    path = run.folder / "on_exception.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == STEP - 1
    same(run.run(ckpt_path=path), uninterrupted(1))


class Stop(L.Callback):
    """What SLURM does some seconds after its signals."""

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == STEP:
            os.kill(os.getpid(), signal.SIGKILL)
