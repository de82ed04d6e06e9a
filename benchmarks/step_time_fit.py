"""What scores, cuts and the monitor take of a step in a real fit: every hook of every callback on the CPU clock."""

from __future__ import annotations

import logging
import tempfile
import time
from collections import defaultdict

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.profilers import Profiler
from step_time_rows import ENCODER_LINEARS, RANK, Shape
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_peft import presets

OURS = ("AdapterInjection", "RankPruning", "Regularization", "RankMonitor", "AdapterCheckpoint")


class Clock(Profiler):
    """CPU seconds of every action that the Trainer names: `run_training_batch`, `[Callback]RankMonitor.on_...`."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self._started: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        """Called by the Trainer before an action."""
        self._started[action_name] = time.process_time()

    def stop(self, action_name: str) -> None:
        """Called by the Trainer after it."""
        self.seconds[action_name].append(time.process_time() - self._started.pop(action_name))


class Classifier(LightningModule):
    """The encoder of the other rows as a user's module."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.net = shape.encoder()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The model's own loss."""
        loss: Tensor = self.net(**batch).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW as in the other rows."""
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-4, fused=True)


def share_of_fit(shape: Shape, title: str, steps: int) -> str:
    """Train with the preset for dynamic DoRA and a TensorBoard logger; Markdown table of what our callbacks took."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    clock = Clock()
    batches = DataLoader([shape.inputs()] * steps, batch_size=None)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=TensorBoardLogger(folder),
            callbacks=presets.dynamic_dora(RANK, dropout=0.0, targets=[ENCODER_LINEARS], train=["classifier"]),
            profiler=clock,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Classifier(shape), batches)
    return table(clock, title, steps)


def table(clock: Clock, title: str, steps: int) -> str:
    """Mean per step of each callback's hooks that run in the training loop, and their share of the step."""
    hooks = {"on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end", "on_before_zero_grad"}
    hooks |= {"on_before_backward", "on_after_backward"}
    took: dict[str, float] = dict.fromkeys(OURS, 0.0)
    worst: dict[str, float] = dict.fromkeys(OURS, 0.0)
    for action, seconds in clock.seconds.items():
        owner, _, hook = action.removeprefix("[Callback]").rpartition(".")
        name = owner.partition("{")[0]
        if action.startswith("[Callback]") and hook in hooks and name in took:
            took[name] += sum(seconds)
            worst[name] = max(worst[name], *seconds)
    # The first steps are slower: memory is new.
    step = sorted(clock.seconds["run_training_batch"])[steps // 2]
    lines = [f"### {title}: a fit of {steps} steps, {1e3 * step:.0f} ms each", ""]
    lines += ["| callback | mean ms per step | worst ms | share of a step |", "|---|---:|---:|---:|"]
    for name, seconds in took.items():
        mean = seconds / steps
        lines.append(f"| {name} | {1e3 * mean:.2f} | {1e3 * worst[name]:.1f} | {mean / step:.2%} |")
    total = sum(took.values()) / steps
    lines.append(f"| together | {1e3 * total:.2f} | | {total / step:.2%} |")
    return "\n".join(lines)
