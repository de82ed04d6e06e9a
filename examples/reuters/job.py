"""One training run of the demo: data, classifier, a method's callbacks, a Trainer."""

from __future__ import annotations

import csv
import random
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_peft import Export, presets, to_hf_peft
from lightning_peft.head_modules import head_modules
from lightning_peft.modules import TextClassifier, TextData
from lightning_peft.modules.text_files import read_file

ENCODER = [r"encoder\.layer\..*\.(query|key|value|dense)"]  # all linear layers: attention and feed-forward


@dataclass(frozen=True)
class Method:
    """A row of the table: what it is called, and the callbacks that make it."""

    title: str
    callbacks: Callable[[], list[Callback]] | None  # None: nothing but the head trains


METHODS = {
    "frozen": Method("frozen encoder, trained head", None),
    "lora": Method("LoRA r=8", lambda: presets.lora(rank=8, targets=ENCODER)),
    "dynamic-dora": Method("dynamic DoRA 12 → 8", lambda: presets.dynamic_dora(final_rank=8, targets=ENCODER)),
    "adalora": Method("AdaLoRA 12 → 8", lambda: presets.adalora(final_rank=8, targets=ENCODER)),
    "weight-decomposed": Method(
        "weight-decomposed 12 → 8", lambda: presets.weight_decomposed(final_rank=8, targets=ENCODER)
    ),
    "weight-decomposed-fixed": Method(
        "weight-decomposed r=8", lambda: presets.weight_decomposed_fixed(rank=8, targets=ENCODER)
    ),
    "increlora": Method("IncreLoRA 1 → 8", lambda: presets.increlora(final_rank=8, targets=ENCODER)),
    "elalora": Method("ElaLoRA of 8", lambda: presets.elalora(final_rank=8, targets=ENCODER)),
    "sora": Method("SoRA from 12", lambda: presets.sora(rank=12, targets=ENCODER)),
    "eva": Method("EVA of 8", lambda: presets.eva(rank=8, targets=ENCODER)),
    "gora": Method("GoRA of 8", lambda: presets.gora(rank=8, targets=ENCODER)),
    "rlora": Method("RLoRA r=256", lambda: presets.rlora(rank=256, targets=ENCODER)),
    "sparta": Method("SpaRTA, 2 % of the entries", lambda: presets.sparta(density=0.02, targets=ENCODER)),
    "pac-bayes": Method("LoRA r=8, PAC-Bayes", lambda: presets.pac_bayes(rank=8, targets=ENCODER)),
    "pac-tuning": Method("LoRA r=8, PAC-tuning", lambda: presets.pac_tuning(rank=8, targets=ENCODER)),
    "blob": Method("BLoB r=8", lambda: presets.blob(rank=8, batch_size=32, targets=ENCODER)),
    "vib": Method("LoRA r=8, VIB", lambda: presets.vib(rank=8, targets=ENCODER)),
}


@dataclass(frozen=True)
class Job:
    """What all methods have in common."""

    encoder: str
    texts: str
    test: str
    epochs: int
    seed: int
    out: Path
    lr: float = 2e-3  # of the adapters
    head_lr: float = 5e-3  # of the new classifier: with one rate for both it is the bottleneck
    max_steps: int = -1

    @property
    def precision(self) -> Literal["bf16-mixed", "32-true"]:
        """bf16 only where the processor computes in it; emulated it is slower than float32."""
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return "bf16-mixed" if native else "32-true"


@dataclass(frozen=True)
class Result:
    """What came of one method."""

    title: str
    classifier: TextClassifier
    accuracy: float
    macro_f1: float
    errors: int
    trainable: int
    adapter_bytes: int
    step_seconds: float
    checkpoint: str
    export: Export | None


class StepClock(Callback):
    """Processor time from the start of one batch to the start of the next; steadier than a clock on a busy machine."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.times.append(time.process_time())

    def median(self) -> float:
        return statistics.median(b - a for a, b in pairwise(self.times))


def train(job: Job, name: str) -> Result:
    """Train, test and export one method."""
    method, clock = METHODS[name], StepClock()
    seed_everything(job.seed, verbose=False)
    data = TextData(job.texts, tokenizer=job.encoder, test=job.test, val_share=0.0, max_length=64, seed=job.seed)
    classifier = TextClassifier(job.encoder, data.num_labels, lr=job.lr, head_lr=job.head_lr)
    callbacks = method.callbacks() if method.callbacks else []
    if not callbacks:
        classifier.model.base_model.requires_grad_(False)

    run = f"{name}-seed{job.seed}-{time.strftime('%m%d-%H%M%S')}"
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        precision=job.precision,
        max_epochs=job.epochs,
        max_steps=job.max_steps,
        gradient_clip_val=1.0,
        callbacks=[clock, *callbacks],
        logger=TensorBoardLogger(job.out, name="tensorboard", version=run),
        log_every_n_steps=10,
        enable_checkpointing=bool(callbacks),
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    print(f"\n--- {method.title}", flush=True)
    trainer.fit(classifier, datamodule=data)
    metrics = trainer.test(classifier, datamodule=data, verbose=False)[0]

    trainable = sum(p.numel() for p in classifier.parameters() if p.requires_grad)
    # PEFT builds a linear head, and none that was put in its place: that one is in the checkpoint.
    head, folder = not head_modules(classifier), job.out / f"{name}-adapter"
    export = to_hf_peft(classifier.eval(), folder, mode="compact", head=head) if callbacks else None
    rows = len(data.test_dataloader().dataset)
    return Result(
        title=method.title,
        classifier=classifier,
        accuracy=metrics["test/accuracy"],
        macro_f1=metrics["test/macro_f1"],
        errors=round((1 - metrics["test/accuracy"]) * rows),
        trainable=trainable,
        adapter_bytes=export.bytes if export else 4 * trainable,
        step_seconds=clock.median(),
        checkpoint=trainer.checkpoint_callback.best_model_path if trainer.checkpoint_callback else "",
        export=export,
    )


def balanced(texts: str, path: Path, rows: int, seed: int) -> str:
    """Write a small training set with the same number of texts of each topic, as far as there are so many."""
    topics = defaultdict(list)
    for row in read_file(texts):
        if row.label:
            topics[row.label].append(row)
    draw = random.Random(seed)
    each = max(2, rows // len(topics))
    chosen = [row for members in topics.values() for row in draw.sample(members, min(each, len(members)))]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *chosen])
    return str(path)


def quiet() -> None:
    """One thread, and no messages that are about neither data nor training."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
