"""What scoring costs: closed form against outer products, 72 layers of RoBERTa-base's shapes, 12 components each.

    python benchmarks/scoring.py [--rounds 5]

Both compute the shares of `lightning_peft.adapters.component_shares`; the second forms every component as a matrix, as
the equation is written. CPU time of this process, one thread, medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lightning_peft import DynamicDoRA, NormShare, RankBudget, inject
from lightning_peft.adapters import component_shares

SHAPES = [(768, 768)] * 4 + [
    (3072, 768),
    (768, 3072),
]  # (d_out, d_in): query, key, value, output, and the two of the FFN
LAYERS, RANK = 12, 12


def materialised(A: Tensor, B: Tensor, c: Tensor, eps: float = 1e-8) -> Tensor:
    """Shares by R matrices of d_out x d_in per layer."""
    parts = c[:, None, None] * B.t()[:, :, None] * A[:, None, :]
    return parts.flatten(1).norm(dim=1) / (parts.sum(0).norm() + eps)


def seconds(call: Callable[[], object], rounds: int) -> float:
    """Median CPU time."""
    times = []
    for _ in range(rounds + 1):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times[1:])  # the first one allocates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    layers = [nn.Linear(d_in, d_out, device="meta") for _ in range(LAYERS) for d_out, d_in in SHAPES]
    net = nn.Sequential(*layers)
    inject(net, lambda layer: DynamicDoRA(layer, rank=RANK), targets=[r"\d+"])
    net.to_empty(device="cpu")  # the base is not looked at
    generator = torch.Generator().manual_seed(0)
    budget, importance = RankBudget.of(net), NormShare()
    with torch.no_grad():
        for site in budget.values():
            site.gate.mask.fill_(1)
            for _, parameter in site.adapter.own_parameters():
                parameter.normal_(generator=generator)
        importance.track(budget)
        factors = [(s.adapter.A, s.adapter.B, s.gate.value()) for s in budget.values()]
        gap = max(float((component_shares(*f) - materialised(*f)).abs().max()) for f in factors[: len(SHAPES)])
        closed = seconds(importance.update, rounds)
        dense = seconds(lambda: [materialised(*f) for f in factors], rounds)
    print(f"{len(factors)} layers, {RANK} components each, one thread, {rounds} rounds; largest difference {gap:.1e}")
    print(f"closed form, running average included  {1e3 * closed:9.1f} ms")
    print(f"outer products                         {1e3 * dense:9.1f} ms")
    print(f"ratio                                  {dense / closed:9.0f}")


if __name__ == "__main__":
    main()
