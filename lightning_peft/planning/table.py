"""A plan as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning_peft.planning.figures import Load, Plan

Row = tuple[str, list[str]]
_NAMES = {"ddp": "DDP", "fsdp2": "FSDP2, trained parameters whole", "fsdp1": "FSDP1, trained parameters whole"}
_NOT_COUNTED = (
    "activations, weights that FSDP gathers for a moment, casts of mixed precision, what calibration holds before the "
    "first step, the libraries' own memory"
)


def table(plan: Plan) -> str:
    """The figures in four parts: what is trained, memory, files, network."""
    loads = [plan.start] if plan.final is None else [plan.start, plan.final]
    sharded = plan.world_size > 1 and plan.strategy != "ddp"
    columns = ["all components" if plan.final else "bytes", "final budget"][: len(loads)]
    parts: list[tuple[str, list[Row]]] = [
        ("Trained", _trained(plan, loads)),
        ("Memory per process", _memory(plan, loads)),
        ("Files", _files(plan, loads)),
    ]
    if plan.world_size > 1:
        parts.append(("Network, per process", _network(plan, loads)))
    label = max(len(name) for _, rows in parts for name, _ in rows) + 2
    width = max(len(text) for text in (*columns, *(cell for _, rows in parts for _, cells in rows for cell in cells)))

    def line(name: str, cells: list[str]) -> str:
        return f"{name:<{label}}" + "".join(f"  {cell:>{width}}" for cell in cells)

    lines = [_headline(plan), "", line("", columns)]
    for title, rows in parts:
        lines += [title, *(line(f"  {name}", cells) for name, cells in rows)]
    lines += ["", f"Not counted: {_NOT_COUNTED}."]
    if plan.most_parameters is not None and plan.final is not None:
        lines.append(
            "Final budget: every layer keeps the same share of its components; if the dearest stay instead, "
            f"{plan.most_parameters:,} adapter parameters. "
            + ("Sharded: cut at export, so memory and network stay as they are." if sharded else "After compaction.")
        )
    return "\n".join(lines)


def _headline(plan: Plan) -> str:
    processes = "1 process"
    if plan.world_size > 1:
        nodes = f" on {plan.nodes} nodes" if plan.nodes > 1 else ""
        processes = f"{plan.world_size} processes{nodes}, {_NAMES[plan.strategy]}"
    batches = f", {plan.accumulate} batches a step" if plan.accumulate > 1 else ""
    return f"{plan.model}, {plan.layers} adapted layers: {processes}, {plan.precision}, {plan.optimizer}{batches}."


def _trained(plan: Plan, loads: list[Load]) -> list[Row]:
    rows = [
        ("components", [f"{load.components:,}" for load in loads]),
        ("adapter parameters", [f"{load.adapter_parameters:,}" for load in loads]),
    ]
    if plan.start.trained_parameters:
        rows.append(("parameters beside them", [f"{load.trained_parameters:,}" for load in loads]))
    return [*rows, ("frozen parameters", [f"{plan.base_parameters:,}"] * len(loads))]


def _memory(plan: Plan, loads: list[Load]) -> list[Row]:
    rows = [
        ("frozen weights", [size(plan.base)] * len(loads)),
        ("trained weights", [size(load.weights) for load in loads]),
        ("gradients", [size(load.gradients) for load in loads]),
        ("optimizer state", [size(load.optimizer) for load in loads]),
    ]
    if plan.start.statistics:
        rows.append(("statistics of importance", [size(load.statistics) for load in loads]))
    if plan.start.constants:
        rows.append(("constants of adapters", [size(load.constants) for load in loads]))
    if plan.world_size > 1:
        rows.append(("gradients in transit", [size(load.buckets) for load in loads]))
    return [*rows, ("sum", [size(plan.memory(load)) for load in loads])]


def _files(plan: Plan, loads: list[Load]) -> list[Row]:
    def written(exported: int | None) -> str:
        return "refused" if exported is None else size(exported)

    statistics = [("checkpoint: statistics", [size(load.statistics) for load in loads])]
    pairs = [("indices and deltas", [written(load.pairs) for load in loads])]
    return [
        ("checkpoint: adapter state", [size(load.checkpoint) for load in loads]),
        ("checkpoint: optimizer state", [size(load.optimizer) for load in loads]),
        *(statistics if plan.start.statistics else []),
        ("PEFT folder, true ranks", [written(load.exported) for load in loads]),
        ("PEFT folder, padded", [written(plan.padded)] * len(loads)),
        *(pairs if plan.start.pairs is not None else []),
    ]


def _network(plan: Plan, loads: list[Load]) -> list[Row]:
    rows = [("step: gradients", [size(load.all_reduce) for load in loads])]
    if plan.strategy == "ddp":
        rows.append(("step: buffers from process 0", [size(load.buffers) for load in loads]))
    else:
        rows.append(("step: frozen weights, forward", [size(plan.gather_forward)] * len(loads)))
        rows.append(("step: frozen weights, backward", [size(plan.gather_backward)] * len(loads)))
    rows.append(("step: sum", [size(plan.step(load)) for load in loads]))
    if plan.final is not None:
        rows.append(("pruning event: masks", [size(plan.event)] * len(loads)))
    what = "whole module" if plan.strategy == "ddp" else "trained weights"
    return [*rows, (f"once: the {what}", [size(plan.startup)] * len(loads))]


def size(count: int) -> str:
    """A number of bytes in the unit of a thousand that fits.

    Example:
        >>> size(13476831232), size(119941632), size(2688), size(0)
        ('13.48 GB', '119.94 MB', '2.69 kB', '0 B')
    """
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if count >= unit:
            return f"{count / unit:,.2f} {name}"
    return f"{count} B"
