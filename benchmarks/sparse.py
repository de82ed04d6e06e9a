"""What it costs to train a few entries of the weights: SpaRTA's kernels beside SHiRA, LoRA and full fine-tuning.

    python benchmarks/sparse.py                          # both tables
    python benchmarks/sparse.py layer --rounds 21        # one layer, forward and backward
    python benchmarks/sparse.py step --rounds 15         # a whole step of a 4-layer encoder, AdamW included
    python benchmarks/sparse.py table --out docs/sparse.md

Rows of a table live in one process with one thread and take turns in a new order every round; ratios are taken within a
round. The clock is the CPU time of the process. Memory is the most that a call's tensors hold at a time beyond what was
held before it, from torch's own allocations: a step's transient peak, without weights and optimizer.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]  # this checkout is what is measured

import runs  # noqa: E402
import torch  # noqa: E402
from sparse_rows import ENCODER, LAYERS, STEPS, Call, layer_call  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

RESULTS = runs.RESULTS / "sparse.jsonl"
SHAPES = ((768, 768), (3072, 768))
"""(d_out, d_in) of the layers."""
DENSITIES = (0.001, 0.01, 0.05)
STEP_DENSITIES = (0.01, 0.05)
TOKENS = 512
AIMS = (
    ("auto", "shira", "step", 0.75),
    ("auto", "shira", "held", 0.55),
    ("auto", "lora", "step", 1.05),
)
"""What is promised at 1 %: (row, against, a step's time or memory, at most)."""
CALLED = {
    "auto": "SpaRTA", "shira": "SHiRA", "lora": "LoRA", "full": "full fine-tuning", "index-put": "index_put",
    "sampled": "its sampled product", "dense": "its dense product",
}  # fmt: skip
"""Rows of whole steps, as ratios name them."""
OTHERS = (("auto", "full"), ("auto", "index-put"), ("sampled", "dense"), ("auto", "sampled"))


def taking_turns(calls: Mapping[str, Callable[[], object]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """CPU seconds of every call in every round, in a shuffled order."""
    order, shuffle = list(calls), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + warmup):
        shuffle(order)
        for name in order:
            start = time.process_time()
            calls[name]()
            if number >= warmup:
                times[name].append(time.process_time() - start)
    return times


def most_held(call: Callable[[], object]) -> int:
    """The most bytes that a call's tensors hold at a time beyond what was held before it."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = most = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def measured(calls: Mapping[str, Call], rounds: int, warmup: int) -> dict[str, dict[str, Any]]:
    """Times, memory and trained scalars of rows that take turns."""
    times = taking_turns({name: each.call for name, each in calls.items()}, rounds, warmup)
    return {
        name: {
            "least_ms": round(1e3 * min(times[name]), 3),
            "median_ms": round(1e3 * statistics.median(times[name]), 3),
            "held": most_held(each.call),
            "trainable": each.trainable,
            "seconds": [round(value, 6) for value in times[name]],
        }
        for name, each in calls.items()
    }


def layers(rounds: int, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """One layer of every shape at every density."""
    found = []
    for d_out, d_in in SHAPES:
        for density in DENSITIES:
            calls = {kind: layer_call(kind, d_out, d_in, density, TOKENS) for kind in kinds}
            rows = measured(calls, rounds, warmup=3)
            found.append({"shape": [d_out, d_in], "density": density, "tokens": TOKENS, "rows": rows})
            print(f"{d_out}x{d_in} {density:.1%}:", {kind: row["least_ms"] for kind, row in rows.items()}, flush=True)
    return found


def steps(rounds: int, kinds: Sequence[str], densities: Sequence[float]) -> list[dict[str, Any]]:
    """A whole training step at every density."""
    found = []
    for density in densities:
        calls = {kind: STEPS[kind][1](density) for kind in kinds}
        found.append({"density": density, "rows": measured(calls, rounds, warmup=2)})
        print(f"{density:.1%}:", {kind: row["least_ms"] for kind, row in found[-1]["rows"].items()}, flush=True)
        for row, against, what, most in AIMS:
            if {row, against} <= set(kinds):
                print(f"  {what} {row} / {against} {_shown(found[-1]['rows'], row, against, what)} (<= {most})")
    return found


def ratio(rows: Mapping[str, Any], row: str, against: str, what: str = "step") -> tuple[float, float, float]:
    """Median and middle half of the ratio of two rows' times within a round; of memory there is one number."""
    if what == "held":
        value = rows[row]["held"] / rows[against]["held"]
        return value, value, value
    pairs = zip(rows[row]["seconds"], rows[against]["seconds"], strict=True)
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4, method="inclusive")
    return middle, low, high


def _shown(rows: Mapping[str, Any], row: str, against: str, what: str) -> str:
    middle, low, high = ratio(rows, row, against, what)
    return f"{middle:.2f}" if what == "held" else f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def record(what: str, found: list[dict[str, Any]], rounds: int) -> None:
    """Append one line: settings, versions, what was found."""
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "what": what,
        "rounds": rounds,
        "versions": runs.versions("torch", "transformers", "peft"),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "load": round(os.getloadavg()[0], 2),
        "found": found,
    }
    runs.append(line, RESULTS)


def table() -> str:
    """What was recorded last of each kind, as a page."""
    last = {line["what"]: line for line in runs.read(RESULTS)}
    lines = [
        "# Sparse adapters: what a step costs",
        "",
        "Made by `python benchmarks/sparse.py table --out docs/sparse.md`. One thread, float32; CPU time of the "
        "process, rows take turns in one run. Memory is the most that a call's tensors hold beyond weights and "
        "optimizer state.",
        "",
    ]
    if "step" in last:
        lines += _step_table(last["step"])
        lines += _every_step([line for line in runs.read(RESULTS) if line["what"] == "step"])
    if "layer" in last:
        lines += _layer_table(last["layer"])
    return "\n".join(lines)


def _step_table(line: Mapping[str, Any]) -> list[str]:
    shape = f"{ENCODER.layers} layers of {ENCODER.width}, {ENCODER.batch} texts of {ENCODER.length} tokens"
    lines = [f"## A whole step: {shape}, AdamW included", ""]
    for point in line["found"]:
        rows = point["rows"]
        lines += [
            f"### {point['density']:.1%} of the linear layers' weights",
            "",
            "| step | trained | least ms | median ms | peak MiB |",
            "|---|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {STEPS[kind][0]} | {row['trainable']:,} | {row['least_ms']:.0f} | {row['median_ms']:.0f} | "
            f"{row['held'] / 2**20:.1f} |"
            for kind, row in rows.items()
        ]
        lines += ["", "| ratio | median [middle half] | aim |", "|---|---:|---:|"]
        for row, against, what, most in AIMS:
            if row in rows and against in rows:
                met = "met" if ratio(rows, row, against, what)[0] <= most else "missed"
                aim = f"≤ {most:.2f} {met}" if point["density"] == STEP_DENSITIES[0] else ""
                name = "time" if what == "step" else "peak memory"
                lines.append(
                    f"| {name}, {CALLED[row]} / {CALLED[against]} | {_shown(rows, row, against, what)} | {aim} |"
                )
        for row, against in OTHERS:
            if row in rows and against in rows:
                lines.append(f"| time, {CALLED[row]} / {CALLED[against]} | {_shown(rows, row, against, 'step')} | |")
        if point["density"] == STEP_DENSITIES[0] and (short := _fell_short(rows)):
            lines += ["", f"This fell short of what was asked: {'; '.join(short)}."]
        lines.append("")
    return [*lines, _how(line), ""]


def _every_step(recorded: Sequence[Mapping[str, Any]]) -> list[str]:
    """The aims in all runs that were recorded, on whichever processor: one run alone could be a lucky one."""
    heads = [
        f"{'time' if what == 'step' else 'peak'}, ÷ {CALLED[against]} (≤ {most})" for _, against, what, most in AIMS
    ]
    lines = ["### Every run that was recorded, at 1%", "", f"| when | processor | {' | '.join(heads)} |"]
    lines.append("|---|---|" + "---:|" * len(AIMS))
    for line in recorded:
        rows = next((p["rows"] for p in line["found"] if p["density"] == STEP_DENSITIES[0]), {})
        if all(name in rows for row, against, *_ in AIMS for name in (row, against)):
            cells = [_shown(rows, row, against, what) for row, against, what, _ in AIMS]
            lines.append(f"| {line['time'][:16].replace('T', ' ')} | {line['cpu']} | {' | '.join(cells)} |")
    return [*lines, ""]


def _fell_short(rows: Mapping[str, Any]) -> list[str]:
    """The aims that were missed, as the page says them."""
    found = []
    for row, against, what, most in AIMS:
        if row in rows and against in rows and (middle := ratio(rows, row, against, what)[0]) > most:
            name = "the time of a step" if what == "step" else "peak memory"
            found.append(
                f"{name} of {CALLED[row]} is {middle:.2f} times that of {CALLED[against]}, asked is {most:.2f}"
            )
    return found


def _layer_table(line: Mapping[str, Any]) -> list[str]:
    lines = [f"## One layer: forward and backward, {TOKENS} tokens", ""]
    points = {(*point["shape"], point["density"]): point["rows"] for point in line["found"]}
    kinds = list(next(iter(points.values())))
    for d_out, d_in in SHAPES:
        shown = " | ".join(f"{d:.1%}: ms | MiB" for d in DENSITIES)
        lines += [f"### {d_out} x {d_in}", "", f"| layer | {shown} |", "|---|" + "---:|" * 2 * len(DENSITIES)]
        for kind in kinds:
            cells = [points[d_out, d_in, density][kind] for density in DENSITIES]
            shown = " | ".join(f"{cell['least_ms']:.1f} | {cell['held'] / 2**20:.1f}" for cell in cells)
            lines.append(f"| {LAYERS[kind][0]} | {shown} |")
        lines.append("")
    return [*lines, "Least of all rounds. " + _how(line), ""]


def _how(line: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in line["versions"].items())
    return f"{line['rounds']} rounds; {versions}; {line['cpu']}."


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "layer", "step", "table"), default="all")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of every comparison; at least 2")
    parser.add_argument("--rows", nargs="+", choices=sorted({*LAYERS, *STEPS}), help="these rows alone")
    parser.add_argument("--densities", nargs="+", type=float, default=STEP_DENSITIES, help="of whole steps")
    parser.add_argument("--out", type=Path, help="file for the table; default: standard output")
    parser.add_argument("--no-record", action="store_true", help=f"do not append to {RESULTS.name}")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2 to have quartiles. Got {arguments.rounds}.")
    runs.one_quiet_thread()
    chosen = {what: [k for k in kinds if not arguments.rows or k in arguments.rows] for what, kinds in
              (("layer", LAYERS), ("step", STEPS))}  # fmt: skip
    if arguments.what in ("all", "step"):
        found = steps(arguments.rounds, chosen["step"], arguments.densities)
        if not arguments.no_record:
            record("step", found, arguments.rounds)
    if arguments.what in ("all", "layer"):
        found = layers(arguments.rounds, chosen["layer"])
        if not arguments.no_record:
            record("layer", found, arguments.rounds)
    if arguments.what == "table":
        if arguments.out:
            arguments.out.write_text(table() + "\n", encoding="utf-8")
        else:
            print(table())


if __name__ == "__main__":
    main()
