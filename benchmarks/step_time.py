"""What a training step costs: adapters beside HF PEFT's, and beside the least that any adapter could cost.

    python benchmarks/step_time.py                       # both encoders, three Markdown tables each
    python benchmarks/step_time.py --shape minilm --rows floor peft-lora lora --rounds 40
    python benchmarks/step_time.py --callbacks           # share of a real fit's step that our callbacks take

Absolute times say little on a shared machine, so the rows of a table live in one process with one thread and take
turns, one step each, in a new order every round. A ratio is taken within a round; the table gives the median over
rounds and the middle half in brackets. The clock is the CPU time of the process, which a busy neighbour disturbs less
than wall time; still, one that fills caches and memory slows what is bound by memory, as adapters are, more than the
floor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from step_time_rows import ROWS, SHAPES, Row, Run

RESULTS = Path(__file__).parent / "results" / "step_time.jsonl"
CLOCKS = {"cpu": time.process_time, "wall": time.perf_counter}

# Rows that take turns: few at a time, because every other row's step leaves its own data in the cache.
GROUPS = (
    ("floor", "peft-lora", "lora"),
    ("floor", "peft-adalora", "adalora", "dora"),
    ("peft-lora", "peft-decomposed", "lora", "decomposed"),
    ("no-gate", "dora-gate", "dora-no-dem", "dora"),
)
# What is promised: (row, against, {shape: at most}).
TARGETS = (
    ("lora", "peft-lora", {"minilm": 0.95, "4x768": 0.95}),
    ("lora", "floor", {"minilm": 1.20, "4x768": 1.08}),
    ("adalora", "peft-adalora", {"minilm": 0.85, "4x768": 0.85}),
    ("decomposed", "lora", {"minilm": 1.15, "4x768": 1.15}),
    ("dora", "peft-adalora", {"minilm": 0.85, "4x768": 0.85}),
    ("dora-no-dem", "no-gate", {"minilm": 1.03, "4x768": 1.03}),
)
# Shown beside them.
OTHERS = (("peft-lora", "floor"), ("dora", "dora-no-dem"), ("dora-no-dem", "dora-gate"), ("dora-gate", "no-gate"))
OTHERS += (("adalora", "floor"),)
OTHERS += (("peft-decomposed", "peft-lora"), ("decomposed", "peft-decomposed"))
OTHERS += (("no-gate", "plain"), ("dora", "floor"), ("peft-adalora", "floor"))

Times = dict[str, list[float]]


def paired(rows: Mapping[str, Row], rounds: int, warmup: int, clock: str) -> Times:
    """Seconds of every row's step in every round; rows take turns, in a shuffled order."""
    order, shuffle, now = list(rows), random.Random(0).shuffle, CLOCKS[clock]
    times: Times = {name: [] for name in rows}
    for number in range(1, warmup + rounds + 1):
        shuffle(order)
        for name in order:
            start = now()
            rows[name].step(number)
            seconds = now() - start
            if number > warmup:
                times[name].append(seconds)
    return times


def ratio(times: Times, row: str, against: str) -> tuple[float, float, float]:
    """Median, lower and upper quartile of the ratio within a round."""
    ratios = [a / b for a, b in zip(times[row], times[against], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return middle, low, high


def table(times: Times, trainable: Mapping[str, int], shape: str, dropout: float) -> str:
    """Medians per row, then the pairs that matter, as Markdown."""
    base = "floor" if "floor" in times else next(iter(times))
    lines = [
        f"### {shape}",
        "",
        f"| step | trainable | median ms | mean | least | ÷ {base} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, values in times.items():
        middle, low, high = ratio(times, name, base)
        cost = " | ".join(f"{1e3 * of(values):.1f}" for of in (statistics.median, statistics.mean, min))
        lines.append(f"| {ROWS[name][0]} | {trainable[name]:,} | {cost} | {middle:.3f} [{low:.3f}, {high:.3f}] |")
    lines += ["", "| ratio | median [middle half] | target |", "|---|---:|---:|"]
    for row, against, limit in pairs(times, shape, dropout):
        middle, low, high = ratio(times, row, against)
        target = "" if limit is None else f"≤ {limit:.2f} {'met' if middle <= limit else 'MISSED'}"
        lines.append(f"| {row} ÷ {against} | {middle:.3f} [{low:.3f}, {high:.3f}] | {target} |")
    return "\n".join(lines)


def pairs(times: Times, shape: str, dropout: float) -> list[tuple[str, str, float | None]]:
    """The pairs to report whose rows were timed, with their limit if they have one."""
    # Drawing the noise of dropout costs more on a CPU than the whole adapter, and the floor has none.
    found: list[tuple[str, str, float | None]] = [
        (row, against, None if dropout and against == "floor" else limits[shape]) for row, against, limits in TARGETS
    ]
    found += [(row, against, None) for row, against in OTHERS]
    return [pair for pair in found if pair[0] in times and pair[1] in times]


def record(times: Times, shape: str, arguments: argparse.Namespace) -> None:
    """Append one JSON line: settings, versions, medians and ratios."""
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "shape": shape,
        "rounds": arguments.rounds,
        "dropout": arguments.dropout,
        "clock": arguments.clock,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),
        "median_ms": {name: round(1e3 * statistics.median(values), 3) for name, values in times.items()},
        "least_ms": {name: round(1e3 * min(values), 3) for name, values in times.items()},
        "ratios": {
            f"{row}/{against}": [round(number, 4) for number in ratio(times, row, against)]
            for row, against, _ in pairs(times, shape, arguments.dropout)
        },
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, time, print and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES), help="encoders")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="rows to time together; without it, three groups")
    parser.add_argument("--rounds", type=int, default=15, help="timed steps of every row; at least 2")
    parser.add_argument("--warmup", type=int, default=2, help="steps of every row before the timed ones")
    parser.add_argument("--dropout", type=float, default=0.0, help="adapter dropout, the same for every row")
    parser.add_argument("--clock", choices=CLOCKS, default="cpu", help="CPU time of the process, or wall time")
    parser.add_argument("--no-record", action="store_true", help=f"do not append to {RESULTS.name}")
    parser.add_argument("--callbacks", action="store_true", help="instead: our callbacks' share of a real fit's step")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2 to have quartiles. Got {arguments.rounds}.")
    torch.set_num_threads(1)
    if arguments.callbacks:
        from step_time_fit import share_of_fit

        for shape in arguments.shape:
            print(share_of_fit(SHAPES[shape], shape, arguments.rounds), end="\n\n", flush=True)
        return
    groups = GROUPS if arguments.rows is None else (arguments.rows,)
    for shape, group in itertools.product(arguments.shape, groups):
        run = Run(SHAPES[shape], arguments.warmup + arguments.rounds, arguments.dropout)
        rows = {name: ROWS[name][1](run) for name in group}
        times = paired(rows, arguments.rounds, arguments.warmup, arguments.clock)
        trainable = {name: row.trainable for name, row in rows.items()}
        print(table(times, trainable, shape, run.dropout), end="\n\n", flush=True)
        if not arguments.no_record:
            record(times, shape, arguments)


if __name__ == "__main__":
    main()
