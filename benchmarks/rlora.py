"""RLoRA: which way to apply its projections, and what a step costs beside HF PEFT's VeRA.

    python benchmarks/rlora.py                           # both, recorded
    python benchmarks/rlora.py paths --rounds 9          # rows, kron and auto over widths, ranks and tokens
    python benchmarks/rlora.py vera                      # a step and its memory beside VeRA's, at r = 1024
    python benchmarks/rlora.py table                     # what was recorded last, as Markdown

The rows of a comparison take turns in one process with one thread, one call each in a new order every round; the clock
is the CPU time of the process. Of the ways the least time over rounds is compared, of a step the median ratio within a
round. "paths" is the update alone, without the layer that it is added to: beside it both ways are nearer to each other.
What "auto" takes is settled when an adapter is built, so its time is that of the way that it takes.
Memory is the most that a step's tensors hold at a time beyond what was held before it, from torch's own allocations.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_peft import RLoRA, inject
from lightning_peft.functional.randomized import Update, randomized_linear
from lightning_peft.functional.srht import faster_path

RESULTS = Path(__file__).parent / "results" / "rlora.jsonl"
WIDTHS = (384, 768, 1024, 4096)
RANKS = (16, 64, 128, 192, 256, 512, 1024)
TOKENS = (64, 512, 2048)
STACKS = {768: 6, 4096: 4}
"""Width of the layers of a stack -> how many."""
WITHIN, STEP, MEMORY = 1.10, 0.80, 0.60
"""What is promised: auto beside the faster way; a step's time and memory beside VeRA's."""


def timed(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of every call in every round, after one that does not count."""
    order, shuffle = list(calls), random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        shuffle(order)
        for name in order:
            start = time.process_time()
            calls[name]()
            if number:
                times[name].append(time.process_time() - start)
    return times


def update_of(adapter: RLoRA, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """Forward and backward of an adapter's update alone."""
    into, out = adapter._into, adapter._out
    assert into is not None
    value, b = adapter.gate.value().detach().requires_grad_(), adapter.b

    def call() -> None:
        randomized_linear(x, None, None, into, out, Update(value, b=b)).backward(grad)
        x.grad = value.grad = None

    return call


def paths(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of every way at every point of the grid; largest widths last."""
    found = []
    for d in WIDTHS:
        base = nn.Linear(d, d)
        for tokens in TOKENS:
            x, grad = torch.randn(tokens, d, requires_grad=True), torch.randn(tokens, d)
            for rank in RANKS:
                calls = {}
                for path in ("rows", "kron"):
                    adapter = RLoRA(base, rank=rank, path=path)  # type: ignore[arg-type]
                    nn.init.normal_(adapter.b)  # type: ignore[arg-type]
                    calls[path] = update_of(adapter, x, grad)
                # Short calls are disturbed more, and cost less.
                times = timed(calls, rounds * max(1, min(16, 2**20 // (tokens * d))))
                least = {path: round(1e3 * min(values), 3) for path, values in times.items()}
                taken = faster_path(d, rank)
                ratio = round(least[taken] / min(least.values()), 3)
                found.append({"d": d, "tokens": tokens, "rank": rank, "ms": least, "taken": taken, "auto": ratio})
                print(found[-1], flush=True)
    return found


def stack(d: int, kind: str, rank: int) -> nn.Module:
    """Frozen layers with adapters, of which the first one's input wants no gradient, as in a model."""
    torch.manual_seed(0)
    net: nn.Module = nn.Sequential(*[nn.Linear(d, d) for _ in range(STACKS[d])])
    if kind == "vera":
        from peft import VeraConfig, get_peft_model

        config = VeraConfig(r=rank, target_modules=[str(i) for i in range(STACKS[d])], save_projection=False)
        net = get_peft_model(net, config)  # type: ignore[arg-type]
    else:
        inject(net, partial(RLoRA, rank=rank), targets=[r"\d+"], train=[])
    with torch.no_grad():  # off its start, where products with zero are faster
        for name, parameter in net.named_parameters():
            if parameter.requires_grad and (name.endswith(".b") or "vera_lambda_b" in name):
                parameter.normal_(0, 0.01)
    return net


def step_of(net: nn.Module, x: Tensor) -> Callable[[], object]:
    """One step of training: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    grad = torch.randn_like(x)  # as if it came from above: a loss would hold more than the layers do

    def step() -> None:
        net(x).backward(grad)
        optimizer.step()
        optimizer.zero_grad()

    return step


def most_held(call: Callable[[], object]) -> int:
    """The most bytes that a call's tensors hold at a time beyond what was held before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        call()
    held = most = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def vera(rounds: int, rank: int = 1024, tokens: int = 512) -> list[dict[str, Any]]:
    """A step of a stack beside VeRA's: time and memory."""
    found = []
    for d in STACKS:
        x = torch.randn(tokens, d)
        steps = {kind: step_of(stack(d, kind, rank), x) for kind in ("vera", "rlora")}
        times = timed(steps, rounds if d > 1024 else 4 * rounds)
        held = {kind: most_held(step) for kind, step in steps.items()}
        ratios = [a / b for a, b in zip(times["rlora"], times["vera"], strict=True)]
        found.append(
            {
                "d": d,
                "layers": STACKS[d],
                "rank": rank,
                "tokens": tokens,
                "ms": {kind: round(1e3 * statistics.median(values), 2) for kind, values in times.items()},
                "step": [round(r, 3) for r in (statistics.median(ratios), *statistics.quantiles(ratios, n=4)[::2])],
                "held_mb": {kind: round(size / 1e6, 2) for kind, size in held.items()},
                "memory": round(held["rlora"] / held["vera"], 3),
            }
        )
        print(found[-1], flush=True)
    return found


def record(what: str, found: list[dict[str, Any]], rounds: int) -> None:
    """Append one line: settings, versions, what was found."""
    line = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "what": what,
        "rounds": rounds,
        "versions": {name: version(name) for name in ("torch", "peft")},
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "found": found,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


def table() -> str:
    """What was recorded last of each kind, as Markdown."""
    last = {(line := json.loads(text))["what"]: line for text in RESULTS.read_text().splitlines()}
    lines = [
        f"| d | tokens | {' | '.join(f'r = {rank}' for rank in RANKS)} |",
        "|---|---|" + "---|" * len(RANKS),
    ]
    points = {(p["d"], p["tokens"], p["rank"]): p for p in last["paths"]["found"]}
    for d in WIDTHS:
        for tokens in TOKENS:
            cells = []
            for rank in RANKS:
                point = points[d, tokens, rank]
                both = [f"{point['ms'][path]:.3g}" for path in ("rows", "kron")]
                taken = ("rows", "kron").index(point["taken"])
                both[taken] = f"**{both[taken]}**"
                cells.append(" / ".join(both) + ("" if point["auto"] <= WITHIN else f" ({point['auto']:.2f})"))
            lines.append(f"| {d} | {tokens} | {' | '.join(cells)} |")
    over = [p for p in points.values() if p["auto"] > WITHIN]
    lines += ["", f"{len(points) - len(over)} of {len(points)} points with auto within 10 % of the faster way.", ""]
    lines += ["| d | layers | VeRA ms | RLoRA ms | step | target | VeRA MB | RLoRA MB | memory | target |"]
    lines += ["|---|---|---|---|---|---|---|---|---|---|"]
    for point in last["vera"]["found"]:
        ms, mb, (middle, low, high) = point["ms"], point["held_mb"], point["step"]
        met = ["met" if value <= limit else "MISSED" for value, limit in ((middle, STEP), (point["memory"], MEMORY))]
        lines.append(
            f"| {point['d']} | {point['layers']} | {ms['vera']:.0f} | {ms['rlora']:.0f} | {middle:.2f} [{low:.2f}, "
            f"{high:.2f}] | ≤ {STEP:.2f} {met[0]} | {mb['vera']:.1f} | {mb['rlora']:.1f} | {point['memory']:.2f} | "
            f"≤ {MEMORY:.2f} {met[1]} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure, record, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("all", "paths", "vera", "table"), default="all")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of every comparison; at least 2")
    parser.add_argument("--no-record", action="store_true", help=f"do not append to {RESULTS.name}")
    arguments = parser.parse_args(argv)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2 to have quartiles. Got {arguments.rounds}.")
    torch.set_num_threads(1)
    for what, measure in (("paths", paths), ("vera", vera)):
        if arguments.what in (what, "all"):
            found = measure(arguments.rounds)
            if not arguments.no_record:
                record(what, found, arguments.rounds)
    if arguments.what in ("table", "all") and RESULTS.exists():
        print(table())


if __name__ == "__main__":
    main()
