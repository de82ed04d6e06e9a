"""How much faster training steps get as RankDyna's ranks fall, where removed groups are cut out while it trains.

    python benchmarks/rankdyna_speed.py [--layers 4] [--steps 80] [--ratio 0.33] [--plot speed.png]

Layers of BERT-base with random weights and random texts: time does not depend on what is learned. One thread, float32.
A row per compaction: the share of the dense layers' parameters that is left, and the median step until the next one,
beside the dense model's own step, measured in the same way.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import lightning.pytorch as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import BertConfig, BertModel

from lightning_peft import RankBudget, presets


class Encoder(L.LightningModule):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.model = BertModel(BertConfig(num_hidden_layers=layers, vocab_size=1000), add_pooling_layer=False)

    def training_step(self, batch: Tensor) -> Tensor:
        loss: Tensor = (self.model(batch).last_hidden_state - 1).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-4, fused=True)


class Clock(L.Callback):
    """Seconds of every step, and the share of the dense parameters that its layers then had."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.began = time.process_time()

    def on_before_zero_grad(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.size = 1.0
        budget = RankBudget.of(module)
        if budget:
            self.size = sum(len(s.gate) * s.gate.cost for s in budget.values()) / budget.dense_parameters

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.rows.append((trainer.global_step, self.size, time.process_time() - self.began))


def train(options: argparse.Namespace, callbacks: Sequence[L.Callback]) -> list[tuple[int, float, float]]:
    torch.manual_seed(0)
    clock, module = Clock(), Encoder(options.layers)
    texts = torch.randint(0, 1000, (options.steps * options.batch, options.length))
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[*callbacks, clock],
    )
    trainer.fit(module, DataLoader(texts, batch_size=options.batch))  # type: ignore[arg-type]
    return clock.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--ratio", type=float, default=0.33)
    parser.add_argument("--plot", help="write a figure there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    dense = median(seconds for _, _, seconds in train(options, [])[1:])
    interval = max(1, options.steps // 20)
    rows = train(options, presets.rankdyna(options.ratio, interval=interval, warmup=0.1, tail=0.3, compact=1))
    print(f"dense step: {dense * 1e3:.0f} ms")
    print("from step | share of dense parameters | ms per step | of the dense step")
    sizes = list(dict.fromkeys(size for _, size, _ in rows))
    for size in sizes:
        steps = [(step, seconds) for step, each, seconds in rows if each == size]
        taken = median(seconds for _, seconds in steps)
        print(f"{steps[0][0]:9d} | {size:25.3f} | {taken * 1e3:11.0f} | {taken / dense:.2f}")
    if options.plot:
        import matplotlib as mpl

        mpl.use("agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
        axes.plot(
            [step for step, _, _ in rows], [seconds / dense for *_, seconds in rows], ".", label="step / dense step"
        )
        axes.step([step for step, _, _ in rows], [size for _, size, _ in rows], label="parameters / dense parameters")
        axes.axhline(1.0, color="grey", linewidth=0.8)
        axes.set_xlabel("optimizer step")
        axes.set_ylim(bottom=0)
        axes.legend()
        figure.savefig(options.plot, dpi=150)


if __name__ == "__main__":
    main()
