"""What a step of the tail costs after compaction, beside a model that was built at the final ranks.

    python benchmarks/compaction.py                     # MiniLM's shape
    python benchmarks/compaction.py --shape 4x768 --rounds 40

A real fit prunes dynamic DoRA from 12 to 8 with `RankPruning(compact="final")` and stops in the tail. Its model and its
very optimizer then take turns with a model that had each layer's final rank from the start, and with one that kept the
masks: one step each, in a new order every round, in one process with one thread. A ratio is taken within a round.
"""

from __future__ import annotations

import argparse
import logging
import statistics
from collections.abc import Sequence
from functools import partial

import torch
from lightning.pytorch import LightningModule, Trainer
from step_time import CLOCKS, paired, ratio
from step_time_fit import Classifier
from step_time_rows import ALPHA, ENCODER_LINEARS, RANK, SHAPES, START_RANK, Row, Shape
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_peft import AdapterInjection, Budget, DynamicDoRA, RankBudget, RankPruning, inject
from lightning_peft.adapters import dynamic_dora
from lightning_peft.callbacks.pruning import Compact

STEPS = 12  # of the fit; the final mask is there after half of them
LIMIT = 1.03  # what is promised


def trained(shape: Shape, compact: Compact) -> tuple[LightningModule, Optimizer]:
    """A module and its optimizer after a fit that has reached its final mask."""
    policy = dynamic_dora.policy(Budget(rank=RANK), warmup=0.1, tail=0.5, interval=2)
    factory = partial(DynamicDoRA, rank=START_RANK, alpha=ALPHA, dropout=0.0)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        logger=False,
        callbacks=[
            AdapterInjection(factory, [ENCODER_LINEARS], ["classifier"], verbose=False),
            RankPruning(policy, compact=compact),
        ],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Classifier(shape)
    trainer.fit(module, DataLoader([shape.inputs()] * STEPS, batch_size=None))
    return module, trainer.optimizers[0]


def built(shape: Shape, ranks: dict[str, int]) -> tuple[LightningModule, Optimizer]:
    """A module that has these ranks from the start, and its optimizer."""
    module = Classifier(shape)
    left = iter([rank for rank in ranks.values() if rank])
    targets = [name.replace(".", r"\.") for name, rank in ranks.items() if rank]
    inject(module, lambda layer: DynamicDoRA(layer, next(left), alpha=ALPHA, dropout=0.0), targets, ["classifier"])
    optimizer = module.configure_optimizers()
    assert isinstance(optimizer, Optimizer)
    return module, optimizer


def row(shape: Shape, module: LightningModule, optimizer: Optimizer) -> Row:
    """Forward, backward and the optimizer's step, as in the tail: no scores, no term."""
    inputs = shape.inputs()

    def step(number: int) -> None:
        optimizer.zero_grad(set_to_none=True)
        module.training_step(inputs, number).backward()
        optimizer.step()

    return Row(step, sum(p.numel() for p in trainable(module)))


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that are trained."""
    return [p for p in module.parameters() if p.requires_grad]


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the optimizer's state."""
    return sum(t.numel() * t.element_size() for entry in optimizer.state.values() for t in entry.values())


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, train, time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["minilm"], help="encoders")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps of every row; at least 2")
    parser.add_argument("--warmup", type=int, default=2, help="steps of every row before the timed ones")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="CPU time of the process, or wall time")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2 to have quartiles. Got {arguments.rounds}.")
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for name in arguments.shape:
        shape = SHAPES[name]
        pairs = {"compacted": trained(shape, "final"), "masked": trained(shape, "never")}
        ranks = RankBudget.of(pairs["compacted"][0]).ranks()
        pairs["built"] = built(shape, ranks)
        rows = {each: row(shape, *pair) for each, pair in pairs.items()}
        times = paired(rows, arguments.rounds, arguments.warmup, arguments.clock)
        lines = [f"### {name}: ranks {min(ranks.values())} to {max(ranks.values())}, {sum(ranks.values())} in all", ""]
        lines += ["| tail step | trainable | optimizer state, bytes | median ms |", "|---|---:|---:|---:|"]
        for each, (_, optimizer) in pairs.items():
            median = 1e3 * statistics.median(times[each])
            lines.append(f"| {each} | {rows[each].trainable:,} | {state_bytes(optimizer):,} | {median:.1f} |")
        lines += ["", "| ratio | median [middle half] | target |", "|---|---:|---:|"]
        for one, other, limit in (("compacted", "built", LIMIT), ("masked", "built", None)):
            middle, low, high = ratio(times, one, other)
            target = "" if limit is None else f"≤ {limit:.2f} {'met' if middle <= limit else 'MISSED'}"
            lines.append(f"| {one} ÷ {other} | {middle:.3f} [{low:.3f}, {high:.3f}] | {target} |")
        print("\n".join(lines), end="\n\n", flush=True)


if __name__ == "__main__":
    main()
