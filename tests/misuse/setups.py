"""What the tables of mistakes are made with: a small module, a Trainer, and how a mistake is told."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_peft import Budget, Cubic, LoRA, RankPolicy, RankPruning, Taylor, inject, presets

Rows = dict[str, tuple[Callable[[], object], type[Exception]]]
"""Mistake -> (what makes it, the class of what is raised or warned)."""

LORA = partial(LoRA, rank=4)


class Encoder(LightningModule):
    """A small module with names as a hub's encoder has them."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.query, self.value, self.norm = nn.Linear(8, 8), nn.Linear(8, 6), nn.LayerNorm(6)
            self.classifier = nn.Linear(6, 2)

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss: Tensor = self.classifier(self.norm(self.value(self.query(batch)))).square().mean()
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


def batches() -> DataLoader[Tensor]:
    """Twelve batches."""
    return DataLoader(torch.randn(24, 8), batch_size=2)  # type: ignore[arg-type]


def fit(module: Any, *callbacks: Any, ckpt_path: str | None = None, kind: Any = Trainer, **options: Any) -> Any:
    """Train for an epoch of twelve steps."""
    trainer = kind(
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **{"max_epochs": 1, "logger": False, **options},
    )
    trainer.fit(module, batches(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def pruning(interval: Any = 2, **budget: Any) -> RankPruning:
    return RankPruning(RankPolicy(Cubic(), Taylor(), Budget(**budget), interval=interval))


def adapted(*parts: str) -> Encoder:
    module = Encoder()
    inject(module, LORA, parts or None)
    return module


@functools.cache
def _checkpoint() -> bytes:
    with torch.random.fork_rng(devices=[]):  # the first who asks for it goes on as all others do
        fit(Encoder(), *presets.dynamic_dora(final_rank=2), max_steps=12).save_checkpoint("first.ckpt")
    return Path("first.ckpt").read_bytes()


def saved() -> str:
    """A checkpoint of dynamic DoRA at final rank 2, in the working folder."""
    content = _checkpoint()
    Path("some.ckpt").write_bytes(content)
    return "some.ckpt"


class Told(Exception):  # not an error: what the command line has said
    """What the command line says on stderr, with exit code 2."""


def cli(*arguments: str) -> None:
    """Run the command line, and raise what it says."""
    from lightning_peft import cli as command

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = command.main(list(arguments))
        except SystemExit as stopped:  # what argparse itself refuses
            code = stopped.code  # type: ignore[assignment]
    if code == 2:
        raise Told(said.getvalue().strip().splitlines()[-1])


class Once(Callback):
    """Does something at a hook."""

    def __init__(self, hook: str, action: Callable[[Any, Any], object]) -> None:
        setattr(self, hook, lambda trainer, module, *_: action(trainer, module))


def tell(wrong: Callable[[], object]) -> tuple[str, str]:
    """Make a mistake in an empty folder; the class and the sentence of what is raised, or warned."""
    with _folder(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # some sentences tell of numbers that were trained
        warnings.simplefilter("error", UserWarning)
        for advice in (
            ".*does not have many workers",
            ".*Checkpoint directory",
            "None of the inputs have requires_grad",
        ):
            warnings.filterwarnings("ignore", advice)
        try:
            wrong()
        except Exception as error:
            return type(error).__name__, " ".join(str(error).split())
    return "nothing", ""


@contextlib.contextmanager
def _folder() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(before)
