"""What a step with a term of mutual information takes, beside a step without it.

    python benchmarks/mi_step.py [--rounds 9] [--batch 32] [--length 64]

A classifier of MiniLM's shapes (6 layers of width 384, 52 classes, as in Reuters R52), random weights, float32, one
thread; LoRA of rank 8 on all linear layers, the head trained beside them. Texts are of 16 tokens up to the length,
padded to it. Terms hear the last layer, pooled over the positions shown. With and without a term take turns in one
process, and a ratio is taken within a round. Seconds are of CPU time, as other processes may share the cores. One line
for each term is added to benchmarks/results/mi_step.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from runs import RESULTS, append, beside
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import CategoricalCLUB, LoRA, MutualInformation, Regularizer, SeparableCritic, inject

LAYER = r"encoder\.layer\.5"
CLASSES = 52
TERMS: dict[str, Callable[[], Regularizer]] = {
    "InfoNCE with labels, separable critic": lambda: MutualInformation(
        [LAYER], classes=CLASSES, critic=SeparableCritic, features=384, nats=1
    ),
    "InfoNCE with labels, cosines": lambda: MutualInformation([LAYER], classes=CLASSES, features=384, nats=1),
    "DV with labels, separable critic": lambda: MutualInformation(
        [LAYER], classes=CLASSES, estimator="dv", critic=SeparableCritic, features=384
    ),
    "CLUB of labels, one inner step": lambda: CategoricalCLUB(
        layer=LAYER, label="labels", classes=CLASSES, features=384
    ),
}


class Run:
    """A model with adapters, its optimizer, and a term or none."""

    def __init__(self, batch: dict[str, Any], term: Regularizer | None) -> None:
        config = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=CLASSES
        )
        self.model, self.batch, self.term = BertForSequenceClassification(config).train(), batch, term
        inject(self.model, partial(LoRA, rank=8))
        if term is not None:
            term.attach(self.model)
            term.begin(self.model)
        parts = [self.model, *([] if term is None else [term])]
        own = [p for part in parts for p in part.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(own, lr=1e-3, fused=True)

    def step(self) -> float:
        """Seconds of CPU time that a step takes."""
        start = time.process_time()
        if self.term is None:
            loss = self.model(**self.batch).loss
        else:
            self.term.prepare(self.model, self.batch, 1, 1)
            with self.term.watching(self.model):
                outputs = self.model(**self.batch)
            loss = outputs.loss + 0.05 * self.term(self.model, self.batch, outputs)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lengths = torch.randint(16, options.length + 1, (options.batch, 1))
    batch = {
        "input_ids": torch.randint(1000, 20000, (options.batch, options.length)),
        "attention_mask": (torch.arange(options.length) < lengths).long(),
        "labels": torch.randint(CLASSES, (options.batch,)),
    }
    print(f"{options.batch} x {options.length} tokens, {options.rounds} rounds")
    plain, runs = Run(batch, None), {name: Run(batch, make()) for name, make in TERMS.items()}
    rounds = []
    for _ in range(options.rounds + 2):  # two to warm up
        without = plain.step()
        rounds.append({name: (without, run.step()) for name, run in runs.items()})
    for name in runs:
        pairs = [each[name] for each in rounds[2:]]
        row = {
            "term": name,
            "batch": options.batch,
            "length": options.length,
            "rounds": options.rounds,
            **beside(pairs),
        }
        print(f"{name:<40} {row['seconds'] * 1000:6.0f} ms   with the term x {row['ratio']:.3f}")
        append(row, RESULTS / "mi_step.jsonl")


if __name__ == "__main__":
    main()
