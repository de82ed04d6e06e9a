"""A small job that real processes run: alone or as two that train together, as torchrun starts them."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_peft import RankPruning, presets

STEPS, EVERY = 24, 5  # 3 epochs of 8 steps; a checkpoint every 5; events at 3, 5, ..., 17, 18


class Net(L.LightningModule):
    """Dropout and an adaptive optimizer: what a resumed run could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Dropout(0.2), nn.Linear(24, 16), nn.Linear(16, 4))
        self.in_backward: Callable[[Tensor], None] | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        hidden = self.net[:3](batch[0])
        if self.in_backward is not None:
            hidden.register_hook(self.in_backward)
        return nn.functional.cross_entropy(self.net[3:](hidden), batch[1])

    def train_dataloader(self) -> DataLoader[Any]:
        generator = torch.Generator().manual_seed(0)
        x, y = torch.randn(64, 16, generator=generator), torch.randint(0, 4, (64,), generator=generator)
        return DataLoader(TensorDataset(x, y), batch_size=8 // self.trainer.world_size, shuffle=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


def everything(trainer: L.Trainer) -> dict[str, Tensor]:
    """All that a run leaves: weights, masks, optimizer state, the running importance, and the random numbers."""
    found = {name: value.clone() for name, value in trainer.lightning_module.state_dict().items()}
    for i, state in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"optimizer.{i}.{key}": torch.as_tensor(value).clone() for key, value in state.items()}
    pruning = next(c for c in trainer.callbacks if isinstance(c, RankPruning))
    found |= {f"worth.{name}": worth for name, worth in pruning.policy.state_dict()["importance"]["worth"].items()}
    return found | {"step": torch.tensor(trainer.global_step), "random": torch.get_rng_state()}


Extra = Callable[[int], list[L.Callback]]


def train(folder: Path, rank: int, world: int, extra: Extra, ckpt_path: Path | None, ours_last: bool) -> None:
    """One process of the job; leaves what it has in the end as `end-<rank>.pt`."""
    strategy: Any = "auto"
    if world > 1:
        strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment())
    preset = presets.dynamic_dora(final_rank=4, interval=2, tail=0.25)
    torch.manual_seed(5 if ckpt_path is None else 77)  # another process has other random numbers
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", devices=world, strategy=strategy, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=folder,
        callbacks=[
            *([*extra(rank), *preset] if ours_last else [*preset, *extra(rank)]),
            ModelCheckpoint(folder, filename="{step}", every_n_train_steps=EVERY, save_top_k=-1),
        ],
    )  # fmt: skip
    trainer.fit(Net(), ckpt_path=ckpt_path)
    torch.save(everything(trainer), folder / f"end-{rank}.pt")


@dataclass
class Job:
    """Real processes that run :func:`train` in one folder."""

    folder: Path
    world: int
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[BaseProcess] = field(default_factory=list)

    def start(
        self, extra: Extra = lambda rank: [], ckpt_path: Path | None = None, ours_last: bool = False
    ) -> list[BaseProcess]:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        for rank in range(self.world):
            process = multiprocessing.get_context("fork").Process(
                target=self._run, args=(rank, port, extra, ckpt_path, ours_last), daemon=True
            )
            process.start()
            self.processes.append(process)
        return self.processes[-self.world :]

    def _run(self, rank: int, port: int, *arguments: Any) -> None:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world), "GROUP_RANK": "0",
            "LOCAL_WORLD_SIZE": str(self.world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        os.environ |= self.environment
        log = os.open(self.folder / f"log-{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        train(self.folder, rank, self.world, *arguments)

    def finish(self, processes: list[BaseProcess], seconds: float = 120) -> list[float]:
        """Wait for all of them; when each ended, on one clock. One that does not end in time fails the test."""
        ends, limit = [0.0] * len(processes), time.monotonic() + seconds
        while not all(ends):
            assert time.monotonic() < limit, f"a process hangs: {self.logs()}"
            for i, process in enumerate(processes):
                process.join(0.01)
                if process.exitcode is not None and not ends[i]:
                    ends[i] = time.monotonic()
        return ends

    def run(self, **kwargs: Any) -> list[dict[str, Tensor]]:
        """Train to the end: what each process has then."""
        processes = self.start(**kwargs)
        self.finish(processes)
        assert [process.exitcode for process in processes] == [0] * self.world, self.logs()
        return [torch.load(self.folder / f"end-{rank}.pt", weights_only=True) for rank in range(self.world)]

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("log-*.txt")))

    def checkpoints(self) -> list[str]:
        """Names of the checkpoints, all of which torch can read."""
        paths = sorted(self.folder.glob("*.ckpt"))
        for path in paths:
            torch.load(path, weights_only=True)
        return [path.name for path in paths]


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Callable[[int], Job]]:
    """Makes a job of some processes, none of which outlives the test."""
    jobs: list[Job] = []

    def make(world: int) -> Job:
        jobs.append(Job(tmp_path, world))
        return jobs[-1]

    yield make
    for process in [process for each in jobs for process in each.processes]:
        if process.is_alive():
            process.kill()
        process.join()


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Tensor]]]:
    """What a job that nothing disturbs has in the end, per process."""
    ends: dict[int, list[dict[str, Tensor]]] = {}

    def ends_of(world: int) -> list[dict[str, Tensor]]:
        if world not in ends:
            ends[world] = Job(tmp_path_factory.mktemp(f"uninterrupted-{world}"), world).run()
        return ends[world]

    return ends_of


@pytest.fixture
def same() -> Callable[[list[dict[str, Tensor]], list[dict[str, Tensor]]], None]:
    """Asserts that two jobs have, process for process, bit for bit the same in the end."""

    def compare(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> None:
        for a, b in zip(one, other, strict=True):
            assert int(a["step"]) == STEPS
            assert a.keys() == b.keys()
            assert not [name for name in a if not torch.equal(a[name], b[name])]

    return compare
