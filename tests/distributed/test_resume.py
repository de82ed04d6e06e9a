"""A run that was interrupted anywhere, on one process, DDP or FSDP2, ends bit for bit as one that never was."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as L
import pytest
import torch
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Dataset

from lightning_peft import (
    AdapterCheckpoint,
    AdapterInjection,
    Budget,
    Cubic,
    LoRA,
    RankPolicy,
    RankPruning,
    Taylor,
    adapter_state_dict,
    presets,
)
from lightning_peft.checkpoint import ENTRY
from lightning_peft.testing.processes import run_processes
from lightning_peft.validation import CUT

pytestmark = [
    pytest.mark.dist,
    # Lightning advises sync_dist for what is logged in validation: each process compares its own here
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]

EPOCHS, BATCHES, ACCUMULATE = 4, 11, 3  # steps after batches 3, 6, 9, 11 of an epoch: 16 in all


class Net(L.LightningModule):
    """Dropout, an adaptive optimizer and a schedule: all that a resumed run could get wrong."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.net = nn.Sequential(
                nn.Linear(8, 13), nn.ReLU(), nn.Dropout(0.2), nn.Linear(13, 12), nn.ReLU(), nn.Linear(12, 3)
            )

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log_dict({"train/loss": loss.detach(), "lr": self.lr_schedulers().get_last_lr()[0]})  # type: ignore[union-attr]
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(4 * BATCHES * self.trainer.world_size), batch_size=4, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(Noisy(4 * self.trainer.world_size), batch_size=4)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=4 * EPOCHS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ShardsItself(Net):
    """FSDP2, the head sharded as well: its gradients and its optimizer state are in pieces."""

    def configure_model(self) -> None:
        if not isinstance(next(self.parameters()), DTensor):
            mesh = self.device_mesh["data_parallel"]
            fully_shard(self.net[3], mesh=mesh)
            fully_shard(self.net, mesh=mesh)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Augmented with the global generator."""

    def __init__(self, n: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x, self.y = torch.randn(n, 8, generator=generator), torch.randint(0, 3, (n,), generator=generator)

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.x[i] + 0.1 * torch.randn(8), self.y[i]


@dataclass(frozen=True)
class Stop:
    """Where a checkpoint is written, and where the run stands there."""

    name: str
    batch: int  # batches done, counted through
    step: int  # optimizer steps done
    phase: str
    open: bool = False  # between two micro-batches of one step
    hook: str = "batch end"


# Components are chosen after steps 3, 5, 7, 9, 11 and 12; the running importance counts until then.
STOPS = [
    Stop("first micro-batch", 1, 0, "warm-up", open=True),
    Stop("warm-up, mid-accumulation", 4, 1, "warm-up", open=True),
    Stop("warm-up", 6, 2, "warm-up"),
    Stop("first event", 9, 3, "event"),
    Stop("first event, before the schedule has looked", 9, 3, "pruning", hook="batch end, first"),
    Stop("end of an epoch, its last batch", 11, 4, "pruning"),
    Stop("event", 14, 5, "event"),
    Stop("validation, mid-accumulation", 16, 5, "event", open=True, hook="validation end"),
    Stop("pruning", 17, 6, "pruning"),
    Stop("pruning, mid-accumulation", 19, 6, "pruning", open=True),
    Stop("end of an epoch, all done", 22, 8, "pruning", hook="epoch end"),
    Stop("last event, end of an epoch", 33, 12, "event"),
    Stop("mid-accumulation, validation due", 32, 11, "event", open=True),
    Stop("tail", 39, 14, "tail"),
    Stop("tail, mid-accumulation", 40, 14, "tail", open=True),
    Stop("end of training", 44, 16, "tail"),
]


class Saves(L.Callback):
    """Writes a checkpoint at every stop, and notes where the run stood."""

    def __init__(self, folder: Path, hook: str, stops: list[Stop]) -> None:
        self.folder, self.hook = folder, hook
        self.stops = {stop.batch: stop for stop in stops if stop.hook == hook}
        self.stood: dict[str, tuple[int, str, bool]] = {}

    @property
    def state_key(self) -> str:
        return self.hook

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.save(trainer, "batch end", "batch end, first")

    def on_validation_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.save(trainer, "validation end")

    def on_train_epoch_end(self, trainer: L.Trainer, *args: Any) -> None:
        self.save(trainer, "epoch end")

    def save(self, trainer: L.Trainer, *hooks: str) -> None:
        stop = self.stops.get(trainer.fit_loop.epoch_loop.batch_progress.total.ready)
        if stop is None or self.hook not in hooks:
            return
        pruning, step = pruning_of(trainer), trainer.global_step
        start, last = pruning.policy.schedule.window(pruning.total_steps)
        phase = "warm-up" if step < start else "pruning" if step <= last else "tail"
        if 0 < pruning.event_step == step:
            phase = "event"
        self.stood[stop.name] = step, phase, trainer.fit_loop._should_accumulate()
        trainer.save_checkpoint(self.folder / f"{stop.name}.ckpt")


class Lines(Logger):
    """What is logged, with the step it is logged at and the batches done by then."""

    def __init__(self) -> None:
        super().__init__()
        self.progress: Any = None
        self.lines: list[tuple[int, int | None, dict[str, float]]] = []

    @property
    def name(self) -> str:
        return "lines"

    @property
    def version(self) -> int:
        return 0

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.lines.append((self.progress.total.ready, step, dict(metrics)))


def taylor() -> list[L.Callback]:
    policy = RankPolicy(Cubic(warmup=0.2, tail=0.25), Taylor(), Budget(rank=2), interval=2)
    return [AdapterInjection(partial(LoRA, rank=3, dropout=0.1)), RankPruning(policy), AdapterCheckpoint()]


METHODS = {
    "dynamic-dora": partial(presets.dynamic_dora, final_rank=2, interval=2, warmup=0.2, tail=0.25),
    "taylor": taylor,
    "compacted": partial(presets.dynamic_dora, final_rank=2, interval=2, warmup=0.2, tail=0.25, compact="final"),
}
STRATEGIES: dict[str, tuple[int, Any]] = {
    "one": (1, lambda: "auto"),
    "ddp": (2, lambda: DDPStrategy(gradient_as_bucket_view=True)),
    "fsdp2": (2, lambda: ModelParallelStrategy(2, 1)),
}


def pruning_of(trainer: L.Trainer) -> RankPruning:
    return next(c for c in trainer.callbacks if isinstance(c, RankPruning))


def run(
    kind: str, method: str, seed: int, savers: list[Saves] | None = None, ckpt_path: Path | None = None
) -> tuple[dict[str, Any], Lines]:
    """Train, and return all that this process is left with."""
    torch.manual_seed(seed)
    world, strategy = STRATEGIES[kind]
    module = ShardsItself() if kind == "fsdp2" else Net()
    first, *rest = savers or [None]
    lines = Lines()
    trainer = L.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=world, strategy=strategy(), accumulate_grad_batches=ACCUMULATE,
        val_check_interval=5, num_sanity_val_steps=1, log_every_n_steps=1, logger=lines, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, gradient_clip_val=1.0,
        callbacks=[*([first] if first else []), *METHODS[method](), *rest],
    )  # fmt: skip
    lines.progress = trainer.fit_loop.epoch_loop.batch_progress
    trainer.fit(module, ckpt_path=ckpt_path)
    left: dict[str, Any] = {
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "random numbers": torch.get_rng_state(),
        "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        "event step": pruning_of(trainer).event_step,
    }
    left |= {f"weights {name}": local(value) for name, value in adapter_state_dict(module).items()}
    optimizer = trainer.optimizers[0].state_dict()
    left["groups"] = optimizer["param_groups"]
    for i, entry in optimizer["state"].items():
        left |= {f"optimizer {i} {key}": local(value) for key, value in entry.items()}
    worth = pruning_of(trainer).policy.state_dict()["importance"]["worth"]
    return left | {f"worth {name}": value for name, value in worth.items()}, lines


def local(value: Any) -> Any:
    value = value.to_local() if isinstance(value, DTensor) else value
    return value.detach().clone() if isinstance(value, Tensor) else value


def equal(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(a == b)


def interrupt_everywhere(kind: str, method: str, stops: list[Stop], folder: Path) -> dict[str, Any]:
    """One run that saves at all stops, and one from each: what is different, per stop."""
    rank = int(torch.distributed.get_rank()) if torch.distributed.is_initialized() else 0
    savers = [Saves(folder, hook, stops) for hook in ("batch end, first", "batch end", "validation end", "epoch end")]
    whole, lines = run(kind, method, seed=3, savers=savers)
    unwatched, _ = run(kind, method, seed=3)
    different = {"saving": [key for key in {**whole, **unwatched} if not equal(whole.get(key), unwatched.get(key))]}
    for stop in stops:
        resumed, rest = run(kind, method, seed=77 + rank, ckpt_path=folder / f"{stop.name}.ckpt")
        different[stop.name] = [key for key in {**whole, **resumed} if not equal(whole.get(key), resumed.get(key))]
        # Lines of the stop's own batch are written after its hooks, by the interrupted run. The ranks of a start are
        # told once more, with the step and the values that they had.
        restated = [line for line in rest.lines[:1] if "rank/open" in line[2] and line[0] == stop.batch]
        known = [line for line in lines.lines if "rank/open" in line[2] and line[0] <= stop.batch]
        if restated and restated[0][1:] != known[-1][1:]:
            different[stop.name].append(f"restated {restated}, known {known[-1:]}")
        if rest.lines[len(restated) :] != [line for line in lines.lines if line[0] > stop.batch]:
            different[stop.name].append("lines")
    stood = {name: where for saver in savers for name, where in saver.stood.items()}
    return {"different": different, "stood": stood, "steps": whole["step"], "lines": len(lines.lines)}


@pytest.mark.parametrize(("method", "kind"), [
    (method, kind) for method in METHODS for kind in STRATEGIES if (method, kind) != ("compacted", "fsdp2")
])  # fmt: skip
def test_interrupted_is_uninterrupted(tmp_path: Path, kind: str, method: str) -> None:
    # Taylor's importance adds to what there is in the middle of accumulation: the gradients of masks.
    stops = STOPS if method != "taylor" else [s for s in STOPS if s.open and s.phase != "tail"]
    results = run_processes(STRATEGIES[kind][0], interrupt_everywhere, kind, method, stops, tmp_path)
    for result in results:
        assert result["steps"] == 16
        assert result["stood"] == {stop.name: (stop.step, stop.phase, stop.open) for stop in stops}
        assert result["different"] == {"saving": []} | {stop.name: [] for stop in stops}
    assert results[0]["lines"] > 16
    for stop in stops:
        saved = torch.load(tmp_path / f"{stop.name}.ckpt", weights_only=True)
        assert ("lightning_peft_gradients" in saved) == stop.open, stop.name
        if stop.phase in ("warm-up", "tail"):
            assert (CUT in saved[ENTRY]) == (method == "compacted" and stop.phase == "tail"), stop.name
