"""`kill -9` at the worst places: the other process ends soon, no checkpoint is harmed, and the run goes on exactly."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable
from typing import Any

import lightning.pytorch as L
import pytest
from torch import Tensor

import lightning_peft.atomic
from lightning_peft import RankPruning

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]
ENDS_WITHIN = 30  # seconds; a survivor that waits for the time-out of the process group would take half an hour
STEP = 13  # of the fault, in the middle of the second epoch and an event; the last checkpoint is of step 10


def kill_myself(*args: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class InBackward(L.Callback):
    """Kills its process when half of the backward pass of a step is done."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STEP - 1:
            pl_module.in_backward = kill_myself


class InEvent(L.Callback):
    """Kills its process when components are chosen and the masks are not yet written."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STEP - 1:
            pruning = next(c for c in trainer.callbacks if isinstance(c, RankPruning))
            pruning.policy.apply = kill_myself  # type: ignore[method-assign]


class HalfAFile(io.FileIO):
    """Kills its process when half of the bytes are on the disk."""

    def write(self, data: Any) -> int:
        super().write(memoryview(data)[: len(data) // 2])
        os.fsync(self.fileno())
        kill_myself()
        raise AssertionError


class InCheckpoint(L.Callback):
    """Kills its process in the middle of writing the checkpoint of step 15."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == STEP - 1:
            vars(lightning_peft.atomic)["open"] = HalfAFile  # in this process, which is a child of the test's


def killed(job: Any, fault: type[L.Callback], victim: int) -> tuple[Any, float]:
    """Run a job until one of its processes is killed; how many seconds later the other one has ended."""
    processes = job.start(extra=lambda rank: [fault()] if rank == victim else [])
    ends = job.finish(processes)
    assert processes[victim].exitcode == -signal.SIGKILL, job.logs()
    for rank, process in enumerate(processes):
        if rank != victim:
            assert process.exitcode == 1, job.logs()
            log = (job.folder / f"log-{rank}.txt").read_text()
            assert "Connection closed by peer" in log or "Connection reset by peer" in log, log
    assert job.checkpoints() == ["step=10.ckpt", "step=5.ckpt"]
    assert not list(job.folder.glob("end-*"))
    return job, max(ends) - ends[victim]


@pytest.mark.parametrize("fault", [InBackward, InEvent, InCheckpoint])
def test_a_killed_process(fault: type[L.Callback], job: Any, uninterrupted: Any, same: Callable[..., None]) -> None:
    killed_job, _ = killed(job(1), fault, 0)
    parts = list(killed_job.folder.glob(".*.part"))
    assert len(parts) == (fault is InCheckpoint)
    whole = (killed_job.folder / "step=10.ckpt").stat().st_size
    assert all(0.4 * whole < part.stat().st_size < 0.6 * whole for part in parts)  # it was in the middle
    same(killed_job.run(ckpt_path=killed_job.folder / "step=10.ckpt"), uninterrupted(1))


@pytest.mark.dist
@pytest.mark.parametrize(("fault", "victim"), [(InBackward, 0), (InBackward, 1), (InEvent, 1), (InCheckpoint, 0)])
def test_one_killed_process_of_two(
    fault: type[L.Callback],
    victim: int,
    job: Any,
    uninterrupted: Callable[[int], list[dict[str, Tensor]]],
    same: Callable[..., None],
    record_property: Callable[[str, object], None],
) -> None:
    killed_job, seconds = killed(job(2), fault, victim)
    record_property("seconds_until_the_other_process_ended", seconds)
    print(f"{fault.__name__}, rank {victim}: the other process ended {seconds:.2f} s later")
    assert seconds < ENDS_WITHIN
    same(killed_job.run(ckpt_path=killed_job.folder / "step=10.ckpt"), uninterrupted(2))
