"""What RankDyna's bookkeeping takes of a training step: importance at every step, and a choice at every event.

    python benchmarks/rankdyna_bookkeeping.py [--layers 12] [--steps 5]

The encoder layers of BERT-base, factorised at full rank, in float32 on one thread; the head of a classifier over them.
A step is timed as it is without RankPruning. The bookkeeping is what RankPruning adds to it, timed by itself, because
it is far below what one step differs from the next: the backward of the masks' gradients, the running average, and at
an event the sort and the masks. CPU time; a line of `results/rankdyna_bookkeeping.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from lightning_peft import Budget, Factorized, RankBudget, inject
from lightning_peft.adapters import rankdyna

RESULTS = Path(__file__).parent / "results" / "rankdyna_bookkeeping.jsonl"


def timed(action: Callable[[], object], times: int) -> float:
    """Median CPU seconds of an action, after one that is not counted."""
    taken = []
    for _ in range(times + 1):
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
    return median(taken[1:])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor) -> None:
    model(ids).last_hidden_state.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def masks_backward(budget: RankBudget) -> None:
    """What a mask that requires a gradient adds to the backward of each layer: its value's other factor, and a sum."""
    for site in budget.values():
        site.gate.value().backward(torch.ones_like(site.gate.mask))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=options.layers), add_pooling_layer=False)
    start = time.process_time()
    inject(model, Factorized, targets=["query", "key", "value", "dense"], train=[".*"])
    decomposed = time.process_time() - start
    budget = RankBudget.of(model)
    policy = rankdyna.policy(Budget(dense_share=0.5), interval=1)
    ids = torch.randint(1000, 20000, (options.batch, options.length))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    step = timed(partial(train, model, optimizer, ids), options.steps)

    policy.track(budget)
    backward = timed(partial(masks_backward, budget), 20)

    def observe() -> None:
        for site in budget.values():
            site.gate.mask.grad = torch.ones_like(site.gate.mask)
        policy.importance.update()

    average = timed(observe, 20)
    policy.importance.fold([torch.rand_like(worth) for worth in policy.importance.worth_now()])

    def choose() -> None:
        policy.decide(50, 100)

    event = timed(choose, 5)
    each = backward + average
    result = {
        "layers": options.layers, "batch": options.batch, "length": options.length, "groups": budget.capacity,
        "step_ms": 1e3 * step, "bookkeeping_ms": 1e3 * each, "share": each / step,
        "event_ms": 1e3 * event, "event_share": event / 50 / step, "decomposition_s": decomposed,
        "torch": torch.__version__, "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
    print(f"{options.layers} layers of BERT-base, {budget.capacity:,} groups, batch {options.batch} x {options.length}")
    print(f"decomposition at the start: {decomposed:.1f} s")
    print(f"training step without bookkeeping: {step * 1e3:.0f} ms")
    print(f"bookkeeping of a step: {each * 1e3:.2f} ms, {each / step:.3%} of it")
    print(f"choice at an event: {event * 1e3:.1f} ms; every 50 steps {event / 50 / step:.3%} of a step")


if __name__ == "__main__":
    main()
