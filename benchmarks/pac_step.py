"""What a step under a PAC-Bayes term takes, beside a step of the same adapter without it.

    python benchmarks/pac_step.py [--rounds 5] [--batch 16] [--length 64]

A classifier of MiniLM's shapes (6 layers of width 384, 52 classes, as in Reuters R52), random weights, float32, one
thread; LoRA on all linear layers, RLoRA on queries and values, the head trained beside them and in Q. With and without
the term take turns, and a ratio is taken within a round. Seconds are of CPU time; a row is a line of
`results/pac_step.jsonl`.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from typing import Any

import torch
from runs import RESULTS, append, beside
from transformers import BertConfig, BertForSequenceClassification

from lightning_peft import LoRA, PACBayes, RLoRA, inject
from lightning_peft.adapters.base import AdapterFactory
from lightning_peft.regularizers.pac_bayes import Unit


class Run:
    """A model with adapters, its optimizer, and a term or none."""

    def __init__(
        self, adapter: AdapterFactory, targets: list[str] | None, batch: dict[str, Any], unit: Unit | None
    ) -> None:
        config = BertConfig(
            hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=52
        )
        self.model, self.batch, self.term = BertForSequenceClassification(config).eval(), batch, None
        inject(self.model, adapter, targets)
        own = [p for p in self.model.parameters() if p.requires_grad]
        if unit is not None:
            self.term = PACBayes("f_quad", examples=6532, unit=unit)
            self.term.attach(self.model)
            own += list(self.term.parameters())
        self.optimizer = torch.optim.AdamW(own, lr=1e-3, fused=True)

    def step(self) -> float:
        start = time.process_time()
        if self.term is None:
            self.model(**self.batch).loss.backward()
        else:
            self.term.prepare(self.model, self.batch, 1, 1)
            with self.term.watching(self.model):
                outputs = self.model(**self.batch)
            found = {"loss": outputs.loss, "logits": outputs.logits}
            (outputs.loss + self.term(self.model, self.batch, found)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ids = torch.randint(1000, 20000, (options.batch, options.length))
    batch = {"input_ids": ids, "labels": torch.randint(52, (options.batch,))}
    few = ["query", "value"]
    rows: list[tuple[str, AdapterFactory, list[str] | None, Unit]] = [
        ("LoRA, rank 8, per batch", partial(LoRA, rank=8), None, "batch"),
        ("RLoRA, rank 384, per batch", partial(RLoRA, rank=384), few, "batch"),
        ("RLoRA, rank 384, per example", partial(RLoRA, rank=384), few, "example"),
    ]
    print(f"{options.batch} x {options.length} tokens, {options.rounds} rounds")
    for name, adapter, targets, unit in rows:
        plain, bound = (Run(adapter, targets, batch, kind) for kind in (None, unit))
        k = bound.term.posterior.offset.numel()  # type: ignore[union-attr]
        pairs = [(plain.step(), bound.step()) for _ in range(options.rounds + 2)][2:]
        row = {
            "adapter": name,
            "batch": options.batch,
            "length": options.length,
            "rounds": options.rounds,
            "parameters": k,
            **beside(pairs),
        }
        print(f"{name:<30} k = {k:>9,}   {row['seconds'] * 1000:6.0f} ms   with the term x {row['ratio']:.3f}")
        append(row, RESULTS / "pac_step.jsonl")


if __name__ == "__main__":
    main()
