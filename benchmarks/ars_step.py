"""What a step that learns masks (ARS) takes, beside a step of dense fine-tuning, and what of it is the hypernetwork's.

    python benchmarks/ars_step.py [--layers 12] [--rounds 3]

The encoder layers of BERT-base, in float32 on one thread, with the squares of the last hidden state for a loss: dense
and trained by AdamW; or factorised at full rank and frozen, with masks of a hypernetwork that Adam trains. The two take
turns; a ratio is taken within a round. Seconds are of CPU time. The factors' values are random: no step depends on
them. The hypernetwork's own part (draw, both terms, their backward, Adam) is also timed by itself. Each run appends a
line to `results/ars_step.jsonl`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median

import runs
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightning_peft import BudgetPenalty, Factorized, MaskAlignment, RankBudget, inject
from lightning_peft.adapters import ars

RESULTS = runs.RESULTS / f"{Path(__file__).stem}.jsonl"


def seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def dense_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model(ids).last_hidden_state.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def factorised(model: nn.Module) -> RankBudget:
    """All linear layers of the encoder as frozen factors of full rank."""
    inject(model, partial(Factorized.unfilled, trained=False), ["query", "key", "value", "dense"], train=[])
    budget = RankBudget.of(model)
    for site in budget.values():
        site.adapter.fill(
            *(torch.randn_like(part) * 0.03 for part in (site.adapter.U, site.gate.gain, site.adapter.Vh))
        )
    return budget


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(num_hidden_layers=options.layers)
    dense, masked = (BertModel(config, add_pooling_layer=False).eval() for _ in range(2))
    budget = factorised(masked)
    learned = ars.policy(0.48)
    sampler = learned.build(budget)
    learned.track(budget)
    penalty, alignment = BudgetPenalty(0.48), MaskAlignment()
    ids = torch.randint(1000, 20000, (options.batch, options.length))
    fine_tuning = torch.optim.AdamW(dense.parameters(), lr=2e-5, fused=True)
    adam = torch.optim.Adam(sampler.parameters(), lr=1e-3, fused=True)

    def mask_step(number: int, task: bool = True) -> None:
        learned.draw(number)
        loss = 16 * penalty(masked, None, None) + 10 * alignment(masked, None, None)
        if task:
            loss = loss + masked(ids).last_hidden_state.square().mean()
        loss.backward()
        adam.step()
        adam.zero_grad()
        learned.clear()

    times: dict[str, list[float]] = {"dense": [], "masks": [], "hypernetwork": []}
    for number in range(options.rounds + 1):
        now = {
            "dense": seconds(partial(dense_step, dense, fine_tuning, ids)),
            "masks": seconds(partial(mask_step, number)),
            "hypernetwork": seconds(partial(mask_step, number, task=False)),
        }
        for name, taken in now.items():
            times[name] += [taken] if number else []  # the first round is not counted
    selection = median(seconds(lambda: learned.decide(0, 100)) for _ in range(5))
    own = sum(p.numel() for p in sampler.parameters())
    print(f"{len(budget)} layers, {options.batch} x {options.length} tokens, hypernetwork of {own:,} parameters")
    for name, taken in times.items():
        ratios = [a / b for a, b in zip(taken, times["dense"], strict=True)]
        print(f"{name:<13} {median(taken):6.2f} s   {median(ratios):.3f} of dense")
    print(f"a look at the ranks so far: {selection * 1000:.0f} ms")
    result = {
        **vars(options),
        "parameters": own,
        "seconds": {name: round(median(taken), 4) for name, taken in times.items()},
        "masks_over_dense": runs.beside(zip(times["dense"], times["masks"], strict=True)),
        "look_seconds": round(selection, 4),
        "versions": runs.versions("torch", "transformers"),
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    runs.append(result, RESULTS)


if __name__ == "__main__":
    main()
