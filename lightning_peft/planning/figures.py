"""The figures of a plan."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from lightning_peft.planning.table import table

Strategy = Literal["ddp", "fsdp2", "fsdp1"]
Optimizer = Literal["adamw", "sgd", "sgd-momentum"]
Precision = Literal["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]


@dataclass(frozen=True)
class Load:
    """What the trained parameters take, per process, in bytes where nothing else is said.

    Attributes:
        components: adapter components that exist.
        adapter_parameters: parameters of the adapters.
        trained_parameters: parameters trained beside them, such as a new head.
        weights: both kinds of parameters.
        gradients: their gradients.
        buckets: the copy of the gradients that DDP's reducer, or the one flat all-reduce under sharding, works on.
        optimizer: the optimizer's state; what it takes in a checkpoint as well.
        statistics: what an importance remembers of components until the last event; as much again in a checkpoint.
        constants: what adapters hold beside parameters and masks, as buffers: where sparse entries are, and what the
            base has there.
        checkpoint: adapter state in a checkpoint: trained parameters, masks and buffers; optimizer and statistics
            are beside it.
        exported: weights' file that `to_hf_peft` writes in the modes "compact" and "folded", head included; ``None`` if
            it refuses these adapters.
        pairs: the file of indices and deltas that `SparseAdapter.save` writes, head included; ``None`` if adapters
            are of another kind.
        all_reduce: gradients that each process sends per optimizer step.
        buffers: buffers that reach each process from process 0 per optimizer step, under DDP.
    """

    components: int
    adapter_parameters: int
    trained_parameters: int
    weights: int
    gradients: int
    buckets: int
    optimizer: int
    statistics: int
    constants: int
    checkpoint: int
    exported: int | None
    pairs: int | None
    all_reduce: int
    buffers: int


@dataclass(frozen=True)
class Plan:
    """What :func:`plan` found; print it. Per process, in bytes where nothing else is said.

    Attributes:
        model: the module's class.
        layers: adapted layers.
        world_size: processes in all.
        nodes: machines that they are spread over.
        strategy: "ddp", "fsdp2" or "fsdp1"; of no effect with one process.
        precision: the Trainer's.
        optimizer: "adamw", "sgd" or "sgd-momentum".
        accumulate: batches per optimizer step.
        base_parameters: parameters that are frozen, in the whole model.
        base: memory for them.
        start: with all components.
        final: with the components of the final budget, every layer keeping the same share: after compaction, which
            sharded strategies leave to the export. ``None`` without a final budget.
        most_parameters: adapter parameters at the final budget if it is spent on the dearest components.
        padded: weights' file that `to_hf_peft` writes in the mode "padded", if one layer keeps all its components.
        gather_forward: base weights that each process sends per optimizer step, for the forward passes.
        gather_backward: the same for the backward passes.
        event: masks that reach each process at a pruning event.
        startup: what reaches each process from process 0 once: under DDP the whole module, under FSDP what is trained.
    """

    model: str
    layers: int
    world_size: int
    nodes: int
    strategy: Strategy
    precision: Precision
    optimizer: Optimizer
    accumulate: int
    base_parameters: int
    base: int
    start: Load
    final: Load | None
    most_parameters: int | None
    padded: int | None
    gather_forward: int
    gather_backward: int
    event: int
    startup: int

    def memory(self, load: Load) -> int:
        """Bytes per process of all that is counted: weights, gradients and their copy, optimizer state, the rest."""
        trained = load.weights + load.gradients + load.buckets + load.optimizer
        return self.base + trained + load.statistics + load.constants

    def step(self, load: Load) -> int:
        """Bytes per process and optimizer step that cross to other processes."""
        return load.all_reduce + load.buffers + self.gather_forward + self.gather_backward

    def as_dict(self) -> dict[str, Any]:
        """All figures as plain values, with the sums `memory` and `step` of each stage."""
        figures = asdict(self)
        for stage, load in (("start", self.start), ("final", self.final)):
            if load is not None:
                figures[stage] |= {"memory": self.memory(load), "step": self.step(load)}
        return figures

    def __str__(self) -> str:
        return table(self)
