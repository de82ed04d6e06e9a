"""What a checkpoint says of itself, without its model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_peft.checkpoint import ENTRY, check_entry, read
from lightning_peft.validation import CUT, check_ranks


def report(path: str | PathLike[str]) -> str:
    """Ranks per layer, budget and size of an adapter checkpoint, as text.

    Args:
        path: a checkpoint that AdapterCheckpoint has filtered. Its digest is checked; no model is needed or built.

    Raises:
        FileNotFoundError: there is no such file.
        AdapterFileError: it is damaged, changed, or no adapter checkpoint.
    """
    checkpoint = read(path)
    check_entry(checkpoint, str(path))
    entry = checkpoint[ENTRY]
    check_ranks(entry, str(path))
    size = Path(path).stat().st_size
    step = checkpoint.get("global_step")
    when = f" at step {step}" if type(step) is int else ""
    spent = sum(rank * entry["costs"][name] for name, rank in entry["ranks"].items())
    closed = [name for name, rank in entry["ranks"].items() if not rank]
    lines = [
        f"{path}: {size:,} bytes, unchanged since it was written{when}.",
        "",
        _table(entry, checkpoint["state_dict"]),
        "",
        f"The open components are {spent:,} parameters, {4 * spent / 1e6:.2f} MB in float32.",
    ]
    if closed:
        lines.append(f"Rank 0, so no component acts: {', '.join(closed)}.")
    if CUT in entry:
        lines.append("Compacted: closed components were cut out while it trained.")
    trained = entry["recipe"]["trained"]
    if trained:
        owners = dict.fromkeys(name.rpartition(".")[0] or name for name in trained)
        lines.append(f"Trained beside the adapters: {', '.join(owners)}.")
    lines += _schedules(checkpoint.get("callbacks"))
    return "\n".join(lines)


def _whole(rank: object, mask: Tensor | None) -> int | None:
    """The components that a layer has: an argument of that name may be anything, or leave it to the layer's size."""
    if type(rank) is int:
        return rank
    return None if mask is None else mask.numel()


def _schedules(callbacks: object) -> Iterator[str]:
    """Where rank schedules stand. The digest does not cover this part, so what is not as we write it is left out."""
    for name, state in callbacks.items() if isinstance(callbacks, dict) else ():
        if str(name).startswith("RankPruning") and isinstance(state, dict):
            event, total = state.get("event_step"), state.get("total_steps")
            if type(event) is int and type(total) is int:
                last = f"its last event at step {event}" if event else "no event yet"
                yield f"Rank schedule over {total} steps, {last}."


def _table(entry: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    adapters = {
        name: (
            group["class"].rpartition(":")[2],
            _whole(group["arguments"].get("rank"), state.get(f"{name}.gate.mask")),
        )
        for group in entry["recipe"]["adapters"]
        for name in group["layers"]
    }
    for name, record in entry.get(CUT, {}).items():
        adapters[name] = (record["class"].rpartition(":")[2], record["components"])
    ranks, costs = entry["ranks"], entry["costs"]
    rows = [("layer", "adapter", "rank", "parameters")]
    for name, rank in ranks.items():
        kind, full = adapters[name]
        rows.append((name, kind, str(rank) if full is None else f"{rank}/{full}", f"{rank * costs[name]:,}"))
    full = sum(adapters[name][1] or rank for name, rank in ranks.items())
    spent = sum(rank * costs[name] for name, rank in ranks.items())
    rows.append((f"{len(ranks)} layers", "", f"{sum(ranks.values())}/{full}", f"{spent:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{layer:<{widths[0]}}  {kind:<{widths[1]}}  {rank:>{widths[2]}}  {cost:>{widths[3]}}"
        for layer, kind, rank, cost in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
